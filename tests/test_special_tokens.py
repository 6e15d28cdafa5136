"""Special tokens, wherever a checkpoint's files name them."""

import json
from pathlib import Path

import pytest
from small_tokenizers import CHATML, LLAMA, byte_level, save
from tokenizers import Tokenizer

from minalm.errors import InputError
from minalm.text.documents import Segment
from minalm.tokenization.tokenizer_json import load_vocabulary, tokenizer_json
from minalm.tokenization.vocabulary import byte_vocabulary, with_special_tokens


def write(folder: Path, special: list[str], ordinary: list[str] = (), **files: dict) -> Path:
    path = save(folder, byte_level(), special, ordinary)
    (path / "tokenizer_config.json").unlink()
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


def test_a_named_token_that_is_not_marked_special(tmp_path):
    path = write(tmp_path / "t", ["<s>"], ["<|EOT|>"], tokenizer_config={"eos_token": "<|EOT|>"})
    plain = load_vocabulary(write(tmp_path / "plain", ["<s>"], ["<|EOT|>"]))
    ours = load_vocabulary(path)
    assert ours.eos_id == plain.id_of_bytes[b"<|EOT|>"] == ours.special["<|EOT|>"]
    (ids,) = (each.ids.tolist() for each in ours.encode([_text("a<|EOT|>")]))
    assert ours.eos_id not in ids and ours.decode(ids) == "a<|EOT|>"  # no text becomes one
    assert byte_vocabulary(ours).named("eos") == "<|EOT|>"
    # The student's tokenizer.json says so too.
    written = Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    assert written.get_added_tokens_decoder()[ours.eos_id].special


