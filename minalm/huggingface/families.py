"""Model families of Hugging Face: config.json <-> ModelConfig, and the names of tensors <-> our fields. No files here.

A family is data: its keys, its defaults, its tensors. The spellings of transformers 4 and 5 are read. A key is refused
by name if it is not understood, unless it is known to leave the computation alone, or switched off (null, false, 0).
What a family's own class in transformers computes is right. Keys that the class does not read are refused where one
could expect something of them. Places in transformers are those of version 5.24.0.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from minalm.errors import InputError
from minalm.models.config import (
    FULL_ATTENTION,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    Rope,
    YarnScaling,
)
from minalm.models.transformer import abstract, leaves
from minalm.tokenization.files import shortened
from minalm.tokenization.special_tokens import MOST_IDS

EXPANSION_BYTES = 16  # the longest original token that the input expansion looks for


# Put before the model_type of a model with an expansion, as in the published byte models. Without the code that comes
# along, transformers then refuses the model; it would otherwise drop the expansion.
EXPANSION_TYPE = "tpu_"


MODELING = "modeling_minalm"  # that code


Tensor = TypeVar("Tensor")


# The rotary types that transformers has for most families, and their names in config.json.
ROPE_KINDS = {kind: kind for kind in ("default", "linear", "llama3", "yarn")}


@dataclass(frozen=True)
class Family:
    """What is special about a model_type."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]  # keys of this family, and what transformers takes where one is missing
    norms: Mapping[str, str]  # tensors of a layer -> our fields, beyond those that all families share
    slides: Callable[["Keys", int], bool] | None = None  # whether a layer has a window where no `layer_types` say so
    local_theta: str | None = None  # the key of the rotary theta of layers with a window, which have no scaling
    activation_key: str = "hidden_act"
    norm_plus_one: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: Literal["head", "all"] | None = None
    qkv_bias: bool = False
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    rope_kinds: Mapping[str, str] = field(default_factory=lambda: ROPE_KINDS)  # name in config.json -> rotary type
    fused: Mapping[str, str] = field(default_factory=dict)  # our fields that share a tensor, in the order of its rows
    prefixes: Mapping[str, str | None] = field(default_factory=dict)  # of tensors -> our own; None: of no use for text
    ignored: frozenset[str] = frozenset()  # keys that are in its files, and that its class does not read
    never_applied: frozenset[str] = frozenset()  # keys that must be null, since its class does nothing with them

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


# A bias of all products of attention, and of the MLP (LlamaAttention and LlamaMLP, models/llama/modeling_llama.py).
BIASES = {"attention_bias": False, "mlp_bias": False}


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


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    GEMMA
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    # The files of the models that also see leave out what is as here.
    | {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8},
    BOTH_NORMS,
    slides=lambda keys, layer: (layer + 1) % keys.whole("sliding_window_pattern", 6) != 0,
    local_theta="rope_local_base_freq",
    activation_key="hidden_activation",
    norm_plus_one=True,
    post_norms=True,
    qk_norm="head",
    scaled_embedding=True,
    # Gemma3Attention keeps it and does not hand it to the attention (models/gemma3/modeling_gemma3.py, `forward`).
    never_applied=frozenset({"attn_logit_softcapping"}),
)


# The text part of a Gemma 3 that also sees (4B and larger); it is written as a gemma3_text. Its settings are the
# `text_config` of config.json. Gemma3ForConditionalGeneration does not cap logits, though Gemma3ForCausalLM does.
GEMMA3_SEEING = replace(
    GEMMA3,
    prefixes={
        "language_model.model.": "model.",  # in files
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",  # in memory, and so in files that were not written by transformers
        "vision_tower.": None,
        "model.vision_tower.": None,
        "multi_modal_projector.": None,
        "model.multi_modal_projector.": None,
    },
    never_applied=GEMMA3.never_applied | {"final_logit_softcapping"},
)


