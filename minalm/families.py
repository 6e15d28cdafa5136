"""Model families of Hugging Face: config.json <-> ModelConfig, and the names of tensors <-> our fields. No files here.

A family is data: its keys, its defaults, its tensors. Reads the spellings of transformers 4 and 5. A key that is neither
understood, nor known to leave the computation alone, nor switched off (null, false, 0) is refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from minalm.model import ModelConfig, RopeScaling, Transformer, initialize
from minalm.text import InputError

EXPANSION_BYTES = 16  # the longest original token that the input expansion looks for
EXPANSION_TYPE = "tpu_"  # in front of a family's model_type: transformers refuses it rather than drop the expansion


@dataclass(frozen=True)
class Family:
    """What sets a model_type apart."""

    model_type: str
    architecture: str
    activation_key: str
    defaults: Mapping[str, Any]  # keys that only some families have, and what transformers takes where one is missing
    norm_plus_one: bool
    post_norms: bool
    scaled_embedding: bool  # embeddings are multiplied by sqrt(hidden_size)
    norms: Mapping[str, str]  # tensors of a layer -> our fields, beyond those that all families share


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    activation_key="hidden_act",
    defaults={"hidden_act": "silu", "tie_word_embeddings": False},
    norm_plus_one=False,
    post_norms=False,
    scaled_embedding=False,
    norms={"post_attention_layernorm": "mlp_norm"},
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    activation_key="hidden_activation",
    defaults={
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "head_dim": 256,
        "query_pre_attn_scalar": 256.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "layer_types": None,
    },
    norm_plus_one=True,
    post_norms=True,
    scaled_embedding=True,
    norms={
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
)
FAMILIES = (LLAMA, GEMMA2)

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}  # that tensors are stored in
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = ("sliding_attention", "full_attention")

# Keys of config.json that do not change what a model computes from given tokens.
HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "name_or_path",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)

# Tensor of a folder -> our field, and how many leading dimensions of the field are the inputs of a product. torch keeps
# matrices as [out, in], we as [*in, *out]; 0: kept as it is. "layers." stands for the stacked blocks and the last one.
SHARED = {
    "model.embed_tokens.weight": ("embed", 0),
    "model.expand_embed_tokens.weight": ("expansion", 0),
    "model.norm.weight": ("norm", 0),
    "lm_head.weight": ("unembed", 0),
    "model.layers.{}.input_layernorm.weight": ("layers.attention_norm", 0),
    "model.layers.{}.self_attn.q_proj.weight": ("layers.attention.q", 1),
    "model.layers.{}.self_attn.k_proj.weight": ("layers.attention.k", 1),
    "model.layers.{}.self_attn.v_proj.weight": ("layers.attention.v", 1),
    "model.layers.{}.self_attn.o_proj.weight": ("layers.attention.o", 2),
    "model.layers.{}.mlp.gate_proj.weight": ("layers.mlp.gate", 1),
    "model.layers.{}.mlp.up_proj.weight": ("layers.mlp.up", 1),
    "model.layers.{}.mlp.down_proj.weight": ("layers.mlp.down", 1),
}


# --- config.json --------------------------------------------------------------------------------------------------


class _Keys:
    """The keys of a JSON object of config.json, checked as they are read; `done` refuses what nobody asked for."""

    def __init__(self, place: str, values: object):
        if not isinstance(values, dict):
            raise InputError(f"{place} is not a JSON object: take it from the original model")
        self.place, self.values, self.seen = place, values, set()

    def wrong(self, key: str, why: str) -> InputError:
        return InputError(f"{self.place}: {key!r} is {self.values.get(key)!r}, {why}")

    def read(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return self.values.get(key, default)

    def _needed(self, key: str, default: Any) -> Any:
        value = self.read(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.place} lacks {key!r}: take the file from the original model")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._needed(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "which is not a positive whole number: correct it")
        return value

    def number(self, key: str, default: float | None = None, optional: bool = False) -> float | None:
        """A positive number; with `optional`, null means that there is none and not that the key is missing."""
        if optional and self.read(key, default) is None:
            return None
        value = self._needed(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, "which is not a positive number: correct it")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._needed(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "which is neither true nor false: correct it")
        return value

    def done(self, harmless: frozenset[str] = frozenset()) -> None:
        for key, value in self.values.items():
            if value and key not in self.seen and key not in harmless:
                raise self.wrong(key, "a setting that is not implemented: use a model without it")


def config_values(config: ModelConfig, dtype: Literal["bfloat16", "float32"]) -> dict[str, Any]:
    """The values of config.json for an architecture, in spellings that transformers 4 and 5 read.

    Raises InputError for an architecture that no family can express.
    """
    for family in FAMILIES:
        values = _values(family, config, dtype)
        try:
            read = parse_config("the configuration", values)[1]
        except InputError:
            continue
        if math.isclose(read.scale, config.scale) and replace(read, query_scale=config.query_scale) == config:
            return values
    raise InputError(f"no Hugging Face model type expresses this architecture: change it to one of a family ({config})")


def parse_config(place: str, values: object) -> tuple[Family, ModelConfig]:
    """The family and the architecture that the values of a config.json describe; `place` is what messages call it.

    Raises InputError, naming the key, for what is not implemented.
    """
    keys = _Keys(place, values)
    model_type = keys.read("model_type")
    families = {prefix + family.model_type: family for prefix in ("", EXPANSION_TYPE) for family in FAMILIES}
    if model_type not in list(families):
        raise keys.wrong("model_type", f"which is not implemented: use a model of type {' or '.join(families)}")
    family = families[model_type]
    defaults = family.defaults

    def optional_number(key):
        return keys.number(key, defaults[key], optional=True) if key in defaults else None

    embed, layers, heads = (keys.whole(key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = heads if keys.read("num_key_value_heads") is None else keys.whole("num_key_value_heads")
    if heads % kv_heads:
        raise keys.wrong("num_key_value_heads", f"which does not divide the {heads} attention heads: correct it")
    head_dim = keys.whole("head_dim", defaults.get("head_dim", embed // heads))  # old Llama files lack it
    if head_dim % 2:
        raise keys.wrong("head_dim", "an odd number, which rotary embeddings cannot halve: correct it")
    activation = keys.read(family.activation_key, defaults[family.activation_key])
    if activation not in list(ACTIVATIONS):
        raise keys.wrong(family.activation_key, f"which is not implemented: only {' and '.join(ACTIVATIONS)} are")
    if keys.read("hidden_act", activation) != activation:  # the first Gemma 2 files have both spellings
        raise keys.wrong("hidden_act", f"but {family.activation_key!r} is {activation!r}: make them agree")
    rope_theta, rope_scaling = _rope(keys)
    query_scalar = optional_number("query_pre_attn_scalar")
    if keys.flag("expand_input_ids", False):
        expansion_size = keys.whole("expand_input_ids_vocab_size")
        if keys.whole("expand_input_ids_maxlen", EXPANSION_BYTES) != EXPANSION_BYTES:
            raise keys.wrong("expand_input_ids_maxlen", f"which is not implemented: only {EXPANSION_BYTES} is")
    else:
        expansion_size = None
    config = ModelConfig(
        vocab_size=keys.whole("vocab_size"),
        embed=embed,
        mlp=keys.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=_windows(keys, layers) if "layer_types" in defaults else (None,) * layers,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        query_scale=None if query_scalar is None else 1.0 / math.sqrt(query_scalar),
        attention_softcap=optional_number("attn_logit_softcapping"),
        final_softcap=optional_number("final_logit_softcapping"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        norm_plus_one=family.norm_plus_one,
        post_norms=family.post_norms,
        activation=ACTIVATIONS[activation],
        embedding_scale=math.sqrt(embed) if family.scaled_embedding else 1.0,
        tied=keys.flag("tie_word_embeddings", defaults["tie_word_embeddings"]),
        expansion_size=expansion_size,
    )
    keys.done(HARMLESS)
    return family, config


def _rope(keys: _Keys) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    theta = keys.number("rope_theta", 10_000.0)
    found = [
        _rope_parameters(_Keys(f"{keys.place}, {key!r}", keys.values[key]), theta)
        for key in ("rope_scaling", "rope_parameters")
        if keys.read(key) is not None
    ]
    if not found:
        return theta, None
    if found[0] != found[-1] or ("rope_theta" in keys.values and found[0][0] != theta):
        raise InputError(f"{keys.place} gives rotary settings twice, and they differ: keep 'rope_parameters' alone")
    return found[0]


def _rope_parameters(keys: _Keys, theta: float) -> tuple[float, RopeScaling | None]:
    kind = keys.read("rope_type", keys.read("type", "default"))  # "type": the older spelling
    theta = keys.number("rope_theta", theta)
    if keys.number("partial_rotary_factor", 1.0) != 1.0:
        raise keys.wrong("partial_rotary_factor", "which is not implemented: use a model without it")
    if kind == "default":
        keys.done()
        return theta, None
    if kind != "llama3":
        raise InputError(f"{keys.place}: the rotary type {kind!r} is not implemented: only 'default' and 'llama3' are")
    scaling = RopeScaling(
        factor=keys.number("factor"),
        low_freq_factor=keys.number("low_freq_factor"),
        high_freq_factor=keys.number("high_freq_factor"),
        original_length=keys.whole("original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise keys.wrong("low_freq_factor", "which is not below 'high_freq_factor': correct it")
    keys.done(frozenset({"type"}))
    return theta, scaling


def _windows(keys: _Keys, layers: int) -> tuple[int | None, ...]:
    """Of each layer the number of positions that it sees; without `layer_types` the even layers slide."""
    kinds = keys.read("layer_types")
    if kinds is None:
        kinds = [LAYER_TYPES[layer % 2] for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in LAYER_TYPES for kind in kinds):
        raise keys.wrong("layer_types", f"which is not a list of {layers} times {' or '.join(LAYER_TYPES)}: correct it")
    keys.read("sliding_window")  # of no meaning, and maybe null, where no layer slides
    window = keys.whole("sliding_window", GEMMA2.defaults["sliding_window"]) if LAYER_TYPES[0] in kinds else None
    return tuple(window if kind == LAYER_TYPES[0] else None for kind in kinds)


def _values(family: Family, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The inverse of `_config` for a config that this family can express."""
    scaling = config.rope_scaling
    window = next((window for window in config.windows if window), None)
    own = {
        family.activation_key: {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
        "tie_word_embeddings": config.tied,
        "head_dim": config.head_dim,
        "query_pre_attn_scalar": round(config.scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "sliding_window": window,
        "layer_types": [LAYER_TYPES[window is None] for window in config.windows],
    }
    values = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        },
        "attention_bias": False,
        **{key: value for key, value in own.items() if key == "head_dim" or key in family.defaults},
        "torch_dtype": dtype,
    }
    if config.expansion_size is not None:
        values |= {
            "architectures": ["TPU" + family.architecture],
            "model_type": EXPANSION_TYPE + family.model_type,
            "expand_input_ids": True,
            "expand_input_ids_maxlen": EXPANSION_BYTES,
            "expand_input_ids_vocab_size": config.expansion_size,
        }
    return values


