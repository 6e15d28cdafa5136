"""Checkpoints as people have them: names, shared tensors, buffers of old versions, pad ids past the table."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from small_tokenizers import CHATML, byte_level, save

from minalm.errors import InputError
from minalm.huggingface import weights
from minalm.huggingface.folder import load_vocabularies
from minalm.models import transformer
from minalm.run.setup import LoadedModel
from minalm.tokenization.vocabulary import byte_vocabulary

FIXTURES = Path(__file__).parent / "fixtures"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def changed(folder: Path, fixture: str, change, metadata: dict[str, str] | None = None) -> Path:
    """A copy of a fixture with other tensors."""
    shutil.copytree(FIXTURES / fixture, folder)
    save_file(change(tensors(folder)), folder / "model.safetensors", {"format": "pt", **(metadata or {})})
    return folder


def assert_same(found: Path, fixture: str) -> None:
    ours, expected = (transformer.leaves(weights.load(each, np.float32)) for each in (found, FIXTURES / fixture))
    assert all(np.array_equal(ours[leaf], expected[leaf]) for leaf in expected)


CHANGES = {
    "the output's name": lambda t: {HEAD if name == EMBED else name: x for name, x in t.items()},
    "both names": lambda t: t | {HEAD: t[EMBED].copy()},
    "no prefix": lambda t: {name.removeprefix("model."): x for name, x in t.items()},
    "no prefix, and a head": lambda t: {n.removeprefix("model."): x for n, x in t.items()} | {HEAD: t[EMBED].copy()},
    "buffers": lambda t: (
        t
        | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32) for i in range(3)}
        | {"model.rotary_emb.inv_freq": np.ones(5, np.float32)}
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_tied_model_is_read(tmp_path, what):
    assert_same(changed(tmp_path / "model", "gemma2", CHANGES[what]), "gemma2")


def test_tensors_that_are_saved_once_for_several_names(tmp_path):
    """safetensors' save_model leaves such names to the metadata."""

    def once(held):
        held = dict(held)
        held[HEAD] = held.pop(EMBED)
        return held

    folder = changed(tmp_path / "model", "gemma2", once, {EMBED: HEAD})
    assert_same(folder, "gemma2")
    # A model whose tables need not be equal has them both.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    model = weights.load(folder, np.float32)
    assert np.array_equal(model.embed, model.unembed)


def test_other_tensors_are_still_refused(tmp_path):
    for name in ("model.layers.0.self_attn.rotary_emb.scale", "model.layers.0.mlp.bias", "inv_freq"):
        extra = {name: np.ones(5, np.float32)}
        folder = changed(tmp_path / name, "gemma2", extra.__or__)
        with pytest.raises(InputError, match=f"holds the tensor {name}"):
            weights.read(folder)
    folder = changed(tmp_path / "untied", "llama3", lambda t: {n: x for n, x in t.items() if n != EMBED})
    with pytest.raises(InputError, match=f"lacks the tensor {EMBED}"):
        weights.read(folder)


def with_tokenizer(folder: Path, **config: object) -> tuple[Path, int]:
    """A small model whose table ends where the ordinary tokens of its tokenizer do, and that number."""
    path = save(folder / "t", byte_level(), [*CHATML, "[PAD]"], **config)
    spec = json.loads((path / "tokenizer.json").read_text())
    rows = next(token["id"] for token in spec["added_tokens"] if token["content"] == "[PAD]")
    config_values = json.loads((FIXTURES / "gemma2" / "config.json").read_text()) | {"vocab_size": rows}
    held = tensors(FIXTURES / "gemma2")
    table = np.zeros((rows, held[EMBED].shape[1]), held[EMBED].dtype)
    save_file(held | {EMBED: table}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config_values))
    return path, rows


def test_a_pad_id_past_the_table(tmp_path):
    path, rows = with_tokenizer(tmp_path, pad_token="[PAD]", eos_token="<|im_end|>")
    loaded = LoadedModel.read(path)
    assert loaded.vocabulary.special["[PAD]"] == rows and loaded.vocabulary.named("pad") is None
    assert loaded.vocabulary.pad_id == loaded.vocabulary.eos_id < rows and len(loaded.mask.exists) == rows
    assert "[PAD]" not in byte_vocabulary(loaded.vocabulary).special


def test_an_eos_id_past_the_table(tmp_path):
    path, rows = with_tokenizer(tmp_path, eos_token="[PAD]")
    with pytest.raises(
        InputError, match=rf"ids past the model's {rows} rows .'\[PAD\]' has {rows}.: use the model's own"
    ):
        LoadedModel.of(weights.read(path), *load_vocabularies(path))
