"""Hugging Face folders: both directions, the spellings of transformers 4 and 5, and everything that must be refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from minalm import families, hf
from minalm.model import LinearScaling, Llama3Scaling, ModelConfig, Rope, Transformer, YarnScaling, initialize
from minalm.text import InputError

FIXTURES = Path(__file__).parent / "fixtures"
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
    "llama": LLAMA,
    "llama tied, no scaling": dataclasses.replace(LLAMA, tied=True, rope=Rope(100.0)),
    "llama with expansion": dataclasses.replace(LLAMA, expansion_size=77),
    "gemma2": GEMMA,
    "gemma2 untied, full attention": dataclasses.replace(GEMMA, tied=False, windows=(None, None, None)),
    "gemma2 without caps": dataclasses.replace(GEMMA, attention_softcap=None, final_softcap=None),
    "gemma2 with expansion": dataclasses.replace(GEMMA, tied=False, expansion_size=77),
}

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
    shapes = families.leaves(families.abstract(config))
    random = np.random.default_rng(0)
    return families.from_leaves(
        config, {leaf: random.normal(size=s.shape).astype(np.float32) for leaf, s in shapes.items()}
    )


def read(folder: Path, values: dict) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return hf.read_config(folder / "config.json")


def edit(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    with safe_open(file, framework="numpy") as tensors:
        return tensors.get_tensors()


def assert_same(first: Transformer, second: Transformer) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for leaf, array in families.leaves(first).items():
        other = families.leaves(second)[leaf]
        assert array.dtype == other.dtype and np.array_equal(array, other), leaf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with both tables, to be damaged."""
    hf.save(tmp_path / "model", random_model(LLAMA), "float32")
    return tmp_path / "model"


# --- both directions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip_keeps_every_bit(tmp_path, config):
    model = random_model(config)
    hf.save(tmp_path / "model", model, "float32")
    assert_same(hf.load(tmp_path / "model", np.float32), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # nothing temporary is left
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_files_of_transformers_come_out_again(tmp_path, name):
    """The tensors that torch wrote: same names, shapes, bits."""
    hf.save(tmp_path / "model", hf.load(FIXTURES / name, np.float32), "bfloat16")
    found = tensors_of(tmp_path / "model" / "model.safetensors")
    expected = {}
    for file in (FIXTURES / name).glob("*.safetensors"):
        expected |= tensors_of(file)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert found[tensor].dtype == value.dtype == families.DTYPES["bfloat16"]
        assert np.array_equal(found[tensor], value), tensor
    assert hf.read_config(tmp_path / "model" / "config.json") == hf.read_config(FIXTURES / name / "config.json")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="numpy") as tensors:
        assert tensors.metadata() == {"format": "pt"}


def test_bfloat16_rounds_once(tmp_path):
    model = random_model(GEMMA)
    hf.save(tmp_path / "model", model, "bfloat16")
    rounded = families.leaves(hf.load(tmp_path / "model", families.DTYPES["bfloat16"]))
    for leaf, array in families.leaves(model).items():
        assert np.array_equal(rounded[leaf], array.astype(families.DTYPES["bfloat16"]))


def test_float16_files(tmp_path, folder):
    file = folder / "model.safetensors"
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors_of(file).items()}
    safetensors.numpy.save_file(halves, file)
    expected = halves["model.layers.1.mlp.down_proj.weight"].T.astype(np.float32)
    assert np.array_equal(hf.load(folder, np.float32).blocks.mlp.down[1], expected)


def test_layout_of_the_projections(folder):
    """Head h, channel d of a query is row h * head_dim + d of torch's matrix; of the output projection, its column."""
    stored, model = tensors_of(folder / "model.safetensors"), hf.load(folder, np.float32)
    q = stored["model.layers.1.self_attn.q_proj.weight"]
    o = stored["model.layers.2.self_attn.o_proj.weight"]
    assert q.shape == (60, 24) and o.shape == (24, 60)
    assert np.array_equal(model.blocks.attention.q[1, :, 4, 7], q[4 * 10 + 7])
    assert np.array_equal(model.last.attention.o[4, 7], o[:, 4 * 10 + 7])


