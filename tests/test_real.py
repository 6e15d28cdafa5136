"""Real weights in float32 against transformers: SmolLM2 135M and Gemma 3 270M, and SmolLM2 on bytes."""

import pydoc_data.topics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import greedy
from forward import logits
from real_models import real_model

import convert
from minalm.huggingface import weights
from minalm.huggingface.folder import load_vocabularies
from minalm.models.head import VocabularyMask
from minalm.parallel.mesh import ROWS, P, make_mesh, shard, shard_map, specs
from minalm.text.documents import Segment, Special
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.tokenizer_json import load_vocabulary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.real

FLOAT32 = jnp.dtype(jnp.float32)
TOPICS = ("compound", "formatstrings", "numeric-types", "typesseq")  # of Python's own help, of different kinds
TOKENS = 210  # of each; one text at a time, since Gemma's logits of one are 220 MB


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """transformers keeps the code of folders that it has run: not in the user's cache here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def ours(folder: Path):
    """The model of a folder on one device in float32, and its logits as a function of a row of ids."""
    mesh = make_mesh(1, 1)
    model = shard(weights.read(folder), mesh, np.float32)

    layout = (specs(model, mesh), ROWS, ROWS)
    compiled = jax.jit(shard_map(logits, mesh=mesh, in_specs=layout, out_specs=P("fsdp", None, "tp")))

    def run(ids: np.ndarray, suffix: np.ndarray | None = None) -> np.ndarray:
        return np.asarray(compiled(model, ids[None], suffix)[0])

    return model, run


def theirs(folder: Path, trust: bool = False):
    """The model of a folder in transformers, as AutoModel has it, with attention as the formula says."""
    code = {"trust_remote_code": True} if trust else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **code
    ).eval()


def compare(found: np.ndarray, expected: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest difference as a part of the range of all logits, and where both have the same largest logit."""
    same = found.argmax(-1) == expected.argmax(-1)
    span = float(expected.max() - expected.min())
    return float(np.abs(found - expected).max()) / span, same


def measure(folder: Path) -> tuple[float, float]:
    """The largest of the texts' differences, and the share of positions with the same arg-max."""
    vocabulary, tokenizer = load_vocabulary(folder), transformers.AutoTokenizer.from_pretrained(folder)
    (_, run), model = ours(folder), theirs(folder)
    differences, same = [], []
    for topic in TOPICS:
        text = pydoc_data.topics.topics[topic][:2000]
        ids = vocabulary.encode([(Segment(Special("bos")), Segment(text))])[0].ids
        assert ids.tolist() == vocabulary.part_ids("bos") + tokenizer(text, add_special_tokens=False).input_ids
        ids = ids[:TOKENS]
        assert len(ids) == TOKENS
        with torch.no_grad():
            expected = model(torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0].numpy()
        difference, agree = compare(run(ids), expected)
        differences.append(difference)
        same.append(agree)
    return max(differences), float(np.concatenate(same).mean())


@pytest.mark.parametrize("name", ("smollm2", "gemma3"))
def test_logits_are_those_of_transformers(name):
    difference, share = measure(real_model(name))
    assert difference <= 2e-3 and share >= 0.999


def measure_bytes(folder: Path) -> tuple[float, list[int], list[int]]:
    """Of a byte student: the largest difference of the logits of a chat, and the bytes that both go on with."""
    vocabulary, suffixes = load_vocabularies(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Alignment of tokens requires care: what do the bytes of é, 日本 and 🙂 have in common?\n\n\t"
    text += "Say it in one line, and do not repeat what was asked."
    messages = [{"role": "system", "content": "You answer in a few words."}, {"role": "user", "content": text}]
    read = ChatReader(vocabulary, vocabulary, False, "2026-01-01")
    ids = vocabulary.encode([read({"messages": messages}, add_generation_prompt=True)])[0].ids
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert inputs["input_ids"].tolist() == [ids.tolist()] and 170 < len(ids) < 300

    (placed, run), model = ours(folder), theirs(folder, trust=True)
    with torch.no_grad():
        expected = model(inputs["input_ids"], use_cache=False).logits[0].numpy()
    difference, _ = compare(run(ids, suffixes(ids[None])), expected)
    found = model.generate(**inputs, do_sample=False, max_new_tokens=20, min_new_tokens=20)
    mesh, rows = make_mesh(1, 1), vocabulary.size
    entries = shard(VocabularyMask(np.ones(rows, bool), vocabulary.boundary_mask(rows)), mesh)
    [continued] = greedy(placed, entries, suffixes, [ids], 20, mesh)
    return difference, continued, found[0, len(ids) :].tolist()


def test_smollm2_on_bytes(tmp_path, monkeypatch):
    arguments = ["convert.py", "bytes", real_model("smollm2"), tmp_path / "out", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    convert.main()
    difference, found, expected = measure_bytes(tmp_path / "out")
    assert difference <= 1e-4 and found == expected
