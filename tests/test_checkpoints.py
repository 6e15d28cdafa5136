"""Checkpoints as people have them: names, shared tensors, buffers of old versions, pad ids past the table."""

import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from small_tokenizers import CHATML, byte_level, save
from small_tokenizers import vocabulary as small_vocabulary
from tokenizers import Tokenizer

from minalm.errors import InputError
from minalm.huggingface import folder, weights
from minalm.huggingface.folder import load_vocabularies
from minalm.huggingface.loaded import LoadedModel
from minalm.models import transformer
from minalm.run import checkpoint
from minalm.text.documents import Segment
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.vocabulary import byte_vocabulary, with_special_tokens

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
    "no prefix, the output's name": lambda t: {
        HEAD if name == EMBED else name.removeprefix("model."): x for name, x in t.items()
    },
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


def test_tensors_that_are_saved_once_in_several_files(tmp_path):
    """huggingface_hub leaves their names to the index's metadata."""
    folder, held = shutil.copytree(FIXTURES / "gemma2", tmp_path / "model"), tensors(FIXTURES / "gemma2")
    (folder / "model.safetensors").unlink()
    held[HEAD] = held.pop(EMBED)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    listed = {name: files[n % 2] for n, name in enumerate(held)}
    for file in files:
        save_file({n: x for n, x in held.items() if listed[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1, EMBED: HEAD}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(folder, "gemma2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    model = weights.load(folder, np.float32)
    assert np.array_equal(model.embed, model.unembed)
    for metadata in (None, [1], {EMBED: [HEAD]}, {EMBED: "nothing"}):  # says nothing of it
        (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": metadata}))
        with pytest.raises(InputError, match=f"lacks the tensor {EMBED}"):
            weights.read(folder)


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


def with_holes(folder: Path, in_vocabulary: bool, eos: str = "<|endofprompt|>") -> Path:
    """A model whose tokenizer has unused ids before its last special token, as GPT-4's."""
    path, rows = with_tokenizer(folder, eos_token=eos)
    spec = json.loads((path / "tokenizer.json").read_text())
    token = {**spec["added_tokens"][0], "id": rows + 20, "content": "<|endofprompt|>"}
    spec["added_tokens"].append(token)
    if in_vocabulary:
        spec["model"]["vocab"] |= {each["content"]: each["id"] for each in spec["added_tokens"]}
    (path / "tokenizer.json").write_text(json.dumps(spec))
    values = json.loads((path / "config.json").read_text()) | {"vocab_size": rows + 21}
    (path / "config.json").write_text(json.dumps(values))
    return path


def test_a_model_with_holes(tmp_path):
    """Its rows are those that transformers reads."""
    path = with_holes(tmp_path / "whole", True)
    vocabulary = load_vocabularies(path)[0]
    assert vocabulary.eos_id == vocabulary.special["[PAD]"] + 20
    path = with_holes(tmp_path / "moved", False)
    taken = Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id("<|endofprompt|>")
    assert taken == vocabulary.special["[PAD]"] + 1
    with pytest.raises(InputError, match=rf"'<.endofprompt.>' have holes, so that transformers takes {taken} for it"):
        load_vocabularies(path)
    # As a student's tokenizer, whose rows are new, it has the ids that it names; what is not used may have any.
    assert load_vocabulary(path).eos_id == vocabulary.eos_id
    unused = load_vocabularies(with_holes(tmp_path / "unused", False, eos="<|im_end|>"))[0]
    assert unused.named("eos") == "<|im_end|>" and "<|endofprompt|>" not in unused.template_special


@pytest.mark.parametrize("in_vocabulary", (True, False))
@pytest.mark.parametrize("special_tokens", ("keep", "change"))
def test_transformers_gives_the_ids_of_an_export(tmp_path, special_tokens, in_vocabulary):
    transformers = pytest.importorskip("transformers")
    vocabulary = load_vocabulary(with_holes(tmp_path / "holes", in_vocabulary))
    if special_tokens == "keep":
        vocabulary = with_special_tokens(vocabulary, small_vocabulary("llama"))
    config = replace(weights.read_config(FIXTURES / "llama3" / "config.json"), vocab_size=vocabulary.size)
    model = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), transformer.abstract(config))
    folder.save(tmp_path / "out", model, vocabulary, None, "float32", folder.GenerationConfig())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    words = list(vocabulary.special)
    assert theirs.convert_tokens_to_ids(words) == [vocabulary.special[word] for word in words]
    assert theirs.eos_token_id == vocabulary.eos_id
    text = "the user said: hello\n 日本"
    (encoding,) = vocabulary.encode([(Segment(text),)])
    assert encoding.round_trips and theirs(text, add_special_tokens=False)["input_ids"] == encoding.ids.tolist()
    again = load_vocabularies(tmp_path / "out")[0]
    assert (again.special, again.token_bytes) == (vocabulary.special, vocabulary.token_bytes)


def test_errors_of_late_reads_alone_are_not_shown(monkeypatch):
    shown = []
    show = shown.append
    monkeypatch.setattr(sys, "unraisablehook", show)
    monkeypatch.setattr(logging.getLogger("asyncio"), "disabled", False)
    late, other = (
        SimpleNamespace(exc_type=type(error), exc_value=error)
        for error in (RuntimeError("Event loop is closed"), RuntimeError("another"))
    )
    with checkpoint._late_errors_are_silent():
        sys.unraisablehook(late)  # a thread may be faster than the error
    assert shown == [] and sys.unraisablehook is show and not logging.getLogger("asyncio").disabled
    with pytest.raises(KeyError), checkpoint._late_errors_are_silent():
        raise KeyError
    sys.unraisablehook(late)
    assert shown == []
    sys.unraisablehook(other)
    assert shown == [other]
