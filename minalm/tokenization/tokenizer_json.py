"""Hugging Face's tokenizer.json <-> a Vocabulary."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer

from minalm.errors import InputError
from minalm.tokenization.chat_template import SpecialTokens, read_chat_template, repeats
from minalm.tokenization.files import read_bytes, shortened
from minalm.tokenization.special_tokens import check_count, check_id, declared, prefixes, read_object, steps
from minalm.tokenization.vocabulary import META, Vocabulary


def load_vocabulary(path: Path, of_model: bool = False) -> Vocabulary:
    """The vocabulary of a tokenizer.json, or of its folder, whose other files name the special tokens.

    Special tokens are the added tokens marked `special` and those that are named (special_tokens.py); other added
    tokens are ordinary text. The chat template is the one of the folder (chat_template.py).

    Ids are those that the file gives, also where the library closes the holes before them. `of_model`: they are rows of
    a model that is there, so a token that is used must have one id for both.

    Raises InputError if there is no such file, if a special token is named that does not exist, or if the tokenizer
    spells neither bytes (byte-level BPE) nor has `<0xNN>` tokens to fall back on.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    found, tokenizer, notes = _read(file)
    spec, changed, names, stops = declared(file, found)
    moved: dict[str, int] = {}
    if changed or _moved(spec, tokenizer):
        library = Tokenizer.from_str(json.dumps(spec))
        moved = {token["content"]: library.token_to_id(token["content"]) for token in _moved(spec, library)}
        spec, tokenizer = _with_ids(spec, str(file))
    bare = _without_prefix_space(spec)
    continuing = None if bare is None else Tokenizer.from_str(json.dumps(bare))
    for each in filter(None, (tokenizer, continuing)):
        each.no_truncation()
        each.no_padding()
        each.encode_special_tokens = True  # text that looks like a special token stays text

    added = [token for token in spec.get("added_tokens") or [] if token["special"]]
    special = {token["content"]: token["id"] for token in added}
    token_bytes, fallback = _token_bytes(spec, tokenizer.get_vocab(with_added_tokens=True))
    for i in special.values():
        token_bytes[i] = b""
    if missing := _ORDINARY - {token for token in token_bytes if len(token) == 1}:
        raise InputError(
            f"{file} cannot spell every text (it has no token for byte 0x{min(missing).hex()}): "
            "use a byte-level tokenizer or one with byte fallback"
        )
    strips = {t["content"]: (t["lstrip"], t["rstrip"]) for t in added if t["lstrip"] or t["rstrip"]}
    template = read_chat_template(file.parent, names, special)
    bos = [names["bos_token"]] if "bos_token" in names else []
    asked = read_object(file.with_name("tokenizer_config.json")).get("add_bos_token")
    adds_bos = asked if isinstance(asked, bool) else prefixes(spec)[:1] == bos
    if bos and not adds_bos and template is not None and repeats(template, bos[0], SpecialTokens.of(special, strips)):
        names = {name: word for name, word in names.items() if name != "bos_token"}  # it opens messages (SmolLM2)
        bos = []
    vocabulary = Vocabulary(
        name=str(path),
        tokenizer=tokenizer,
        normalizer=_unicode_normalizer(spec.get("normalizer")),
        fallback=fallback,
        token_bytes=tuple(token_bytes),
        special=special,
        names=names,
        stops=stops,
        chat_template=template,
        strips=strips,
        continuing=continuing,
        spaces_each=_spaces_each(spec),
        adds_bos=adds_bos and bos != [],
        notes=tuple(notes),
    )
    if of_model:
        _check_moved(vocabulary, moved)
    return vocabulary


def _read(file: Path) -> tuple[dict[str, Any], Tokenizer, list[str]]:
    """A tokenizer.json as it is, as a tokenizer, and what a user should know of it. Raises InputError."""
    if not file.exists():
        raise InputError(f"{file} does not exist: name a folder that holds a tokenizer.json, or the file itself")
    notes = []
    try:
        spec = json.loads(read_bytes(file))
        _check(spec, file)
        if spec["model"].get("dropout"):
            notes.append(
                f"{file} drops {spec['model']['dropout']:.0%} of its merges at random (BPE dropout): this is switched off, "
                "so that a text always has the same tokens"
            )
            spec["model"]["dropout"] = None
        return spec, Tokenizer.from_str(json.dumps(spec)), notes
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"{file} cannot be read as a tokenizer.json ({str(error)[:100]}): take it from the original model"
        ) from error


