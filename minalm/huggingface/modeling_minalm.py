"""Byte students with an input expansion for Hugging Face transformers (4.57 and later): copied into a model's folder.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs this file; minalm itself never imports it.
A student is its family's own model but for its input: to the embedding of each id it adds that of the longest token of
the original vocabulary that ends there. Which one depends on the ids before, so these are kept in the cache, as one
more layer behind those of the model: whatever crops, reorders, repeats or copies the cache does the same to the ids.

Ids are looked up plus one, as in config.json, so that 0 can mean that there is none (padding).
"""

from collections.abc import Iterable

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

# Names of transformers' configurations, trunks and models; a version that lacks a model goes without it.
FAMILIES = (
    ("LlamaConfig", "LlamaModel", "LlamaForCausalLM"),
    ("Gemma2Config", "Gemma2Model", "Gemma2ForCausalLM"),
    ("Gemma3TextConfig", "Gemma3TextModel", "Gemma3ForCausalLM"),
    ("Qwen2Config", "Qwen2Model", "Qwen2ForCausalLM"),
    ("Qwen3Config", "Qwen3Model", "Qwen3ForCausalLM"),
    ("MistralConfig", "MistralModel", "MistralForCausalLM"),
    ("Olmo2Config", "Olmo2Model", "Olmo2ForCausalLM"),
    ("Olmo3Config", "Olmo3Model", "Olmo3ForCausalLM"),
    ("SmolLM3Config", "SmolLM3Model", "SmolLM3ForCausalLM"),
    ("Phi3Config", "Phi3Model", "Phi3ForCausalLM"),
    ("GraniteConfig", "GraniteModel", "GraniteForCausalLM"),
)


class Trie:
    """Finds the original tokens. A node is a run of ids, read backwards; level d has the nodes of d + 1 ids.

    `levels` holds of each level the sorted edges (parent * width + id, one for each node, so that an edge's place is
    its node) and the original id that the node stands for, -1 where it is only the end of longer ones.
    """

    def __init__(self, originals: dict[str, int], longest: int, device: torch.device):
        """`originals`: ids plus one, last first, joined by commas -> original id plus one. "" stands for nothing."""
        keys = [[int(part) for part in key.split(",")] for key in originals if key]
        values = torch.tensor([value - 1 for key, value in originals.items() if key], dtype=torch.int64)
        lengths = torch.tensor([len(key) for key in keys], dtype=torch.int64)
        rows = [key[:longest] + [0] * (longest - len(key)) for key in keys]
        ids = torch.tensor(rows, dtype=torch.int64).view(len(keys), longest)
        self.device = device
        self.width = int(ids.max()) + 1 if keys else 1
        self.levels = []
        nodes = torch.zeros_like(values)
        for depth in range(longest):
            ids, values, lengths, nodes = (rows[lengths > depth] for rows in (ids, values, lengths, nodes))
            edges, nodes = torch.unique(nodes * self.width + ids[:, depth], return_inverse=True)
            ends = lengths == depth + 1
            found = torch.full_like(edges, -1)
            found[nodes[ends]] = values[ends]
            if len(edges):
                self.levels.append((edges.to(device), found.to(device)))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, time] of ids plus one -> of original ids: the longest token that ends at each position, or 0."""
        time = ids.shape[1]
        ids = torch.where(ids < self.width, ids, 0)
        nodes, found = torch.zeros_like(ids), torch.zeros_like(ids)
        for depth, (edges, originals) in enumerate(self.levels):
            earlier = nn.functional.pad(ids, (depth, 0))[:, :time]  # of each position the id `depth` before it
            wanted = nodes * self.width + earlier  # negative, and so nowhere, once the path has ended (node -1)
            places = torch.searchsorted(edges, wanted).clamp(max=len(edges) - 1)
            nodes = torch.where(edges[places] == wanted, places, -1)
            found = torch.where((nodes >= 0) & (originals[places] >= 0), originals[places], found)
        return found


class SeenIds(DynamicLayer):
    """A layer of a cache whose keys are the ids seen, plus one, as [batch, 1, time, 1]; padding is 0."""

    is_compileable = True  # a cache is where all layers are, and then gets other masks: the other layers decide
    max_cache_len = 0  # transformers 4 takes the largest of the layers

    @property
    def max_batch_size(self) -> int:  # transformers 4 compares it between the layers
        return self.keys.shape[0]

    def reset(self) -> None:
        """Empties the layer: that of transformers 4 would keep the length and set all to 0."""
        self.keys, self.values, self.is_initialized = None, None, False


def cache_among(values: Iterable) -> Cache | None:
    """The cache among arguments or outputs, whatever its name is in this version (`cache`, `past_key_values`)."""
    return next((value for value in values if isinstance(value, Cache)), None)


def seen_ids(cache: Cache | None) -> SeenIds | None:
    """The layer of a cache with the ids seen, if it has one."""
    return None if cache is None else next((layer for layer in cache.layers if isinstance(layer, SeenIds)), None)


class ExpandedTrunk:
    """What a family's trunk (LlamaModel) gets on top."""

    def __init__(self, config):
        super().__init__(config)
        kind = type(self.embed_tokens)  # Gemma has its own, which scales what it finds
        scale = () if kind is nn.Embedding else (config.hidden_size**0.5,)
        self.expand_embed_tokens = kind(config.expand_input_ids_vocab_size, config.hidden_size, None, *scale)
        self.trie = None  # made when it is first needed: here all may be on the meta device
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is None or inputs_embeds is not None:  # the caller's own embeddings: nothing to add
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        cache = cache_among(kwargs.values())
        seen = seen_ids(cache)
        past, time = 0 if cache is None else int(cache.get_seq_length()), input_ids.shape[1]
        if past != (0 if seen is None else seen.get_seq_length()):
            raise ValueError(
                f"The cache holds {past} positions whose ids this model has not seen, and it needs them to expand its "
                "inputs: pass the whole text as input_ids with an empty cache."
            )
        ids = input_ids.long() + 1
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            ids = ids * (attention_mask[:, past : past + time] != 0).expand_as(ids)  # refuses a mask of new ids alone
        longest = self.config.expand_input_ids_maxlen
        if self.trie is None or self.trie.device != ids.device:
            self.trie = Trie(self.config.expand_input_ids_dict[0], longest, ids.device)
        context = torch.cat([seen.keys[:, 0, -longest:, 0], ids], dim=1) if past else ids
        originals = self.trie(context)[:, -time:]
        outputs = super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=self.embed_tokens(input_ids) + self.expand_embed_tokens(originals),
            **kwargs,
        )
        cache = cache_among(outputs if isinstance(outputs, tuple) else outputs.values())
        if cache is not None:
            seen = seen_ids(cache)
            if seen is None:  # only now: the cache may have made its other layers as they were needed
                seen = SeenIds()
                cache.layers.append(seen)
            seen.update(ids[:, None, :, None], ids[:, None, :, None])
        return outputs


