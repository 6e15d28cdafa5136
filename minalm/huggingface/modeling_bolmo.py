"""Bolmo for Hugging Face transformers (4.57 and later): copied into a model's folder.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs this file; minalm itself never imports it.
Bytes are read by an mLSTM encoder; where a *patch* ends, the blocks of a subword model (transformers' own class for its
family) take a step; an mLSTM decoder predicts the next byte from both. Only torch is needed, on any device.

Ids are 4 special ones, 256 bytes, and all of them again: an id of the second half also ends a patch. Of a prompt, an
encoder with one byte of lookahead predicts where patches end, but for the last byte, of which the decoder says it. In
what is generated, the decoder has chosen the ids, and so the ends of patches: the predictor is not used.

Rows may be padded on either side. Inside, each is moved to the left, and what is padding changes no state.
"""

import inspect
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

SPECIALS = 4  # <pad> <bos> <eos> <bpe_token_end>; the byte 0 is id 4
PLAIN = SPECIALS + 256  # ids that end no patch; as many follow that do
NAMES = ("<pad>", "<bos>", "<eos>", "<bpe_token_end>")
NORM_EPS, CELL_EPS, GATE_CAP = 1e-6, 1e-6, 15.0  # of the mLSTM, in no config.json
State = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # of an mLSTM: C [batch, head, dk, dv], n [batch, head, dk], m [batch, head]
CHUNK = 64  # positions of an mLSTM that are computed at once
NEVER = -1e30  # an input gate that lets nothing in
OWN_KEYS = (  # of config.json; the others are those of the trunk's family
    "add_expanded_embeddings",
    "architectures",
    "auto_map",
    "boundary_predictor_lookahead",
    "boundary_threshold",
    "bos_token_id",
    "eos_token_id",
    "local_intermediate_size",
    "local_rms_norm_eps",
    "model_type",
    "num_local_decoder_layers",
    "num_local_encoder_layers",
    "num_local_heads",
    "pad_token_id",
    "subword_bytes",
    "subword_vocab_size",
    "tokenizer_config",
    "trunk_model_type",
    "transformers_version",
    "vocab_size",
    "_name_or_path",
)
# Families whose trunks take one mask for each kind of layer; the others take one for all.
BY_KIND = ("olmo3", "gemma2", "gemma3_text", "qwen2", "qwen3", "smollm3")
# transformers 5 renamed an argument, and warns of the old name.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"


