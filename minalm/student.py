"""A model on a new vocabulary: its tables, and its folder, which alone is enough to load, run and train it on."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from minalm import chat, families, hf
from minalm.model import Transformer
from minalm.ngrams import LongestSuffix, read_expansion, write_expansion
from minalm.text import InputError
from minalm.transfer import TransferPlan, transfer_rows
from minalm.vocab import Vocabulary, load_vocabulary, prefixes

# Of generation_config.json, what says how to sample; the ids in it are those of another vocabulary.
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")


@dataclass(frozen=True)
class Usage:
    """What a model's folder says of its use, beside weights and tokenizer; it goes along into the student's."""

    chat_template: str | None = None
    max_length: int | None = None  # tokens; informative
    sampling: Mapping[str, Any] = field(default_factory=dict)  # of generation_config.json, what is in SAMPLING


def read_usage(folder: Path) -> Usage:
    """What a model's folder says. Raises InputError for files that are none."""
    length = hf.read_json(folder / "config.json").get("max_position_embeddings")
    return Usage(read_template(folder), length, _read_sampling(folder))


def read_template(path: Path) -> str | None:
    """The chat template in a folder, or beside a tokenizer.json. Raises InputError."""
    template = chat.read_chat_template(path if path.is_dir() else path.parent)
    return None if template is None else template.source


def student_from_teacher(
    teacher: Transformer, plan: TransferPlan, expansion: bool, tied: bool, rows: int, seed: int = 0
) -> Transformer:
    """The teacher with tables of `rows` rows for the vocabulary of the plan, all else its own (and not copied).

    Input and output table are the plan's mix of the teacher's input and output table; `tied` uses the former for both.
    With `expansion` the teacher's input table is added at input as it is: what a byte reads at first is its own row
    plus that of the longest token which ends there. Host only: the teacher's leaves are numpy arrays or hf.Stored, and
    stay what they are; the new tables are float32, so that means are rounded once, where they are used or written.
    Raises InputError for an expansion of what has one already.
    """
    if teacher.expansion is not None:
        raise InputError(
            "the model is a byte student with an input expansion: start from the model that it was made of"
        )
    if rows < len(plan.start) - 1:
        raise ValueError(f"{rows} rows are not enough for {len(plan.start) - 1} tokens")
    arrays = families.leaves(teacher)
    old_embed, old_unembed = arrays["embed"], arrays.pop("unembed", arrays["embed"])
    arrays["embed"] = transfer_rows(plan, old_embed, rows, seed)
    if not tied:
        arrays["unembed"] = transfer_rows(plan, old_unembed, rows, seed + 1)
    if expansion:
        arrays["expansion"] = old_embed
    config = dataclasses.replace(
        teacher.config, vocab_size=rows, tied=tied, expansion_size=old_embed.shape[0] if expansion else None
    )
    return families.from_leaves(config, arrays)


def pad_rows(model: Transformer, rows: int) -> Transformer:
    """The model with tables of at least `rows` rows, zeros at the end, so that a mesh can divide them. Host only."""
    arrays, size = families.leaves(model), model.config.vocab_size
    if rows <= size:
        return model
    for table in ("embed", "unembed"):
        if table in arrays:
            arrays[table] = np.pad(arrays[table][:], ((0, rows - size), (0, 0)))
    return families.from_leaves(dataclasses.replace(model.config, vocab_size=rows), arrays)


def save(
    folder: Path,
    model: Transformer,
    vocabulary: Vocabulary,
    ngrams: LongestSuffix | None,
    dtype: Literal["bfloat16", "float32"],
    usage: Usage,
) -> None:
    """Writes a model and its tokenizer as a new Hugging Face folder, without rows past the vocabulary.

    `ngrams` is the input expansion's search, if the model has one. The chat template is written as it is: it must be
    that of the source where the vocabulary has the source's control tokens, else that of the tokenizer. Raises
    InputError as `hf.save` does.
    """
    if (ngrams is None) != (model.config.expansion_size is None):
        raise ValueError("a model has a search for original tokens if it has an input expansion")
    ids = {part: _control_ids(vocabulary, part)[:1] for part in ("bos", "eos", "end_of_turn", "end_of_chat", "pad")}
    stops = list(dict.fromkeys(ids["eos"] + ids["end_of_turn"] + ids["end_of_chat"]))  # generation ends at any of them
    keys: dict[str, Any] = {
        "bos_token_id": ids["bos"][0] if ids["bos"] else None,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": ids["pad"][0] if ids["pad"] else None,
    }
    files = {
        "tokenizer.json": tokenizer_json(vocabulary),
        "tokenizer_config.json": _tokenizer_config(vocabulary, usage),
        "generation_config.json": {**keys, "eos_token_id": stops or None, **usage.sampling},
    }
    if usage.max_length is not None:
        keys["max_position_embeddings"] = usage.max_length
    if ngrams is not None:
        keys["expand_input_ids_dict"] = write_expansion(ngrams)
    hf.save(folder, model, dtype, vocabulary_size=vocabulary.size, keys=keys, files=files)


