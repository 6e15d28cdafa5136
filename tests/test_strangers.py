"""Folders that strangers made: what is not put together like a model, or is larger than any, is one sentence.

Nothing is built first. So each costs a fraction of a second, and next to no memory.
"""

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minalm.errors import InputError
from minalm.huggingface import weights
from minalm.huggingface.folder import read_generation_config
from minalm.text.documents import Segment
from minalm.tokenization import chat_template, special_tokens
from minalm.tokenization.tokenizer_json import load_vocabulary, tokenizer_json
from minalm.tokenization.train_bpe import train_bpe

FIXTURE = Path(__file__).parent / "fixtures" / "llama3"
WORDS = ["water boils at one hundred degrees", "a model reads bytes and writes tokens", "é日本 of two"] * 9
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(WORDS, 280, folder / "t")
    return json.loads((folder / "t" / "tokenizer.json").read_text())


def cheap(sentence: str, read: Callable[[], object]) -> None:
    """Refused with a sentence, in a moment, and within a little memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError, match=sentence) as error:
        read()
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)
    assert time.process_time() - began < 10.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize(
    "key, value, sentence",
    (
        ("num_hidden_layers", 10**6, "'num_hidden_layers' is 1000000, which is more than 1,024"),
        ("num_hidden_layers", 10**400, "'num_hidden_layers' is 1000.*00, which is more than"),
        ("hidden_size", 10**12, "more than 131,072"),
        ("intermediate_size", 10**12, "more than 1,048,576"),
        ("num_attention_heads", 10**12, "more than 4,096"),
        ("head_dim", 10**12, "more than 16,384"),
        ("vocab_size", 3 * 10**8, "more than 4,194,304"),
        ("max_position_embeddings", 10**30, "'max_position_embeddings' is .* more than 1,073,741,824"),
        ("max_position_embeddings", "many", "'max_position_embeddings' is 'many', which is not a whole number"),
        ("rope_theta", 10**400, r"'rope_theta' is 1000.*\.\.\.0000000000, which is not between 1e-38 and 3e.38"),
        ("rms_norm_eps", 1e300, r"'rms_norm_eps' is 1e.300, which is not between 1e-38 and 1:"),
        ("rms_norm_eps", 1e-300, "which is not between"),
        ("rms_norm_eps", 2.0, "which is not between"),
        ("no_such_key", [[]] * 1000, r"'no_such_key' is .*\.\.\..*, a setting that is not implemented"),
    ),
)
def test_sizes_and_numbers_in_config(tmp_path, key, value, sentence):
    config = json.loads((FIXTURE / "config.json").read_text())
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))

    def read():
        weights.read_config(tmp_path / "config.json")
        read_generation_config(tmp_path)

    cheap(sentence, read)


@pytest.fixture
def no_files(tmp_path) -> dict[str, Path]:
    """What would never end, or fill the memory -> it. A file with a hole costs nothing to make."""
    pipe, device, large = (tmp_path / name for name in ("pipe", "device", "large"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    large.write_bytes(b"")
    os.truncate(large, 10**11)
    return {"a folder, a pipe or a device": pipe, "a pipe or a device, and no file": device, "100,000,000,000 b": large}


@pytest.mark.parametrize(
    "name, read",
    (
        ("config.json", lambda folder: weights.read_config(folder / "config.json")),
        ("generation_config.json", read_generation_config),
        ("tokenizer.json", load_vocabulary),
        ("tokenizer_config.json", load_vocabulary),
        ("special_tokens_map.json", load_vocabulary),
        ("chat_template.jinja", load_vocabulary),
        ("model.safetensors.index.json", weights.read),
    ),
)
def test_files_that_are_none_and_files_that_are_too_large(tmp_path, tokenizer, no_files, name, read):
    for sentence, target in no_files.items():
        folder = tmp_path / f"of-{target.name}"
        folder.mkdir()
        (folder / "config.json").write_text((FIXTURE / "config.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        cheap(f"{name} .*{sentence}", lambda: read(folder))


def test_tensors_that_are_none(tmp_path, no_files):
    (tmp_path / "config.json").write_text((FIXTURE / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "pipe")
    cheap("model.safetensors is a folder, a pipe or a device", lambda: weights.read(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {str(n): f"{n}.safetensors" for n in range(140_000)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    cheap("lists 140,000 tensors, where no model has more than 131,072", lambda: weights.read(tmp_path))


def replace(content: str, **pattern: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: object) -> dict[str, object]:
    return {"type": "Sequence", "normalizers": list(steps)}


def token(i: object, word: str = "<x>") -> dict[str, object]:
    return {"id": i, "content": word, **ADDED}


@pytest.mark.parametrize(
    "changes, sentence",
    (
        ({"normalizer": []}, r"'normalizer' is no object with a 'type' but \[\]"),
        ({"normalizer": [{"type": "NFC"}]}, "'normalizer' is no object with a 'type'"),
        ({"normalizer": "NFC"}, "'normalizer' is no object"),
        ({"normalizer": sequence(3)}, "'normalizer' is no object with a 'type' but 3"),
        ({"pre_tokenizer": [3]}, "'pre_tokenizer' is no object"),
        ({"post_processor": 3}, "'post_processor' is no object"),
        ({"decoder": {"kind": "ByteLevel"}}, "'decoder' is no object"),
        ({"model": None}, "has no 'model'"),
        ({"model": {"vocab": 3}}, "has no 'vocab'"),
        ({"added_tokens": {}, "model": {"vocab": 3}}, "has no 'vocab'"),
        ({"added_tokens": [3]}, "'added_tokens' without a 'content'"),
        ({"added_tokens": [token(3 * 10**8)]}, "gives '<x>' the id 300000000, which is not from 0 to 4,194,303"),
        ({"added_tokens": [token(10**400)]}, "gives '<x>' the id 1000"),
        ({"added_tokens": [token(-1)]}, "gives '<x>' the id -1"),
        ({"added_tokens": [token("7")]}, "gives '<x>' the id '7'"),
        ({"added_tokens": [{"content": "<x>"}]}, "gives '<x>' the id None"),
        ({"added_tokens": [token(n, f"<{n}>") for n in range(140_000)]}, "adds 140,000 tokens"),
        ({"model": {"vocab": {"x": 3 * 10**8}}}, "gives 'x' the id 300000000"),
        ({"normalizer": sequence(*[replace("ee", String="e")] * 40)}, "more than 64 times as long"),
        ({"normalizer": sequence(sequence(replace("e" * 9, String="e")), replace("ii" * 9, String="i"))}, "64 times"),
        ({"normalizer": replace("e" * 10**6, String="e")}, "more than 64 times as long"),
        ({"normalizer": replace("e" * 100, Regex="")}, "more than 64 times as long"),
        ({"normalizer": replace("e" * 100, String="")}, "more than 64 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "e" * 10**6}}, "more than 64 times as long"),
    ),
)
def test_bad_tokenizers(tmp_path, tokenizer, changes, sentence):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**tokenizer, **changes}))
    cheap(sentence, lambda: load_vocabulary(tmp_path))


@pytest.mark.parametrize("name", ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"))
@pytest.mark.parametrize("text", ("[" * 10**5, '{"a":' * 10**5))
def test_nested_brackets(tmp_path, tokenizer, name, text):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / name).write_text(text)
    cheap(
        f"{name} (is not JSON|cannot be read as a tokenizer.json) .maximum recursion", lambda: load_vocabulary(tmp_path)
    )


def test_bad_files_beside_a_tokenizer(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(special_tokens, "MOST_ADDED", 100)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, values, sentence in (
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {n: token(n, f"<{n}>") for n in range(101)}},
            "adds 101 tokens",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {3 * 10**8: token(0)}}, "the id 300000000"),
        ("generation_config.json", {"eos_token_id": list(range(1000))}, "names 1,000 ids as eos_token_id"),
        ("tokenizer_config.json", {"chat_template": "x" * 2**21}, "chat template of 2,097,152 characters"),
    ):
        (tmp_path / name).write_text(json.dumps(values))
        cheap(sentence, lambda: load_vocabulary(tmp_path))
        (tmp_path / name).unlink()


def test_a_template_that_never_ends_is_waited_for_once(tmp_path, tokenizer, monkeypatch):
    """Texts are of use without it, and each question about it would wait as long again."""
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    waited, render = [], chat_template.render
    monkeypatch.setattr(chat_template, "render", lambda *arguments: waited.append(render(*arguments)) or waited[-1])
    spec = {**tokenizer, "added_tokens": [token(280, "<|im_start|>"), token(281, "<|im_end|>")]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "chat_template.jinja").write_text(CHAT + "{{ 10 ** (10 ** 9) }}")
    vocabulary = load_vocabulary(tmp_path)
    assert vocabulary.stop_ids == [281] and "<|im_start|>" in vocabulary.template_special
    assert waited == [[(None, chat_template.TOO_SLOW)] * 4]


@pytest.mark.parametrize(
    "template, why",
    (
        (
            "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
            "more than a gigabyte of memory",
        ),
        ("{{ 'a' * (10 ** 10) }}", "more than a gigabyte of memory"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "OverflowError: it writes without end"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{{ " + "[" * 9000 + "]" * 9000 + " }}", "RecursionError"),
    ),
)
def test_templates_that_want_memory_write_nothing(template, why):
    source = chat_template.ChatTemplate("file", {"default": template}, {})
    ((text, found),) = chat_template.render([chat_template.Render(source, [])], "2026-01-01")
    assert text is None and why in found


def test_bpe_dropout_is_off_and_said(tmp_path, tokenizer):
    """A text has the same tokens each time, the exported tokenizer drops nothing either, and a note says so."""
    plain = tmp_path / "plain"
    dropping = tmp_path / "dropping"
    for folder, dropout in ((plain, None), (dropping, 0.5)):
        folder.mkdir()
        spec = {**tokenizer, "model": {**tokenizer["model"], "dropout": dropout}}
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    vocabularies = [load_vocabulary(folder) for folder in (plain, dropping)]
    texts = [(Segment(" ".join(WORDS)),)]
    expected, *found = [vocabulary.encode(texts)[0].ids.tolist() for vocabulary in (*vocabularies, vocabularies[1])]
    assert found == [expected, expected]
    assert vocabularies[0].notes == () and len(vocabularies[1].notes) == 1
    assert "drops 50% of its merges at random (BPE dropout): this is switched off" in vocabularies[1].notes[0]
    assert tokenizer_json(vocabularies[1])["model"]["dropout"] is None