def test_a_token_that_only_the_configuration_has(tmp_path):
    size = load_vocabulary(write(tmp_path / "plain", ["<s>"])).size
    decoder = {str(size): {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": True}}
    path = write(tmp_path / "t", ["<s>"], tokenizer_config={"eos_token": "<|end|>", "added_tokens_decoder": decoder})
    ours = load_vocabulary(path)
    assert ours.eos_id == size and ours.size == size + 1 and ours.strips == {"<|end|>": (False, True)}
    assert Tokenizer.from_str(json.dumps(tokenizer_json(ours))).token_to_id("<|end|>") == size


def test_a_piece_of_text_that_is_named(tmp_path):
    path = write(tmp_path / "t", ["<s>"], tokenizer_config={"eos_token": "the"})
    ours = load_vocabulary(path)
    assert ours.eos_id == load_vocabulary(write(tmp_path / "p", ["<s>"])).id_of_bytes[b"the"]
    assert not ours.encode([_text("the")])[0].round_trips  # merges still lead there: such a text is left out
    assert ours.encode([_text("x")])[0].round_trips


@pytest.mark.parametrize("value", ("</s>", {"content": "</s>", "lstrip": False}))
def test_special_tokens_map(tmp_path, value):
    path = write(tmp_path / "t", ["<s>", "</s>"], special_tokens_map={"eos_token": value, "bos_token": "<s>"})
    assert load_vocabulary(path).names == {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text('{"eos_token": null}')  # it says that there is none
    assert load_vocabulary(path).names == {"bos_token": "<s>"}


def test_several_stops(tmp_path):
    ids = load_vocabulary(write(tmp_path / "plain", list(LLAMA))).special
    stops = [ids["<|eot_id|>"], ids["<|end_of_text|>"]]
    path = write(tmp_path / "t", list(LLAMA), generation_config={"eos_token_id": stops, "pad_token_id": stops[1]})
    ours = load_vocabulary(path)
    assert ours.stops == ("<|eot_id|>", "<|end_of_text|>") and ours.stop_ids == stops
    assert ours.named("eos") == "<|eot_id|>" and ours.named("pad") == "<|end_of_text|>"
    side = byte_vocabulary(ours)
    assert side.stop_ids == [side.special[word] for word in ours.stops]
    path = write(tmp_path / "c", ["<s>"], config={"eos_token_id": ids["<|begin_of_text|>"]})  # the same id as "<s>"
    assert load_vocabulary(path).named("eos") == "<s>"
    # An id that is a piece of text was written for another tokenizer, as in published byte models.
    path = write(tmp_path / "b", ["<s>"], config={"eos_token_id": 1})
    assert load_vocabulary(path).stops == ()


def test_what_a_tokenizer_puts_first_is_bos(tmp_path):
    path = write(tmp_path / "t", ["<s>"])
    spec = json.loads((path / "tokenizer.json").read_text())
    i = next(token["id"] for token in spec["added_tokens"] if token["content"] == "<s>")
    parts = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<s>": {"id": "<s>", "ids": [i], "tokens": ["<s>"]}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": tokens}
    (path / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_vocabulary(path)
    assert ours.named("bos") == "<s>" and ours.adds_bos


def test_a_tokenizer_alone_is_of_the_family_of_its_special_tokens(tmp_path):
    ours = load_vocabulary(write(tmp_path / "t", list(LLAMA)) / "tokenizer.json")
    assert [ours.named(part) for part in ("bos", "eos", "pad")] == [
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|end_of_text|>",
    ]
    ours = load_vocabulary(write(tmp_path / "q", list(CHATML)))
    assert ours.names == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} and ours.stop_ids == [ours.eos_id]


@pytest.mark.parametrize(
    "files, message",
    (
        (
            {"tokenizer_config": {"eos_token": "<nothing>"}},
            "names '<nothing>' as eos_token, which tokenizer.json does not",
        ),
        ({"special_tokens_map": {"pad_token": "<nothing>"}}, "special_tokens_map.json names '<nothing>' as pad_token"),
        ({"generation_config": {"eos_token_id": [3, 99_999]}}, "names the id 99999 as eos_token_id, which"),
        ({"tokenizer_config": {"eos_token": 3}}, "gives 3 as a special token, which is no string"),
        ({"tokenizer_config": [1]}, "tokenizer_config.json is not a JSON object"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder holds no tokens by id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder holds no tokens by id"),
    ),
)
def test_what_resolves_to_nothing_is_an_error(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        load_vocabulary(write(tmp_path / "t", ["<s>"], **files))


@pytest.mark.parametrize("in_vocabulary", (True, False))
def test_ids_behind_holes(tmp_path, in_vocabulary):
    """As GPT-4's tokenizers have them. The library closes holes before added tokens that are no pieces of the model's."""
    path = write(tmp_path / "t", ["<|endoftext|>"], tokenizer_config={"eos_token": "<|endoftext|>"})
    spec = json.loads((path / "tokenizer.json").read_text())
    first = spec["added_tokens"][0]
    if in_vocabulary:
        spec["model"]["vocab"]["<|endofprompt|>"] = 1000
    spec["added_tokens"].append({**first, "id": 1000, "content": "<|endofprompt|>"})
    (path / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_vocabulary(path)
    assert ours.special["<|endofprompt|>"] == 1000 and ours.size == 1001 and ours.token_bytes[999] == b""
    llama = load_vocabulary(write(tmp_path / "llama", list(LLAMA)))
    both = with_special_tokens(ours, llama)
    assert [both.special[word] for word in sorted(LLAMA, key=both.special.get)] == list(range(1001, 1001 + len(LLAMA)))
    for vocabulary in (ours, both):
        folder = tmp_path / f"again{vocabulary.size}"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary)))
        again = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert {word: again.token_to_id(word) for word in vocabulary.special} == dict(vocabulary.special)
        assert load_vocabulary(folder).special == vocabulary.special
        assert again.encode("<|endofprompt|>").ids == [1000]
    assert not ours.boundary[999] and not ours.boundary_mask(1100)[1001:].any()


def _text(text: str) -> tuple[Segment, ...]:

    return (Segment(text),)
