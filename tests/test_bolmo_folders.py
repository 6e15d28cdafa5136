"""Bolmo in Hugging Face folders: the published layout read and written, against plain numpy and in transformers."""

import json
import math
from pathlib import Path

import bolmo_numpy as plain
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_modeling_bolmo import SEQUENCES, SIZES, SPELLED, TRUNKS, text

from minalm.errors import InputError
from minalm.huggingface import folder as folders
from minalm.huggingface import kinds, weights
from minalm.huggingface.loaded import LoadedModel
from minalm.models import bolmo, layers
from minalm.models.kinds import parameter_counts
from minalm.models.transformer import leaves
from minalm.parallel.mesh import make_mesh, shard, shard_map

OURS = {"trunk_model_type", "subword_bytes"}  # keys that no published folder has


def write(folder, changes=(), left_out=(), tensors=None):
    folder.mkdir()
    config = {key: value for key, value in (SIZES | dict(changes)).items() if key not in left_out}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = plain.random_tensors(config, 0) if tensors is None else tensors
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return config, tensors


def ours(ids):
    """Published ids -> those inside."""
    return np.array([(i - 4 if i % 260 >= 4 else i + 256) for i in ids])


@pytest.mark.parametrize("trunk", ["olmo3", "llama", pytest.param("olmo2", marks=pytest.mark.slow)])
def test_read_and_written_again(tmp_path, trunk):
    config, tensors = write(tmp_path / "published", TRUNKS[trunk])
    folders.copy(tmp_path / "published", tmp_path / "ours", weights.read(tmp_path / "published"), "float32")
    again = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].tobytes() == tensor.tobytes(), name
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    said = {key: value for key, value in config.items() if key not in ("auto_map", "torch_dtype", "trunk_model_type")}
    assert {key: values.get(key) for key in said} == said
    assert (values["trunk_model_type"] == "llama") == (trunk == "llama")
    first, second = (weights.read(tmp_path / name) for name in ("published", "ours"))
    assert first.config.blocks.windows == second.config.blocks.windows
    for leaf, array in leaves(first).items():
        assert np.array_equal(array[:], leaves(second)[leaf][:]), leaf
    vocabulary, suffixes = folders.load_vocabularies(tmp_path / "ours")
    assert vocabulary.size == 260 and vocabulary.special["<bos>"] == 257
    ids = text(0, 60)
    assert suffixes(ours(ids)[None])[0].tolist() == plain.suffix_ids(SEQUENCES, ids).tolist()
    assert values["subword_bytes"] == SPELLED


def test_a_run_starts_from_its_folder(tmp_path):
    """What is not trained stays in the run's folder, and the rest is put back from a checkpoint."""
    write(tmp_path / "published", TRUNKS["llama"])
    loaded = LoadedModel.read(tmp_path / "published")
    model = jax.tree.map(lambda leaf: leaf[:], loaded.model)
    trained = jax.tree.map(lambda leaf: True, model)
    trained = eqx.tree_at(lambda m: m.patches, trained, jax.tree.map(lambda leaf: False, model.patches))
    settings = folders.read_generation_config(tmp_path / "published")
    folders.write_start(tmp_path / "start", model, trained, loaded.vocabulary, loaded.suffixes, settings)
    start = folders.read_start(tmp_path / "start")
    assert {leaf.split(".")[0] for leaf in start.frozen} == {"patches"}
    assert start.vocabulary.special == loaded.vocabulary.special and start.generation_config == settings
    again = start.model(eqx.filter(model, trained))
    folders.save(tmp_path / "whole", again, start.vocabulary, start.suffixes, "float32", settings)
    for leaf, array in leaves(weights.read(tmp_path / "whole")).items():
        assert np.array_equal(array[:], leaves(model)[leaf]), leaf


@pytest.mark.slow
def test_numbers_are_those_of_plain_numpy(tmp_path):
    config, tensors = write(tmp_path / "published", TRUNKS["olmo3"])
    loaded = LoadedModel.read(tmp_path / "published")
    model = jax.tree.map(lambda leaf: jnp.asarray(leaf[:]), loaded.model)
    ids = text(0, 40)
    suffix = plain.suffix_ids(SEQUENCES, ids)
    logits, logp, boundaries = plain.forward(config, tensors, ids, suffix)
    mesh = make_mesh(1, 1)

    def forward(model, ids, suffix):
        h, _ = model.encode(ids, suffix, jnp.dtype(jnp.float32))
        found = model.boundary(h)
        ends = found > jnp.log(0.5)
        slots = ids.shape[1]
        patches = model.patches(model.pooled(h, bolmo.patch_ends(ends, slots)), model.config.blocks)
        x = model.depooled(h, patches, bolmo.patch_of(ends, slots))
        x, _ = bolmo.local_blocks(model.decoder, model.config, x)
        x, _ = model.last(x, model.config.norm_eps)
        return found, layers.rms_norm(x, model.norm, model.config.norm_eps, False) @ model.unembed.T

    run = jax.jit(
        shard_map(forward, mesh, in_specs=jax.sharding.PartitionSpec(), out_specs=jax.sharding.PartitionSpec())
    )
    with jax.default_matmul_precision("highest"):
        found, ours_logits = run(shard(model, mesh), jnp.asarray(ours(ids)[None]), jnp.asarray(suffix[None]))
    np.testing.assert_allclose(found[0], logp, atol=2e-4)
    np.testing.assert_allclose(np.asarray(ours_logits[0])[:, ours(range(520))], logits, rtol=2e-4, atol=2e-4)