FAMILIES = (
    Family("llama", "LlamaForCausalLM", PLAIN | BIASES, PRE_NORMS),
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
    GEMMA3,
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
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        PLAIN
        | BIASES
        | {"tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 2e6, "no_rope_layers": None}
        | {"sliding_window": None, "use_sliding_window": False, "layer_types": None},
        PRE_NORMS,
        slides=lambda keys, layer: not _is_rotated(keys, layer),
        ignored=frozenset({"max_window_layers"}),
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        PLAIN
        | {"rms_norm_eps": 1e-5, "sliding_window": None, "partial_rotary_factor": 1.0}
        | {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        PRE_NORMS,
        slides=lambda keys, layer: True,
        # Phi3Config takes "su" and "yarn", which old files say, as "longrope".
        rope_kinds={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
        fused={
            "attention.q": "self_attn.qkv_proj",
            "attention.k": "self_attn.qkv_proj",
            "attention.v": "self_attn.qkv_proj",
            "mlp.gate": "mlp.gate_up_proj",
            "mlp.up": "mlp.gate_up_proj",
        },
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        PLAIN
        | BIASES
        | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
        | {"attention_multiplier": 1.0},
        PRE_NORMS,
        ignored=frozenset({"attention_dropout"}),  # 0.1 in Granite 3.0, for whoever trains it with transformers
    ),
)


DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}  # that tensors are stored in


ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


LAYER_TYPES = ("sliding_attention", "full_attention")


# Keys of config.json that do not change what a model computes from given tokens, by the reason. No others are let pass.
HARMLESS_BY_REASON = {
    "notes on the file, and what made it": """
        _commit_hash _from_model_config _name_or_path architectures auto_map dtype is_llama_config model_type
        name_or_path torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version""",
    "which code computes the same, and what it also hands out": """
        _attn_implementation _attn_implementation_autoset _experts_implementation _flash_attn_2_enabled
        attn_implementation chunk_size_feed_forward output_attentions output_hidden_states pretraining_tp return_dict
        torchscript use_bfloat16 use_cache use_flash_attention use_flash_attn use_return_dict""",
    "the tokenizer's, which has files of its own": """
        bos_token_id decoder_start_token_id eos_token_id mask_token_id pad_token_id prefix processor_class sep_token_id
        tokenizer_class unk_token_id""",
    "how to generate: transformers moves these keys to generation_config.json, or drops them": """
        assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens cache_implementation
        diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
        epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
        length_penalty max_length max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens
        num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
        repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p
        typical_p""",
    "how long texts were or may be; rotary scalings that depend on it compare it with their own number": """
        context_length max_position_embeddings max_seq_len max_seq_length max_sequence_length model_max_length n_ctx
        n_positions original_max_position_embeddings seq_length sequence_length tokenizer_model_max_length""",
    "how a model was or would be trained": """
        finetuning_task gradient_checkpointing initializer_factor initializer_range neftune_noise_alpha""",
    "of classifiers": "id2label label2id num_labels problem_type task_specific_params",
    "the pattern that `layer_types` was made of, once that is written": "_sliding_window_pattern",
}
HARMLESS = frozenset(key for keys in HARMLESS_BY_REASON.values() for key in keys.split())


# Keys that mean nothing at one value, and that no class of ours reads: Falcon 3's (a llama), and Phi 4 mini's.
NEUTRAL = {"activation": "swiglu", "full_attn_mod": 1, "interpolate_factor": 1}


# Beside the `text_config` of a model that also sees: how images become tokens, and which tokens these are.
OF_IMAGES = frozenset(
    """
    boi_token_id boi_token_index eoi_token_id eoi_token_index image_token_id image_token_index mm_tokens_per_image
    vision_config
    """.split()
)


OLMO3_THETA = 500_000.0  # Olmo3Config, `convert_rope_params_to_dict`: one object has used up `rope_theta`


LONGROPE_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")


# What a flat `rope_parameters` has. Beside the objects of the two kinds of layers transformers reads none of it.
FLAT_ROPE = frozenset(
    """
    attention_factor beta_fast beta_slow factor high_freq_factor low_freq_factor mscale mscale_all_dim
    original_max_position_embeddings partial_rotary_factor rope_theta rope_type type
    """.split()
)


# Tensor of a folder -> our field, and how many leading dimensions of the field are the inputs of a product. torch keeps
# matrices as [out, in], we as [*in, *out]; 0: kept as it is; FLAT: all dimensions are stored as one. "layers." stands for the stacked blocks and the last one.
FLAT = -1
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
    "model.layers.{}.self_attn.o_proj.bias": ("layers.attention.o_bias", 0),
    "model.layers.{}.self_attn.q_norm.weight": ("layers.attention.q_norm", 0),
    "model.layers.{}.self_attn.k_norm.weight": ("layers.attention.k_norm", 0),
    "model.layers.{}.mlp.gate_proj.weight": ("layers.mlp.gate", 1),
    "model.layers.{}.mlp.up_proj.weight": ("layers.mlp.up", 1),
    "model.layers.{}.mlp.down_proj.weight": ("layers.mlp.down", 1),
    "model.layers.{}.mlp.gate_proj.bias": ("layers.mlp.gate_bias", 0),
    "model.layers.{}.mlp.up_proj.bias": ("layers.mlp.up_bias", 0),
    "model.layers.{}.mlp.down_proj.bias": ("layers.mlp.down_bias", 0),
}