class BolmoConfig(transformers.PretrainedConfig):
    """config.json: what is published, `subword_bytes`, and `trunk_model_type` where the trunk is not that of OLMo 3.

    `subword_bytes` has the bytes of each original token, as hexadecimal digits, or names of special ones; or null.
    """

    model_type = "bolmo"

    def __init__(self, **keys):
        defaults = {
            "vocab_size": 2 * PLAIN,
            "trunk_model_type": "olmo3",
            "add_expanded_embeddings": True,
            "boundary_predictor_lookahead": 1,
            "boundary_threshold": "sample:0",
            "num_local_encoder_layers": 1,
            "num_local_decoder_layers": 4,
            "num_local_heads": 16,
            "local_rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }
        keys = {**defaults, **keys}
        if keys.get("rope_scaling", ...) is None:  # published files say that there is none
            del keys["rope_scaling"]
        super().__init__(**keys)

    def trunk(self) -> transformers.PretrainedConfig:
        """The settings of the trunk, for its own class; its table of tokens has one row, since none is read."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        values = {key: value for key, value in self.to_dict().items() if key not in OWN_KEYS}
        if self.trunk_model_type == "olmo3" and values.get("rope_parameters") is None:
            # transformers 5 wants them for both kinds of layers, and else takes a theta of its own.
            rope = {"rope_type": "default", "rope_theta": values.get("rope_theta", 10_000.0)}
            scaled = rope | (values.get("rope_scaling") or {})
            values["rope_parameters"] = {"sliding_attention": rope, "full_attention": scaled}
        return CONFIG_MAPPING[self.trunk_model_type](
            **values, vocab_size=1, bos_token_id=None, eos_token_id=None, pad_token_id=None
        )


# --- mLSTM ------------------------------------------------------------------------------------------------------------


def mlstm_step(
    state: State, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor, f: torch.Tensor
) -> tuple[State, torch.Tensor]:
    """One position: q, k [batch, head, dk], v [batch, head, dv], capped gates [batch, head] -> state, h like v.

    All float32. Equations: Beck et al. 2024, arXiv 2405.04517, in the stabilized form.
    """
    C, n, m = state
    keep = nn.functional.logsigmoid(f) + m
    m = torch.maximum(keep, i)
    keep, write = (keep - m).exp(), (i - m).exp()
    C = keep[..., None, None] * C + write[..., None, None] * k[..., :, None] * v[..., None, :]
    n = keep[..., None] * n + write[..., None] * k
    q = q * q.shape[-1] ** -0.5
    weight = torch.maximum((n * q).sum(-1).abs(), (-m).exp()) + CELL_EPS
    return (C, n, m), torch.einsum("bhkv,bhk->bhv", C, q) / weight[..., None]


def mlstm_chunk(
    state: State, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, i: torch.Tensor, log_f: torch.Tensor
) -> tuple[State, torch.Tensor]:
    """Some positions at once: q, k [batch, head, time, dk], ..., gates [batch, head, time] -> state, h."""
    C, n, m = state
    b = log_f.cumsum(-1)
    A = b[..., :, None] - b[..., None, :] + i[..., None, :]
    time = A.shape[-1]
    A = A.masked_fill(torch.ones(time, time, dtype=torch.bool, device=A.device).triu(1), float("-inf"))
    M = torch.maximum(b + m[..., None], A.amax(-1))
    q = q * q.shape[-1] ** -0.5
    S = (q @ k.transpose(-1, -2)) * (A - M[..., None]).exp()
    before = q * (b + m[..., None] - M).exp()[..., None]
    weight = ((before @ n[..., None])[..., 0] + S.sum(-1)).abs()
    h = (before @ C + S @ v) / (torch.maximum(weight, (-M).exp()) + CELL_EPS)[..., None]
    a = b[..., -1:] - b + i
    last = torch.maximum(b[..., -1] + m, a.amax(-1))
    keep, write = (b[..., -1] + m - last).exp(), (a - last[..., None]).exp()
    C = keep[..., None, None] * C + (write[..., None] * k).transpose(-1, -2) @ v
    return (C, keep[..., None] * n + (write[..., None] * k).sum(-2), last), h


class BolmoRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (self.weight.float() * y).to(x.dtype)


class BolmoHeadLayerNorm(nn.Module):
    """LayerNorm of each head, and then a weight for each channel."""

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), None

    def forward(self, h):  # [batch, time, head, dv], float32
        h = nn.functional.layer_norm(h, h.shape[-1:], eps=NORM_EPS)
        return h.flatten(-2) * self.weight.float()


class BolmoXLSTM(nn.Module):
    def __init__(self, config: BolmoConfig):
        super().__init__()
        size, self.heads = config.hidden_size, config.num_local_heads
        self.q = nn.Linear(size, size // 2, bias=False)
        self.k = nn.Linear(size, size // 2, bias=False)
        self.v = nn.Linear(size, size, bias=False)
        self.ogate_preact = nn.Linear(size, size, bias=False)
        self.igate_preact = nn.Linear(size, self.heads)
        self.fgate_preact = nn.Linear(size, self.heads)
        self.multihead_norm = BolmoHeadLayerNorm(size)
        self.out_proj = nn.Linear(size, size, bias=False)

    def empty_state(self, x):
        """(C, n, m) for so many rows that have read nothing."""
        size = x.shape[-1] // self.heads
        zeros = x.new_zeros(len(x), self.heads, size // 2, size, dtype=torch.float32)
        return zeros, zeros[..., 0], zeros[..., 0, 0]

    def forward(self, x, state, present):  # [batch, time, embed]; present: [batch, time], or None if all are
        batch, time, _ = x.shape

        def by_head(value):  # [batch, head, time, ...]
            return value.float().view(batch, time, self.heads, -1).transpose(1, 2)

        q, k, v = (by_head(project(x)) for project in (self.q, self.k, self.v))
        i, f = (
            GATE_CAP * torch.tanh(by_head(gate(x))[..., 0] / GATE_CAP)
            for gate in (self.igate_preact, self.fgate_preact)
        )
        state = self.empty_state(x) if state is None else state
        if time == 1 and present is None:
            state, h = mlstm_step(state, *(each[:, :, 0] for each in (q, k, v, i, f)))
            h = h[:, :, None]
        else:
            log_f = nn.functional.logsigmoid(f)
            if present is not None:
                i, log_f = i.masked_fill(~present[:, None], NEVER), log_f.masked_fill(~present[:, None], 0.0)
            found = []
            for start in range(0, time, CHUNK):
                part = slice(start, start + CHUNK)
                state, h = mlstm_chunk(state, *(each[:, :, part] for each in (q, k, v, i, log_f)))
                found.append(h)
            h = torch.cat(found, dim=2)
        mixed = self.multihead_norm(h.transpose(1, 2)).to(x.dtype)
        return self.out_proj(torch.sigmoid(self.ogate_preact(x)) * mixed), state


class BolmoMLP(nn.Module):
    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class BolmoLocalLayer(nn.Module):
    def __init__(self, config: BolmoConfig):
        super().__init__()
        self.pre_xlstm_layernorm = BolmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.xlstm = BolmoXLSTM(config)
        self.pre_feedforward_layernorm = BolmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = BolmoMLP(config.hidden_size, config.local_intermediate_size)

    def forward(self, x, state, present):
        mixed, state = self.xlstm(self.pre_xlstm_layernorm(x), state, present)
        x = x + mixed
        return x + self.mlp(self.pre_feedforward_layernorm(x)), state


def run(
    layers: nn.ModuleList, x: torch.Tensor, states: list[State | None] | None, present: torch.Tensor | None
) -> tuple[torch.Tensor, list[State]]:
    """Local layers, one after the other; `states`: one of each, None in the place of one that has read nothing."""
    new = []
    for layer, state in zip(layers, states or [None] * len(layers), strict=True):
        x, state = layer(x, state, present)
        new.append(state)
    return x, new


# --- the model --------------------------------------------------------------------------------------------------------


class BolmoBoundaryPredictor(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.q_proj_layer = nn.Linear(size, size, bias=False)
        self.k_proj_layer = nn.Linear(size, size, bias=False)

    def forward(self, h):
        """Whether a patch ends at each byte, [batch, time], which depends on the next; False at the last one."""
        q, k = self.q_proj_layer(h[:, :-1]).float(), self.k_proj_layer(h[:, 1:]).float()
        unit = (nn.functional.normalize(each, dim=-1, eps=1e-12) for each in (q, k))
        q, k = unit
        return nn.functional.pad((q * k).sum(-1) < 0, (0, 1))


class BolmoLocalEncoder(nn.Module):
    def __init__(self, config: BolmoConfig):
        super().__init__()
        size = config.hidden_size
        self.byte_embedding = nn.Embedding(config.vocab_size, size)
        if config.add_expanded_embeddings:
            self.subword_embedding = nn.Embedding(config.subword_vocab_size, size)
        self.layers = nn.ModuleList([BolmoLocalLayer(config) for _ in range(config.num_local_encoder_layers)])
        self.post_last_block_norm = BolmoRMSNorm(size, config.local_rms_norm_eps)
        self.out_projection = nn.Linear(size, size)
        self.boundary_predictor_module = BolmoBoundaryPredictor(size)

    def forward(self, ids, subwords, states, present):
        x = self.byte_embedding(ids)
        if subwords is not None:
            x = x + self.subword_embedding(subwords)
        x, states = run(self.layers, x, states, present)
        return self.post_last_block_norm(x), states


class BolmoLocalDecoder(nn.Module):
    def __init__(self, config: BolmoConfig):
        super().__init__()
        self.initial_norm = BolmoRMSNorm(config.hidden_size, config.local_rms_norm_eps)
        self.in_projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList([BolmoLocalLayer(config) for _ in range(config.num_local_decoder_layers)])

    def forward(self, h, patches, states, present):
        return run(self.layers, self.in_projection(h) + patches, states, present)


class Subwords:
    """Finds the longest original token whose bytes end at a position. On the host."""

    def __init__(self, spelled: list[str | None]):
        self.ids, lengths = {}, set()
        for number, word in enumerate(spelled):
            rows = [[i] for i, name in enumerate(NAMES) if name in (word or "")]
            if word is not None and not rows:
                rows = [[SPECIALS + byte for byte in bytes.fromhex(word)]]
            for row in rows:
                self.ids["".join(map(chr, row))] = number  # of several with the same bytes the last one
                lengths.add(len(row))
        self.lengths = sorted(lengths, reverse=True)

    def __call__(self, row: list[int], new: int) -> list[int]:
        """Of the last `new` ids of a row; before a text there may be negative ones."""
        text = "".join(chr(i) if i >= 0 else "\uffff" for i in row)
        found = []
        for end in range(len(row) - new + 1, len(row) + 1):
            endings = (self.ids.get(text[end - length : end]) for length in self.lengths if length <= end)
            found.append(next((number for number in endings if number is not None), 0))
        return found


class BolmoCache(Cache):
    """What rows have read. It cannot go back: a state of an mLSTM forgets what it was."""

    def __init__(self):
        super().__init__(layers=[])
        self.bytes = 0  # columns that were read, padding included
        self.trunk = DynamicCache()
        self.tensors: dict[str, torch.Tensor] = {}  # by row: ids, positions, patches, patch, hidden
        self.states: dict[str, list] = {}  # of encoder and decoder: (C, n, m) of each layer

    def get_seq_length(self, *args, **kwargs) -> int:
        return self.bytes

    def get_max_cache_shape(self, *args, **kwargs) -> int:
        return -1

    def _change(self, change) -> None:
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        self.states = {side: [tuple(map(change, state)) for state in states] for side, states in self.states.items()}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        self.trunk.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda tensor: tensor[indices.to(tensor.device)])
        self.trunk.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        self.trunk.batch_repeat_interleave(repeats)

    def crop(self, *args) -> None:
        raise NotImplementedError("A cache of Bolmo cannot be cropped: read the shorter text anew.")

    def reset(self) -> None:
        self.__init__()


def moved(x: torch.Tensor, start: torch.Tensor, size: int) -> torch.Tensor:
    """Of each row [batch, time, ...] `size` positions from its own `start` on; beyond its end, the last one."""
    places = (start[:, None] + torch.arange(size, device=x.device)).clamp(0, x.shape[1] - 1)
    places = places.view(*places.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, places)


class BolmoPreTrainedModel(transformers.PreTrainedModel):
    config_class = BolmoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _is_stateful = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb"]

    def _init_weights(self, module):
        """As the trunk's class does it, which also knows the tables of its rotary embedding."""
        getattr(self, self.base_model_prefix, self).trunk._init_weights(module)


class BolmoModel(BolmoPreTrainedModel):
    def __init__(self, config: BolmoConfig):
        super().__init__(config)
        if config.boundary_predictor_lookahead != 1 or config.boundary_threshold != "sample:0":
            raise ValueError("Only a lookahead of one byte and the threshold 'sample:0' are implemented.")
        if config.add_expanded_embeddings and getattr(config, "subword_bytes", None) is None:
            raise ValueError(
                "config.json has no 'subword_bytes': write the folder anew with minalm's convert.py export."
            )
        from transformers.models.auto.modeling_auto import MODEL_MAPPING

        self.local_encoder = BolmoLocalEncoder(config)
        self.local_decoder = BolmoLocalDecoder(config)
        trunk_config = config.trunk()
        trunk_config._attn_implementation = config._attn_implementation
        trunk = MODEL_MAPPING[type(trunk_config)](trunk_config)
        trunk.norm = nn.Identity()  # the blocks' output is read as it is
        # What some trunks multiply embeddings with, which patches are not.
        self.divisor = getattr(trunk, "embedding_multiplier", 1.0)
        if config.trunk_model_type == "gemma2" and type(trunk.embed_tokens) is nn.Embedding:
            self.divisor = config.hidden_size**0.5
        del trunk.embed_tokens
        # Its layers, and its rotary embedding, are ours by their names; beside that, the trunk is only the function that
        # runs them.
        for name, child in trunk.named_children():
            if name != "norm":
                setattr(self, name, child)
        object.__setattr__(self, "trunk", trunk)
        self.norm = BolmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.subwords = None  # made when it is first needed
        self.post_init()

    def get_input_embeddings(self):
        return self.local_encoder.byte_embedding

    def set_input_embeddings(self, value):
        self.local_encoder.byte_embedding = value

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        boundaries: torch.BoolTensor | None = None,
        prompt_length: int | None = None,
        use_cache: bool | None = None,
        head: nn.Module | None = None,
        **kwargs,
    ):
        """Reads bytes. `boundaries` [batch, time] says where patches end. Without it, ids of the second half do, and
        others where the encoder predicts it (or the decoder, at the last byte), if they are among the first
        `prompt_length` columns: all columns, but none if a single id follows on a cache. `head`: of the decoder."""
        cache = kwargs.get(CACHE)
        if cache is not None and not isinstance(cache, BolmoCache):
            raise ValueError(f"The cache is a {type(cache).__name__}: leave it out, so that the model makes its own.")
        cache = BolmoCache() if cache is None else cache
        batch, time = input_ids.shape
        past, device = cache.bytes, input_ids.device
        present = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            present = attention_mask.to(device)[:, past:] != 0
            if present.shape != input_ids.shape:
                raise ValueError(
                    f"The mask has {attention_mask.shape[1]} columns for {past} read ones and {time} new ones."
                )
        start, length = present.int().argmax(1), present.sum(1)
        if prompt_length is None:
            prompt_length = past if past and time == 1 else past + time
        prompt = (length - (past + time - max(prompt_length, past))).clamp(min=0)  # columns of each row's prompt
        column = torch.arange(time, device=device)
        whole = bool(present.all())
        ids = input_ids if whole else moved(input_ids, start, time)
        present = column < length[:, None]

        ends = (ids >= PLAIN) & present
        ids = ids % PLAIN
        h, states = self.local_encoder(
            ids, self._subwords(cache, ids, length), cache.states.get("encoder"), None if whole else present
        )
        first = cache.tensors.get("patches", length.new_zeros(batch))[:, None] == 0  # rows whose first byte comes
        cache.states["encoder"] = states
        if boundaries is not None:
            ends = (boundaries if whole else moved(boundaries, start, time)) & present
        else:
            inner = (
                column < prompt[:, None] - 1
            )  # of the last one the next byte is not known, or not part of the prompt
            if bool(inner.any()):
                ends = ends | (self.local_encoder.boundary_predictor_module(h) & inner)
        ends = ends | (first & (column == 0) & present)

        chosen = torch.zeros_like(prompt)  # where the decoder says it: nowhere, if it is said already
        if boundaries is None:
            last = (prompt - 1).clamp(min=0)[:, None]
            chosen = torch.where((prompt > 0) & ~ends.gather(1, last)[:, 0], prompt, 0)
        x = None
        if bool((chosen > 0).any()):
            if head is None:
                raise ValueError(
                    "Where the last byte's patch ends is the decoder's to say: pass `head` or `boundaries`."
                )
            before = torch.where(chosen > 0, chosen - 1, length)  # bytes that are read before that is decided
            x = self._patches_and_decoder(cache, h, ends, before)
            hidden, last = cache.tensors["hidden"], ids.gather(1, last)
            logits = head(hidden).float()
            ends = ends | ((logits.gather(1, last + PLAIN) > logits.gather(1, last)) & (column == chosen[:, None] - 1))
            size = int((length - before).max())
            rest = self._patches_and_decoder(cache, moved(h, before, size), moved(ends, before, size), length - before)
            places = torch.arange(size, device=device)
            row, place = torch.nonzero(places < (length - before)[:, None], as_tuple=True)
            x = x.index_put((row, before[row] + place), rest[row, place])
        else:
            x = self._patches_and_decoder(cache, h, ends, length)
        cache.bytes += time
        if not whole:  # back to where the ids stand
            x, ends = (moved(each, -start, time) for each in (x, ends))
        outputs = BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache if use_cache is not False else None})
        outputs.boundaries = ends
        return outputs

    def _subwords(self, cache, ids, length):
        """The original token at each of some ids, which are kept for those that follow."""
        if not self.config.add_expanded_embeddings:
            return None
        if self.subwords is None:
            self.subwords = Subwords(self.config.subword_bytes)
        longest, (batch, time) = self.subwords.lengths[0], ids.shape
        before = cache.tensors.get("ids", ids.new_full((batch, longest), -1))
        row = torch.cat([before, ids], dim=1)
        found = [self.subwords(each, time) for each in row.tolist()]
        cache.tensors["ids"] = moved(row, length, longest)  # the last ones: there are `longest` more than `length`
        return ids.new_tensor(found)

    def _patches_and_decoder(self, cache, h, ends, length):
        """What the decoder makes of each row's next `length` bytes, whose patches end at `ends`: [batch, time, embed]."""
        batch, time, size = h.shape
        device, tensors = h.device, cache.tensors
        column = torch.arange(time, device=device)
        present = column < length[:, None]
        whole = bool(present.all())
        ends = ends & present
        before = tensors.get("patches", length.new_zeros(batch))
        patch = tensors.get("patch", h.new_zeros(batch, size))  # of each row the last one
        number = ends.cumsum(1)  # of patches that have ended here
        most = int(number[:, -1].max())
        patches = patch[:, None]
        if most:
            # The bytes that end patches, moved to the left.
            places = torch.where(ends, column, time).sort(1).values[:, :most]
            there = places < time
            g = h.gather(1, places.clamp(max=time - 1)[..., None].expand(-1, -1, size))
            position = before[:, None] + torch.arange(most, device=device)
            states = self._trunk(cache, self.local_encoder.out_projection(g), position, there)
            patches = torch.cat([patches, self.local_decoder.initial_norm(states)], dim=1)
        read = patches.gather(1, number[..., None].expand(-1, -1, size))
        x, states = self.local_decoder(h, read, cache.states.get("decoder"), None if whole else present)
        cache.states["decoder"] = states
        x = self.norm(x)
        last = (length - 1).clamp(min=0)[:, None, None].expand(-1, -1, size)
        hidden, some = x.gather(1, last)[:, 0], (length > 0)[:, None]
        tensors["hidden"] = torch.where(some, hidden, tensors.get("hidden", hidden))
        tensors["patch"] = patches.gather(1, number[:, -1][:, None, None].expand(-1, -1, size))[:, 0]
        tensors["patches"] = before + number[:, -1]
        return x

    def _trunk(self, cache, g, position, there):
        """The subword model's blocks on new patches [batch, patch, embed]; what is not `there` is never seen."""
        known = cache.tensors.get("positions")
        new = torch.where(there, position, -1)
        known = new if known is None else torch.cat([known, new], dim=1)
        cache.tensors["positions"] = known
        distance = position[:, :, None] - known[:, None, :]

        def mask(window):
            seen = (known >= 0)[:, None, :] & (distance >= 0)
            seen = seen if window is None else seen & (distance < window)
            seen = seen | ~there[:, :, None]  # so that no row of scores is empty
            return torch.zeros_like(seen, dtype=g.dtype).masked_fill(~seen, torch.finfo(g.dtype).min)[:, None]

        config = self.trunk.config
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if self.config.trunk_model_type in BY_KIND:
            masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in set(kinds)}
        else:
            masks = mask(window)
        outputs = self.trunk(
            inputs_embeds=g / self.divisor,
            attention_mask=masks,
            position_ids=position,
            use_cache=True,
            **{CACHE: cache.trunk},
        )
        return outputs.last_hidden_state


