"""Model families of Hugging Face: config.json <-> ModelConfig, and the names of tensors <-> our fields. No files here.

A family is data: its keys, its defaults, its tensors. The spellings of transformers 4 and 5 are read. A key is refused
by name if it is not understood, unless it is known to leave the computation alone, or switched off (null, false, 0).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from minalm.errors import InputError
from minalm.models.config import LinearScaling, Llama3Scaling, ModelConfig, Rope, YarnScaling
from minalm.models.transformer import abstract, leaves

EXPANSION_BYTES = 16  # the longest original token that the input expansion looks for


# Put before the model_type of a model with an expansion, as in the published byte models. Without the code that comes
# along, transformers then refuses the model; it would otherwise drop the expansion.
EXPANSION_TYPE = "tpu_"


MODELING = "modeling_minalm"  # that code


@dataclass(frozen=True)
class Family:
    """What is special about a model_type."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]  # keys of this family, and what transformers takes where one is missing
    norms: Mapping[str, str]  # tensors of a layer -> our fields, beyond those that all families share
    slides: Callable[["_Keys", int], bool] | None = None  # whether a layer has a window where no `layer_types` say so
    local_theta: str | None = None  # the key of the rotary theta of layers with a window, which have no scaling
    activation_key: str = "hidden_act"
    norm_plus_one: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: Literal["head", "all"] | None = None
    qkv_bias: bool = False
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)

    @property
    def config_class(self) -> str:
        """transformers' name for its settings."""
        text = "Text" if self.model_type.endswith("_text") else ""
        return self.architecture.removesuffix("ForCausalLM") + text + "Config"


PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


POST_NORMS = {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}


BOTH_NORMS = POST_NORMS | {"input_layernorm": "attention_norm", "pre_feedforward_layernorm": "mlp_norm"}


PLAIN = {"hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6}


QWEN = PLAIN | {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "layer_types": None}


GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window": 4096,
    "layer_types": None,
}


FAMILIES = (
    Family("llama", "LlamaForCausalLM", PLAIN, PRE_NORMS),
    Family(
        "mistral",
        "MistralForCausalLM",
        PLAIN | {"num_key_value_heads": 8, "sliding_window": 4096},
        PRE_NORMS,
        slides=lambda keys, layer: True,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        QWEN,
        PRE_NORMS,
        slides=lambda keys, layer: layer >= keys.whole("max_window_layers", 28, least=0),
        qkv_bias=True,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        QWEN | {"head_dim": 128},
        PRE_NORMS,
        slides=lambda keys, layer: layer >= keys.whole("max_window_layers", 28, least=0),
        qk_norm="head",
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        BOTH_NORMS,
        slides=lambda keys, layer: layer % 2 == 0,
        activation_key="hidden_activation",
        norm_plus_one=True,
        post_norms=True,
        scaled_embedding=True,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        BOTH_NORMS,
        slides=lambda keys, layer: (layer + 1) % keys.whole("sliding_window_pattern", 6) != 0,
        local_theta="rope_local_base_freq",
        activation_key="hidden_activation",
        norm_plus_one=True,
        post_norms=True,
        qk_norm="head",
        scaled_embedding=True,
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        PLAIN | {"rms_norm_eps": 1e-5},
        POST_NORMS,
        pre_norms=False,
        post_norms=True,
        qk_norm="all",
    ),
    Family(
        "olmo3",
        "Olmo3ForCausalLM",
        # Versions of transformers take different thetas where the key is missing, so it must not be.
        PLAIN | {"rms_norm_eps": 1e-5, "rope_theta": None, "sliding_window": 4096, "layer_types": None},
        POST_NORMS,
        slides=lambda keys, layer: (layer + 1) % 4 != 0,
        local_theta="rope_theta",
        pre_norms=False,
        post_norms=True,
        qk_norm="all",
    ),
)


DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}  # that tensors are stored in


ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


LAYER_TYPES = ("sliding_attention", "full_attention")