def load_vocabularies(folder: Path) -> tuple[Vocabulary, LongestSuffix | None]:
    """The vocabulary of a model's folder, and the search of its input expansion if it has one. Raises InputError."""
    vocabulary = load_vocabulary(folder)
    single = tuple(bytes([byte]) for byte in range(256))
    if vocabulary.tokenizer is not None and vocabulary.token_bytes[:256] == single:
        added = {token.content: i for i, token in vocabulary.tokenizer.get_added_tokens_decoder().items()}
        if sorted(added.values()) == list(range(256, vocabulary.size)):
            # Plain bytes, no need to ask. A published model has ids for words of its headers too: no text becomes one.
            vocabulary = dataclasses.replace(vocabulary, tokenizer=None, control=added)
    config = hf.read_config(folder / "config.json")
    if config.expansion_size is None:
        return vocabulary, None
    if vocabulary.tokenizer is not None:
        raise InputError(f"{folder}: config.json has 'expand_input_ids', but tokenizer.json reads no plain bytes")
    values = hf.read_json(folder / "config.json").get("expand_input_ids_dict")
    return vocabulary, read_expansion(str(folder / "config.json"), values, vocabulary.size, config.expansion_size)


def _read_sampling(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    values = hf.read_json(file) if file.is_file() else {}
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a JSON object: take it from the original model, or remove it")
    found = {key: values[key] for key in SAMPLING if values.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool) != (key == "do_sample"):
            raise InputError(
                f"{file}: {key} is {value!r}: write {'true or false' if key == 'do_sample' else 'a number'}"
            )
    return found


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer.json of a vocabulary, whose control tokens no text becomes unless a program asks for that.

    It puts bos before a text where the vocabulary it comes from does (`Vocabulary.adds_bos`). Raises InputError where the
    format cannot give its tokens the ids that they have.
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
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for word, i in sorted(vocabulary.control.items(), key=lambda item: item[1])
        if i not in present
    ]
    bos = list(vocabulary.template.get("bos", ())) if vocabulary.adds_bos else []
    if prefixes(spec) != bos:
        spec["post_processor"] = _bos_processor(bos, vocabulary) if bos else None
    try:
        ids = Tokenizer.from_str(json.dumps(spec)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"{vocabulary.name}: its tokens cannot be written as a tokenizer.json ({error}): use another tokenizer"
        ) from error
    for word, i in vocabulary.control.items():
        if ids.get(word) != i:
            raise InputError(
                f"{vocabulary.name}: a tokenizer.json cannot give {word!r} the id {i} (it becomes {ids.get(word)}): "
                "use a tokenizer whose ids have no holes"
            )
    return spec


def _bos_processor(bos: list[str], vocabulary: Vocabulary) -> dict[str, Any]:
    """A post-processor of a tokenizer.json that puts control tokens before a text, and before each of a pair."""
    first, second = (
        [{"SpecialToken": {"id": word, "type_id": kind}} for word in bos]
        + [{"Sequence": {"id": name, "type_id": kind}}]
        for kind, name in enumerate("AB")
    )
    tokens = {word: {"id": word, "ids": [vocabulary.control[word]], "tokens": [word]} for word in bos}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": tokens}


def _bytes_json() -> dict[str, Any]:
    """A byte-level BPE without merges: text becomes its UTF-8 bytes. Id b is byte b, written in GPT-2's alphabet."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {characters[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


def _tokenizer_config(vocabulary: Vocabulary, usage: Usage) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    words = {i: word for word, i in vocabulary.control.items()}
    for part in ("bos", "eos", "pad"):
        if ids := _control_ids(vocabulary, part):
            config[f"{part}_token"] = words[ids[0]]
    if usage.chat_template is not None:
        config["chat_template"] = usage.chat_template
    if usage.max_length is not None:
        config["model_max_length"] = usage.max_length
    return config


def _control_ids(vocabulary: Vocabulary, part: str) -> list[int]:
    return [vocabulary.control[word] for word in vocabulary.template.get(part, ()) if word in vocabulary.control]