@dataclass
class BolmoOutput(CausalLMOutputWithPast):
    """`boundaries` [batch, time]: the bytes that ended a patch."""

    boundaries: torch.Tensor | None = field(default=None)


class BolmoForCausalLM(BolmoPreTrainedModel, transformers.GenerationMixin):
    def __init__(self, config: BolmoConfig):
        super().__init__(config)
        self.model = BolmoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        boundaries: torch.BoolTensor | None = None,
        prompt_length: int | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs,
    ):
        """Logits of the next byte and of whether it ends a patch. For the rest see `BolmoModel.forward`.

        With `labels` (bytes, of the same columns, -100 where none counts), `loss` is the cross-entropy of the next byte
        together with the end of a patch, as this pass has found it.
        """
        outputs = self.model(
            input_ids, attention_mask, boundaries, prompt_length, use_cache, self.lm_head, **{CACHE: kwargs.get(CACHE)}
        )
        x, ends = outputs.last_hidden_state, outputs.boundaries
        loss = None
        if labels is not None:
            after = labels[:, 1:]
            fused = torch.where(after >= 0, after % PLAIN + PLAIN * ends[:, 1:], -100)
            # Of a text's last byte nothing says whether a patch ends there.
            closing = nn.functional.pad(after[:, 1:] < 0, (0, 1), value=True)
            fused = torch.where(closing & (fused >= 0), fused % PLAIN, fused)
            logits = self.lm_head(x[:, :-1]).float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), fused.flatten())
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)
        found = BolmoOutput(loss=loss, logits=logits, boundaries=ends, **{CACHE: outputs.get(CACHE)})
        return found.to_tuple() if return_dict is False else found

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, prompt_length=None, use_cache=None, **kwargs
    ):
        """The ids that are new, and what is said of them."""
        cache = kwargs.get(CACHE)
        past = 0 if cache is None else cache.get_seq_length()
        return {
            "input_ids": input_ids[:, past:],
            "attention_mask": None if attention_mask is None else attention_mask.to(input_ids.device),
            "prompt_length": prompt_length,
            "use_cache": use_cache,
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
            CACHE: cache,
        }

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, keep_boundaries: bool = False, **kwargs):
        """As of any model. The ids are bytes; with `keep_boundaries`, those that end patches are of the second half."""
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        settings = self.generation_config if generation_config is None else generation_config
        ends = kwargs.get("eos_token_id", settings.eos_token_id)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        if ends:
            kwargs["eos_token_id"] = list(dict.fromkeys([*ends, *(i + PLAIN for i in ends if i < PLAIN)]))
        if prompt is not None:
            kwargs["prompt_length"] = prompt.shape[1]
        outputs = super().generate(inputs, generation_config, *args, **kwargs)
        if keep_boundaries:
            return outputs
        if isinstance(outputs, torch.Tensor):
            return outputs % PLAIN
        outputs.sequences = outputs.sequences % PLAIN
        return outputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        return False


BolmoConfig.register_for_auto_class("AutoConfig")
BolmoModel.register_for_auto_class("AutoModel")
BolmoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