def _check(spec: Any, file: Path) -> None:
    """Raises InputError for a tokenizer.json that is not put together like one, or whose sizes are no model's."""
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise InputError(
            f"{file} cannot be read as a tokenizer.json (it has no 'model'): take it from the original model"
        )
    for key in parts:
        for step in _steps(spec.get(key)):
            if not isinstance(step, dict) or not isinstance(step.get("type"), str):
                raise InputError(
                    f"{file}: {key!r} is no object with a 'type' but {shortened(step)}: take it from the original model"
                )
    vocab, added = spec["model"].get("vocab"), spec.get("added_tokens") or []
    if not isinstance(vocab, dict | list) or not isinstance(added, list):
        raise InputError(f"{file} has no 'vocab', or no list of 'added_tokens': take it from the original model")
    if not all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in added):
        raise InputError(f"{file} has 'added_tokens' without a 'content': take it from the original model")
    check_count(len(added), file)
    for token in added:
        check_id(token.get("id"), token["content"], file)
    for word, i in vocab.items() if isinstance(vocab, dict) else ():
        check_id(i, word, file)
    growth = math.prod(map(_growth, _steps(spec.get("normalizer"))))
    if growth > MOST_GROWTH:
        raise InputError(
            f"{file}: the normalizer can make a text more than {MOST_GROWTH} times as long: use another tokenizer"
        )


def _steps(part: Any) -> Iterator[Any]:
    """The steps of a part of a tokenizer.json, whatever it is, also those within others."""
    if part is not None:
        yield part
    if isinstance(part, dict):
        for key in ("normalizers", "pretokenizers", "processors", "decoders"):
            inner = part.get(key)
            for each in inner if isinstance(inner, list) else () if inner is None else (inner,):
                yield from _steps(each if each is not None else {})


def _growth(step: Mapping[str, Any]) -> float:
    """How many times as long a step of a normalizer can make a text of one character or more."""
    if step["type"] == "Prepend":
        return 1.0 + len(str(step.get("prepend", "")))
    if step["type"] != "Replace":
        return 1.0  # Unicode's forms: at most 18 times, of rare characters
    content, pattern = len(str(step.get("content", ""))), step.get("pattern")
    fixed = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1.0, content / len(fixed)) if fixed else 1.0 + content  # an expression may match nothing, anywhere


MOST_GROWTH = 64  # of a text, by what a normalizer puts in


# A byte-level BPE writes each byte as one printable character: itself where it is printable, else one from U+0100 on
# (GPT-2's encoder.py, bytes_to_unicode).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


_FROM_BYTE_LEVEL = {0x100 + i: byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}
_BYTE_LEVEL = {byte: byte for byte in _PRINTABLE} | {byte: code for code, byte in _FROM_BYTE_LEVEL.items()}
BYTE_SIGNS = {byte: chr(_BYTE_LEVEL[byte]) for byte in range(256)}  # how byte-level tokenizers write a byte


# What a vocabulary must spell to be of use: the bytes of UTF-8 text without control characters and the rarer planes,
# which some vocabularies lack (SmolLM2). A text that has one of those is found not to be spelled.
_ORDINARY = {bytes([byte]) for byte in (0x09, 0x0A, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))}


