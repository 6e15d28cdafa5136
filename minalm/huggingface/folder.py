"""A model's folder with its tokenizer: enough to load the model, run it, and train it further."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from minalm.errors import InputError
from minalm.huggingface import bolmo, families, weights
from minalm.huggingface.weights import LazyTensor
from minalm.models import kinds, transformer
from minalm.models.bolmo import Bolmo
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.transformer import Transformer
from minalm.tokenization.chat_template import ChatTemplate, read_chat_template
from minalm.tokenization.special_tokens import NAMES, REQUIRED
from minalm.tokenization.suffixes import LongestSuffix, bolmo_suffixes, read_expansion, write_expansion
from minalm.tokenization.tokenizer_json import load_vocabulary, tokenizer_json
from minalm.tokenization.vocabulary import Vocabulary, bolmo_vocabulary

# The keys of generation_config.json that say how to sample. Its other keys hold ids, which a new vocabulary changes.
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
NEW_TOKENS, NEW_BYTES = 256, 1024  # that an exported model generates, unless a program says otherwise
# Files of a model, beside config.json and tensors, that `copy` takes along.
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
COPIED += ("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
FROZEN = "frozen.safetensors"  # the tensors in a folder of `write_start`


@dataclass(frozen=True)
class GenerationConfig:
    """How a model is used, beside its weights and tokenizer; a student takes it over from its teacher."""

    max_length: int | None = None  # tokens; nothing here depends on it
    sampling: Mapping[str, Any] = field(default_factory=dict)  # the SAMPLING keys of generation_config.json


def read_generation_config(folder: Path) -> GenerationConfig:
    """What config.json and generation_config.json of a folder say. Raises InputError."""
    file = folder / "config.json"
    length = families.longest_text(str(file), families.text_values(str(file), weights.read_json(file)))
    return GenerationConfig(length, _read_sampling(folder))


def save(
    folder: Path,
    model: Transformer | Bolmo,
    vocabulary: Vocabulary,
    suffixes: LongestSuffix | None,
    dtype: Literal["bfloat16", "float32"],
    generation_config: GenerationConfig,
) -> None:
    """Writes a model and its tokenizer as a new Hugging Face folder, without rows past the vocabulary.

    `suffixes` is the search of the model's input expansion, if it has one. Raises InputError as `weights.save` does.
    """
    if (suffixes is None) != (model.config.expansion_size is None):
        raise ValueError("`suffixes` belong to a model with an input expansion, and to no other")
    keys, files = _files(model.config, vocabulary, suffixes, generation_config)
    weights.save(folder, model, dtype, vocabulary_size=vocabulary.size, keys=keys, files=files)


def copy(
    source: Path,
    folder: Path,
    model: Transformer | Bolmo,
    dtype: Literal["bfloat16", "float32"],
    template: ChatTemplate | None = None,
) -> None:
    """Writes the model of the folder `source` to a new one. The files of its tokenizer are copied as they are.

    Code is not copied: a model with an input expansion gets ours. So does a Bolmo, whose published tokenizer is code
    too, and it gets a tokenizer.json; and where it has no chat template, this `template`. Raises InputError as
    `weights.save` does.
    """
    values = weights.read_json(source / "config.json")
    keys = families.informative(values)
    if isinstance(model.config, BolmoConfig):
        vocabulary, suffixes = load_vocabularies(source)
        vocabulary = dataclasses.replace(vocabulary, chat_template=vocabulary.chat_template or template)
        own_keys, files = _files(model.config, vocabulary, suffixes, read_generation_config(source))
        original = own_keys["tokenizer_config"] | {"original_identifier": bolmo.original_tokenizer(values)}
        weights.save(folder, model, dtype, keys=keys | own_keys | {"tokenizer_config": original}, files=files)
        return
    files = {name: (source / name).read_bytes() for name in COPIED if (source / name).is_file()}
    weights.save(folder, model, dtype, keys=keys, files=files)


@dataclass(frozen=True)
class Start:
    """A run's student without its trained leaves, which are in the run's checkpoints."""

    config: ModelConfig | BolmoConfig  # its tables may have more rows than the vocabulary, for the mesh
    vocabulary: Vocabulary
    suffixes: LongestSuffix | None
    generation_config: GenerationConfig
    frozen: Mapping[str, LazyTensor]  # the leaves that are not trained, by name

    def trained(self) -> Transformer | Bolmo:
        """The tree of trained leaves in a checkpoint, as float32 zeros that take no memory; frozen leaves are None."""
        shapes = kinds.abstract(self.config)
        zeros = [
            None if leaf in self.frozen else np.broadcast_to(np.float32(0), array.shape)
            for leaf, array in transformer.leaves(shapes).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(shapes), zeros)

    def model(self, trained: Transformer | Bolmo) -> Transformer | Bolmo:
        """The whole student from its trained leaves."""
        return kinds.from_leaves(self.config, transformer.leaves(trained) | dict(self.frozen))


def write_start(
    folder: Path,
    student: Transformer | Bolmo,
    trained: Transformer | Bolmo,
    vocabulary: Vocabulary,
    suffixes: LongestSuffix | None,
    generation_config: GenerationConfig,
) -> None:
    """Writes a run's student without its trained leaves as a new folder, for `read_start`.

    `trained` has a bool in the place of each leaf. The files are those of `save`, but frozen.safetensors holds the
    tensors of the leaves that are not trained, in the dtype that they have. Raises InputError as `weights.save` does.
    """
    keys, files = _files(student.config, vocabulary, suffixes, generation_config)
    is_trained = transformer.leaves(trained)
    frozen = {leaf: array for leaf, array in transformer.leaves(student).items() if not is_trained[leaf]}
    with weights.new_folder(folder, student.config, "float32", keys, files) as (partial, names):
        weights.write_part(partial / FROZEN, frozen, names, None)


def read_start(folder: Path) -> Start:
    """The inverse of `write_start`; the frozen leaves stay in their file. Raises InputError for a damaged folder."""
    vocabulary, suffixes = load_vocabularies(folder)
    config, frozen = weights.read_config(folder / "config.json"), weights.read_part(folder / FROZEN)
    return Start(config, vocabulary, suffixes, read_generation_config(folder), frozen)


def load_vocabularies(folder: Path) -> tuple[Vocabulary, LongestSuffix | None]:
    """The vocabulary of a model's folder, and the search of its input expansion if it has one. Raises InputError."""
    config = weights.read_config(folder / "config.json")
    if isinstance(config, BolmoConfig):
        return _load_bolmo_vocabularies(folder, config)
    vocabulary = load_vocabulary(folder, of_model=True)
    single = tuple(bytes([byte]) for byte in range(256))
    if vocabulary.tokenizer is not None and vocabulary.token_bytes[:256] == single:
        added = {token.content: i for i, token in vocabulary.tokenizer.get_added_tokens_decoder().items()}
        if sorted(added.values()) == list(range(256, vocabulary.size)):
            # The tokenizer only spells bytes. A published model also has ids for words of its headers, not of texts.
            vocabulary = dataclasses.replace(vocabulary, tokenizer=None, special=added)
    if max(vocabulary.part_ids("pad"), default=0) >= config.vocab_size:  # nothing reads it: another filler will do
        names = {name: word for name, word in vocabulary.names.items() if name != "pad_token"}
        vocabulary = dataclasses.replace(vocabulary, names=names)
    if config.expansion_size is None:
        return vocabulary, None
    if vocabulary.tokenizer is not None:
        raise InputError(f"{folder}: config.json has 'expand_input_ids', but tokenizer.json reads no plain bytes")
    values = weights.read_json(folder / "config.json").get("expand_input_ids_dict")
    return vocabulary, read_expansion(str(folder / "config.json"), values, vocabulary.size, config.expansion_size)