def test_initial_parameters_can_be_saved(tmp_path):
    """Arrays on a device as well as on the host."""
    hf.save(tmp_path / "model", initialize(LLAMA, jax.random.key(0)), "float32")
    assert hf.load(tmp_path / "model", np.float32).config == LLAMA


def test_rows_past_the_vocabularies_are_cut(tmp_path):
    model = random_model(CONFIGS["gemma2 with expansion"])
    hf.save(tmp_path / "model", model, "float32", vocabulary_size=51, expansion_size=70)
    loaded = hf.load(tmp_path / "model", np.float32)
    assert (loaded.config.vocab_size, loaded.config.expansion_size) == (51, 70)
    for leaf, size in (("embed", 51), ("unembed", 51), ("expansion", 70)):
        assert np.array_equal(families.leaves(loaded)[leaf], families.leaves(model)[leaf][:size])


def test_expansion_keys(tmp_path):
    hf.save(tmp_path / "model", random_model(CONFIGS["gemma2 with expansion"]), "float32")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["expand_input_ids"] is True
    assert values["expand_input_ids_maxlen"] == 16 and values["expand_input_ids_vocab_size"] == 77
    # transformers knows no such type. It would load a gemma2 and only warn that a tensor is left over.
    assert values["model_type"] == "tpu_gemma2"
    stored = tensors_of(tmp_path / "model" / "model.safetensors")
    assert stored["model.expand_embed_tokens.weight"].shape == (77, 24)


def test_further_files_and_keys(tmp_path):
    files = {"a.json": {"x": "é"}, "b.bin": b"\x00\x01"}
    hf.save(tmp_path / "new" / "model", random_model(LLAMA), "float32", keys={"bos_token_id": 5}, files=files)
    written = tmp_path / "new" / "model"
    assert json.loads((written / "a.json").read_text("utf-8")) == {"x": "é"}
    assert (written / "b.bin").read_bytes() == b"\x00\x01"
    assert json.loads((written / "config.json").read_text())["bos_token_id"] == 5


