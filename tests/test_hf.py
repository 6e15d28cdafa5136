"""Hugging Face folders: both directions, the spellings of transformers 4 and 5, and everything that must be refused."""

import dataclasses
import http.server
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from real_models import real_model
from safetensors import safe_open

from minalm.errors import InputError
from minalm.huggingface import families, weights
from minalm.huggingface.families import TensorMap
from minalm.models import transformer
from minalm.models.config import LinearScaling, Llama3Scaling, LongRopeScaling, ModelConfig, Rope, YarnScaling
from minalm.models.transformer import Transformer, initialize
from minalm.parallel.mesh import make_mesh, shard, shardings, specs

FIXTURES = Path(__file__).parent / "fixtures"
BFLOAT16 = families.DTYPES["bfloat16"]
SIZES = {"vocab_size": 58, "embed": 24, "mlp": 34, "layers": 3, "heads": 6, "kv_heads": 2, "head_dim": 10}
LLAMA = ModelConfig(
    **SIZES,
    windows=(None, None, None),
    rope=Rope(100.0, Llama3Scaling(8.0, 1.0, 4.0, 16)),
    tied=False,
    model_type="llama",
)
GEMMA = ModelConfig(
    **SIZES,
    windows=(3, None, 3),
    query_scale=14**-0.5,
    attention_softcap=5.0,
    final_softcap=3.0,
    norm_eps=1e-6,
    norm_plus_one=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=24**0.5,
    model_type="gemma2",
)
CONFIGS = {
    **{
        name: weights.read_config(FIXTURES / name / "config.json")
        for name in ("gemma3", "mistral", "qwen2", "qwen2_yarn", "qwen3", "olmo2", "olmo3")
        + ("llama3_biased", "smollm3", "phi3", "granite")
    },
    "llama": LLAMA,
    "llama tied, no scaling": dataclasses.replace(LLAMA, tied=True, rope=Rope(100.0)),
    "llama with expansion": dataclasses.replace(LLAMA, expansion_size=78),
    "gemma2": GEMMA,
    "gemma2 untied, full attention": dataclasses.replace(GEMMA, tied=False, windows=(None, None, None)),
    "gemma2 without caps": dataclasses.replace(GEMMA, attention_softcap=None, final_softcap=None),
    "gemma2 with expansion": dataclasses.replace(GEMMA, tied=False, expansion_size=78),
}
CONFIGS["phi3 with expansion"] = dataclasses.replace(CONFIGS["phi3"], expansion_size=78)

# As they are published (transformers 4), but for keys of the same kind.
LLAMA_3_2_3B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
GEMMA_2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4",
    "use_cache": True,
    "vocab_size": 256000,
}