def _token_bytes(spec: Mapping[str, Any], vocab: Mapping[str, int]) -> tuple[list[bytes], dict[int, int]]:
    """The bytes of each token, by id, and for each byte that has a fallback token `<0xNN>` its id.

    `vocab` gives the ids of all tokens, including the added ones, which are always written as text.
    """
    byte_level = '"ByteLevel"' in json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    added = {token["id"] for token in spec.get("added_tokens") or []}
    token_bytes, fallback = [b""] * (1 + max(vocab.values())), {}
    for token, i in vocab.items():
        if byte_level and i not in added:
            token_bytes[i] = _from_byte_level(token)
        elif spec["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token) and i not in added:
            fallback[int(token[3:5], 16)] = i
            token_bytes[i] = bytes([int(token[3:5], 16)])
        else:
            token_bytes[i] = (token if byte_level else token.replace(META, " ")).encode()
    return token_bytes, fallback


def _from_byte_level(token: str) -> bytes:
    try:
        return token.translate(_FROM_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:  # not of that alphabet: no text becomes this token
        return b""


def as_model_reads(vocabulary: Vocabulary, text: bytes) -> str:
    """Text as the model within a tokenizer reads it, behind normalizer and pre-tokenizer.

    Raises UnicodeDecodeError for bytes that are no UTF-8, unless the tokenizer is byte-level.
    """
    if vocabulary.fallback:
        return text.decode().replace(" ", META)
    return text.decode("latin-1").translate(_BYTE_LEVEL)


def _without_prefix_space(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """A tokenizer.json that puts no space before a text, but is the same otherwise; None if it is so already."""
    normalizers = steps(spec.get("normalizer"), "normalizers")
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    splits = steps(spec.get("pre_tokenizer"), "pretokenizers")
    bare = [step | _NO_SPACE.get(step["type"], {}) for step in splits]
    if kept == normalizers and bare == splits:
        return None
    normalizer = {"type": "Sequence", "normalizers": kept} if kept else None
    pre_tokenizer = {"type": "Sequence", "pretokenizers": bare} if bare else None
    return {**spec, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}


_NO_SPACE = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}


def _spaces_each(spec: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts its space before the text behind every special token, and not the first alone."""
    prepends = any(step["type"] == "Prepend" for step in steps(spec.get("normalizer"), "normalizers"))
    splits = steps(spec.get("pre_tokenizer"), "pretokenizers")
    return prepends or any(
        step["type"] == "ByteLevel"
        and step.get("add_prefix_space", True)
        or step["type"] == "Metaspace"
        and step.get("prepend_scheme", "always") == "always"
        for step in splits
    )


def _unicode_normalizer(spec: dict | None) -> Normalizer | None:
    """What of a tokenizer.json's normalizer acts on the text; the rest belongs to how tokens spell bytes."""
    spells = ("Prepend", "ByteLevel")
    kept = [s for s in steps(spec, "normalizers") if s["type"] not in spells]
    kept = [s for s in kept if not (s["type"] == "Replace" and META in s["content"])]
    if not kept:
        return None
    model, normalizer = {"type": "BPE", "vocab": {}, "merges": []}, {"type": "Sequence", "normalizers": kept}
    return Tokenizer.from_str(json.dumps({"model": model, "normalizer": normalizer})).normalizer


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer.json of a vocabulary.

    It puts bos before a text where `Vocabulary.adds_bos` says so. Raises InputError if the format cannot give the
    tokens the ids that they have.
    """
    if vocabulary.tokenizer is None:
        spec = _bytes_json()
    else:
        spec = json.loads(vocabulary.tokenizer.to_str())
    present = {token["id"] for token in spec["added_tokens"]}
    spec["added_tokens"] += [
        {
            "id": i,
            "content": word,
            "single_word": False,
            "lstrip": vocabulary.strips.get(word, (False, False))[0],
            "rstrip": vocabulary.strips.get(word, (False, False))[1],
            "normalized": False,
            "special": True,
        }
        for word, i in sorted(vocabulary.special.items(), key=lambda item: item[1])
        if i not in present
    ]
    bos = [vocabulary.names["bos_token"]] if vocabulary.adds_bos else []
    if prefixes(spec) != bos:
        spec["post_processor"] = _bos_processor(bos, vocabulary) if bos else None
    return _with_ids(spec, vocabulary.name)[0]


def _moved(spec: Mapping[str, Any], tokenizer: Tokenizer) -> list[Mapping[str, Any]]:
    """The added tokens to which the library gives other ids than the file does: it closes holes before them."""
    return [token for token in spec.get("added_tokens") or [] if tokenizer.token_to_id(token["content"]) != token["id"]]


def _check_moved(vocabulary: Vocabulary, moved: Mapping[str, int]) -> None:
    """Raises InputError for a token that is used among those to which the library gives other ids. Any pad will do."""
    names = {name: word for name, word in vocabulary.names.items() if name != "pad_token"}
    used = replace(vocabulary, names=names).template_special
    for word, i in moved.items():
        if word in used or word not in vocabulary.special:
            raise InputError(
                f"{vocabulary.name}: ids before that of {word!r} have holes, so that transformers takes {i} for it: "
                "write the id that the model has learned into the vocabulary of tokenizer.json too"
            )


def _with_ids(spec: dict[str, Any], name: str) -> tuple[dict[str, Any], Tokenizer]:
    """A tokenizer.json whose added tokens have their ids, also behind holes: these tokens are in the model's vocabulary
    too. Raises InputError, naming the tokenizer, where that cannot be."""
    try:
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        moved, vocab = _moved(spec, tokenizer), spec["model"]["vocab"]
        if moved and isinstance(vocab, dict):
            added = {token["content"]: token["id"] for token in spec["added_tokens"]}
            spec = {**spec, "model": {**spec["model"], "vocab": {**added, **vocab}}}
            tokenizer = Tokenizer.from_str(json.dumps(spec))
            moved = _moved(spec, tokenizer)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"{name}: its tokens cannot be written as a tokenizer.json ({error}): use another tokenizer"
        ) from error
    if moved:
        word, i = moved[0]["content"], moved[0]["id"]
        raise InputError(
            f"{name}: a tokenizer.json cannot give {word!r} the id {i} (it becomes {tokenizer.token_to_id(word)}): "
            "use a tokenizer whose ids have no holes"
        )
    return spec, tokenizer


def _bos_processor(bos: list[str], vocabulary: Vocabulary) -> dict[str, Any]:
    """A post-processor of a tokenizer.json that puts special tokens before a text, and before each of a pair."""
    first, second = (
        [{"SpecialToken": {"id": word, "type_id": kind}} for word in bos]
        + [{"Sequence": {"id": name, "type_id": kind}}]
        for kind, name in enumerate("AB")
    )
    tokens = {word: {"id": word, "ids": [vocabulary.special[word]], "tokens": [word]} for word in bos}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": tokens}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def bpe_without_merges(vocab: Mapping[str, int]) -> dict[str, Any]:
    """The model of a tokenizer.json by which a text becomes its UTF-8 bytes. `vocab`: names, as in BYTE_SIGNS -> ids."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": dict(vocab),
        "merges": [],
    }


def _bytes_json() -> dict[str, Any]:
    """A byte-level BPE in which byte b has the id b."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": bpe_without_merges({sign: byte for byte, sign in BYTE_SIGNS.items()}),
    }