# The largest values that are let pass, far above those of any model: nothing is built of more. Others: LARGEST_NUMBER.
LARGEST = {
    "num_hidden_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "vocab_size": MOST_IDS,
    "expand_input_ids_vocab_size": MOST_IDS,
    # Bolmo's (bolmo.py)
    "num_local_encoder_layers": 1 << 10,
    "num_local_decoder_layers": 1 << 10,
    "local_intermediate_size": 1 << 20,
    "num_local_heads": 1 << 12,
    "subword_vocab_size": MOST_IDS,
}
LARGEST_NUMBER = FULL_ATTENTION  # int32 holds it, and the sum of two
SMALLEST_FLOAT, LARGEST_FLOAT = (float(value) for value in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


# --- config.json --------------------------------------------------------------------------------------------------


class Keys:
    """The keys of a JSON object in config.json, checked as they are read; `done` refuses those that were not read."""

    def __init__(self, source: str, values: object):
        if not isinstance(values, dict):
            raise InputError(f"{source} is not a JSON object: take it from the original model")
        self.source, self.values, self.seen = source, values, set()

    def wrong(self, key: str, why: str) -> InputError:
        return InputError(f"{self.source}: {key!r} is {shortened(self.values.get(key))}, {why}")

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
        """A whole number, also 4096.0; with `optional`, null means that there is none, not that the key is missing."""
        if optional and self.read(key, default) is None:
            return None
        value = self._needed(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, f"which is not a whole number of at least {least}: correct it")
        if value > (most := LARGEST.get(key, LARGEST_NUMBER)):
            raise self.wrong(key, f"which is more than {most:,}, as no model has it: correct it")
        return value

    def number(
        self, key: str, default: float | None = None, optional: bool = False, most: float = LARGEST_FLOAT
    ) -> float | None:
        """A positive number of at most `most` that float32 holds; `optional` as in `whole`."""
        if optional and self.read(key, default) is None:
            return None
        value = self._needed(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, "which is not a positive number: correct it")
        if not SMALLEST_FLOAT <= value <= most:
            raise self.wrong(key, f"which is not between {SMALLEST_FLOAT:.1g} and {most:.1g}: correct it")
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` positive numbers."""
        values = self._needed(key, None)
        if not isinstance(values, list) or len(values) != length:
            raise self.wrong(key, f"which is no list of {length} numbers: correct it")
        return tuple(Keys(self.source, {key: value}).number(key) for value in values)

    def flag(self, key: str, default: bool) -> bool:
        value = self._needed(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "which is neither true nor false: correct it")
        return value

    def done(self, harmless: frozenset[str] = frozenset()) -> None:
        for key, value in self.values.items():
            if value and key not in self.seen | harmless and NEUTRAL.get(key) != value:
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
        key: value
        for key, value in text_values("config.json", values).items()
        if key in HARMLESS | {"expand_input_ids_dict"} and key not in ours
    }


def text_values(source: str, values: Any) -> Any:
    """The values of a config.json; of a model that also sees (Gemma 3), those of its text part.

    `source` is what messages call the file. Raises InputError for what is not implemented beside the text part.
    """
    if not isinstance(values, dict) or values.get("model_type") != "gemma3":
        return values
    whole = Keys(source, values)
    text = Keys(f"{source}, 'text_config'", whole.read("text_config"))
    if text.read("model_type", GEMMA3.model_type) != GEMMA3.model_type:
        raise text.wrong("model_type", f"which is not implemented here: only {GEMMA3.model_type} is")
    tied = whole.flag("tie_word_embeddings", True)
    if text.flag("tie_word_embeddings", tied) != tied:
        raise text.wrong("tie_word_embeddings", f"but outside of 'text_config' it is {tied}: make them agree")
    whole.seen.add("model_type")
    whole.done(HARMLESS | OF_IMAGES)
    around = {key: value for key, value in values.items() if key in HARMLESS and value is not None}  # ids of tokens
    return text.values | around | {"model_type": GEMMA3.model_type, "tie_word_embeddings": tied}


def _family_of(keys: Keys, sees: bool) -> Family:
    """The family that config.json names. Raises InputError for another one, and for keys that it never applies."""
    model_type = keys.read("model_type")
    families = {prefix + family.model_type: family for prefix in ("", EXPANSION_TYPE) for family in FAMILIES}
    if model_type not in list(families):
        raise keys.wrong("model_type", f"which is not implemented: use a model of type {' or '.join(families)}")
    family = GEMMA3_SEEING if sees else families[model_type]
    for key in sorted(family.never_applied):
        if keys.read(key) is not None:
            raise keys.wrong(key, "which transformers never applies in this family: set it to null to have the same")
    return family


def longest_text(source: str, values: Mapping[str, Any]) -> int | None:
    """`max_position_embeddings`, of which nothing is computed. Raises InputError if it is no number of positions."""
    return Keys(source, values).whole("max_position_embeddings", optional=True)


def parse_config(source: str, values: object) -> tuple[Family, ModelConfig]:
    """The family and the architecture that the values of a config.json describe; `source` is what messages call it.

    Raises InputError, naming the key, for what is not implemented.
    """
    keys = Keys(source, text_values(source, values))
    family = _family_of(keys, sees=isinstance(values, dict) and values.get("model_type") == "gemma3")
    defaults = family.defaults

    def size(key):
        return keys.whole(key, defaults.get(key))

    def optional_number(key):
        return keys.number(key, defaults[key], optional=True) if key in defaults else None

    def multiplier(key):
        return keys.number(key, defaults[key]) if key in defaults else 1.0

    def flag(key):
        return key in defaults and keys.flag(key, defaults[key])

    embed, layers = size("hidden_size"), size("num_hidden_layers")
    heads, kv_heads, head_dim = _heads(keys, family, embed)
    activation = _activation(keys, family)
    windows = _windows(keys, family, layers)
    rope, local_rope = _ropes(keys, family, head_dim)
    query_scalar = optional_number("query_pre_attn_scalar")
    query_scale = None if query_scalar is None else 1.0 / math.sqrt(query_scalar)
    if "attention_multiplier" in defaults:
        query_scale = multiplier("attention_multiplier")
    unrotated = [layer for layer in range(layers) if "no_rope_layers" in defaults and not _is_rotated(keys, layer)]
    qk_norm = family.qk_norm
    if keys.values["model_type"] == EXPANSION_TYPE + "llama" and keys.flag("add_qk_norm", False):
        qk_norm = "head"  # the published byte models' name for Qwen 3's norm of queries and keys
    config = ModelConfig(
        vocab_size=size("vocab_size"),
        embed=embed,
        mlp=size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        windows=windows,
        rope=rope,
        local_rope=local_rope if any(windows) and local_rope != rope else None,
        unrotated_layers=tuple(unrotated),
        query_scale=query_scale,
        attention_softcap=optional_number("attn_logit_softcapping"),
        final_softcap=optional_number("final_logit_softcapping"),
        norm_eps=keys.number("rms_norm_eps", defaults["rms_norm_eps"], most=1.0),
        norm_plus_one=family.norm_plus_one,
        pre_norms=family.pre_norms,
        post_norms=family.post_norms,
        qk_norm=qk_norm,
        qkv_bias=family.qkv_bias or flag("attention_bias"),
        o_bias=flag("attention_bias"),
        mlp_bias=flag("mlp_bias"),
        activation=activation,
        embedding_scale=math.sqrt(embed) if family.scaled_embedding else multiplier("embedding_multiplier"),
        residual_scale=multiplier("residual_multiplier"),
        logits_divisor=multiplier("logits_scaling"),
        tied=keys.flag("tie_word_embeddings", defaults["tie_word_embeddings"]),
        expansion_size=_expansion_size(keys),
        model_type=family.model_type,
    )
    keys.done(HARMLESS | family.ignored)
    return family, config


def _heads(keys: Keys, family: Family, embed: int) -> tuple[int, int, int]:
    """The numbers of heads and of key and value heads, and the channels of one."""
    heads = keys.whole("num_attention_heads", family.defaults.get("num_attention_heads"))
    usual = heads if "num_key_value_heads" in keys.values else family.defaults.get("num_key_value_heads", heads)
    kv_heads = keys.whole("num_key_value_heads", usual)  # null: as many as heads
    if heads % kv_heads:
        raise keys.wrong("num_key_value_heads", f"which does not divide the {heads} attention heads: correct it")
    head_dim = keys.whole("head_dim", family.defaults.get("head_dim", embed // heads))  # old Llama files lack it
    if head_dim % 2:
        raise keys.wrong("head_dim", "an odd number, which rotary embeddings cannot halve: correct it")
    return heads, kv_heads, head_dim


def _activation(keys: Keys, family: Family) -> str:
    """Our name of the MLP's activation."""
    activation = keys.read(family.activation_key, family.defaults[family.activation_key])
    if activation not in list(ACTIVATIONS):
        raise keys.wrong(family.activation_key, f"which is not implemented: only {' and '.join(ACTIVATIONS)} are")
    if keys.read("hidden_act", activation) != activation:  # the first Gemma 2 files have both spellings
        raise keys.wrong("hidden_act", f"but {family.activation_key!r} is {activation!r}: make them agree")
    return ACTIVATIONS[activation]


def _expansion_size(keys: Keys) -> int | None:
    """Rows of the table of a byte model's input expansion; None if it has none."""
    keys.seen |= {"expand_input_ids_vocab_size", "expand_input_ids_maxlen"}  # without an expansion they mean nothing
    keys.seen.add("expand_input_ids_dict")  # tokenization/suffixes.py reads it
    if not keys.flag("expand_input_ids", False):
        return None
    size = keys.whole("expand_input_ids_vocab_size")
    if keys.whole("expand_input_ids_maxlen", EXPANSION_BYTES) != EXPANSION_BYTES:
        raise keys.wrong("expand_input_ids_maxlen", f"which is not implemented: only {EXPANSION_BYTES} is")
    return size


def _is_rotated(keys: Keys, layer: int) -> bool:
    """Whether queries and keys of a layer know their positions (SmolLM 3)."""
    listed, interval = keys.read("no_rope_layers"), keys.whole("no_rope_layer_interval", 4)
    if listed is None:
        return (layer + 1) % interval != 0
    if not isinstance(listed, list) or len(listed) <= layer or listed[layer] not in (0, 1):
        raise keys.wrong("no_rope_layers", "which has no 0 or 1 for each layer: correct it")
    return bool(listed[layer])


def _ropes(keys: Keys, family: Family, head_dim: int) -> tuple[Rope, Rope]:
    """The rotary settings of layers without and with a window.

    transformers 4 has `rope_theta` and `rope_scaling`. In a family with two kinds of layers these belong to layers
    without a window, and another key is the theta of layers with one. transformers 5 has `rope_parameters`, which in
    such a family holds one object for each kind.
    """
    theta = keys.number("rope_theta", optional=True)
    parameters = sliding = keys.read("rope_parameters")
    nested = family.local_theta is not None and parameters is not None
    if nested:
        both = Keys(f"{keys.source}, 'rope_parameters'", parameters)
        sliding, parameters = (both.read(kind) for kind in LAYER_TYPES)
        if not all(isinstance(own, dict) and own.get("rope_theta") is not None for own in (sliding, parameters)):
            # Gemma3TextConfig and Olmo3Config, `convert_rope_params_to_dict`. They save what they took beside the rest.
            raise InputError(
                f"{both.source} does not give a 'rope_theta' for each of {' and '.join(LAYER_TYPES)}, and transformers "
                "would take its own, whatever else is there: write down what the model was trained with"
            )
        if both.read("truncate", True) is not True:  # read here even by layers whose own object says otherwise
            raise both.wrong("truncate", "which is not implemented: only true is")
        both.done(FLAT_ROPE)
    default = family.defaults.get("rope_theta", 10_000.0)
    ropes = [
        _rope(Keys(f"{keys.source}, {key!r}", values), theta or default, keys, family, head_dim)
        for key, values in (("rope_scaling", keys.read("rope_scaling")), ("rope_parameters", parameters))
        if values is not None
    ] or [_rope(Keys(keys.source, {}), theta or default, keys, family, head_dim)]
    if ropes[0] != ropes[-1] or theta not in (None, ropes[0].theta):
        raise InputError(f"{keys.source} gives rotary settings twice, and they differ: keep 'rope_parameters' alone")
    if family.local_theta is None:
        return ropes[0], ropes[0]

    own_key = family.local_theta != "rope_theta"
    if not own_key and not nested and ropes[0].theta != OLMO3_THETA:
        raise keys.wrong(
            "rope_theta",
            f"which transformers 5 does not take for layers with a window, but {OLMO3_THETA:.0f}: write "
            "'rope_parameters' with the 'rope_theta' of both kinds of layers",
        )
    local = Rope(keys.number(family.local_theta, family.defaults[family.local_theta]) if own_key else ropes[0].theta)
    if nested:
        source = f"{keys.source}, 'rope_parameters', 'sliding_attention'"
        found = _rope(Keys(source, sliding), local.theta, keys, family, head_dim)
        if own_key and keys.values.get(family.local_theta) not in (None, found.theta):
            raise keys.wrong(family.local_theta, "but 'rope_parameters' says another number: keep one of them")
        local = found
    return ropes[0], local


def _rotated_share(keys: Keys, whole: Keys, family: Family, head_dim: int) -> float:
    """The share of a head's channels that is rotated; arguments as of `_rope`."""
    around = whole.number("partial_rotary_factor", optional=True)
    share = keys.number("partial_rotary_factor", around or 1.0)
    channels = int(share * head_dim)
    if share != 1.0 and "partial_rotary_factor" not in family.defaults:
        holder = keys if "partial_rotary_factor" in keys.values else whole
        raise holder.wrong("partial_rotary_factor", "which is not implemented: use a model without it")
    if around not in (None, share):
        raise whole.wrong("partial_rotary_factor", f"but the rotary settings say {share}: make them agree")
    if share > 1.0 or channels % 2 or not channels:
        raise whole.wrong("partial_rotary_factor", f"here {share}, which leaves no even number of {head_dim} channels")
    return share


def _yarn(keys: Keys, original_length: int) -> YarnScaling:
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
        original_length=original_length,
        truncate=keys.flag("truncate", True),
    )
    if scaling.beta_slow >= scaling.beta_fast:
        raise keys.wrong("beta_slow", "which is not below 'beta_fast': correct it")
    return scaling


def _rope(keys: Keys, theta: float | None, whole: Keys, family: Family, head_dim: int) -> Rope:
    """The rotary settings in one JSON object; `whole` is the config.json around it."""
    named = keys.read("rope_type", keys.read("type", "default"))  # "type": the older spelling
    kind = family.rope_kinds.get(named) if isinstance(named, str) else None
    theta = keys.number("rope_theta", theta)
    share = _rotated_share(keys, whole, family, head_dim)
    channels = int(share * head_dim)

    def original_length(default):
        # transformers 4 reads the one in the rotary settings, transformers 5 the one beside them
        # (modeling_rope_utils.py, `standardize_rope_params`).
        key = "original_max_position_embeddings"
        length = keys.whole(key, default, least=2)
        if whole.values.get(key, family.defaults.get(key)) not in (None, length):
            raise whole.wrong(key, f"but the rotary settings say {length}: make them agree")
        return length

    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(keys.number("factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=keys.number("factor"),
            low_freq_factor=keys.number("low_freq_factor"),
            high_freq_factor=keys.number("high_freq_factor"),
            original_length=original_length(None),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise keys.wrong("low_freq_factor", "which is not below 'high_freq_factor': correct it")
    elif kind == "yarn":
        scaling = _yarn(keys, original_length(whole.values.get("max_position_embeddings")))
        if family.local_theta is not None and not scaling.truncate:
            # `_compute_yarn_parameters` looks for it beside the objects of the kinds (modeling_rope_utils.py).
            raise keys.wrong("truncate", "which transformers 5 does not read in this family: set it to true")
    elif kind == "longrope":
        lengths = {key: whole.whole(key, family.defaults[key]) for key in LONGROPE_LENGTHS}
        longest, original = lengths["max_position_embeddings"], lengths["original_max_position_embeddings"]
        factor = longest / original_length(original)
        if keys.number("factor", factor) != factor:
            raise keys.wrong("factor", f"but {longest} / {original} positions make {factor}: make them agree")
        scaling = LongRopeScaling(
            short_factors=keys.numbers("short_factor", channels // 2),
            long_factors=keys.numbers("long_factor", channels // 2),
            attention_factor=keys.number("attention_factor", _longrope_attention(factor, original)),
            factor=factor,
            original_length=original,
        )
    else:
        kinds = " and ".join(map(repr, family.rope_kinds))
        raise InputError(
            f"{keys.source}: the rotary type {named!r} is not implemented for {family.model_type}: only {kinds} are"
        )
    keys.done(frozenset({"type"}))
    return Rope(theta, scaling, share)


def _longrope_attention(factor: float, original_length: int) -> float:
    """The attention factor where none is given (arXiv 2402.13753, section 3.3; `_compute_longrope_parameters`)."""
    return math.sqrt(1.0 + math.log(factor) / math.log(original_length)) if factor > 1.0 else 1.0


def _windows(keys: Keys, family: Family, layers: int) -> tuple[int | None, ...]:
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
    written = window
    if window is None and "layer_types" in family.defaults and "use_sliding_window" not in family.defaults:
        written = family.defaults["sliding_window"]  # transformers makes the mask of a window, and asks for a number
    own = {
        family.activation_key: {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation],
        "tie_word_embeddings": config.tied,
        "query_pre_attn_scalar": round(config.scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "sliding_window": written,
        "use_sliding_window": window is not None,
        "layer_types": [LAYER_TYPES[window is None] for window in config.windows],
        "rope_local_base_freq": local_rope.theta,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "attention_multiplier": config.scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logits_divisor,
        "no_rope_layers": [int(layer not in config.unrotated_layers) for layer in range(config.layers)],
        "partial_rotary_factor": config.rope.share,
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
    values |= _rope_values(family, config)
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


def _rope_values(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The rotary settings, but for `rope_theta`."""
    values: dict[str, Any] = {}
    scaling = _scaling_values(config.rope)
    if isinstance(config.rope.scaling, LongRopeScaling):
        original = config.rope.scaling.original_length
        lengths = round(config.rope.scaling.factor * original), original
        values |= zip(LONGROPE_LENGTHS, lengths)  # they say the attention factor
    if family.local_theta == "rope_theta":  # transformers 5 would take its own theta for layers with a window
        kinds = zip(LAYER_TYPES, (config.local_rope or config.rope, config.rope))
        values["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": rope.theta, **_scaling_values(rope)} for kind, rope in kinds
        }
    if scaling and config.expansion_size is not None and family.local_theta in (None, "rope_theta"):
        # To load the tokenizer, transformers 5 reads config.json as that of any model and fails on `rope_scaling`.
        # transformers 4 knows nothing else: the code that comes along tells it.
        values.setdefault("rope_parameters", {"rope_theta": config.rope.theta, **scaling})
    elif isinstance(config.rope.scaling, LongRopeScaling):  # Phi3Config of transformers 4 takes just these keys
        also = {key: scaling[key] for key in ("short_factor", "long_factor", "attention_factor") if key in scaling}
        values["rope_scaling"] = {"type": "longrope", **also}
    elif scaling:
        values["rope_scaling"] = scaling
    return values


def _scaling_values(rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling
    if scaling is None:
        return {}
    if isinstance(scaling, LongRopeScaling):
        values = {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "original_max_position_embeddings": scaling.original_length,
        }
        if scaling.attention_factor != _longrope_attention(scaling.factor, scaling.original_length):
            values["attention_factor"] = scaling.attention_factor
        return values
    names = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}
    values = {"rope_type": names[type(scaling)], **asdict(scaling)}
    if "original_length" in values:
        values["original_max_position_embeddings"] = values.pop("original_length")
    return values


# --- tensors ------------------------------------------------------------------------------------------------------


class TensorMap(NamedTuple):
    """Which part of a Transformer a tensor of a folder is, or some of its rows are, and how it is stored there."""

    leaf: str  # path of the array, for example "blocks.attention.q"
    layer: int | None  # index along the layer axis of stacked blocks
    shape: tuple[int, ...]  # ours, without the layer axis
    inputs: int  # see SHARED
    first_row: int = 0  # of the tensor; more than 0 in one that holds several parts (Phi 3)
    rows: tuple[int, ...] | None = None  # of each of our rows the stored one, where these have another order (Bolmo)

    @property
    def _stored_dims(self) -> tuple[range, ...]:
        """Of each dimension of the tensor, which of ours it is."""
        dims = range(len(self.shape))
        if self.inputs == FLAT:
            return (dims,)
        return (dims[self.inputs :], dims[: self.inputs]) if self.inputs else tuple(dims[n : n + 1] for n in dims)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor, if it holds no other parts."""
        return tuple(math.prod(self.shape[dim] for dim in dims) for dims in self._stored_dims)

    def cut_shape(self, index: tuple[slice, ...]) -> tuple[int, ...]:
        """The shape of the part `index` of our array."""
        return tuple(len(range(size)[cut]) for size, cut in zip(self.shape, index, strict=True))

    def stored_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where in the stored tensor the part `index` of our array lies.

        Raises ValueError for steps, and for a cut of any but the first of the dimensions that are stored as one (of
        heads and head_dim: heads), since no slice of the stored tensor is such a part.
        """
        result = []
        for first, *others in self._stored_dims:
            span = range(self.shape[first])[index[first]]
            if span.step != 1 or any(range(self.shape[dim])[index[dim]] != range(self.shape[dim]) for dim in others):
                raise ValueError(f"{self.leaf}, cut as {index}, is no slice of a tensor of shape {self.stored_shape}")
            inner = math.prod(self.shape[dim] for dim in others)
            before = 0 if result else self.first_row
            result.append(slice(before + span.start * inner, before + span.stop * inner))
        return tuple(result)

    def from_stored(self, tensor: Any, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """The part `index` of our array; `tensor` is the stored one, or what reads slices of it from a file."""
        if self.rows is not None:  # of small tables
            return tensor[:][list(self.rows)][index]
        part = tensor[self.stored_index(index)]
        return part.T.reshape(self.cut_shape(index)) if self.inputs else part

    def to_stored(self, array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        if self.rows is not None:
            return array[np.argsort(self.rows)]
        return array.reshape(self.stored_shape[::-1]).T if self.inputs else array


Parts = tuple[TensorMap, ...]  # what a tensor holds, one part behind the other along its rows; mostly there is one


def stored_shape(parts: Parts) -> tuple[int, ...]:
    """The shape of a tensor that holds these parts."""
    _, *columns = parts[0].stored_shape
    return sum(part.stored_shape[0] for part in parts), *columns


def tensor_maps(family: Family, config: ModelConfig) -> dict[str, Parts]:
    """Name of each tensor of a folder -> its parts of the Transformer: one table for both directions."""
    names = {ours: (name, inputs) for name, (ours, inputs) in SHARED.items()}
    for norm, field_name in family.norms.items():
        names[f"layers.{field_name}"] = (f"model.layers.{{}}.{norm}.weight", 0)
    for field_name, tensor in family.fused.items():
        names[f"layers.{field_name}"] = (f"model.layers.{{}}.{tensor}.weight", 1)
    result: dict[str, Parts] = {}

    def add(name, leaf, layer, shape, inputs):
        before = result.get(name, ())
        first_row = stored_shape(before)[0] if before else 0
        result[name] = (*before, TensorMap(leaf, layer, shape, inputs, first_row))

    for leaf, array in leaves(abstract(config)).items():
        part, _, field_name = leaf.partition(".")
        if part == "blocks":
            name, inputs = names[f"layers.{field_name}"]
            for layer in range(config.layers - 1):
                add(name.format(layer), leaf, layer, array.shape[1:], inputs)
        else:
            name, inputs = names[f"layers.{field_name}" if part == "last" else leaf]
            add(name.format(config.layers - 1), leaf, None, array.shape, inputs)
    return result


def text_tensors(source: str, family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder by our names for them, without those that a model also sees with.

    Raises InputError if two tensors are the same one.
    """
    result = {}
    for theirs, tensor in tensors.items():
        prefix = next((prefix for prefix in family.prefixes if theirs.startswith(prefix)), "")
        ours = family.prefixes.get(prefix, "")
        if ours is None:
            continue
        name = ours + theirs.removeprefix(prefix)
        if name in result:
            raise InputError(f"{source} holds the tensor {theirs} twice, under two names: remove one of them")
        result[name] = tensor
    return result