YARN = {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "yarn",
}
OLMO_3 = {
    "architectures": ["Olmo3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}
GEMMA_3_270M = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
QWEN_2_5 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3 = QWEN_2_5 | {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "rope_scaling": None}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def random_model(config: ModelConfig) -> Transformer:
    """Norms included, so that each tensor differs from every other."""
    shapes = transformer.leaves(transformer.abstract(config))
    random = np.random.default_rng(0)
    return transformer.from_leaves(
        config, {leaf: random.normal(size=s.shape).astype(np.float32) for leaf, s in shapes.items()}
    )


def read(folder: Path, values: dict) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return weights.read_config(folder / "config.json")


def edit(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    with safe_open(file, framework="numpy") as tensors:
        return tensors.get_tensors()


def assert_same(first: Transformer, second: Transformer) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for leaf, array in transformer.leaves(first).items():
        other = transformer.leaves(second)[leaf]
        assert array.dtype == other.dtype and np.array_equal(array, other), leaf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with both tables, to be damaged."""
    weights.save(tmp_path / "model", random_model(LLAMA), "float32")
    return tmp_path / "model"


# --- both directions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_keeps_every_bit(tmp_path, config):
    model = random_model(config)
    weights.save(tmp_path / "model", model, "float32")
    assert_same(weights.load(tmp_path / "model", np.float32), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # nothing temporary is left
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_files_of_transformers_come_out_again(tmp_path, name):
    """The tensors that torch wrote: same names, shapes, bits."""
    weights.save(tmp_path / "model", weights.load(FIXTURES / name, np.float32), "bfloat16")
    found = tensors_of(tmp_path / "model" / "model.safetensors")
    expected = {}
    for file in (FIXTURES / name).glob("*.safetensors"):
        expected |= tensors_of(file)
    if name == "gemma3_seeing":
        parts = {
            part: [tensor for tensor in expected if tensor.startswith(part)] for part in ("language_model.", "vision")
        }
        assert all(parts.values())
        expected = {tensor.removeprefix("language_model."): expected[tensor] for tensor in parts["language_model."]}
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert found[tensor].dtype == value.dtype == families.DTYPES["bfloat16"]
        assert np.array_equal(found[tensor], value), tensor
    assert weights.read_config(tmp_path / "model" / "config.json") == weights.read_config(
        FIXTURES / name / "config.json"
    )
    with safe_open(tmp_path / "model" / "model.safetensors", framework="numpy") as tensors:
        assert tensors.metadata() == {"format": "pt"}


def test_bfloat16_rounds_once(tmp_path):
    model = random_model(GEMMA)
    weights.save(tmp_path / "model", model, "bfloat16")
    rounded = transformer.leaves(weights.load(tmp_path / "model", families.DTYPES["bfloat16"]))
    for leaf, array in transformer.leaves(model).items():
        assert np.array_equal(rounded[leaf], array.astype(families.DTYPES["bfloat16"]))


def test_float16_files(tmp_path, folder):
    file = folder / "model.safetensors"
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors_of(file).items()}
    safetensors.numpy.save_file(halves, file)
    expected = halves["model.layers.1.mlp.down_proj.weight"].T.astype(np.float32)
    assert np.array_equal(weights.load(folder, np.float32).blocks.mlp.down[1], expected)


def test_layout_of_the_projections(folder):
    """Head h, channel d of a query is row h * head_dim + d of torch's matrix; of the output projection, its column."""
    stored, model = tensors_of(folder / "model.safetensors"), weights.load(folder, np.float32)
    q = stored["model.layers.1.self_attn.q_proj.weight"]
    o = stored["model.layers.2.self_attn.o_proj.weight"]
    assert q.shape == (60, 24) and o.shape == (24, 60)
    assert np.array_equal(model.blocks.attention.q[1, :, 4, 7], q[4 * 10 + 7])
    assert np.array_equal(model.last.attention.o[4, 7], o[:, 4 * 10 + 7])


def test_layout_of_fused_projections(tmp_path):
    """Behind each other along the rows: queries, keys, values; gate, up."""
    model = random_model(CONFIGS["phi3"])
    weights.save(tmp_path / "model", model, "float32")
    stored = tensors_of(tmp_path / "model" / "model.safetensors")
    qkv = stored["model.layers.1.self_attn.qkv_proj.weight"]
    assert qkv.shape == (6 * 8 + 2 * 8 + 2 * 8, 48)
    attention = model.blocks.attention
    assert np.array_equal(attention.q[1, :, 4, 7], qkv[4 * 8 + 7])
    assert np.array_equal(attention.k[1, :, 1, 7], qkv[6 * 8 + 8 + 7])
    assert np.array_equal(attention.v[1, :, 1, 7], qkv[8 * 8 + 8 + 7])
    gate_up = stored["model.layers.2.mlp.gate_up_proj.weight"]
    assert np.array_equal(model.last.mlp.gate.T, gate_up[:34]) and np.array_equal(model.last.mlp.up.T, gate_up[34:])
    lazy = weights.read(tmp_path / "model").blocks.attention.v
    assert np.array_equal(lazy[1, 3:9, 1:2], attention.v[1, 3:9, 1:2])


@pytest.mark.parametrize("rows", (slice(None, -1), slice(8, None)), ids=("too few", "too many"))
def test_a_fused_tensor_of_a_wrong_shape(tmp_path, rows):
    weights.save(tmp_path / "model", random_model(CONFIGS["phi3"]), "float32")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    tensor = tensors_of(tmp_path / "model" / "model.safetensors")[name]
    tensor = tensor[rows] if rows.stop else np.concatenate([tensor, tensor[:8]])
    rewrite(tmp_path / "model", **{name.replace(".", "__"): tensor})
    refused(tmp_path / "model", rf"the tensor {name} has the shape .* where config.json asks for \(80, 48\)")


PREFIXES = {"language_model.model.": "model.language_model.", "vision": "model.vision", "multi": "model.multi"}


def test_a_model_that_sees_by_the_names_that_it_has_in_memory(tmp_path):
    shutil.copytree(FIXTURES / "gemma3_seeing", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    renamed = {}
    for name, tensor in tensors_of(file).items():
        old = next(old for old in PREFIXES if name.startswith(old))
        renamed[PREFIXES[old] + name.removeprefix(old)] = tensor
    renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"]  # some tools write both
    safetensors.numpy.save_file(renamed, file)
    assert_same(weights.load(tmp_path / "model", np.float32), weights.load(FIXTURES / "gemma3_seeing", np.float32))
    twice = renamed | {"language_model.model.norm.weight": renamed["model.language_model.norm.weight"]}
    safetensors.numpy.save_file(twice, file)
    refused(tmp_path / "model", "norm.weight twice, under two names")
    safetensors.numpy.save_file(renamed | {"model.audio_tower.weight": np.zeros(3, np.float32)}, file)
    refused(tmp_path / "model", "holds the tensor model.audio_tower.weight")


def test_what_stands_beside_the_text_part(tmp_path):
    values = json.loads((FIXTURES / "gemma3_seeing" / "config.json").read_text())
    alone = read(tmp_path, json.loads((FIXTURES / "gemma3" / "config.json").read_text()))
    assert read(tmp_path, values) == alone
    assert read(tmp_path, values | {"eos_token_id": [1, 106], "boi_token_index": 3}) == alone
    assert families.informative(values | {"eos_token_id": [1, 106]})["eos_token_id"] == [1, 106]
    assert families.informative(values)["max_position_embeddings"] == 131072
    text = values["text_config"]
    for changes, named in (
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"audio_config": {"layers": 4}}, "audio_config"),
        ({"text_config": None}, "text_config.* is not a JSON object"),
        ({"text_config": text | {"model_type": "gemma2"}}, "text_config.*model_type"),
        ({"text_config": text | {"tie_word_embeddings": False}}, "tie_word_embeddings.* make them agree"),
        ({"text_config": text | {"final_logit_softcapping": 30.0}}, "final_logit_softcapping.*never applies"),
        ({"text_config": text | {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping.*never applies"),
        ({"text_config": text | {"x": 1}}, "'x'"),
    ):
        with pytest.raises(InputError, match=named):
            read(tmp_path, values | changes)


def full_attention(name: str) -> Transformer:
    model = weights.load(FIXTURES / name, np.float32)
    layers = dataclasses.replace(model.config, windows=(None, None, None), local_rope=None)
    return transformer.from_leaves(layers, transformer.leaves(model))


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_transformers_computes_the_same_from_what_is_written(tmp_path, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    weights.save(tmp_path / "model", weights.load(FIXTURES / name, np.float32), "float32", keys=ids)
    stored = np.load(FIXTURES / name / "logits.npz")

    def logits(folder):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            return model(torch.tensor(stored["tokens"], dtype=torch.int64)).logits.numpy()

    np.testing.assert_allclose(logits(tmp_path / "model"), stored["logits"], rtol=0, atol=1e-5)
    if not name.startswith(("gemma", "olmo3")):
        return
    # Without any window transformers still makes a mask with one, and raises at `sliding_window: null`.
    weights.save(tmp_path / "full", full_attention(name), "float32", keys=ids)
    assert weights.read_config(tmp_path / "full" / "config.json").windows == (None, None, None)
    assert np.abs(logits(tmp_path / "full") - stored["logits"]).max() > 1e-2


def test_initial_parameters_can_be_saved(tmp_path):
    """Arrays on a device as well as on the host."""
    weights.save(tmp_path / "model", initialize(LLAMA, jax.random.key(0)), "float32")
    assert weights.load(tmp_path / "model", np.float32).config == LLAMA


def test_rows_past_the_vocabulary_are_cut(tmp_path):
    model = random_model(CONFIGS["gemma2 with expansion"])
    weights.save(tmp_path / "model", model, "float32", vocabulary_size=51)
    loaded = weights.load(tmp_path / "model", np.float32)
    assert (loaded.config.vocab_size, loaded.config.expansion_size) == (51, 78)
    for leaf, size in (("embed", 51), ("unembed", 51), ("expansion", 78)):
        assert np.array_equal(transformer.leaves(loaded)[leaf], transformer.leaves(model)[leaf][:size])


def test_expansion_keys(tmp_path):
    weights.save(tmp_path / "model", random_model(CONFIGS["gemma2 with expansion"]), "float32")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["expand_input_ids"] is True
    assert values["expand_input_ids_maxlen"] == 16 and values["expand_input_ids_vocab_size"] == 78
    # transformers knows no such type. It would load a gemma2 and only warn that a tensor is left over.
    assert values["model_type"] == "tpu_gemma2"
    stored = tensors_of(tmp_path / "model" / "model.safetensors")
    assert stored["model.expand_embed_tokens.weight"].shape == (78, 24)


def test_further_files_and_keys(tmp_path):
    files = {"a.json": {"x": "é"}, "b.bin": b"\x00\x01"}
    weights.save(tmp_path / "new" / "model", random_model(LLAMA), "float32", keys={"bos_token_id": 5}, files=files)
    written = tmp_path / "new" / "model"
    assert json.loads((written / "a.json").read_text("utf-8")) == {"x": "é"}
    assert (written / "b.bin").read_bytes() == b"\x00\x01"
    assert json.loads((written / "config.json").read_text())["bos_token_id"] == 5


def test_save_refuses_what_exists(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="model exists already"):
        weights.save(folder, random_model(GEMMA), "float32")
    assert (folder / "model.safetensors").read_bytes() == before
    (folder.parent / "empty").mkdir()
    with pytest.raises(InputError, match="empty exists already"):
        weights.save(folder.parent / "empty", random_model(GEMMA), "float32")


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        weights.save(tmp_path / "model", random_model(LLAMA), "float32", files={"a.json": {"x": object()}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    (
        {"windows": (3, 4, None), "norm_plus_one": True},
        {"windows": (3, None, None), "attention_softcap": 5.0},
        {"embedding_scale": 2.0, "norm_plus_one": True},
        {"post_norms": True},
        {"query_scale": 0.3, "qk_norm": "head"},
        {"residual_scale": 0.5, "windows": (3, 3, 3)},
        {"logits_divisor": 2.0, "qkv_bias": True},
        {"qkv_bias": True, "mlp_bias": True},
        {"unrotated_layers": (0,), "attention_softcap": 5.0},
        {"rope": Rope(100.0, Llama3Scaling(8.0, 1.0, 4.0, 16), 0.6)},
    ),
    ids=str,
)
def test_save_refuses_what_no_family_expresses(tmp_path, changes):
    with pytest.raises(InputError, match="no Hugging Face model type"):
        weights.save(tmp_path / "model", random_model(dataclasses.replace(LLAMA, **changes)), "float32")
    assert not list(tmp_path.iterdir())


# --- slices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ((8, 1), (4, 2), (1, 2)), ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_devices_get_their_slices_from_the_file(tmp_path, config, mesh):
    model, mesh = random_model(config), make_mesh(*mesh)
    weights.save(tmp_path / "model", model, "float32")
    stored, loaded = weights.read(tmp_path / "model"), weights.load(tmp_path / "model", np.float32)
    assert all(isinstance(leaf, weights.LazyTensor) for leaf in transformer.leaves(stored).values())
    layouts = transformer.leaves(shardings(specs(model, mesh), mesh))
    for dtype in (None, np.float32, BFLOAT16):
        read, placed = (transformer.leaves(shard(source, mesh, dtype)) for source in (stored, loaded))
        for leaf, array in transformer.leaves(model).items():
            expected = jax.device_put(array.astype(dtype or np.float32), layouts[leaf])
            for found in (read[leaf], placed[leaf]):
                assert found.dtype == expected.dtype and found.sharding == expected.sharding, leaf
                for ours, theirs in zip(found.addressable_shards, expected.addressable_shards, strict=True):
                    assert ours.device == theirs.device and np.array_equal(ours.data, theirs.data), leaf


@dataclasses.dataclass
class Counted:
    """A handle of a tensor that notes how much of it is read."""

    tensor: object
    read: list[int]

    def __getitem__(self, index):
        part = self.tensor[index]
        self.read.append(part.size)
        return part


@pytest.mark.parametrize("mesh", ((8, 1), (4, 2), (1, 2)), ids=str)
def test_every_number_is_read_once(tmp_path, mesh):
    weights.save(tmp_path / "model", random_model(CONFIGS["gemma2 with expansion"]), "float32")
    read: list[int] = []
    model = jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, tensors=tuple(Counted(tensor, read) for tensor in leaf.tensors)),
        weights.read(tmp_path / "model"),
    )
    assert not read
    shard(model, make_mesh(*mesh))
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert max(read) <= max(leaf.size for leaf in jax.tree.leaves(model)) / math.prod(mesh)


PROCESS = """
import sys, jax, numpy as np
from pathlib import Path
process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
from minalm.huggingface import weights
from minalm.models import transformer
from minalm.parallel.mesh import make_mesh, shard
mesh = make_mesh(4, 2)
model = transformer.leaves(shard(weights.read(folder), mesh, np.float32))
whole = transformer.leaves(weights.load(folder, np.float32))
shards = [(leaf, shard) for leaf in model for shard in model[leaf].addressable_shards]
assert all(np.array_equal(shard.data, whole[leaf][shard.index]) for leaf, shard in shards)
print(len(mesh.devices.flat), len({shard.device for _, shard in shards}), len(shards) // len(model))
"""


def test_two_processes_read_for_their_own_devices(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(process), str(port), folder],
            cwd=Path(weights.__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for process in processes:
            printed, errors = process.communicate(timeout=120)
            assert printed == "8 4 4\n", errors
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def leaf_pairs(tmp_path_factory) -> dict[str, tuple[weights.LazyTensor, np.ndarray]]:
    folder = tmp_path_factory.mktemp("pairs") / "model"
    weights.save(folder, random_model(GEMMA), "bfloat16")
    arrays = transformer.leaves(weights.load(folder, np.float32))
    return {leaf: (stored, arrays[leaf]) for leaf, stored in transformer.leaves(weights.read(folder)).items()}


@given(data=st.data())
def test_a_stored_leaf_is_indexed_as_an_array(leaf_pairs, data):
    leaf = data.draw(st.sampled_from(sorted(leaf_pairs)))
    stored, array = leaf_pairs[leaf]
    assert (stored.shape, stored.ndim, stored.size, stored.dtype) == (array.shape, array.ndim, array.size, BFLOAT16)
    index = []
    for axis, size in enumerate(array.shape[: data.draw(st.integers(1, array.ndim))]):
        inner = axis + 1 == array.ndim - (leaf.endswith(".o")) and leaf[-1] in "qkvo"  # head_dim
        cut = st.just(slice(None)) if inner else st.builds(slice, *(st.none() | st.integers(-size, size),) * 2)
        layer = st.integers(-size, size - 1) if axis == 0 and leaf.startswith("blocks") else st.nothing()
        index.append(data.draw(layer | cut))
    if any(isinstance(part, slice) and not len(range(size)[part]) for part, size in zip(index, array.shape)):
        return  # no device has a slice of nothing
    found = stored[tuple(index)]
    assert found.dtype == BFLOAT16 and np.array_equal(found, array[tuple(index)].astype(BFLOAT16))
    assert np.array_equal(stored.astype(np.float32)[tuple(index)], array[tuple(index)])


def test_what_no_slice_of_the_file_holds(folder):
    model = weights.read(folder)
    everything = slice(None)
    for part in (model.last.attention.q, model.last.attention.o):
        index = [everything] * 3
        index[part.shape.index(10)] = slice(0, 5)  # of head_dim: half of every head
        with pytest.raises(ValueError, match="is no slice of a tensor of shape"):
            part[tuple(index)]
    for steps in (model.embed, model.last.mlp.up, model.last.attention.q):
        with pytest.raises(ValueError, match="no slice"):
            steps[::2]
    whole = TensorMap("x", None, (2, 3, 4, 5), 2)
    assert whole.stored_index((slice(1, 2), slice(0, 3), slice(1, 3), slice(-5, None))) == (slice(5, 15), slice(3, 6))


def test_a_model_of_one_layer(tmp_path):
    config = dataclasses.replace(LLAMA, layers=1, windows=(None,))
    model = random_model(config)
    weights.save(tmp_path / "model", model, "bfloat16")
    stored = weights.read(tmp_path / "model")
    assert stored.blocks.attention.q[:, :, 1:3].shape == (0, 24, 2, 10)
    rounded = jax.tree.map(lambda leaf: leaf.astype(BFLOAT16).astype(np.float32), model)
    assert_same(weights.load(tmp_path / "model", np.float32), rounded)
    shard(stored, make_mesh(4, 2))
    weights.save(tmp_path / "again", stored, "bfloat16")
    assert_same(weights.load(tmp_path / "again", np.float32), rounded)


def test_layers_of_several_dtypes(folder):
    down = tensors_of(folder / "model.safetensors")[DOWN].astype(np.float16)
    rewrite(folder, model__layers__1__mlp__down_proj__weight=down)
    stored = weights.read(folder).blocks.mlp.down
    assert stored.dtype == np.float32 and np.array_equal(stored[1], down.T.astype(np.float32))
    assert np.array_equal(stored[:][1], stored[1])


# --- writing ------------------------------------------------------------------------------------------------------


def shards_of(folder: Path) -> list[dict[str, np.ndarray]]:
    """The tensors of each file, in the order of the files, as safetensors reads them."""
    return [tensors_of(file) for file in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("source", ("numpy", "mesh", "file"))
@pytest.mark.parametrize("dtype", families.DTYPES)
def test_shards(tmp_path, source, dtype):
    """Bit for bit the same from wherever the leaves are, in one file or several; safetensors reads them."""
    model = random_model(LLAMA)
    weights.save(tmp_path / "model", model, "float32")
    if source == "mesh":
        model = shard(model, make_mesh(4, 2))
    elif source == "file":
        model = weights.read(tmp_path / "model")
    limit = 12_000
    weights.save(tmp_path / "whole", model, dtype)
    weights.save(tmp_path / "shards", model, dtype, shard_size=limit)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["config.json", "model.safetensors"]

    (whole,), shards = shards_of(tmp_path / "whole"), shards_of(tmp_path / "shards")
    place_of = families.tensor_maps(families.FAMILIES[0], LLAMA)
    assert whole.keys() == place_of.keys()
    for name, (place,) in place_of.items():
        array = transformer.leaves(random_model(LLAMA))[place.leaf]
        array = array if place.layer is None else array[place.layer]
        expected = (array.reshape(-1, math.prod(place.shape[place.inputs :])).T if place.inputs else array).astype(
            families.DTYPES[dtype]
        )
        assert whole[name].dtype == expected.dtype and np.array_equal(whole[name], expected), name
    names = list(itertools.chain(*shards))
    assert sorted(names) == sorted(whole)
    for name, tensor in itertools.chain(*(shard.items() for shard in shards)):
        assert tensor.dtype == whole[name].dtype and np.array_equal(tensor, whole[name])

    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(sizes, shards))
    assert len(shards) >= sum(sizes) / limit
    if dtype == "float32":
        assert sum(size > limit for size in sizes) == 0  # the largest has 9,792 bytes
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(tensor.nbytes for tensor in whole.values())
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors")) == files
    assert index["weight_map"] == {name: file for file, shard in zip(files, shards) for name in shard}
    assert_same(weights.load(tmp_path / "shards", np.float32), weights.load(tmp_path / "whole", np.float32))
    assert len({path.stat().st_mode & 0o777 for path in (tmp_path / "shards").iterdir()}) == 1


@pytest.mark.real
@pytest.mark.parametrize("name", ("smollm2", "gemma3"))
def test_real_tensors_come_out_again(tmp_path, name):
    source = real_model(name)
    if json.loads((source / "config.json").read_text())["model_type"] not in [f.model_type for f in families.FAMILIES]:
        pytest.skip("gemma3_text is not implemented")
    model = weights.read(source)
    weights.save(tmp_path / "model", model, "bfloat16", shard_size=100_000_000)
    assert weights.read_config(tmp_path / "model" / "config.json") == model.config
    expected, shards = tensors_of(source / "model.safetensors"), shards_of(tmp_path / "model")
    assert len(shards) > 2 and sum(map(len, shards)) == len(expected)
    for tensor, value in itertools.chain(*(shard.items() for shard in shards)):
        assert np.array_equal(value.view(np.uint16), expected[tensor].view(np.uint16)), tensor


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    weights.save(tmp_path / "model", random_model(GEMMA), "float32", shard_size=4000)
    shards = shards_of(tmp_path / "model")
    large = [shard for shard in shards if any(tensor.nbytes > 4000 for tensor in shard.values())]
    assert len(large) > 3 and all(len(shard) == 1 for shard in large)
    assert any(len(shard) > 1 for shard in shards)
    assert_same(weights.load(tmp_path / "model", np.float32), random_model(GEMMA))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    sources = (random_model(GEMMA), shard(random_model(GEMMA), make_mesh(2, 2)))
    for i, model in enumerate(sources):
        weights.save(tmp_path / str(i), model, "bfloat16", shard_size=10_000)
    weights.save(tmp_path / "2", weights.load(tmp_path / "0", np.float32), "bfloat16", shard_size=10_000)
    weights.save(tmp_path / "3", weights.read(tmp_path / "0"), "bfloat16", shard_size=10_000)
    first, *others = ({path.name: path.read_bytes() for path in (tmp_path / i).iterdir()} for i in "0123")
    assert len(first) > 4 and all(other == first for other in others)
    for name, content in first.items():
        if name.endswith(".safetensors"):
            length = int.from_bytes(content[:8], "little")
            assert length % 8 == 0 and content[8 : 8 + length].rstrip(b" ").endswith(b"}")
            with safe_open(tmp_path / "0" / name, framework="numpy") as tensors:
                assert tensors.metadata() == {"format": "pt"}


def test_what_lies_on_a_mesh_leaves_no_copy_on_the_host(tmp_path):
    model = shard(random_model(GEMMA), make_mesh(4, 2))
    weights.save(tmp_path / "model", model, "float32")
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(model))


def test_rows_that_a_mesh_needs_are_cut(tmp_path):
    model = random_model(LLAMA)
    for i, source in enumerate((model, shard(model, make_mesh(4, 2)))):
        weights.save(tmp_path / str(i), source, "float32", vocabulary_size=51)
    weights.save(tmp_path / "2", weights.read(tmp_path / "0"), "float32", vocabulary_size=50)
    assert np.array_equal(weights.load(tmp_path / "1", np.float32).unembed, model.unembed[:51])
    assert np.array_equal(weights.load(tmp_path / "2", np.float32).unembed, model.unembed[:50])
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (tmp_path / "1" / "model.safetensors").read_bytes()


def test_a_failure_between_shards_leaves_nothing(tmp_path):
    model = random_model(LLAMA)
    model = eqx.tree_at(lambda model: model.last.mlp.down, model, model.last.mlp.down[:-1])
    with pytest.raises(ValueError, match="last.mlp.down has the shape"):
        weights.save(tmp_path / "model", model, "float32", shard_size=10_000)
    assert not list(tmp_path.iterdir())


def test_transformers_reads_shards(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = random_model(LLAMA)
    weights.save(tmp_path / "model", model, "float32", shard_size=10_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    assert np.array_equal(theirs["lm_head.weight"].numpy(), model.unembed)
    q = theirs["model.layers.2.self_attn.q_proj.weight"].numpy()
    assert np.array_equal(q.reshape(6, 10, 24), np.moveaxis(model.last.attention.q, 0, 2))


# --- names of the hub ---------------------------------------------------------------------------------------------

COMMIT = "0123456789" * 4
FIND = """
import sys
from minalm.huggingface import weights
for name in sys.argv[1:]:
    try:
        print(weights.find(name))
    except weights.InputError as error:
        print("refused:", error)
"""


def find(home: Path, *names: str, **environment: str) -> list[str]:
    """What `weights.find` says to each name, in a process of its own, since the hub's client reads its settings once."""
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FIND, *names],
        cwd=home,
        env=os.environ | settings | {"PYTHONPATH": str(Path(weights.__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert not done.stderr
    return done.stdout.splitlines()


INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def hub():
    """A hub of this machine, with two repositories, org/name and org/shards: the files that were sent, and its address."""
    names = ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"]
    names += ["pytorch_model.bin", "modeling.py", "original/params.json", "onnx/model.safetensors", "README.md"]
    shards = ["config.json", INDEX, *SHARDS, "model-00003-of-00003.safetensors", "consolidated.safetensors"]
    files = {"name": {name: name for name in names}, "shards": {name: name for name in shards}}
    files["shards"][INDEX] = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}})
    sent = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, body = self.path.partition("?")[0], b""
            for name, held in files.items():
                if path in (f"/api/models/org/{name}/revision/{of}" for of in ("main", COMMIT)):
                    body = json.dumps({"id": f"org/{name}", "sha": COMMIT, "siblings": []}).encode()
                elif path == f"/api/models/org/{name}/tree/{COMMIT}":
                    sizes = enumerate((file, len(text)) for file, text in held.items())
                    listed = [{"type": "file", "path": f, "size": size, "oid": f"{i:040}"} for i, (f, size) in sizes]
                    body = json.dumps(listed).encode()
                elif path.startswith(prefix := f"/org/{name}/resolve/{COMMIT}/"):
                    body = held[path.removeprefix(prefix)].encode()
                    if self.command == "GET":
                        sent.append(path.removeprefix(prefix))
            self.send_response(200 if body else 404)
            if not body:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{body.hex()[:40]}"')  # the name of the file in the client's cache
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        yield sent, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_name_of_the_hub(tmp_path, hub):
    sent, address = hub
    found, unknown = find(tmp_path, "org/name", "org/unknown", HF_ENDPOINT=address)
    assert Path(found) == tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    kept = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]  # no pickles, no code
    assert sorted(path.name for path in Path(found).iterdir()) == sorted(sent) == kept
    assert (Path(found) / "config.json").read_text() == "config.json"
    assert unknown.startswith("refused: org/unknown is no folder here, and the Hugging Face hub did not give it")
    assert all(word in unknown for word in ("RepositoryNotFoundError", "name a folder", "login", "network"))
    # Once fetched it is there without a network; what was not fetched is not.
    for without in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again, other = find(tmp_path, "org/name", "org/other", **without)
        assert again == found and other.startswith("refused: org/other is no folder here")


def test_only_listed_shards_are_fetched(tmp_path, hub):
    sent, address = hub
    (found,) = find(tmp_path, "org/shards", HF_ENDPOINT=address)
    assert sorted(path.name for path in Path(found).iterdir()) == sorted(sent) == ["config.json", *SHARDS, INDEX]
    (again,) = find(tmp_path, "org/shards", HF_HUB_OFFLINE="1")
    assert again == found


def test_names_without_a_hub(tmp_path, folder):
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (tmp_path / "hub" / "models--some--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--some--model" / "refs" / "main").write_text(COMMIT)
    (tmp_path / "local" / "model").mkdir(parents=True)
    cached, local, absolute, *refused = find(
        tmp_path, "some/model", "local/model", str(folder), "no/model", "a/b/c", "../x", "/no/x", HF_HUB_OFFLINE="1"
    )
    assert (cached, local, absolute) == (str(snapshot), "local/model", str(folder))
    assert weights.load(Path(cached), np.float32).config == LLAMA
    assert refused[0].startswith("refused: no/model is no folder here, and the Hugging Face hub did not give it")
    for name, message in zip(("a/b/c", "../x", "/no/x"), refused[1:], strict=True):
        assert message.startswith(f"refused: {name} does not exist: name the folder")


# --- config.json --------------------------------------------------------------------------------------------------


def test_published_llama(tmp_path):
    config = read(tmp_path, LLAMA_3_2_3B)
    assert config == ModelConfig(
        vocab_size=128256,
        embed=3072,
        mlp=8192,
        layers=28,
        heads=24,
        kv_heads=8,
        head_dim=128,
        windows=(None,) * 28,
        rope=Rope(500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        norm_eps=1e-5,
        tied=True,
        model_type="llama",
    )


def test_published_smollm2(tmp_path):
    config = read(tmp_path, SMOLLM2_135M)
    assert (config.head_dim, config.kv_heads, config.rope, config.tied) == (64, 3, Rope(100_000.0), True)


def test_published_gemma2(tmp_path):
    config = read(tmp_path, GEMMA_2_2B)
    assert config == ModelConfig(
        vocab_size=256000,
        embed=2304,
        mlp=9216,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        windows=(4096, None) * 13,
        query_scale=1 / 16,
        attention_softcap=50.0,
        final_softcap=30.0,
        norm_eps=1e-6,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=48.0,
        tied=True,
        model_type="gemma2",
    )


def test_published_olmo3(tmp_path):
    config = read(tmp_path, OLMO_3)
    assert config.windows == (4096, 4096, 4096, None) * 8 and config.qk_norm == "all"
    assert (config.pre_norms, config.post_norms) == (False, True)
    assert config.rope == Rope(500_000.0, YarnScaling(8.0, 1.2079441541679836, 32.0, 1.0, 8192))
    assert config.local_rope == Rope(500_000.0)
    without = {key: value for key, value in OLMO_3.items() if key != "layer_types"}
    assert read(tmp_path, without) == config
    new = {key: value for key, value in OLMO_3.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {
        "full_attention": YARN | {"rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
    }
    assert read(tmp_path, new) == config
    # Without its own attention factor it is 1 + 0.1 log(factor), the one that was written down.
    unsaid = {key: value for key, value in YARN.items() if key != "attention_factor"}
    assert read(tmp_path, OLMO_3 | {"rope_scaling": unsaid}).rope == config.rope


def test_published_gemma3(tmp_path):
    config = read(tmp_path, GEMMA_3_270M)
    assert config.windows == ((512,) * 5 + (None,)) * 3 and config.qk_norm == "head"
    assert (config.rope, config.local_rope) == (Rope(1e6), Rope(1e4))
    assert (config.query_scale, config.norm_plus_one, config.post_norms) == (1 / 16, True, True)
    without = {key: value for key, value in GEMMA_3_270M.items() if key != "layer_types"}
    assert read(tmp_path, without) == config
    assert read(tmp_path, without | {"sliding_window_pattern": 2}).windows == (512, None) * 9
    scaled = read(tmp_path, GEMMA_3_270M | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert (scaled.rope, scaled.local_rope) == (Rope(1e6, LinearScaling(8.0)), Rope(1e4))
    new = {key: value for key, value in GEMMA_3_270M.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert read(tmp_path, new) == config == read(tmp_path, {k: v for k, v in new.items() if k != "rope_parameters"})


GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}
SMOLLM_3 = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
GRANITE = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "logits_scaling": 8.0,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49155,
}


def test_published_gemma3_that_sees(tmp_path):
    config = read(tmp_path, GEMMA_3_4B)
    assert (config.vocab_size, config.heads, config.kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert (config.rope, config.local_rope) == (Rope(1e6, LinearScaling(8.0)), Rope(1e4))
    assert config.windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert (config.tied, config.model_type, config.norm_plus_one) == (True, "gemma3_text", True)
    assert families.config_values(config, "bfloat16")["architectures"] == ["Gemma3ForCausalLM"]
    assert read(tmp_path, GEMMA_3_4B["text_config"]) == config  # a text model lacks them as well


def test_published_smollm3(tmp_path):
    config = read(tmp_path, SMOLLM_3)
    assert config.unrotated_layers == tuple(range(3, 36, 4)) and config.ropes == (Rope(5e6), None)
    assert (config.windows, config.tied, config.head_dim) == ((None,) * 36, True, 128)
    without = {key: value for key, value in SMOLLM_3.items() if not key.startswith("no_rope_layers")}
    assert read(tmp_path, without) == config
    assert read(tmp_path, without | {"no_rope_layer_interval": 9}).unrotated_layers == (8, 17, 26, 35)
    with_windows = without | {"use_sliding_window": True, "sliding_window": 512, "layer_types": None}
    assert read(tmp_path, with_windows).windows == (None, None, None, 512) * 9


def test_published_phi(tmp_path):
    config = read(tmp_path, PHI_4_MINI)
    scaling = LongRopeScaling((1.0,) * 48, (2.0,) * 48, math.sqrt(1 + math.log(32) / math.log(4096)), 32.0, 4096)
    assert config.rope == Rope(10_000.0, scaling, 0.75) and config.windows == (262144,) * 32
    assert config.rope.channels(config.head_dim) == 96
    short, long = (config.rope.inverse_frequencies(config.head_dim, length) for length in (4096, 4097))
    assert np.array_equal(long, short / np.float32(2))
    new = {key: value for key, value in PHI_4_MINI.items() if not key.startswith("rope_")}
    new["rope_parameters"] = PHI_4_MINI["rope_scaling"] | {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
    }
    assert read(tmp_path, new) == config
    for older in ("su", "yarn"):  # which Phi3Config takes for the same
        assert read(tmp_path, PHI_4_MINI | {"rope_scaling": PHI_4_MINI["rope_scaling"] | {"type": older}}) == config
    own = PHI_4_MINI | {"rope_scaling": PHI_4_MINI["rope_scaling"] | {"attention_factor": 1.5}}
    assert read(tmp_path, own).rope.magnitude == 1.5
    phi_4 = {**PHI_4_MINI, "original_max_position_embeddings": 16384, "max_position_embeddings": 16384}
    phi_4 |= {"rope_scaling": None, "sliding_window": None, "partial_rotary_factor": 1.0, "rope_theta": 250000}
    assert read(tmp_path, phi_4).rope == Rope(250_000.0)


def test_published_granite(tmp_path):
    config = read(tmp_path, GRANITE)
    assert (config.scale, config.embedding_scale, config.residual_scale, config.logits_divisor) == (1 / 64, 12, 0.22, 8)
    without = {key: value for key, value in GRANITE.items() if not key.endswith(("multiplier", "scaling"))}
    assert read(tmp_path, without).scale == 1.0  # not 1 / sqrt(head_dim)


def test_published_qwen(tmp_path):
    config = read(tmp_path, QWEN_2_5)
    assert (config.qkv_bias, config.qk_norm, config.head_dim, config.tied) == (True, None, 64, True)
    assert config.windows == (None,) * 24
    assert read(tmp_path, QWEN_2_5 | {"use_sliding_window": True}).windows == (None,) * 21 + (32768,) * 3
    config = read(tmp_path, QWEN_3)
    assert (config.qkv_bias, config.qk_norm, config.head_dim) == (False, "head", 128)


def test_published_mistral(tmp_path):
    assert read(tmp_path, MISTRAL).windows == (4096,) * 32
    assert read(tmp_path, MISTRAL | {"sliding_window": None}).windows == (None,) * 32
    assert read(tmp_path, MISTRAL | {"head_dim": 64}).head_dim == 64  # Mistral Nemo's is not hidden size / heads
    without = {key: value for key, value in MISTRAL.items() if key != "num_key_value_heads"}
    assert read(tmp_path, without).kv_heads == 8


def test_what_the_published_byte_models_call_a_norm_of_queries_and_keys(tmp_path):
    config = read(tmp_path, LLAMA_3_2_3B | {"model_type": "tpu_llama", "add_qk_norm": True, "skip_out_norm": False})
    assert config.qk_norm == "head" and read(tmp_path, LLAMA_3_2_3B).qk_norm is None


@pytest.mark.parametrize(
    "published",
    (OLMO_3, GEMMA_3_270M, QWEN_2_5, QWEN_3, MISTRAL, LLAMA_3_2_3B, GEMMA_2_2B, SMOLLM_3, PHI_4_MINI, GRANITE),
    ids=lambda values: values["model_type"],
)
def test_a_config_comes_out_as_it_was_read(tmp_path, published):
    """Of the same family, although others could express some of them too."""
    config = read(tmp_path, published)
    written = families.config_values(config, "bfloat16")
    assert written["model_type"] == published["model_type"]
    assert read(tmp_path, written) == config


HARMLESS = {  # what fine-tunes and converters leave in config.json
    "_commit_hash": "0123",
    "_from_model_config": True,
    "bad_words_ids": [[5]],
    "begin_suppress_tokens": [220],
    "decoder_start_token_id": 1,
    "do_sample": True,
    "forced_eos_token_id": 2,
    "gradient_checkpointing": True,
    "max_length": 4096,
    "max_new_tokens": 256,
    "max_sequence_length": 4096,
    "model_max_length": 4096,
    "n_positions": 4096,
    "neftune_noise_alpha": 5,
    "num_return_sequences": 1,
    "original_max_position_embeddings": 16384,
    "output_hidden_states": True,
    "repetition_penalty": 1.1,
    "sep_token_id": 3,
    "task_specific_params": {"text-generation": {"max_length": 50}},
    "temperature": 0.9,
    "tokenizer_class": "LlamaTokenizer",
    "top_k": 50,
    "top_p": 0.6,
    "typical_p": 1.0,
    "unk_token_id": 0,
    "unsloth_version": "2025.1",
    "use_flash_attention": True,
}


@pytest.mark.parametrize("base", (SMOLLM2_135M, GEMMA_2_2B, QWEN_3, GEMMA_3_4B), ids=lambda base: base["model_type"])
def test_harmless_keys(tmp_path, base):
    assert read(tmp_path, base | HARMLESS) == read(tmp_path, base)
    with pytest.raises(InputError, match="temperatur'"):
        read(tmp_path, base | HARMLESS | {"temperatur": 0.9})


def test_no_harmless_key_is_one_that_is_read():
    read_keys = {key for family in families.FAMILIES for key in family.defaults}
    lengths = {"max_position_embeddings", "original_max_position_embeddings"}  # which longrope reads
    assert read_keys & families.HARMLESS == lengths
    listed = [key for keys in families.HARMLESS_BY_REASON.values() for key in keys.split()]
    assert len(listed) == len(set(listed))


def test_whole_numbers_with_a_point(tmp_path):
    changed = {
        "vocab_size": 49152.0,
        "hidden_size": 576.0,
        "num_hidden_layers": 30.0,
        "max_position_embeddings": 8192.0,
    }
    config = read(tmp_path, SMOLLM2_135M | changed)
    assert config == read(tmp_path, SMOLLM2_135M)
    assert all(isinstance(size, int) for size in (config.vocab_size, config.embed, config.layers))


def test_lengths_that_a_scaling_depends_on(tmp_path):
    """Versions of transformers differ in which one they take, so they must agree."""
    length = "original_max_position_embeddings"
    assert read(tmp_path, LLAMA_3_2_3B | {length: 8192}) == read(tmp_path, LLAMA_3_2_3B)
    for base in (LLAMA_3_2_3B, QWEN_3 | {"rope_scaling": YARN}, PHI_4_MINI | {"rope_scaling": None}):
        if base["rope_scaling"] is None:
            base = PHI_4_MINI | {"rope_scaling": PHI_4_MINI["rope_scaling"] | {length: 8192}}
        with pytest.raises(InputError, match=f"'{length}'.*(8192|4096): make them agree"):
            read(tmp_path, base | {length: 4096})


def test_a_flat_config_as_transformers_5_saves_it(tmp_path):
    """It takes nothing of `rope_parameters` that is not of one kind of layers, and saves it beside what it took."""
    transformers = pytest.importorskip("transformers")
    sizes = {key: OLMO_3[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")}
    flat = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 64}
    for name, ropes in (
        ("Olmo3Config", (Rope(500_000.0), None)),
        ("Gemma3TextConfig", (Rope(1e6), Rope(1e4))),
    ):
        getattr(transformers, name)(**sizes, rope_parameters=dict(flat)).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
        assert saved["rope_theta"] == 100.0 and saved["sliding_attention"]
        config = weights.read_config(tmp_path / "config.json")
        assert (config.rope, config.local_rope) == ropes


def test_spellings_of_transformers_5(tmp_path):
    new = dict(LLAMA_3_2_3B)
    new["rope_parameters"] = new.pop("rope_scaling") | {"rope_theta": new.pop("rope_theta")}
    new["dtype"] = new.pop("torch_dtype")
    assert read(tmp_path, new) == read(tmp_path, LLAMA_3_2_3B)
    new = dict(GEMMA_2_2B, layer_types=["sliding_attention", "full_attention"] * 13, use_bidirectional_attention=None)
    new["rope_parameters"] = {"rope_theta": new.pop("rope_theta"), "rope_type": "default"}
    del new["hidden_act"]
    assert read(tmp_path, new) == read(tmp_path, GEMMA_2_2B)


def test_older_and_double_spellings(tmp_path):
    scaling = dict(LLAMA_3_2_3B["rope_scaling"])
    scaling["type"] = scaling.pop("rope_type")
    assert read(tmp_path, LLAMA_3_2_3B | {"rope_scaling": scaling}) == read(tmp_path, LLAMA_3_2_3B)
    both = LLAMA_3_2_3B | {"rope_parameters": LLAMA_3_2_3B["rope_scaling"] | {"rope_theta": 500000.0}}
    assert read(tmp_path, both) == read(tmp_path, LLAMA_3_2_3B)


def test_missing_keys_mean_what_transformers_takes(tmp_path):
    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    needed += ("num_attention_heads", "num_key_value_heads")
    config = read(tmp_path, {key: LLAMA_3_2_3B[key] for key in needed})
    assert (config.head_dim, config.norm_eps, config.rope, config.tied) == (128, 1e-6, Rope(10_000.0), False)
    assert config.activation == "silu"
    assert read(tmp_path, {key: GEMMA_2_2B[key] for key in needed}) == read(tmp_path, GEMMA_2_2B)
    config = read(tmp_path, {key: LLAMA_3_2_3B[key] for key in needed[:-1]})
    assert config.kv_heads == config.heads
    for key in needed[:-1]:
        with pytest.raises(InputError, match=f"config.json.*{key}"):
            read(tmp_path, {other: LLAMA_3_2_3B[other] for other in needed if other != key})


@pytest.mark.parametrize("key", ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps"))
def test_null_is_missing(tmp_path, key):
    without = {other: value for other, value in LLAMA_3_2_3B.items() if other != key}
    assert read(tmp_path, without | {key: None}) == read(tmp_path, without)


def test_null_softcaps_are_none(tmp_path):
    config = read(tmp_path, GEMMA_2_2B | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert config.attention_softcap is None and config.final_softcap is None


ROPE = LLAMA_3_2_3B["rope_scaling"]


@pytest.mark.parametrize(
    "base, changes, named",
    (
        (LLAMA_3_2_3B, {"model_type": "phi3small"}, "model_type"),
        (LLAMA_3_2_3B, {"model_type": "gemma3"}, "text_config"),
        (LLAMA_3_2_3B, {"model_type": "tpu_gemma3"}, "model_type"),
        (LLAMA_3_2_3B, {"model_type": None}, "model_type"),
        (LLAMA_3_2_3B, {"model_type": ["llama"]}, "model_type"),
        (LLAMA_3_2_3B, {"hidden_act": "relu"}, "hidden_act"),
        (LLAMA_3_2_3B, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA_3_2_3B, {"attention_bias": 1}, "attention_bias"),
        (MISTRAL, {"attention_bias": True}, "attention_bias"),
        (MISTRAL, {"mlp_bias": True}, "mlp_bias"),
        (PHI_4_MINI, {"mlp_bias": True}, "mlp_bias"),
        (PHI_4_MINI, {"full_attn_mod": 2}, "full_attn_mod"),
        (LLAMA_3_2_3B, {"vocab_size": 128256.5}, "vocab_size"),
        (LLAMA_3_2_3B, {"vocab_size": float("inf")}, "vocab_size"),
        (LLAMA_3_2_3B, {"logits_scaling": 8.0}, "logits_scaling"),
        (GEMMA_3_270M, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping.*never applies"),
        (GRANITE, {"residual_multiplier": 0}, "residual_multiplier"),
        (GRANITE, {"residual_multiplier": "0.22"}, "residual_multiplier"),
        (SMOLLM_3, {"no_rope_layers": [1] * 35}, "no_rope_layers"),
        (SMOLLM_3, {"no_rope_layers": [2] * 36}, "no_rope_layers"),
        (SMOLLM_3, {"no_rope_layers": "1110"}, "no_rope_layers"),
        (SMOLLM_3, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        (SMOLLM_3, {"layer_types": ["sliding_attention"] * 36, "sliding_window": 512}, "layer_types"),
        (PHI_4_MINI, {"partial_rotary_factor": 0.76}, "partial_rotary_factor"),  # 97 of 128 channels
        (PHI_4_MINI, {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (PHI_4_MINI, {"partial_rotary_factor": 1.0}, "short_factor.*64 numbers"),
        (PHI_4_MINI, {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48}}, "long_factor"),
        (PHI_4_MINI, {"rope_scaling": PHI_4_MINI["rope_scaling"] | {"long_factor": [0.0] * 48}}, "long_factor"),
        (PHI_4_MINI, {"rope_scaling": PHI_4_MINI["rope_scaling"] | {"long_factor": 2.0}}, "long_factor"),
        (PHI_4_MINI, {"rope_scaling": PHI_4_MINI["rope_scaling"] | {"factor": 16.0}}, "factor"),
        (PHI_4_MINI, {"rope_scaling": PHI_4_MINI["rope_scaling"] | {"partial_rotary_factor": 0.5}}, "make them agree"),
        (PHI_4_MINI, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear.*phi3"),
        (QWEN_3, {"rope_scaling": PHI_4_MINI["rope_scaling"]}, "rope_scaling.*longrope"),
        (LLAMA_3_2_3B, {"attention_dropout": 0.1}, "attention_dropout"),
        (LLAMA_3_2_3B, {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA_3_2_3B, {"sliding_window": 4096}, "sliding_window"),
        (LLAMA_3_2_3B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (LLAMA_3_2_3B, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA_3_2_3B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA_3_2_3B, {"add_qk_norm": True}, "add_qk_norm"),
        (LLAMA_3_2_3B, {"head_dim": 63}, "head_dim"),
        (LLAMA_3_2_3B, {"num_key_value_heads": 5}, "num_key_value_heads"),
        (LLAMA_3_2_3B, {"hidden_size": "3072"}, "hidden_size"),
        (LLAMA_3_2_3B, {"hidden_size": 0}, "hidden_size"),
        (LLAMA_3_2_3B, {"num_hidden_layers": True}, "num_hidden_layers"),
        (LLAMA_3_2_3B, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (LLAMA_3_2_3B, {"rope_theta": -1}, "rope_theta"),
        (LLAMA_3_2_3B, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (LLAMA_3_2_3B, {"rope_scaling": ROPE | {"rope_type": "longrope"}}, "rope_scaling.*longrope"),
        (LLAMA_3_2_3B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.*dynamic"),
        (LLAMA_3_2_3B, {"rope_scaling": {"type": "linear"}}, "rope_scaling.*factor"),
        (LLAMA_3_2_3B, {"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "rope_scaling.*'x'"),
        (LLAMA_3_2_3B, {"rope_scaling": {"type": "yarn"}}, "rope_scaling.*factor"),
        (LLAMA_3_2_3B, {"rope_scaling": YARN | {"beta_slow": 40.0}}, "rope_scaling.*beta_slow"),
        (LLAMA_3_2_3B, {"rope_scaling": YARN | {"short_factor": [1.0]}}, "rope_scaling.*short_factor"),
        (LLAMA_3_2_3B, {"layer_types": ["full_attention"] * 28}, "layer_types"),
        (LLAMA_3_2_3B, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        (LLAMA_3_2_3B | {"model_type": "tpu_llama"}, {"skip_out_norm": True}, "skip_out_norm"),
        (QWEN_2_5, {"sliding_window": -1}, "sliding_window"),
        (QWEN_2_5, {"use_sliding_window": 1}, "use_sliding_window"),
        (QWEN_2_5, {"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        (QWEN_2_5, {"attention_bias": True}, "attention_bias"),
        (QWEN_3, {"attention_bias": True}, "attention_bias"),
        (OLMO_3, {"rope_theta": None}, "rope_theta"),
        (OLMO_3, {"rope_theta": 10000.0}, "rope_theta.*of both kinds of layers"),
        (OLMO_3, {"clip_qkv": 8.0}, "clip_qkv"),
        (
            OLMO_3,
            {"rope_parameters": {"sliding_attention": None, "full_attention": {"rope_theta": 1.0}}},
            "for each of",
        ),
        (
            OLMO_3,
            {"rope_parameters": {"sliding_attention": {"rope_theta": 5e5}, "full_attention": YARN}},
            "for each of",
        ),
        (OLMO_3, {"rope_parameters": YARN | {"rope_theta": 5e5}}, "'rope_theta' for each of.*would take its own"),
        (OLMO_3, {"rope_parameters": {kind: {"rope_theta": 1.0} for kind in families.LAYER_TYPES}}, "twice"),
        (OLMO_3, {"rope_scaling": YARN | {"truncate": False}}, "truncate"),
        (GEMMA_3_270M, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "for each of"),
        (GEMMA_3_270M, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "for each of"),
        (GEMMA_3_270M, {"rope_parameters": {}}, "for each of"),
        (GEMMA_3_270M, {"rope_parameters": []}, "rope_parameters.* is not a JSON object"),
        (GEMMA_3_270M, {"sliding_window": None}, "layer_types"),
        (
            GEMMA_3_270M,
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}, "full_attention": {"rope_theta": 1e6}}},
            "rope_local_base_freq",
        ),
        (LLAMA_3_2_3B, {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling.*factor"),
        (LLAMA_3_2_3B, {"rope_scaling": ROPE | {"attention_factor": 2.0}}, "rope_scaling.*attention_factor"),
        (LLAMA_3_2_3B, {"rope_scaling": ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        (LLAMA_3_2_3B, {"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        (LLAMA_3_2_3B, {"rope_scaling": "llama3"}, "rope_scaling"),
        (LLAMA_3_2_3B, {"rope_parameters": ROPE | {"factor": 2.0}}, "twice"),
        (LLAMA_3_2_3B, {"rope_parameters": ROPE | {"rope_theta": 1.0}, "rope_scaling": None}, "twice"),
        (LLAMA_3_2_3B, {"expand_input_ids": True}, "expand_input_ids_vocab_size"),
        (
            LLAMA_3_2_3B,
            {"expand_input_ids": True, "expand_input_ids_vocab_size": 9, "expand_input_ids_maxlen": 8},
            "expand_input_ids_maxlen",
        ),
        (GEMMA_2_2B, {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA_2_2B, {"hidden_act": "gelu"}, "hidden_act"),
        (GEMMA_2_2B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA_2_2B, {"layer_types": ["full_attention"]}, "layer_types"),
        (GEMMA_2_2B, {"layer_types": ["chunked_attention"] * 26}, "layer_types"),
        (GEMMA_2_2B, {"sliding_window": 4096.5}, "sliding_window"),
        (GEMMA_2_2B, {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        (GEMMA_2_2B, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ),
    ids=str,
)
def test_refused_settings_are_named(tmp_path, base, changes, named):
    with pytest.raises(InputError, match=f"config.json.*{named}"):
        read(tmp_path, base | changes)


def test_config_that_is_no_config(tmp_path):
    for text, named in (("{", "JSON"), ("[]", "JSON object"), ('{"a": 1, "a": 2}', "'a' twice"), ("\xff", "JSON")):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=f"config.json.*{named}"):
            weights.load(tmp_path, np.float32)
    with pytest.raises(InputError, match="config.json does not exist"):
        weights.load(tmp_path / "nowhere", np.float32)
    with pytest.raises(InputError, match="does not exist"):
        weights.load(tmp_path / "config.json", np.float32)


# --- tensors ------------------------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj.weight"


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; dots are written as two underscores."""
    tensors = tensors_of(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(kept, folder / "model.safetensors")


def split_in_two(folder: Path) -> dict:
    """Splits model.safetensors in two and returns the index, for `write_index`."""
    tensors = tensors_of(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name, place in weight_map.items() if place == file}
        safetensors.numpy.save_file(part, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        weights.load(folder, np.float32)


def test_several_files_with_an_index(folder):
    whole = weights.load(folder, np.float32)
    split_in_two(folder)
    assert_same(weights.load(folder, np.float32), whole)


def test_a_missing_tensor(folder):
    rewrite(folder, model__layers__1__mlp__down_proj__weight=None)
    refused(folder, f"model lacks the tensor {DOWN}")


def test_an_unexpected_tensor(folder):
    rewrite(folder, model__layers__1__self_attn__q_proj__bias=np.zeros(60, np.float32))
    refused(folder, "model holds the tensor model.layers.1.self_attn.q_proj.bias")


def test_a_layer_too_many(folder):
    edit(folder, num_hidden_layers=2)
    refused(folder, r"model holds the tensor model.layers.2\.")


def test_an_untied_model_without_its_unembedding(folder):
    rewrite(folder, lm_head__weight=None)
    refused(folder, "model lacks the tensor lm_head.weight")


def test_a_wrong_shape(folder):
    rewrite(folder, model__layers__1__mlp__down_proj__weight=np.zeros((34, 24), np.float32))
    refused(folder, rf"the tensor {DOWN} has the shape \(34, 24\) where config.json asks for \(24, 34\)")


def test_a_config_of_another_size_is_refused_before_anything_is_allocated(folder):
    edit(folder, vocab_size=10**6)
    refused(folder, "model.embed_tokens.weight has the shape")
    edit(folder, vocab_size=10**12)
    refused(folder, "'vocab_size' is 1000000000000, which is more than 4,194,304")


def test_a_quantised_tensor(folder):
    rewrite(folder, model__layers__1__mlp__down_proj__weight=np.zeros((24, 34), np.int8))
    refused(folder, f"the tensor {DOWN} is I8")


def test_an_expansion_that_config_does_not_mention(folder):
    rewrite(folder, model__expand_embed_tokens__weight=np.zeros((78, 24), np.float32))
    refused(folder, "model.expand_embed_tokens.weight")


def test_tied_tables_given_twice(folder):
    edit(folder, tie_word_embeddings=True)
    refused(folder, "tie_word_embeddings.*lm_head.weight differ")
    embed = tensors_of(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lm_head__weight=embed)
    model = weights.load(folder, np.float32)
    assert model.unembed is None and np.array_equal(model.embed, embed)


@pytest.mark.parametrize("size", (0, 7, 100, -1))
def test_a_truncated_file(folder, size):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:size])
    refused(folder, "model.safetensors is damaged")


@pytest.mark.parametrize("header", (b"\xff" * 8, b"version https://git-lfs.github.com/spec/v1\noid sha256:0"))
def test_a_file_that_is_no_safetensors(folder, header):
    (folder / "model.safetensors").write_bytes(header)
    refused(folder, "model.safetensors is damaged")


def with_header(file: Path, text: bytes | dict, data: bytes | None = None) -> None:
    """Puts another header in front of the data of a safetensors file, or of other data."""
    whole = file.read_bytes()
    data = whole[8 + int.from_bytes(whole[:8], "little") :] if data is None else data
    text = json.dumps(text).encode() if isinstance(text, dict) else text
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def header_of(file: Path) -> dict:
    whole = file.read_bytes()
    return json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])


@pytest.mark.parametrize("sharded", (False, True))
@pytest.mark.parametrize(
    "change",
    (
        lambda tensor, end: {"data_offsets": [tensor["data_offsets"][0], end + 4]},
        lambda tensor, end: {"data_offsets": [2**63, 2**63 + 24 * 34 * 4]},
        lambda tensor, end: {"data_offsets": [tensor["data_offsets"][0] - 4, tensor["data_offsets"][1] - 4]},
        lambda tensor, end: {"data_offsets": tensor["data_offsets"][::-1]},
        lambda tensor, end: {"data_offsets": [0, 24 * 34 * 4]},
        lambda tensor, end: {"shape": [24, 35]},
        lambda tensor, end: {"shape": [2**40, 2**40]},
        lambda tensor, end: {"shape": [-24, 34]},
        lambda tensor, end: {"dtype": "BF16"},
        lambda tensor, end: {"dtype": "NONE"},
    ),
)
def test_a_header_that_does_not_fit_its_data(folder, sharded, change):
    file = folder / (split_in_two(folder)[DOWN] if sharded else "model.safetensors")
    header = header_of(file)
    end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
    header[DOWN] |= change(header[DOWN], end)
    with_header(file, header)
    refused(folder, f"{file.name} is damaged .*: fetch it again")


@pytest.mark.parametrize("text", (b"", b"{", b"[]", b"\xff", b'{"a": 1}', b"{}"))
def test_a_header_that_is_none(folder, text):
    with_header(folder / "model.safetensors", text)
    refused(folder, "model.safetensors is damaged")


def test_a_header_longer_than_its_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])
    refused(folder, "model.safetensors is damaged")


def test_a_header_that_names_a_tensor_twice(folder):
    file = folder / "model.safetensors"
    text = json.dumps(header_of(file)).replace('"lm_head.weight"', f'"{DOWN}"')
    with_header(file, text.encode())
    refused(folder, "model.safetensors is damaged")


def test_data_behind_the_tensors(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    refused(folder, "model.safetensors is damaged")


@pytest.mark.parametrize("dtype", (np.float64, np.int32, families.ml_dtypes.float8_e4m3fn))
def test_dtypes_that_are_not_read(folder, dtype):
    rewrite(folder, model__norm__weight=np.ones(24, dtype))
    refused(folder, "model.safetensors: the tensor model.norm.weight is (F64|I32|F8_E4M3), which is not implemented")


def test_a_file_that_is_a_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "model.safetensors is a folder, a pipe or a device, and no file")


def test_a_truncated_shard(folder):
    file = folder / split_in_two(folder)[DOWN]
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, f"{file.name} is damaged")


def test_no_tensors_at_all(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "has no model.safetensors")


def test_a_single_file_and_an_index(folder):
    shutil.copy(folder / "model.safetensors", folder / "kept")
    split_in_two(folder)
    (folder / "kept").rename(folder / "model.safetensors")
    refused(folder, "remove one of them")


def test_a_missing_shard(folder):
    split_in_two(folder)
    (folder / "part-1.safetensors").unlink()
    refused(folder, "part-1.safetensors is missing")


def test_a_shard_that_lacks_what_the_index_promises(folder):
    file = folder / split_in_two(folder)[DOWN]
    safetensors.numpy.save_file({name: tensor for name, tensor in tensors_of(file).items() if name != DOWN}, file)
    refused(folder, f"{file.name} lacks the tensor {DOWN} that model.safetensors.index.json promises")


def test_a_tensor_in_two_shards(folder):
    weight_map = split_in_two(folder)
    other = "part-0.safetensors" if weight_map[DOWN] == "part-1.safetensors" else "part-1.safetensors"
    twice = tensors_of(folder / other) | {DOWN: np.zeros((24, 34), np.float32)}
    safetensors.numpy.save_file(twice, folder / other)
    refused(folder, f"{other} holds the tensor {DOWN}, which model.safetensors.index.json places in {weight_map[DOWN]}")


def test_a_shard_with_a_tensor_that_the_index_does_not_list(folder):
    weight_map = split_in_two(folder)
    del weight_map[DOWN]
    write_index(folder, weight_map)
    refused(folder, f"holds the tensor {DOWN}, which model.safetensors.index.json does not list")


@pytest.mark.parametrize(
    "weight_map",
    (
        None,
        [],
        {"a": 1},
        {"a": "../model.safetensors"},
        {"a": "/tmp/model.safetensors"},
        {"a": "part/model.safetensors"},
        {"a": "..safetensors/"},
        {"a": "pytorch_model.bin"},
    ),
    ids=str,
)
def test_an_index_that_is_none(folder, weight_map):
    split_in_two(folder)
    write_index(folder, weight_map)
    refused(folder, "no 'weight_map'")


def test_an_index_with_an_impossible_name(folder):
    write_index(folder, split_in_two(folder) | {DOWN: "a\0.safetensors"})
    refused(folder, "safetensors is missing")


def test_an_index_of_nothing(folder):
    split_in_two(folder)
    write_index(folder, {})
    refused(folder, "model lacks the tensor")


def test_an_index_that_names_a_tensor_twice(folder):
    split_in_two(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"lm_head.weight"', f'"{DOWN}"'))
    refused(folder, f"'{DOWN}' twice")