# Keys of config.json that do not change what a model computes from given tokens.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path _sliding_window_pattern architectures auto_map
    attn_implementation bos_token_id cache_implementation chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_llama_config label2id max_position_embeddings model_type name_or_path pad_token_id
    pretraining_tp problem_type return_dict torch_dtype transformers.js_config transformers_version unsloth_fixed
    unsloth_version use_cache
    """.split()
)


# Tensor of a folder -> our field, and how many leading dimensions of the field are the inputs of a product. torch keeps
# matrices as [out, in], we as [*in, *out]; 0: kept as it is. "layers." stands for the stacked blocks and the last one.
SHARED = {
    "model.embed_tokens.weight": ("embed", 0),
    "model.expand_embed_tokens.weight": ("expansion", 0),
    "model.norm.weight": ("norm", 0),
    "lm_head.weight": ("unembed", 0),
    "model.layers.{}.self_attn.q_proj.weight": ("layers.attention.q", 1),
    "model.layers.{}.self_attn.k_proj.weight": ("layers.attention.k", 1),
    "model.layers.{}.self_attn.v_proj.weight": ("layers.attention.v", 1),
    "model.layers.{}.self_attn.o_proj.weight": ("layers.attention.o", 2),
    "model.layers.{}.self_attn.q_proj.bias": ("layers.attention.q_bias", 0),
    "model.layers.{}.self_attn.k_proj.bias": ("layers.attention.k_bias", 0),
    "model.layers.{}.self_attn.v_proj.bias": ("layers.attention.v_bias", 0),
    "model.layers.{}.self_attn.q_norm.weight": ("layers.attention.q_norm", 0),
    "model.layers.{}.self_attn.k_norm.weight": ("layers.attention.k_norm", 0),
    "model.layers.{}.mlp.gate_proj.weight": ("layers.mlp.gate", 1),
    "model.layers.{}.mlp.up_proj.weight": ("layers.mlp.up", 1),
    "model.layers.{}.mlp.down_proj.weight": ("layers.mlp.down", 1),
}


# --- config.json --------------------------------------------------------------------------------------------------


class _Keys:
    """The keys of a JSON object in config.json, checked as they are read; `done` refuses those that were not read."""

    def __init__(self, source: str, values: object):
        if not isinstance(values, dict):
            raise InputError(f"{source} is not a JSON object: take it from the original model")
        self.source, self.values, self.seen = source, values, set()

    def wrong(self, key: str, why: str) -> InputError:
        return InputError(f"{self.source}: {key!r} is {self.values.get(key)!r}, {why}")

    def read(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return self.values.get(key, default)

    def _needed(self, key: str, default: Any) -> Any:
        value = self.read(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.source} lacks {key!r}: take the file from the original model")
        return value

    def whole(self, key: str, default: int | None = None, least: int = 1, optional: bool = False) -> int | None:
        """A whole number; with `optional`, null means that there is none and not that the key is missing."""
        if optional and self.read(key, default) is None:
            return None
        value = self._needed(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, f"which is not a whole number of at least {least}: correct it")
        return value

    def number(self, key: str, default: float | None = None, optional: bool = False) -> float | None:
        """A positive number; `optional` as in `whole`."""
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
    for family in sorted(FAMILIES, key=lambda family: family.model_type != config.model_type):  # its own one first
        values = _values(family, config, dtype)
        try:
            read = parse_config("the configuration", values)[1]
        except InputError:
            continue
        same = replace(read, query_scale=config.query_scale, model_type=config.model_type)
        if math.isclose(read.scale, config.scale) and same == config:
            return values
    raise InputError(f"no Hugging Face model type expresses this architecture: change it to one of a family ({config})")


def informative(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that a copy of the model keeps, although they change nothing that it computes."""
    ours = ("architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version")
    return {
        key: value for key, value in values.items() if key in HARMLESS | {"expand_input_ids_dict"} and key not in ours
    }


