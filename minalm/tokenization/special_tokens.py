"""The special tokens of a checkpoint, wherever its files name them."""

import json
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from minalm.errors import InputError
from minalm.tokenization.chat_template import FAMILIES, family
from minalm.tokenization.files import read_bytes, shortened

NAMES = tuple(f"{part}_token" for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
REQUIRED = (
    "bos_token",
    "eos_token",
    "pad_token",
)  # those of NAMES that are used here: one that is no token is an error
MOST_IDS = 1 << 22  # a table has one row for each id; known models have up to 262,208
MOST_ADDED = 1 << 17  # tokens beside those of the model within a tokenizer; models of speech have up to 65,544
MOST_STOPS = 256  # tokens that end what is generated
LISTS = ("additional_special_tokens", "extra_special_tokens")


class Declared(NamedTuple):
    """What the files around a tokenizer.json say of its special tokens."""

    spec: dict[str, Any]  # tokenizer.json, with each of them as a special token
    changed: bool  # the file has them otherwise
    names: dict[str, str]  # those of NAMES that exist
    stops: tuple[str, ...]  # the tokens at which generation ends


def declared(file: Path, spec: dict[str, Any]) -> Declared:
    """Reads tokenizer_config.json and special_tokens_map.json (names), added_tokens_decoder (tokens and which are
    special), and generation_config.json, or where it is missing config.json (ids of eos and pad). Where no file names
    bos, it is what tokenizer.json itself puts before a text; where no file says a name, what is usual with these
    special tokens (chat_template.FAMILIES).

    Raises InputError where one of them names a token that does not exist, or is not as such files are.
    """
    config, map_file = (
        read_object(file.with_name("tokenizer_config.json")),
        read_object(file.with_name("special_tokens_map.json")),
    )
    generation = read_object(file.with_name("generation_config.json")) or read_object(file.with_name("config.json"))
    tokens = _Tokens(file, spec, config)
    names = {}
    for name in NAMES:
        source = "tokenizer_config.json" if name in config else "special_tokens_map.json"
        word = _content((config if name in config else map_file).get(name), file.with_name(source))
        if word and tokens.make_special(word):
            names[name] = word
        elif word and name in REQUIRED:
            raise InputError(
                f"{file.with_name(source)} names {word!r} as {name}, which {file.name} does not have: correct the name"
            )
    for key in LISTS:
        listed = config.get(key, map_file.get(key)) or ()
        for item in listed.values() if isinstance(listed, dict) else listed:
            tokens.make_special(_content(item, file.with_name("tokenizer_config.json")))
    if "bos_token" not in config and "bos_token" not in map_file and len(put_first := prefixes(spec)) == 1:
        names |= {"bos_token": put_first[0]} if tokens.make_special(put_first[0]) else {}
    stop_ids = _ids(generation.get("eos_token_id"))
    if len(stop_ids) > MOST_STOPS:
        raise InputError(
            f"{file.parent} names {len(stop_ids):,} ids as eos_token_id, more than the {MOST_STOPS} that are looked for: "
            "correct generation_config.json or config.json"
        )
    stops = [tokens.special_of_id(i, "eos_token_id") for i in stop_ids]
    pads = [tokens.special_of_id(i, "pad_token_id") for i in _ids(generation.get("pad_token_id"))[:1]]
    for name, found in (("eos_token", stops), ("pad_token", pads)):
        if found and found[0] and name not in config and name not in map_file:
            names.setdefault(name, found[0])
    known = family([word for word, token in tokens.added.items() if token["special"]])
    for name, word in FAMILIES[known].names.items() if known is not None else ():
        if name not in names and name not in config and name not in map_file and tokens.make_special(word):
            names[name] = word
    return Declared(spec, tokens.changed, names, tuple(dict.fromkeys(filter(None, stops))))


def prefixes(spec: Mapping[str, Any]) -> list[str]:
    """The special tokens that the post-processor of a tokenizer.json puts before a text."""
    parts = [part for step in steps(spec.get("post_processor"), "processors") for part in step.get("single", ())]
    return [part["SpecialToken"]["id"] for part in takewhile(lambda part: "SpecialToken" in part, parts)]


def steps(spec: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, also where there is one, none, or lists in lists."""
    found = [spec] if spec else []
    while any(step["type"] == "Sequence" for step in found):
        found = [part for step in found for part in step.get(key, [step])]
    return found


def check_count(count: int, file: Path) -> None:
    """Raises InputError if a file adds too many tokens."""
    if count > MOST_ADDED:
        raise InputError(
            f"{file} adds {count:,} tokens, where no model has more than {MOST_ADDED:,}: take it from the original model"
        )


def check_id(i: object, word: str, file: Path) -> None:
    """Raises InputError for an id that is none, or larger than any model's."""
    if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < MOST_IDS:
        raise InputError(
            f"{file} gives {shortened(word)} the id {shortened(i)}, which is not from 0 to {MOST_IDS - 1:,}: "
            "take it from the original model"
        )


class _Tokens:
    """The tokens of a tokenizer.json, some of which are made special."""

    def __init__(self, file: Path, spec: dict[str, Any], config: Mapping[str, Any]):
        self.file, self.spec, self.changed = file, spec, False
        self.added = {token["content"]: token for token in spec.get("added_tokens") or []}
        vocab = spec["model"]["vocab"]  # a Unigram model lists pieces with their scores
        self.vocab = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        source = file.with_name("tokenizer_config.json")
        for i, token in _decoder(config, source):
            check_id(i, token["content"], source)
            if token["content"] not in self.added and token["content"] not in self.vocab:
                self._add(token["content"], i, token)
            if token.get("special"):
                self.make_special(token["content"])

    def make_special(self, word: str | None) -> bool:
        """Makes a token special that exists; whether it does."""
        if word not in self.added and word in self.vocab:
            self._add(word, self.vocab[word], {})
        if word not in self.added:
            return False
        if not self.added[word]["special"]:
            self.added[word]["special"] = self.changed = True
        return True

    def special_of_id(self, i: int, key: str) -> str | None:
        """The added token with this id, made special. None where the id is that of a piece of text, as in
        configurations that were written for another tokenizer, or where there is no such pad."""
        words = [word for word, token in self.added.items() if token["id"] == i]
        if not words and key == "eos_token_id" and i not in self.vocab.values():
            raise InputError(
                f"{self.file.parent} names the id {i} as {key}, which {self.file.name} does not have: "
                "correct generation_config.json or config.json"
            )
        return words[0] if words and self.make_special(words[0]) else None

    def _add(self, word: str, i: int, values: Mapping[str, Any]) -> None:
        flags = {
            key: bool(values.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        self.added[word] = {"id": i, "content": word, **flags}
        self.spec.setdefault("added_tokens", []).append(self.added[word])
        self.changed = True


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file. Raises InputError for anything else."""
    try:
        values = json.loads(read_bytes(file)) if file.exists() else {}
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}): take it from the original model") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a JSON object: take it from the original model")
    return values


def _content(token: object, file: Path) -> str | None:
    """A special token is given as its string, or as an object that holds it."""
    word = token.get("content") if isinstance(token, dict) else token
    if not isinstance(word, str | None):
        raise InputError(
            f"{file} gives {shortened(token)} as a special token, which is no string: take it from the original model"
        )
    return word


def _decoder(config: Mapping[str, Any], file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    found = config.get("added_tokens_decoder") or {}
    try:
        check_count(len(found), file)
        yield from ((int(i), token) for i, token in found.items() if isinstance(token["content"], str))
    except InputError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"{file}: added_tokens_decoder holds no tokens by id: take it from the original model"
        ) from error


def _ids(value: object) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