def _load_bolmo_vocabularies(folder: Path, config: BolmoConfig) -> tuple[Vocabulary, LongestSuffix]:
    values = weights.read_json(folder / "config.json")
    suffixes = bolmo.read_suffixes(str(folder / "config.json"), values, config.expansion_size)
    source = Vocabulary(str(folder), None, None, {}, (), {})
    if suffixes is None:  # as published: the subword tokenizer lies elsewhere
        original = bolmo.original_tokenizer(values)
        if original is None:
            raise InputError(
                f"{folder / 'config.json'} has neither 'subword_bytes' nor an 'original_identifier' in its "
                "'tokenizer_config': name there the subword model that it was made from"
            )
        beside = (folder / original).is_dir()
        source = load_vocabulary(folder / original if beside else weights.find(original), of_model=True)
        suffixes = bolmo_suffixes(source, bolmo_vocabulary(source))
    vocabulary = bolmo_vocabulary(source)
    template = read_chat_template(folder, vocabulary.names, vocabulary.special)
    return dataclasses.replace(vocabulary, chat_template=template), suffixes


def _read_sampling(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    values = weights.read_json(file) if file.exists() else {}
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a JSON object: take it from the original model, or remove it")
    found = {key: values[key] for key in SAMPLING if values.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool) != (key == "do_sample"):
            raise InputError(
                f"{file}: {key} is {value!r}: write {'true or false' if key == 'do_sample' else 'a number'}"
            )
    return found


def _tokenizer_config(vocabulary: Vocabulary, generation_config: GenerationConfig) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    template = vocabulary.chat_template
    named = {**(template.names if template is not None else {}), **vocabulary.names}
    config |= dict.fromkeys(REQUIRED)  # null: there is none, and none is to be guessed
    config |= {name: named[name] for name in NAMES if named.get(name) in vocabulary.special}
    if template is not None:
        several = [{"name": name, "template": source} for name, source in template.sources.items()]
        config["chat_template"] = several if len(several) > 1 else template.sources["default"]
    if generation_config.max_length is not None:
        config["model_max_length"] = generation_config.max_length
    return config


def _files(
    config: ModelConfig | BolmoConfig,
    vocabulary: Vocabulary,
    suffixes: LongestSuffix | None,
    generation_config: GenerationConfig,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a model's folder, the keys of config.json that name tokens and the like, and the files of the tokenizer."""
    if isinstance(config, BolmoConfig):
        keys = bolmo.vocabulary_keys(suffixes, config.expansion_size)
        if generation_config.max_length is not None:
            keys["max_position_embeddings"] = generation_config.max_length
        ids = {key: value for key, value in keys.items() if key.endswith("_token_id")}
        files = {
            "tokenizer.json": bolmo.tokenizer_json(vocabulary),
            "tokenizer_config.json": _tokenizer_config(vocabulary, generation_config) | {"padding_side": "left"},
            "generation_config.json": {**ids, "max_new_tokens": NEW_BYTES, **generation_config.sampling},
        }
        files["tokenizer_config.json"].pop("model_max_length", None)  # which counts patches
        return keys, files
    ids = {part: next(iter(vocabulary.part_ids(part)), None) for part in ("bos", "eos", "pad")}
    stops = vocabulary.stop_ids  # generation ends at any of them
    keys: dict[str, Any] = {
        "bos_token_id": ids["bos"],
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": ids["pad"],
    }
    files = {
        "tokenizer.json": tokenizer_json(vocabulary),
        "tokenizer_config.json": _tokenizer_config(vocabulary, generation_config),
        "generation_config.json": {
            **keys,
            "eos_token_id": stops or None,
            "max_new_tokens": NEW_BYTES if vocabulary.tokenizer is None else NEW_TOKENS,
            **generation_config.sampling,
        },
    }
    if generation_config.max_length is not None:
        keys["max_position_embeddings"] = generation_config.max_length
    if suffixes is not None:
        keys["expand_input_ids_dict"] = write_expansion(suffixes)
    return keys, files
