"""Bolmo in a Hugging Face folder: config.json and the names of tensors <-> BolmoConfig and Bolmo. No files here.

The layout is that of the published models, whose trunk is an OLMo 2 or 3, and reads as an OLMo 3. A trunk of another
family has that family's keys and names of tensors in their places, and `trunk_model_type` names it.

The published order of ids is special tokens first, ours is bytes first; so the rows of two tables change places.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from minalm.errors import InputError
from minalm.huggingface import families
from minalm.huggingface.families import FLAT, Family, Keys, Parts, TensorMap
from minalm.models import bolmo
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.transformer import leaves
from minalm.tokenization.chat_template import ChatTemplate, probe
from minalm.tokenization.suffixes import LongestSuffix, of_tokens
from minalm.tokenization.tokenizer_json import BYTE_LEVEL, BYTE_SIGNS, bpe_without_merges
from minalm.tokenization.vocabulary import BOLMO_SPECIAL, Vocabulary

MODEL_TYPE = "bolmo"
MODELING = "modeling_bolmo"  # the code that goes along for transformers
SPECIAL, PLAIN = len(BOLMO_SPECIAL), len(BOLMO_SPECIAL) + 256
UNSET_THETA = 10_000.0  # of folders that the published exporter has written without the trunk's rotary theta
# Our row -> the published one, of the tables with a row for each id.
ROWS = tuple(half + row for half in (0, PLAIN) for row in (*range(SPECIAL, PLAIN), *range(SPECIAL)))
PUBLISHED = {ours: theirs for ours, theirs in enumerate(ROWS)}  # of an id
WHAT_IS_IMPLEMENTED = {  # keys with one value that is, which is the default too
    "add_expanded_embeddings": True,
    "boundary_predictor_lookahead": 1,
    "boundary_threshold": "sample:0",
    "block_type": "reordered_norm",
    "use_qk_norm": True,
    "use_head_qk_norm": False,
    "vocab_size": 2 * PLAIN,
    "tie_word_embeddings": False,
}
LOCAL = {  # tensors of a local layer -> our fields, and the leading dimensions that are inputs (see families.SHARED)
    "pre_xlstm_layernorm.weight": ("norm", 0),
    "xlstm.q.weight": ("mlstm.q", 1),
    "xlstm.k.weight": ("mlstm.k", 1),
    "xlstm.v.weight": ("mlstm.v", 1),
    "xlstm.ogate_preact.weight": ("mlstm.output_gate", 1),
    "xlstm.igate_preact.weight": ("mlstm.input_gate", 1),
    "xlstm.igate_preact.bias": ("mlstm.input_bias", 0),
    "xlstm.fgate_preact.weight": ("mlstm.forget_gate", 1),
    "xlstm.fgate_preact.bias": ("mlstm.forget_bias", 0),
    "xlstm.multihead_norm.weight": ("mlstm.norm", FLAT),
    "xlstm.out_proj.weight": ("mlstm.out", 2),
    "pre_feedforward_layernorm.weight": ("mlp_norm", 0),
    "mlp.gate_proj.weight": ("mlp.gate", 1),
    "mlp.up_proj.weight": ("mlp.up", 1),
    "mlp.down_proj.weight": ("mlp.down", 1),
}
SINGLE = {  # the other tensors, but for those of the trunk
    "model.local_encoder.byte_embedding.weight": ("embed", 0),
    "model.local_encoder.subword_embedding.weight": ("expansion", 0),
    "model.local_encoder.post_last_block_norm.weight": ("encoder_norm", 0),
    "model.local_encoder.boundary_predictor_module.q_proj_layer.weight": ("boundary.q", 1),
    "model.local_encoder.boundary_predictor_module.k_proj_layer.weight": ("boundary.k", 1),
    "model.local_encoder.out_projection.weight": ("pool.weight", 1),
    "model.local_encoder.out_projection.bias": ("pool.bias", 0),
    "model.local_decoder.initial_norm.weight": ("patch_norm", 0),
    "model.local_decoder.in_projection.weight": ("depool.weight", 1),
    "model.local_decoder.in_projection.bias": ("depool.bias", 0),
    "model.norm.weight": ("norm", 0),
    "lm_head.weight": ("unembed", 0),
}


def parse_config(source: str, values: Mapping[str, Any]) -> tuple[Family, BolmoConfig]:
    """The trunk's family and the architecture that the values of a config.json describe. `source`: the file's name.

    Raises InputError, naming the key, for what is not implemented.
    """
    keys = Keys(source, values)
    for key, only in WHAT_IS_IMPLEMENTED.items():
        if keys.read(key, only) != only:
            raise keys.wrong(key, f"which is not implemented: only {only!r} is")
    _check_tokenizer(keys)
    keys.seen |= {"subword_bytes", "model_type"}
    local = {
        "heads": keys.whole("num_local_heads"),
        "mlp": keys.whole("local_intermediate_size"),
        "encoder_layers": keys.whole("num_local_encoder_layers"),
        "decoder_layers": keys.whole("num_local_decoder_layers"),
        "local_norm_eps": keys.number("local_rms_norm_eps", 1e-5),
        "expansion_size": keys.whole("subword_vocab_size"),
    }
    kind = keys.read("trunk_model_type", "olmo3")
    trunk = {key: value for key, value in values.items() if key not in keys.seen}
    trunk |= {"model_type": kind, "vocab_size": local["expansion_size"], "tie_word_embeddings": False}
    if kind == "olmo3":
        trunk |= _rope_of_olmo3(keys, trunk)
    family, blocks = families.parse_config(f"{source} (the trunk)", trunk)
    if blocks.embed % (4 * local["heads"]) or "trunk_model_type" in values and blocks.model_type != kind:
        raise keys.wrong("num_local_heads", f"which does not divide the {blocks.embed // 2} channels of keys evenly")
    return family, BolmoConfig(vocab_size=PLAIN, blocks=blocks, **local)


def _check_tokenizer(keys: Keys) -> None:
    """Raises InputError for a tokenizer_config that gives ids other meanings."""
    given = keys.read("tokenizer_config")
    if given is None:
        return
    wanted = _tokenizer_config(None)
    for key in sorted(wanted.keys() - {"original_identifier"}):
        if not isinstance(given, dict) or given.get(key, wanted[key]) != wanted[key]:
            raise keys.wrong("tokenizer_config", f"whose {key!r} is not {wanted[key]!r}: only that is implemented")


def _rope_of_olmo3(keys: Keys, trunk: Mapping[str, Any]) -> dict[str, Any]:
    """The published spelling: one theta, and a scaling of the layers that see all. The keys as families.py wants them."""
    theta = keys.number("rope_theta")
    if theta == UNSET_THETA and "trunk_model_type" not in keys.values:
        raise keys.wrong(
            "rope_theta",
            "the default of a class, and the published models were trained with 500000: write the right number, and "
            "'trunk_model_type': 'olmo3' if it is this one",
        )
    plain = {"rope_type": "default", "rope_theta": theta}
    scaled = plain | (keys.read("rope_scaling") or {})
    return {
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"sliding_attention": plain, "full_attention": scaled},
    }


def config_values(config: BolmoConfig, dtype: Literal["bfloat16", "float32"]) -> dict[str, Any]:
    """The values of config.json. Raises InputError for a trunk that no family can express."""
    blocks = replace(config.blocks, vocab_size=config.expansion_size, expansion_size=None, tied=False)
    if blocks.model_type == "olmo2":  # the same computation; what is published reads as an OLMo 3
        blocks = replace(blocks, model_type="olmo3")
    values = families.config_values(blocks, dtype)
    kind = values.pop("model_type")
    if kind == "olmo3":
        rope = values.pop("rope_parameters")["full_attention"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        values["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    return values | {
        "architectures": ["BolmoForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODELING}.BolmoConfig",
            "AutoModel": f"{MODELING}.BolmoModel",
            "AutoModelForCausalLM": f"{MODELING}.BolmoForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "trunk_model_type": kind,
        "vocab_size": 2 * PLAIN,
        "add_expanded_embeddings": True,
        "boundary_predictor_lookahead": 1,
        "boundary_threshold": "sample:0",
        "num_local_encoder_layers": config.encoder_layers,
        "num_local_decoder_layers": config.decoder_layers,
        "num_local_heads": config.heads,
        "local_intermediate_size": config.mlp,
        "local_rms_norm_eps": config.local_norm_eps,
        "subword_vocab_size": config.expansion_size,
    }


def tensor_maps(family: Family, config: BolmoConfig) -> dict[str, Parts]:
    """Name of each tensor of a folder -> what it is of a Bolmo: one table for both directions."""
    shapes = {leaf: array.shape for leaf, array in leaves(bolmo.abstract(config)).items()}
    result: dict[str, Parts] = {}
    for name, (leaf, inputs) in SINGLE.items():
        rows = ROWS if leaf in ("embed", "unembed") else None
        result[name] = (TensorMap(leaf, None, shapes[leaf], inputs, rows=rows),)
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for layer in range(layers):
            last = side == "decoder" and layer == layers - 1  # which stands apart
            for tensor, (field, inputs) in LOCAL.items():
                leaf = f"last.{field}" if last else f"{side}.{field}"
                shape = shapes[leaf] if last else shapes[leaf][1:]
                name = f"model.local_{side}.layers.{layer}.{tensor}"
                result[name] = (TensorMap(leaf, None if last else layer, shape, inputs),)
    for name, parts in families.tensor_maps(family, _without_tables(config.blocks)).items():
        if name.startswith("model.layers."):
            result[name] = tuple(part._replace(leaf=f"patches.{part.leaf}") for part in parts)
    return result


def _without_tables(blocks: ModelConfig) -> ModelConfig:
    return replace(blocks, vocab_size=1, tied=True, expansion_size=None)


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def _tokenizer_config(original: str | None) -> dict[str, Any]:
    """The `tokenizer_config` of config.json; `original`: where the subword tokenizer is."""
    return {
        "vocab_size": 2 * PLAIN,
        "bos_token_id": PUBLISHED[257],
        "pad_token_id": PUBLISHED[256],
        "eos_token_id": PUBLISHED[257],
        "bpe_token_end_id": PUBLISHED[259],
        "special_tokens": list(BOLMO_SPECIAL),
        "special_tokens_first": True,
        "original_identifier": original,
    }


def vocabulary_keys(suffixes: LongestSuffix, rows: int) -> dict[str, Any]:
    """The keys of config.json that say how text is read; `rows`: of the table of subwords.

    `subword_bytes` is ours: with it, neither the subword tokenizer nor a hub is needed. It has of each subword the
    hexadecimal digits of its bytes, or the names of the special tokens that it stands for, or null.
    """
    letters = suffixes.keys.view(np.uint8).reshape(-1, suffixes.window)
    spelled: list[str | None] = [None] * rows
    for word in ("<pad>", "<bos>"):
        original = int(suffixes.special[BOLMO_SPECIAL.index(word)])
        spelled[original] = (spelled[original] or "") + word
    for row, length, original in zip(letters, suffixes.length.tolist(), suffixes.original.tolist()):
        if length:
            spelled[original] = row[:length][::-1].tobytes().hex()
    return {
        "bos_token_id": PUBLISHED[257],
        "eos_token_id": PUBLISHED[257],
        "pad_token_id": PUBLISHED[256],
        "tokenizer_config": _tokenizer_config(None),
        "subword_bytes": spelled,
    }


def read_suffixes(source: str, values: Mapping[str, Any], rows: int) -> LongestSuffix | None:
    """The inverse of `vocabulary_keys`; None where config.json does not spell the subwords. Raises InputError."""
    spelled = values.get("subword_bytes")
    if spelled is None:
        return None
    tokens, special = {}, [0] * SPECIAL
    if not isinstance(spelled, list) or len(spelled) > rows:
        raise InputError(f"{source}: 'subword_bytes' is no list of at most {rows} subwords: write the folder anew")
    for original, word in enumerate(spelled):
        named = [number for number, name in enumerate(BOLMO_SPECIAL) if isinstance(word, str) and name in word]
        if named:
            for number in named:
                special[number] = original
        elif word is not None:
            try:
                tokens[bytes.fromhex(word)] = original
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{source}: 'subword_bytes' has {word!r}, which are no hexadecimal digits: write the folder anew"
                ) from error
    return of_tokens(tokens, special)


def original_tokenizer(values: Mapping[str, Any]) -> str | None:
    """Where a published folder says that the tokenizer of its subwords is."""
    given = values.get("tokenizer_config")
    return given.get("original_identifier") if isinstance(given, dict) else None


def chat_template(base: Vocabulary, post_trained: Vocabulary) -> ChatTemplate | None:
    """The chat template of a post-trained subword model for a Bolmo that was made from its base.

    The base's bos and eos are the Bolmo's bos, which every text begins with. All other special tokens are spelled as they
    stand, those too that the template knows by name.
    """
    template = post_trained.chat_template
    if template is None:
        return None
    own = {base.named("bos"): "<bos>", base.named("eos"): "<bos>"}
    own = {word: ours for word, ours in own.items() if word is not None}

    def with_own(text: str) -> str:
        for word, ours in own.items():
            text = text.replace(word, ours)
        return text

    names = {"bos_token": "<bos>", "eos_token": "<bos>", "pad_token": "<pad>"}
    meant = {name: with_own(template.names.get(name, "")) for name in names}
    first = "".join(f"{{% set {name} = {json.dumps(word)} %}}" for name, word in meant.items() if word != names[name])
    sources = {name: first + with_own(text) for name, text in template.sources.items()}
    found = ChatTemplate(template.file, sources, names)
    if not all(written.startswith("<bos>") for written in probe(found)):
        found = found._replace(sources={name: "<bos>" + text for name, text in sources.items()})
    return found


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """A tokenizer.json with the published ids: a text is its bytes behind <bos>. An id that also ends a patch, which no
    text becomes, is decoded like the one that does not."""
    mark = "\u241e"  # in the names of the ids that end a patch; no sign of a byte
    names = {byte: BYTE_SIGNS[byte] for byte in range(256)} | {256 + n: word for n, word in enumerate(BOLMO_SPECIAL)}
    vocab = {name: PUBLISHED[i] for i, name in names.items()}
    vocab |= {name + mark: i + PLAIN for name, i in vocab.items()}
    special = [word + ending for ending in ("", mark) for word in BOLMO_SPECIAL]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    template = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[word], "content": word, **flags} for word in special],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocab["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": mark}, "content": ""}, BYTE_LEVEL],
        },
        "model": bpe_without_merges(vocab),
    }