# --- tensors ------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a tensor of a folder belongs in a Transformer."""

    leaf: str  # path of the array, for example "blocks.attention.q"
    layer: int | None  # index along the layer axis of stacked blocks
    shape: tuple[int, ...]  # ours, without the layer axis
    inputs: int  # see SHARED

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if not self.inputs:
            return self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def cut_shape(self, index: tuple[slice, ...]) -> tuple[int, ...]:
        """The shape of the part `index` of our array."""
        return tuple(len(range(size)[cut]) for size, cut in zip(self.shape, index, strict=True))

    def stored_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where in the stored tensor the part `index` of our array lies.

        Raises ValueError for steps, and for a cut of any but the first of the dimensions that are stored as one (of
        heads and head_dim: heads), since no slice of the stored tensor is such a part.
        """
        dims = range(len(self.shape))
        result = []
        for first, *others in (dims[self.inputs :], dims[: self.inputs]) if self.inputs else ([dim] for dim in dims):
            span = range(self.shape[first])[index[first]]
            if span.step != 1 or any(range(self.shape[dim])[index[dim]] != range(self.shape[dim]) for dim in others):
                raise ValueError(f"{self.leaf}, cut as {index}, is no slice of a tensor of shape {self.stored_shape}")
            inner = math.prod(self.shape[dim] for dim in others)
            result.append(slice(span.start * inner, span.stop * inner))
        return tuple(result)

    def from_stored(self, tensor: Any, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """The part `index` of our array; `tensor` is the stored one, or what reads slices of it from a file."""
        part = tensor[self.stored_index(index)]
        return part.T.reshape(self.cut_shape(index)) if self.inputs else part

    def to_stored(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        return array.reshape(self.stored_shape[::-1]).T if self.inputs else array


def places(family: Family, config: ModelConfig) -> dict[str, Place]:
    """Name of each tensor of a folder -> its place in the Transformer: one table for both directions."""
    names = {field: (name, inputs) for name, (field, inputs) in SHARED.items()}
    for norm, field in family.norms.items():
        names[f"layers.{field}"] = (f"model.layers.{{}}.{norm}.weight", 0)
    result = {}
    for leaf, array in leaves(abstract(config)).items():
        part, _, field = leaf.partition(".")
        if part == "blocks":
            name, inputs = names[f"layers.{field}"]
            for layer in range(config.layers - 1):
                result[name.format(layer)] = Place(leaf, layer, array.shape[1:], inputs)
        else:
            name, inputs = names[f"layers.{field}" if part == "last" else leaf]
            result[name.format(config.layers - 1)] = Place(leaf, None, array.shape, inputs)
    return result


def leaves(model: Transformer) -> dict[str, Any]:
    """Path of each array, for example "blocks.attention.q" -> the array, in the order of the tree."""
    found, _ = jax.tree_util.tree_flatten_with_path(model)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def from_leaves(config: ModelConfig, arrays: Mapping[str, Any]) -> Transformer:
    """The Transformer of this architecture that has these `leaves`."""
    shapes = abstract(config)
    wanted = {leaf: array.shape for leaf, array in leaves(shapes).items()}
    given = {leaf: array.shape for leaf, array in arrays.items()}
    if given != wanted:
        raise ValueError(f"the arrays have the shapes {given} where the architecture has {wanted}")
    return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[leaf] for leaf in wanted])


def abstract(config: ModelConfig) -> Transformer:
    """A Transformer of shapes."""
    return eqx.filter_eval_shape(initialize, config, jax.random.key(0))