def parse_config(source: str, values: object) -> tuple[Family, ModelConfig]:
    """The family and the architecture that the values of a config.json describe; `source` is what messages call it.

    Raises InputError, naming the key, for what is not implemented.
    """
    keys = _Keys(source, values)
    model_type = keys.read("model_type")
    families = {prefix + family.model_type: family for prefix in ("", EXPANSION_TYPE) for family in FAMILIES}
    if model_type not in list(families):
        raise keys.wrong("model_type", f"which is not implemented: use a model of type {' or '.join(families)}")
    family = families[model_type]
    defaults = family.defaults

    def optional_number(key):
        return keys.number(key, defaults[key], optional=True) if key in defaults else None

    embed, layers = keys.whole("hidden_size"), keys.whole("num_hidden_layers")
    heads, kv_heads, head_dim = _heads(keys, family, embed)
    activation = _activation(keys, family)
    windows = _windows(keys, family, layers)
    rope, local_rope = _ropes(keys, family)
    query_scalar = optional_number("query_pre_attn_scalar")
    qk_norm = family.qk_norm
    if model_type == EXPANSION_TYPE + "llama" and keys.flag("add_qk_norm", False):
        qk_norm = "head"  # the published byte models' name for Qwen 3's norm of queries and keys
    config = ModelConfig(
        vocab_size=keys.whole("vocab_size"),
        embed=embed,
        mlp=keys.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=windows,
        rope=rope,
        local_rope=local_rope if any(windows) and local_rope != rope else None,
        query_scale=None if query_scalar is None else 1.0 / math.sqrt(query_scalar),
        attention_softcap=optional_number("attn_logit_softcapping"),
        final_softcap=optional_number("final_logit_softcapping"),
        norm_eps=keys.number("rms_norm_eps", defaults["rms_norm_eps"]),
        norm_plus_one=family.norm_plus_one,
        pre_norms=family.pre_norms,
        post_norms=family.post_norms,
        qk_norm=qk_norm,
        qkv_bias=family.qkv_bias,
        activation=activation,
        embedding_scale=math.sqrt(embed) if family.scaled_embedding else 1.0,
        tied=keys.flag("tie_word_embeddings", defaults["tie_word_embeddings"]),
        expansion_size=_expansion_size(keys),
        model_type=family.model_type,
    )
    keys.done(HARMLESS)
    return family, config


