"""ModelConfig: the architecture of a decoder-only transformer; a family is a value of it. BolmoConfig: one around it."""

import dataclasses
import math
from typing import Literal

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int

FULL_ATTENTION = 2**30  # a window longer than any sequence


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor (`rope_type: linear`; Gemma 3)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling of the slow rotary frequencies (Llama 3.1 release, `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2).

    Channels that turn more than `beta_fast` times within the original length keep their frequency. For those that turn
    fewer than `beta_slow` times it is divided by the factor. In between, the two are interpolated.
    """

    factor: float
    attention_factor: float  # multiplies queries and keys
    beta_fast: float
    beta_slow: float
    original_length: int
    truncate: bool = True  # the two channels are rounded outwards


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor of its own for each frequency, in two sets (Phi 3).

    Sequences within the original length have the short ones, longer sequences the long ones, from their first position
    on. The length is that of the arrays, padding included, as in a batch of transformers; in generation, that of the
    row's own text, which is read anew where it grows past the original length (generation/engine.py).
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float  # multiplies queries and keys, whatever the length
    factor: float  # times the original length: the longest sequence. Nothing is computed by it
    original_length: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer."""

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None
    share: float = 1.0  # of the channels of a head that are turned: the first ones

    def channels(self, head_dim: int) -> int:
        """How many of a head's channels are turned."""
        return int(self.share * head_dim)

    def inverse_frequencies(self, head_dim: int, length: int = 1) -> Float[np.ndarray, " half"]:
        """Radians per position of each rotary channel pair, after scaling, in sequences of this length."""
        head_dim = self.channels(head_dim)
        frequencies = 1.0 / self.theta ** (np.arange(0, head_dim, 2) / head_dim)
        scaling = self.scaling
        if isinstance(scaling, LongRopeScaling):
            long = length > scaling.original_length
            return (frequencies / (scaling.long_factors if long else scaling.short_factors)).astype(np.float32)
        if scaling is None:
            share = np.ones_like(frequencies)  # of each frequency, how much is kept rather than divided by the factor
        elif isinstance(scaling, LinearScaling):
            share = np.zeros_like(frequencies)
        elif isinstance(scaling, Llama3Scaling):
            turns = scaling.original_length * frequencies / (2 * math.pi)  # full turns within the original length
            share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        else:
            first, last = (self._channel(head_dim, turns) for turns in (scaling.beta_fast, scaling.beta_slow))
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            share = 1.0 - (np.arange(head_dim // 2) - first) / ((last - first) or 0.001)
        share = np.clip(share, 0.0, 1.0)
        divided = frequencies if scaling is None else frequencies / scaling.factor
        return (frequencies * share + divided * (1.0 - share)).astype(np.float32)

    def _channel(self, head_dim: int, turns: float) -> float:
        """The channel pair that turns so many times within YaRN's original length."""
        length = self.scaling.original_length
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    @property
    def magnitude(self) -> float:
        """The factor on queries and keys."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling | LongRopeScaling) else 1.0


class LayerSettings(eqx.Module):
    """What differs from layer to layer, as arrays that a scan runs over."""

    window: Int[Array | np.ndarray, "*stack"]
    rope: Int[Array | np.ndarray, "*stack"] | None  # index into `ModelConfig.ropes`; None: there is only one


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. Every switch is a value here; no code asks for the family."""

    vocab_size: int  # rows of the embedding table, padding included
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # per layer: how many positions a query sees, itself included; None: all
    rope: Rope = Rope()
    local_rope: Rope | None = None  # of layers with a window; None: the same as everywhere
    unrotated_layers: tuple[int, ...] = ()  # whose queries and keys know no positions (NoPE)
    query_scale: float | None = None  # factor on the scores; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    final_softcap: float | None = None
    norm_eps: float = 1e-5
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight
    pre_norms: bool = True  # a norm before attention and before the MLP
    post_norms: bool = False  # a norm after attention and after the MLP
    qk_norm: Literal["head", "all"] | None = None  # a norm of queries and keys: of each head, or over all heads
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # factor on what attention and MLP add to the states
    logits_divisor: float = 1.0
    tied: bool = True  # the unembedding is the embedding table
    expansion_size: int | None = None  # rows of the original table added at input (byte students); None: no expansion
    model_type: str | None = None  # Hugging Face's name for it, for the way back; nothing is computed by it

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim) if self.query_scale is None else self.query_scale

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The distinct rotary embeddings of the layers; None: not rotated."""
        return tuple(dict.fromkeys(map(self.rope_of, range(self.layers))))

    def layer_settings(self) -> tuple[LayerSettings, LayerSettings]:
        """Of the stacked layers 0..n-2, and of the last one."""
        ropes = self.ropes
        settings = LayerSettings(
            window=np.array([window or FULL_ATTENTION for window in self.windows], np.int32),
            rope=np.array([*map(ropes.index, map(self.rope_of, range(self.layers)))], np.int32)
            if len(ropes) > 1
            else None,
        )
        stacked = jax.tree.map(lambda array: array[:-1], settings)
        return stacked, jax.tree.map(lambda array: np.asarray(array[-1]), settings)

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary embedding of a layer; None: not rotated."""
        if layer in self.unrotated_layers:
            return None
        return self.local_rope if self.windows[layer] and self.local_rope else self.rope


@dataclasses.dataclass(frozen=True)
class BolmoConfig:
    """The architecture of a Bolmo: a byte encoder and a byte decoder around the blocks of a subword model."""

    vocab_size: int  # bytes and special tokens; as many ids again are those of a byte that also ends a patch
    expansion_size: int  # rows of the subword model's table, added at input
    blocks: ModelConfig  # of the subword model, whose blocks read the patches; nothing reads its tables
    heads: int  # of the mLSTM layers
    mlp: int  # hidden units of the byte blocks
    encoder_layers: int = 1
    decoder_layers: int = 4
    # Of the norms between the encoder, the subword model's blocks and the decoder; all others have that of the blocks.
    local_norm_eps: float = 1e-5

    @property
    def embed(self) -> int:
        return self.blocks.embed

    @property
    def key_dim(self) -> int:
        """Channels of a head's queries and keys; its values have twice as many."""
        return self.embed // 2 // self.heads

    @property
    def value_dim(self) -> int:
        return self.embed // self.heads

    @property
    def norm_eps(self) -> float:
        return self.blocks.norm_eps
