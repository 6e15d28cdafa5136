"""How probable texts are to a Bolmo, by stepping and all at once, against plain numpy; and the programs that ask for it."""

import json
from pathlib import Path

import bolmo_numpy as plain
import numpy as np
import pytest
from test_bolmo_folders import ours, write
from test_modeling_bolmo import SEQUENCES, TRUNKS, text

from minalm import generate
from minalm.batches import Side
from minalm.errors import InputError
from minalm.evaluation.__main__ import cli
from minalm.evaluation.bolmo_scoring import BolmoScorer
from minalm.evaluation.cuts import cuts
from minalm.evaluation.harness import TaskModel
from minalm.evaluation.scoring import Request
from minalm.huggingface.loaded import LoadedModel
from minalm.parallel.mesh import make_mesh, shard
from minalm.text.documents import Segment, Special
from minalm.tokenization.tokenizer_json import load_vocabulary

TEACHER = Path(__file__).parents[1] / "quickstart_teacher"
FLOAT32 = np.dtype(np.float32)
PAIRS = [
    (text(0, 5), text(9, 13)[1:]),
    (text(1, 1), text(8, 70)[1:]),
    (text(2, 30), [200]),
    (text(3, 9), text(7, 4)[1:]),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "model"
    config, tensors = write(folder, TRUNKS["olmo3"])
    return folder, config, tensors


def inside(ids):
    return ours(ids).astype(np.int32)


def requests():
    return [Request((inside(context),), inside(continuation)) for context, continuation in PAIRS]


def test_causal(files):
    folder, config, tensors = files
    scorer = BolmoScorer(LoadedModel.read(folder), make_mesh(2, 1), FLOAT32, batch_size=3)
    assert scorer.batch_size == 4
    heard = []
    for (context, continuation), score in zip(PAIRS, scorer(requests(), heard.append)):
        expected = plain.causal_logp(config, tensors, SEQUENCES, context, continuation)
        np.testing.assert_allclose(score.logp, expected, rtol=1e-4, atol=2e-4)
    assert sum(heard) == len(PAIRS)
    # As tasks ask: text after bos.
    model, texts = TaskModel(scorer), [("abc ", "bab"), ("", "cab"), ("b", "ac ac"), ("abcabc", "a")]
    for (context, continuation), (logp, greedy) in zip(texts, model.loglikelihood(texts)):
        ids = [[4 + byte for byte in text.encode()] for text in (context, continuation)]
        expected = plain.causal_logp(config, tensors, SEQUENCES, [plain.BOS, *ids[0]], ids[1])
        assert logp == pytest.approx(expected.sum(), abs=1e-3) and isinstance(greedy, bool)


def test_two_sided(files):
    folder, config, tensors = files
    scorer = BolmoScorer(LoadedModel.read(folder), make_mesh(1, 1), FLOAT32, 2, "two-sided")
    for (context, continuation), score in zip(PAIRS, scorer(requests())):
        expected = plain.two_sided_logp(config, tensors, SEQUENCES, context + continuation)[-len(continuation) :]
        np.testing.assert_allclose(score.logp, expected, rtol=1e-4, atol=2e-4)
        assert len(score.greedy) == len(continuation)
    with pytest.raises(InputError, match="nothing to score"):
        scorer([Request((inside([1]),), inside([]))])


@pytest.mark.slow
def test_bits_per_byte_from_the_command_line(files, tmp_path, capsys):
    """The same text with both; only the two-sided one says that it is none."""
    folder, config, tensors = files
    sentence = "abcb cabcab"
    (tmp_path / "text.txt").write_text(sentence)
    found = {}
    for likelihood in ("causal", "two-sided"):
        cli([str(folder), "--text", str(tmp_path / "text.txt"), "--likelihood", likelihood, "--mesh.fsdp", "1",
             "--out", str(tmp_path / likelihood)])  # fmt: skip
        said = capsys.readouterr().out
        assert ("which was not paid for" in said) == (likelihood == "two-sided")
        [model] = json.loads((tmp_path / likelihood / "evaluation.json").read_text())["models"]
        found[likelihood] = model["bits_per_byte"]["value"]
    ids = [4 + byte for byte in sentence.encode()]
    causal = plain.causal_logp(config, tensors, SEQUENCES, [plain.BOS], ids)
    two_sided = plain.two_sided_logp(config, tensors, SEQUENCES, [plain.BOS, *ids])
    for likelihood, logp in (("causal", causal), ("two-sided", two_sided)):
        assert found[likelihood] == pytest.approx(-logp.sum() / np.log(2) / len(ids), abs=1e-3)


@pytest.mark.slow
def test_generate_from_the_command_line(files, capsys):
    folder, config, tensors = files
    generate.cli([str(folder), "abc bab", "--max-bytes", "12"])
    prompt = [plain.BOS, *(4 + byte for byte in b"abc bab")]
    ids = [i % plain.PLAIN for i in plain.generate(config, tensors, SEQUENCES, prompt, 12, stops=(plain.BOS,))]
    expected = bytes(i - 4 for i in ids if i >= 4).decode(errors="replace")
    said = capsys.readouterr().out
    assert said and expected.startswith(said)  # but for a character that --max-bytes has cut
    with pytest.raises(SystemExit, match="a Bolmo does not speculate"):
        generate.cli([str(folder), "abc", "--lookup"])
    with pytest.raises(SystemExit, match="a Bolmo writes alone"):
        generate.cli([str(folder), str(folder), "abc"])


@pytest.mark.slow
def test_where_a_text_is_cut(files):
    """The student's patches are those that numpy predicts, the teacher's its tokens; both spell the text."""
    folder, config, tensors = files
    loaded = LoadedModel.read(folder)
    mesh = make_mesh(1, 1)
    teacher = load_vocabulary(TEACHER, of_model=True)
    sides = Side(loaded.vocabulary, loaded.suffixes, 64, patches=True), Side(teacher, None, 64)
    sentence = "abc cab\nbca"
    piece = (Segment(Special("bos")), Segment(sentence), Segment(Special("eos")))
    found = cuts(shard(loaded.model, mesh, FLOAT32), *sides, piece, mesh, FLOAT32)
    ids = [plain.BOS, *(4 + byte for byte in sentence.encode())]
    tokens = teacher.encode([(Segment(sentence),)])[0].ids
    assert found.teacher == tuple(teacher.token_bytes[token] for token in tokens)
    encoded = plain.encode(
        config, plain.double(tensors), [*ids, plain.BOS], plain.suffix_ids(SEQUENCES, [*ids, plain.BOS])
    )
    ends = plain.boundary_logp(plain.double(tensors), encoded)[1 : len(ids)] > np.log(0.5)
    expected, start = [], 0
    for end in [*np.flatnonzero(ends) + 1, len(sentence)]:
        expected += [sentence[start:end].encode()] if end > start else []
        start = end
    assert found.student == tuple(expected) and b"".join(found.teacher) == sentence.encode()
