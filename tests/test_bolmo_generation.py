"""A Bolmo writes and scores: against plain numpy, rows together and alone, and over meshes."""

import bolmo_numpy as plain
import numpy as np
import pytest
from test_bolmo_folders import ours, write
from test_modeling_bolmo import SEQUENCES, TRUNKS, text

from minalm.errors import InputError
from minalm.generation import bolmo
from minalm.generation.kinds import generator_of
from minalm.generation.sampling import SamplingConfig
from minalm.huggingface.loaded import LoadedModel
from minalm.parallel.mesh import make_mesh

FLOAT32 = np.dtype(np.float32)
GREEDY = SamplingConfig()
PROMPTS = [text(0, 5), text(1, 14), text(2, 1), text(3, 9), text(4, 40)]
BOS = 257


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, config, tensors, loaded model, generator) of a trunk."""
    found = {}

    def make(trunk):
        if trunk not in found:
            folder = tmp_path_factory.mktemp(trunk) / "model"
            config, tensors = write(folder, TRUNKS[trunk])
            loaded = LoadedModel.read(folder)
            found[trunk] = folder, config, tensors, loaded, generator_of([loaded], make_mesh(1, 1), FLOAT32)
        return found[trunk]

    return make


def inside(ids):
    return ours(ids).astype(np.int32)


def written_by(generator, prompts, count, **settings):
    settings = {"sampling": GREEDY, "stop_ids": [BOS]} | settings
    return generator.generate([inside(prompt) for prompt in prompts], max_tokens=count, **settings)


@pytest.mark.parametrize("trunk", ["olmo3", pytest.param("llama", marks=pytest.mark.slow)])
def test_greedy_text(made, trunk):
    """Rows of unequal prompts, whose patches end at different times, are each what numpy writes all anew for each byte."""
    _, config, tensors, _, generator = made(trunk)
    together = written_by(generator, PROMPTS, 12)
    flags = []
    for prompt, found in zip(PROMPTS, together):
        theirs = plain.generate(config, tensors, SEQUENCES, prompt, 12, stops=(plain.BOS,))
        flags += [i >= plain.PLAIN for i in theirs]
        kept = [i % plain.PLAIN for i in theirs if i % plain.PLAIN != plain.BOS]
        assert found == inside(kept).tolist()
    assert 5 < sum(flags) < len(flags) - 5


def test_the_trunk_steps_at_boundaries_alone(made):
    """It has read one patch for each boundary, and what it has not read ends no patch."""
    _, config, tensors, _, generator = made("olmo3")
    session = bolmo.BolmoSession(generator, [inside(prompt) for prompt in PROMPTS])
    done, sampling = np.zeros(len(PROMPTS), bool), bolmo.Sampling.of(GREEDY)
    session.advance(9, done, sampling, np.uint32(0), np.full(16, -1, np.int32))
    for row, prompt in enumerate(PROMPTS):
        theirs = plain.generate(config, tensors, SEQUENCES, prompt, 9)[:-1]  # the last one is not read yet
        boundaries = plain.prompt_boundaries(config, tensors, SEQUENCES, prompt)
        assert session.state.patches[row] == boundaries.sum() + sum(i >= plain.PLAIN for i in theirs)
        assert session.state.length[row] == len(prompt) + len(theirs)


@pytest.mark.slow
def test_rows_alone_and_longer_texts(made, monkeypatch):
    """No row depends on the others; caches grow; calls of few bytes are one of many."""
    monkeypatch.setattr(bolmo, "FEWEST_PATCHES", 16)
    _, config, tensors, _, generator = made("olmo3")
    together = written_by(generator, PROMPTS[:3], 90, stop_ids=[])
    for prompt, found in zip(PROMPTS[:3], together):
        heard = []
        alone = written_by(generator, [prompt], 90, stop_ids=[], on_tokens=lambda row, ids: heard.extend(ids))
        assert found == alone[0] == heard and len(found) == 90
    theirs = plain.generate(config, tensors, SEQUENCES, PROMPTS[0], 90)
    assert together[0] == inside([i % plain.PLAIN for i in theirs]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ((2, 2), (2, 1), (1, 2)))
def test_meshes(made, mesh):
    _, _, _, loaded, generator = made("olmo3")
    other = generator_of([loaded], make_mesh(*mesh), FLOAT32)
    assert written_by(other, PROMPTS, 12) == written_by(generator, PROMPTS, 12)


@pytest.mark.slow
def test_sampling(made):
    """The same seed draws the same, whatever stands in other rows; the first byte has the distribution of the logits."""
    _, config, tensors, _, generator = made("olmo3")
    warm = SamplingConfig(temperature=1.0)
    first = written_by(generator, PROMPTS[:2], 20, sampling=warm, seed=3)
    assert first == written_by(generator, PROMPTS[:2], 20, sampling=warm, seed=3)
    assert first != written_by(generator, PROMPTS[:2], 20, sampling=warm, seed=4)
    narrow = SamplingConfig(temperature=1.0, top_k=1)
    assert written_by(generator, PROMPTS, 12, sampling=narrow) == written_by(generator, PROMPTS, 12)
    many = generator.generate([inside(PROMPTS[0])] * 512, warm, 1, [], seed=5)
    boundaries = plain.prompt_boundaries(config, tensors, SEQUENCES, PROMPTS[0])
    suffix = plain.suffix_ids(SEQUENCES, PROMPTS[0])
    logits, _, _ = plain.forward(config, tensors, PROMPTS[0], suffix, boundaries)
    p = np.exp(plain.fold(plain.log_softmax(logits[-1])))
    counts = np.bincount([ids[0] for ids in many], minlength=260)[inside(range(260))]
    top = p.argsort()[-20:]
    spread = np.sqrt(512 * p[top] * (1 - p[top]))
    assert (np.abs(counts[top] - 512 * p[top]) < 4.5 * spread + 1).all()


@pytest.mark.slow
def test_scores(made):
    """Stepping causally; contexts and continuations of any lengths in one batch."""
    _, config, tensors, _, generator = made("olmo3")
    continuations = [text(9, 13)[1:], [200], text(8, 71)[1:], text(7, 3)[1:], text(6, 20)[1:]]
    session = bolmo.BolmoSession(generator, [inside(prompt) for prompt in PROMPTS])
    found = session.score([inside(continuation) for continuation in continuations])
    for prompt, continuation, (logp, greedy) in zip(PROMPTS, continuations, found):
        expected = plain.causal_logp(config, tensors, SEQUENCES, prompt, continuation)
        np.testing.assert_allclose(logp, expected, rtol=1e-4, atol=2e-4)
        assert greedy.shape == logp.shape


@pytest.mark.slow
def test_greedy_of_scores(made):
    """Bytes of the greedy text by the sum of both ids: most are the most probable ones, and where all are, greedy is true."""
    _, config, tensors, _, generator = made("olmo3")
    prompt = text(0, 12)
    boundaries = plain.prompt_boundaries(config, tensors, SEQUENCES, prompt)
    logits, _, _ = plain.forward(config, tensors, prompt, plain.suffix_ids(SEQUENCES, prompt), boundaries)
    best = plain.fold(plain.log_softmax(logits[-1])).argsort()[-2:]
    session = bolmo.BolmoSession(generator, [inside(prompt)] * 2)
    (_, second), (_, first) = session.score([inside([byte]) for byte in best])
    assert first.tolist() == [True] and second.tolist() == [False]


@pytest.mark.slow
def test_transformers_writes_the_same(made, tmp_path):
    """The folder that is exported, in transformers, greedily."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from minalm.huggingface import folder as folders

    folder, _, _, loaded, generator = made("olmo3")
    folders.copy(folder, tmp_path / "out", loaded.model, "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for prompt, found in zip(PROMPTS[:2], written_by(generator, PROMPTS[:2], 24)):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        theirs = theirs[: theirs.index(plain.BOS)] if plain.BOS in theirs else theirs
        assert found == inside(theirs).tolist()


def test_what_is_refused(made):
    _, _, _, loaded, _ = made("olmo3")
    with pytest.raises(InputError, match="a Bolmo writes alone"):
        generator_of([loaded, loaded], make_mesh(1, 1), FLOAT32)