def _heads(keys: _Keys, family: Family, embed: int) -> tuple[int, int, int]:
    """The numbers of heads and of key and value heads, and the channels of one."""
    heads = keys.whole("num_attention_heads")
    usual = heads if "num_key_value_heads" in keys.values else family.defaults.get("num_key_value_heads", heads)
    kv_heads = keys.whole("num_key_value_heads", usual)  # null: as many as heads
    if heads % kv_heads:
        raise keys.wrong("num_key_value_heads", f"which does not divide the {heads} attention heads: correct it")
    head_dim = keys.whole("head_dim", family.defaults.get("head_dim", embed // heads))  # old Llama files lack it
    if head_dim % 2:
        raise keys.wrong("head_dim", "an odd number, which rotary embeddings cannot halve: correct it")
    return heads, kv_heads, head_dim


def _activation(keys: _Keys, family: Family) -> str:
    """Our name of the MLP's activation."""
    activation = keys.read(family.activation_key, family.defaults[family.activation_key])
    if activation not in list(ACTIVATIONS):
        raise keys.wrong(family.activation_key, f"which is not implemented: only {' and '.join(ACTIVATIONS)} are")
    if keys.read("hidden_act", activation) != activation:  # the first Gemma 2 files have both spellings
        raise keys.wrong("hidden_act", f"but {family.activation_key!r} is {activation!r}: make them agree")
    return ACTIVATIONS[activation]


def _expansion_size(keys: _Keys) -> int | None:
    """Rows of the table of a byte model's input expansion; None if it has none."""
    keys.seen |= {"expand_input_ids_vocab_size", "expand_input_ids_maxlen"}  # without an expansion they mean nothing
    keys.seen.add("expand_input_ids_dict")  # tokenization/suffixes.py reads it
    if not keys.flag("expand_input_ids", False):
        return None
    size = keys.whole("expand_input_ids_vocab_size")
    if keys.whole("expand_input_ids_maxlen", EXPANSION_BYTES) != EXPANSION_BYTES:
        raise keys.wrong("expand_input_ids_maxlen", f"which is not implemented: only {EXPANSION_BYTES} is")
    return size


def _ropes(keys: _Keys, family: Family) -> tuple[Rope, Rope]:
    """The rotary settings of layers without and with a window.

    transformers 4 has `rope_theta` and `rope_scaling`. In a family with two kinds of layers these belong to layers
    without a window, and another key is the theta of layers with one. transformers 5 has `rope_parameters`, which in
    such a family holds one object for each kind.
    """
    theta = keys.number("rope_theta", optional=True)
    parameters = sliding = keys.read("rope_parameters")
    nested = family.local_theta is not None and isinstance(parameters, dict) and parameters.keys() & set(LAYER_TYPES)
    if nested:
        both = _Keys(f"{keys.source}, 'rope_parameters'", parameters)
        sliding, parameters = (both.read(kind) for kind in LAYER_TYPES)
        both.done()
    default = family.defaults.get("rope_theta", 10_000.0)
    ropes = [
        _rope(_Keys(f"{keys.source}, {key!r}", values), theta or default, keys)
        for key, values in (("rope_scaling", keys.read("rope_scaling")), ("rope_parameters", parameters))
        if values is not None
    ] or [Rope(keys.number("rope_theta", default))]
    if ropes[0] != ropes[-1] or theta not in (None, ropes[0].theta):
        raise InputError(f"{keys.source} gives rotary settings twice, and they differ: keep 'rope_parameters' alone")
    if family.local_theta is None:
        return ropes[0], ropes[0]

    own_key = family.local_theta != "rope_theta"
    local = Rope(keys.number(family.local_theta, family.defaults[family.local_theta]) if own_key else ropes[0].theta)
    if nested and sliding is not None:
        found = _rope(_Keys(f"{keys.source}, 'rope_parameters', 'sliding_attention'", sliding), local.theta, keys)
        if own_key and keys.values.get(family.local_theta) not in (None, found.theta):
            raise keys.wrong(family.local_theta, "but 'rope_parameters' says another number: keep one of them")
        local = found
    return ropes[0], local


def _rope(keys: _Keys, theta: float | None, whole: _Keys) -> Rope:
    """The rotary settings in one JSON object; `whole` is the config.json around it."""
    kind = keys.read("rope_type", keys.read("type", "default"))  # "type": the older spelling
    theta = keys.number("rope_theta", theta)
    if keys.number("partial_rotary_factor", 1.0) != 1.0:
        raise keys.wrong("partial_rotary_factor", "which is not implemented: use a model without it")
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(keys.number("factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=keys.number("factor"),
            low_freq_factor=keys.number("low_freq_factor"),
            high_freq_factor=keys.number("high_freq_factor"),
            original_length=keys.whole("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise keys.wrong("low_freq_factor", "which is not below 'high_freq_factor': correct it")
    elif kind == "yarn":
        factor = keys.number("factor")
        mscales = [keys.number(key, optional=True) for key in ("mscale", "mscale_all_dim")]

        def magnitude(scale):  # arXiv 2309.00071, equation 22
            return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

        usual = magnitude(mscales[0]) / magnitude(mscales[1]) if all(mscales) else magnitude(1.0)
        scaling = YarnScaling(
            factor=factor,
            attention_factor=keys.number("attention_factor", usual),
            beta_fast=keys.number("beta_fast", 32.0),
            beta_slow=keys.number("beta_slow", 1.0),
            original_length=keys.whole("original_max_position_embeddings", whole.values.get("max_position_embeddings")),
            truncate=keys.flag("truncate", True),
        )
        if scaling.beta_slow >= scaling.beta_fast:
            raise keys.wrong("beta_slow", "which is not below 'beta_fast': correct it")
    else:
        kinds = "'default', 'linear', 'llama3' and 'yarn'"
        raise InputError(f"{keys.source}: the rotary type {kind!r} is not implemented: only {kinds} are")
    keys.done(frozenset({"type"}))
    return Rope(theta, scaling)


def _windows(keys: _Keys, family: Family, layers: int) -> tuple[int | None, ...]:
    """How many positions each layer sees; None: all."""
    if family.slides is None:
        return (None,) * layers
    slides = [family.slides(keys, layer) for layer in range(layers)]
    window = keys.whole("sliding_window", family.defaults["sliding_window"], optional=True)
    if "use_sliding_window" in family.defaults and not keys.flag("use_sliding_window", False):
        window = None
    kinds = keys.read("layer_types") if "layer_types" in family.defaults else None
    if kinds is None:
        kinds = [LAYER_TYPES[not (window and slide)] for slide in slides]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in LAYER_TYPES for kind in kinds):
        raise keys.wrong("layer_types", f"which is not a list of {layers} times {' or '.join(LAYER_TYPES)}: correct it")
    if LAYER_TYPES[0] in kinds and window is None:
        raise keys.wrong("layer_types", "but no 'sliding_window' is in use: make them agree")
    return tuple(window if kind == LAYER_TYPES[0] else None for kind in kinds)


def _values(family: Family, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The inverse of `parse_config` for a config that this family can express."""
    local_rope = config.local_rope or config.rope
    window = next((window for window in config.windows if window), None)
    own = {
        family.activation_key: {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
        "tie_word_embeddings": config.tied,
        "query_pre_attn_scalar": round(config.scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": [LAYER_TYPES[window is None] for window in config.windows],
        "rope_local_base_freq": local_rope.theta,
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
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "attention_bias": False,
        **{key: value for key, value in own.items() if key in family.defaults},
        "torch_dtype": dtype,
    }
    scaling = _scaling_values(config.rope)
    if family.local_theta == "rope_theta":  # transformers 5 would take its own theta for layers with a window
        kinds = zip(LAYER_TYPES, (local_rope, config.rope))
        values["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": rope.theta, **_scaling_values(rope)} for kind, rope in kinds
        }
    if scaling and config.expansion_size is not None and family.local_theta in (None, "rope_theta"):
        # To load the tokenizer, transformers 5 reads config.json as that of any model and fails on `rope_scaling`.
        # transformers 4 knows nothing else: the code that comes along tells it.
        values.setdefault("rope_parameters", {"rope_theta": config.rope.theta, **scaling})
    elif scaling:
        values["rope_scaling"] = scaling
    if config.expansion_size is not None:
        values |= {
            "architectures": ["TPU" + family.architecture],
            "auto_map": {
                "AutoConfig": f"{MODELING}.TPU{family.config_class}",
                "AutoModelForCausalLM": f"{MODELING}.TPU{family.architecture}",
            },
            "model_type": EXPANSION_TYPE + family.model_type,
            "expand_input_ids": True,
            "expand_input_ids_maxlen": EXPANSION_BYTES,
            "expand_input_ids_vocab_size": config.expansion_size,
        }
    return values


def _scaling_values(rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling
    if scaling is None:
        return {}
    names = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}
    values = {"rope_type": names[type(scaling)], **asdict(scaling)}
    if "original_length" in values:
        values["original_max_position_embeddings"] = values.pop("original_length")
    return values


# --- tensors ------------------------------------------------------------------------------------------------------


class TensorMap(NamedTuple):
    """Which part of a Transformer a tensor of a folder is, and how it is stored there."""

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


def tensor_maps(family: Family, config: ModelConfig) -> dict[str, TensorMap]:
    """Name of each tensor of a folder -> its part of the Transformer: one table for both directions."""
    names = {field: (name, inputs) for name, (field, inputs) in SHARED.items()}
    for norm, field in family.norms.items():
        names[f"layers.{field}"] = (f"model.layers.{{}}.{norm}.weight", 0)
    result = {}
    for leaf, array in leaves(abstract(config)).items():
        part, _, field = leaf.partition(".")
        if part == "blocks":
            name, inputs = names[f"layers.{field}"]
            for layer in range(config.layers - 1):
                result[name.format(layer)] = TensorMap(leaf, layer, array.shape[1:], inputs)
        else:
            name, inputs = names[f"layers.{field}" if part == "last" else leaf]
            result[name.format(config.layers - 1)] = TensorMap(leaf, None, array.shape, inputs)
    return result