def test_sizes_of_the_published_models(tmp_path):
    """Of the shapes of 1B and 7B, every tensor, and the numbers of parameters."""
    for name, total in (("bolmo_1b", 1_468_911_776), ("bolmo_7b", 7_633_084_576)):
        values = {**PUBLISHED_CONFIGS[name]}
        family, config = kinds.parse_config(name, values)
        maps = kinds.tensor_maps(family, config)
        stored = {tensor: tuple(int(size) for size in parts[0].stored_shape) for tensor, parts in maps.items()}
        assert stored == plain.shapes(values)
        assert sum(math.prod(shape) for shape in stored.values()) == total
        assert parameter_counts(config)["all"] == total


COMMON = {
    "model_type": "bolmo",
    "architectures": ["BolmoForCausalLM"],
    "vocab_size": 520,
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "local_rms_norm_eps": 1e-5,
    "rope_theta": 500_000,
    "rope_scaling": None,
    "sliding_window": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "add_expanded_embeddings": True,
    "subword_vocab_size": 100278,
    "boundary_predictor_lookahead": 1,
    "boundary_threshold": "sample:0",
    "num_local_encoder_layers": 1,
    "num_local_decoder_layers": 4,
    "num_local_heads": 16,
    "initializer_range": 0.02,
    "use_cache": True,
    "tokenizer_config": {
        "vocab_size": 520,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bpe_token_end_id": 3,
        "special_tokens": ["<pad>", "<bos>", "<eos>", "<bpe_token_end>"],
        "special_tokens_first": True,
        "original_identifier": "allenai/dolma2-tokenizer",
    },
}
PUBLISHED_CONFIGS = {
    "bolmo_1b": COMMON
    | {"hidden_size": 2048, "intermediate_size": 8192, "local_intermediate_size": 2816}
    | dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 16)
    | {"layer_types": ["full_attention"] * 16},
    "bolmo_7b": COMMON
    | {"hidden_size": 4096, "intermediate_size": 11008, "local_intermediate_size": 5504}
    | dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 32)
    | {"layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8},
}


def test_a_subword_tokenizer_beside_the_folder(tmp_path):
    """As published: config.json names the tokenizer; what is written from it spells the subwords itself."""
    teacher = Path(__file__).parents[1] / "quickstart_teacher"
    rows = 4096
    config, _ = write(
        tmp_path / "published",
        TRUNKS["olmo3"]
        | {
            "subword_vocab_size": rows,
            "tokenizer_config": COMMON["tokenizer_config"] | {"original_identifier": str(teacher)},
        },
        left_out=("subword_bytes", "torch_dtype"),
    )
    vocabulary, suffixes = folders.load_vocabularies(tmp_path / "published")
    folders.copy(tmp_path / "published", tmp_path / "ours", weights.read(tmp_path / "published"), "float32")
    again, written = folders.load_vocabularies(tmp_path / "ours")
    sample = np.array([[257, *b"def f(self):\n    return self.value\n", 257, *b"class", 256]])
    assert suffixes(sample).tolist() == written(sample).tolist()
    assert len(set(suffixes(sample)[0].tolist())) > 15
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert values["tokenizer_config"]["original_identifier"] == str(teacher)


@pytest.mark.slow
def test_tokenizer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "published", TRUNKS["olmo3"])
    folders.copy(tmp_path / "published", tmp_path / "ours", weights.read(tmp_path / "published"), "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    sentence = "a b\u00e9\n<bos>"
    ids = tokenizer(sentence)["input_ids"]
    assert ids == [1, *(4 + byte for byte in "a b\u00e9\n".encode()), 1]
    assert tokenizer.decode([*ids[:3], *(i + 260 for i in ids[3:])], skip_special_tokens=True) == "a b\u00e9\n"
    both = tokenizer(["a", "bcd"], padding=True, return_tensors="np")
    assert both["input_ids"].tolist() == [[0, 0, 1, 101], [1, 102, 103, 104]]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 1 and tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        (
            {"boundary_predictor_lookahead": 2},
            "'boundary_predictor_lookahead' is 2, which is not implemented: only 1 is",
        ),
        ({"add_expanded_embeddings": False}, "only True is"),
        ({"block_type": "pre_norm"}, "only 'reordered_norm' is"),
        ({"vocab_size": 640}, "only 520 is"),
        ({"num_local_heads": 3}, "'num_local_heads' is 3, which does not divide"),
        ({"rope_theta": 10_000.0}, "trained with 500000"),
        ({"trunk_model_type": "mamba"}, "'model_type' is 'mamba', which is not implemented"),
        ({"tokenizer_config": COMMON["tokenizer_config"] | {"bos_token_id": 2}}, "whose 'bos_token_id' is not 1"),
        ({"something": 3}, "'something' is 3, a setting that is not implemented"),
    ),
)
def test_what_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        kinds.parse_config("config.json", SIZES | TRUNKS["olmo3"] | changes)
    kinds.parse_config("config.json", SIZES | TRUNKS["olmo3"])


def test_damaged_subwords(tmp_path):
    write(tmp_path / "published", TRUNKS["olmo3"] | {"subword_bytes": [*SPELLED[:-1], "xyz"]})
    with pytest.raises(InputError, match="'xyz', which are no hexadecimal digits"):
        folders.load_vocabularies(tmp_path / "published")
    write(tmp_path / "none", TRUNKS["olmo3"], left_out=("subword_bytes",))
    with pytest.raises(InputError, match="has neither 'subword_bytes' nor an 'original_identifier'"):
        folders.load_vocabularies(tmp_path / "none")