def test_save_refuses_what_exists(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="model exists already"):
        hf.save(folder, random_model(GEMMA), "float32")
    assert (folder / "model.safetensors").read_bytes() == before
    (folder.parent / "empty").mkdir()
    with pytest.raises(InputError, match="empty exists already"):
        hf.save(folder.parent / "empty", random_model(GEMMA), "float32")


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        hf.save(tmp_path / "model", random_model(LLAMA), "float32", files={"a.json": {"x": object()}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    (
        {"windows": (3, 4, None), "norm_plus_one": True},
        {"windows": (3, None, None)},
        {"attention_softcap": 5.0},
        {"embedding_scale": 2.0},
        {"post_norms": True},
        {"query_scale": 0.3},
    ),
    ids=str,
)
def test_save_refuses_what_no_family_expresses(tmp_path, changes):
    with pytest.raises(InputError, match="no Hugging Face model type"):
        hf.save(tmp_path / "model", random_model(dataclasses.replace(LLAMA, **changes)), "float32")
    assert not list(tmp_path.iterdir())


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
    (OLMO_3, GEMMA_3_270M, QWEN_2_5, QWEN_3, MISTRAL, LLAMA_3_2_3B, GEMMA_2_2B),
    ids=lambda values: values["model_type"],
)
def test_a_config_comes_out_as_it_was_read(tmp_path, published):
    """Of the same family, although others could express some of them too."""
    config = read(tmp_path, published)
    written = families.config_values(config, "bfloat16")
    assert written["model_type"] == published["model_type"]
    assert read(tmp_path, written) == config


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
        (LLAMA_3_2_3B, {"model_type": "phi3"}, "model_type"),
        (LLAMA_3_2_3B, {"model_type": "gemma3"}, "model_type"),
        (LLAMA_3_2_3B, {"model_type": None}, "model_type"),
        (LLAMA_3_2_3B, {"model_type": ["llama"]}, "model_type"),
        (LLAMA_3_2_3B, {"hidden_act": "relu"}, "hidden_act"),
        (LLAMA_3_2_3B, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA_3_2_3B, {"attention_bias": True}, "attention_bias"),
        (LLAMA_3_2_3B, {"mlp_bias": True}, "mlp_bias"),
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
        (OLMO_3, {"clip_qkv": 8.0}, "clip_qkv"),
        (OLMO_3, {"rope_parameters": {"sliding_attention": None, "full_attention": {"rope_theta": 1.0}}}, "twice"),
        (GEMMA_3_270M, {"sliding_window": None}, "layer_types"),
        (GEMMA_3_270M, {"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}}}, "rope_local_base_freq"),
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
            hf.load(tmp_path, np.float32)
    with pytest.raises(InputError, match="config.json does not exist"):
        hf.load(tmp_path / "nowhere", np.float32)
    with pytest.raises(InputError, match="does not exist"):
        hf.load(tmp_path / "config.json", np.float32)


# --- tensors ------------------------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj.weight"


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; dots are written as two underscores."""
    tensors = tensors_of(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.numpy.save_file(kept, folder / "model.safetensors")


def shard(folder: Path) -> dict:
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
        hf.load(folder, np.float32)


def test_several_files_with_an_index(folder):
    whole = hf.load(folder, np.float32)
    shard(folder)
    assert_same(hf.load(folder, np.float32), whole)


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
    edit(folder, vocab_size=10**12)
    refused(folder, "model.embed_tokens.weight has the shape")


def test_a_quantised_tensor(folder):
    rewrite(folder, model__layers__1__mlp__down_proj__weight=np.zeros((24, 34), np.int8))
    refused(folder, f"the tensor {DOWN} is I8")


def test_an_expansion_that_config_does_not_mention(folder):
    rewrite(folder, model__expand_embed_tokens__weight=np.zeros((77, 24), np.float32))
    refused(folder, "model.expand_embed_tokens.weight")


def test_tied_tables_given_twice(folder):
    edit(folder, tie_word_embeddings=True)
    refused(folder, "tie_word_embeddings.*lm_head.weight differ")
    embed = tensors_of(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lm_head__weight=embed)
    model = hf.load(folder, np.float32)
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


def test_no_tensors_at_all(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "has no model.safetensors")


def test_a_single_file_and_an_index(folder):
    shutil.copy(folder / "model.safetensors", folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / "model.safetensors")
    refused(folder, "remove one of them")


def test_a_missing_shard(folder):
    shard(folder)
    (folder / "part-1.safetensors").unlink()
    refused(folder, "part-1.safetensors is missing")


def test_a_shard_that_lacks_what_the_index_promises(folder):
    file = folder / shard(folder)[DOWN]
    safetensors.numpy.save_file({name: tensor for name, tensor in tensors_of(file).items() if name != DOWN}, file)
    refused(folder, f"{file.name} lacks the tensor {DOWN} that model.safetensors.index.json promises")


def test_a_tensor_in_two_shards(folder):
    weight_map = shard(folder)
    other = "part-0.safetensors" if weight_map[DOWN] == "part-1.safetensors" else "part-1.safetensors"
    twice = tensors_of(folder / other) | {DOWN: np.zeros((24, 34), np.float32)}
    safetensors.numpy.save_file(twice, folder / other)
    refused(folder, f"{other} holds the tensor {DOWN}, which model.safetensors.index.json places in {weight_map[DOWN]}")


def test_a_shard_with_a_tensor_that_the_index_does_not_list(folder):
    weight_map = shard(folder)
    del weight_map[DOWN]
    write_index(folder, weight_map)
    refused(folder, f"holds the tensor {DOWN}, which model.safetensors.index.json does not list")


@pytest.mark.parametrize("weight_map", (None, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": "pytorch_model.bin"}))
def test_an_index_that_is_none(folder, weight_map):
    shard(folder)
    write_index(folder, weight_map)
    refused(folder, "no 'weight_map'")


def test_an_index_that_names_a_tensor_twice(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"lm_head.weight"', f'"{DOWN}"'))
    refused(folder, f"'{DOWN}' twice")