class ExpandedCausalLM:
    """What a family's language model (LlamaForCausalLM) gets on top; `trunk` is the class of its `model`."""

    def __init__(self, config):
        parameters = getattr(config, "rope_parameters", None)
        if parameters and transformers.__version__.startswith("4."):  # which knows `rope_scaling` alone
            scaling = parameters.get("full_attention", parameters)
            if scaling.get("rope_type") == "longrope":  # it wants these names alone, when the model is loaded again
                names = ("short_factor", "long_factor", "attention_factor")
                scaling = {"type": "longrope"} | {name: scaling[name] for name in names if name in scaling}
            config.rope_scaling = scaling
        super().__init__(config)
        self.model = self.trunk(config)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """The inputs of a step. The mask stays as it is: where there is padding cannot be read from masks of pairs."""
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        if isinstance(attention_mask, torch.Tensor):
            inputs["attention_mask"] = attention_mask.to(self.device)
        return inputs

    def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
        return False  # `generate` would compile steps with a static cache, but the ids seen grow


def _define(config_name: str, trunk_name: str, model_name: str) -> None:
    """Defines TPU<name> for each of the three, in this module."""

    def define(name: str, bases: tuple[type, ...], **fields) -> type:
        globals()[f"TPU{name}"] = type(f"TPU{name}", bases, {"__module__": __name__, **fields})
        return globals()[f"TPU{name}"]

    family = getattr(transformers, config_name)
    config = define(config_name, (family,), model_type=f"tpu_{family.model_type}")
    trunk = define(trunk_name, (ExpandedTrunk, getattr(transformers, trunk_name)), config_class=config)
    # The mixin is in the family's class already, but transformers looks for it among the bases, or adds it by a
    # subclass.
    bases = (ExpandedCausalLM, getattr(transformers, model_name), transformers.GenerationMixin)
    define(model_name, bases, config_class=config, trunk=trunk)


for _names in FAMILIES:
    if getattr(transformers, _names[-1], None) is not None:
        _define(*_names)
