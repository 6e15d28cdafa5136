"""The modelling file of Bolmo for transformers against plain numpy: all at once, step by step, and in generation.

Needs nothing of minalm but that file: `pytest --noconftest -p no:cacheprovider -o addopts= tests/test_modeling_bolmo.py`.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.numpy  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import bolmo_numpy as plain  # noqa: E402

FILE = Path(__file__).parents[1] / "minalm" / "huggingface" / "modeling_bolmo.py"
WORDS = (b"ab", b"abc", b"bca", b"cabcabc", b"b" * 40)
SPELLED = [f"{byte:02x}" for byte in range(256)] + ["<bos>", "<pad>", None] + [word.hex() for word in WORDS]
SEQUENCES = {
    tuple(
        [("<pad>", "<bos>").index(spelled)] if spelled[0] == "<" else [4 + byte for byte in bytes.fromhex(spelled)]
    ): i
    for i, spelled in enumerate(SPELLED)
    if spelled is not None
}
SIZES = {
    "architectures": ["BolmoForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_bolmo.BolmoConfig",
        "AutoModelForCausalLM": "modeling_bolmo.BolmoForCausalLM",
    },
    "model_type": "bolmo",
    "vocab_size": 520,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "local_rms_norm_eps": 1e-5,
    "num_local_encoder_layers": 1,
    "num_local_decoder_layers": 2,
    "num_local_heads": 2,
    "local_intermediate_size": 20,
    "subword_vocab_size": len(SPELLED),
    "subword_bytes": SPELLED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "rope_theta": 500_000.0,
    "rope_scaling": None,
    "torch_dtype": "float32",
}
TRUNKS = {
    "olmo3": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "olmo2": {"trunk_model_type": "olmo2"},
    "llama": {"trunk_model_type": "llama"},
}


def load(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def make(trunk):
        if trunk not in made:
            folder = tmp_path_factory.mktemp(trunk)
            config, tensors = SIZES | TRUNKS[trunk], plain.random_tensors(SIZES | TRUNKS[trunk], 0)
            (folder / "config.json").write_text(json.dumps(config))
            safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            shutil.copy(FILE, folder)
            made[trunk] = load(folder), config, tensors
        return made[trunk]

    return make


def text(seed, length):
    return [plain.BOS, *np.random.default_rng(seed).choice([101, 102, 103, 110], length - 1).tolist()]


def expected(config, tensors, ids, boundaries=None):
    """Logits of a whole text, and the boundaries: those of a prompt unless they are given."""
    if boundaries is None:
        boundaries = plain.prompt_boundaries(config, tensors, SEQUENCES, ids)
    logits, _, boundaries = plain.forward(config, tensors, ids, plain.suffix_ids(SEQUENCES, ids), boundaries)
    return logits, boundaries


def assert_equal(found, logits):
    np.testing.assert_allclose(found.detach().numpy(), logits, rtol=2e-4, atol=2e-4)


def padded(rows, side="left"):
    time = max(map(len, rows))
    fill = lambda row, filler: [filler] * (time - len(row))  # noqa: E731
    join = lambda row, more: more + row if side == "left" else row + more  # noqa: E731
    ids = [join(row, fill(row, 101)) for row in rows]
    mask = [join([1] * len(row), fill(row, 0)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_whole_texts(models, trunk):
    model, config, tensors = models(trunk)
    assert set(model.state_dict()) == set(tensors)
    for length in (1, 2, 75):  # more than one chunk of the mLSTM
        ids = text(length, length)
        logits, boundaries = expected(config, tensors, ids)
        found = model(torch.tensor([ids]))
        assert found.boundaries[0].tolist() == boundaries.tolist()
        assert_equal(found.logits[0], logits)
    assert 10 < boundaries.sum() < 60
    given = np.arange(75) % 4 == 0
    assert_equal(
        model(torch.tensor([ids]), boundaries=torch.tensor(given)[None]).logits[0],
        expected(config, tensors, ids, given)[0],
    )


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding(models, side):
    model, config, tensors = models("olmo3")
    rows = [text(0, 9), text(1, 30), text(2, 1), text(3, 17)]
    ids, mask = padded(rows, side)
    found = model(ids, attention_mask=mask)
    for row, logits, kept in zip(rows, found.logits, mask.bool()):
        assert_equal(logits[kept], expected(config, tensors, row)[0])


@pytest.mark.parametrize("trunk", TRUNKS)
def test_steps_are_the_whole(models, trunk):
    """A prompt, and then single bytes whose ids say whether a patch ends: rows reach their boundaries at different times."""
    model, config, tensors = models(trunk)
    prompts = [text(0, 7), text(1, 12)]
    rng = np.random.default_rng(0)
    more = rng.choice([101, 102, 103], (2, 9)) + plain.PLAIN * rng.integers(0, 2, (2, 9))
    ids, mask = padded(prompts)
    outputs = model(ids, attention_mask=mask, use_cache=True)
    logits = [outputs.logits[:, -1]]
    for step in range(9):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        cache = next(value for value in outputs.values() if isinstance(value, transformers.Cache))
        name = next(name for name, value in outputs.items() if value is cache)
        outputs = model(torch.tensor(more[:, step : step + 1]), attention_mask=mask, **{name: cache})
        logits.append(outputs.logits[:, -1])
    whole = torch.cat([ids, torch.tensor(more)], dim=1)
    at_once = model(whole, attention_mask=mask, prompt_length=ids.shape[1])
    for row, prompt in enumerate(prompts):
        boundaries = plain.prompt_boundaries(config, tensors, SEQUENCES, prompt)
        boundaries = np.append(boundaries, more[row] >= plain.PLAIN)
        theirs, _ = expected(config, tensors, [*prompt, *(more[row] % plain.PLAIN)], boundaries)
        assert_equal(torch.stack([each[row] for each in logits]), theirs[-10:])
        assert_equal(at_once.logits[row, -len(theirs) :], theirs)


def test_a_prompt_may_go_on_from_a_cache(models):
    """As in a chat: the ends of patches in the new part are predicted, given what is known."""
    model, config, tensors = models("olmo3")
    first, second = text(0, 8), text(1, 11)[1:]
    outputs = model(torch.tensor([first]), use_cache=True)
    cache = {name: value for name, value in outputs.items() if isinstance(value, transformers.Cache)}
    found = model(torch.tensor([second]), **cache)
    known = [*outputs.boundaries[0].tolist(), *found.boundaries[0].tolist()]
    assert_equal(found.logits[0], expected(config, tensors, first + second, np.array(known))[0][8:])
    suffix = plain.suffix_ids(SEQUENCES, first + second)
    encoded = plain.encode(config, plain.double(tensors), first + second, suffix)
    predicted = plain.boundary_logp(plain.double(tensors), encoded) > np.log(0.5)
    assert known[8:-1] == predicted[8:-1].tolist()


@pytest.mark.parametrize(
    "trunk", ["olmo3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo2", "llama"))]
)
def test_generate(models, trunk):
    model, config, tensors = models(trunk)
    prompts = [text(0, 5), text(1, 14), text(2, 1), text(3, 9)]
    ids, mask = padded(prompts)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    found = model.generate(ids, keep_boundaries=True, **settings)
    bytes_alone = model.generate(ids, **settings)
    assert bytes_alone.tolist() == (found % plain.PLAIN).tolist()
    anew = model.generate(ids, use_cache=False, keep_boundaries=True, **settings)
    assert anew.tolist() == found.tolist()
    assert (found[:, ids.shape[1] :] >= plain.PLAIN).any()
    for row, prompt in enumerate(prompts):
        theirs = plain.generate(config, tensors, SEQUENCES, prompt, 12, stops=(plain.BOS,))
        ours = found[row, ids.shape[1] :].tolist()
        assert ours[: len(theirs)] == theirs
        assert set(ours[len(theirs) :]) <= {0}


def test_beam_search(models):
    """Each sequence's score is what numpy gives its bytes and boundaries: beams keep their own states."""
    model, config, tensors = models("olmo3")
    prompts = [text(0, 5), text(1, 14)]
    ids, mask = padded(prompts)
    outputs = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=4,
        num_return_sequences=3,
        length_penalty=0.0,
        max_new_tokens=8,
        min_new_tokens=8,
        return_dict_in_generate=True,
        output_scores=True,
        keep_boundaries=True,
    )
    assert (outputs.beam_indices.diff(dim=1) != 0).any()
    for i, sequence in enumerate(outputs.sequences.tolist()):
        prompt, new = prompts[i // 3], sequence[14:]
        boundaries = plain.prompt_boundaries(config, tensors, SEQUENCES, prompt)
        boundaries = np.append(boundaries, np.array(new) >= plain.PLAIN)
        logits, _ = expected(config, tensors, [*prompt, *(i % plain.PLAIN for i in new)], boundaries)
        score = plain.log_softmax(logits[-9:-1].astype(float))[range(8), new].sum()
        np.testing.assert_allclose(outputs.sequences_scores[i].item(), score, rtol=1e-3)


def test_loss_and_gradient(models):
    model, config, tensors = models("olmo3")
    rows = [text(0, 20), text(1, 13)]
    ids, mask = padded(rows, "right")
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    total, count = 0.0, 0
    for row in rows:
        logits, boundaries = expected(config, tensors, row)
        boundaries[-1] = False
        fused = plain.fused_labels(row, boundaries, [*[True] * (len(row) - 1), False])
        fused[-2] = row[-1]
        total += plain.cross_entropy(logits, fused) * (len(row) - 1)
        count += len(row) - 1
    np.testing.assert_allclose(loss.item(), total / count, rtol=1e-5)
    model.zero_grad()
    loss.backward()
    silent = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert silent == {
        f"model.local_encoder.boundary_predictor_module.{part}_proj_layer.weight" for part in "qk"
    }  # decisions have no gradient
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_saved_again_it_loads_again(models, tmp_path):
    model, config, tensors = models("olmo3")
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    ids = torch.tensor([text(0, 20)])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (tmp_path / "again" / FILE.name).read_bytes() == FILE.read_bytes()
    half = load(tmp_path / "again", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.generate(ids, max_new_tokens=4).shape == (1, 24)


def test_what_is_refused(models, tmp_path):
    model, _, _ = models("olmo3")
    ids = torch.tensor([text(0, 20)])
    cache = model(ids, use_cache=True)
    cache = {name: value for name, value in cache.items() if isinstance(value, transformers.Cache)}
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        next(iter(cache.values())).crop(3)
    with pytest.raises(ValueError, match="The mask has 1 columns for 20 read ones and 1 new ones"):
        model(ids[:, :1], attention_mask=torch.ones(1, 1), **cache)
    with pytest.raises(ValueError, match="leave it out"):
        model(ids, **{name: transformers.DynamicCache() for name in cache})
    config = {key: value for key, value in SIZES.items() if key != "subword_bytes"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file({"none": np.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(FILE, tmp_path)
    with pytest.raises(ValueError, match="has no 'subword_bytes'"):
        load(tmp_path)
