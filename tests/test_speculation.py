"""Drafts change nothing but the time: the same greedy text, the same distribution of samples."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
from decoding import generator
from small_tokenizers import vocabulary
from test_generate import BYTE_ENTRIES, BYTES, byte_suffixes, random_model
from tokenizers import normalizers

from minalm.errors import InputError
from minalm.generation import speculation
from minalm.generation.engine import DRAFTS, Generator
from minalm.generation.sampling import SamplingConfig
from minalm.generation.speculation import LookupDraft, ModelDraft, Pace, speculate
from minalm.huggingface.loaded import LoadedModel
from minalm.models.config import ModelConfig
from minalm.models.head import VocabularyMask
from minalm.models.transformer import initialize
from minalm.parallel.mesh import make_mesh
from minalm.text.documents import Markup, Segment, Special
from minalm.tokenization.vocabulary import byte_vocabulary

GREEDY = SamplingConfig()


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time: XLA leaves out most optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def always(monkeypatch):
    """Drafts are used whether they pay or not."""
    monkeypatch.setattr(Pace, "wait", lambda self: 0)


class Oracle:
    """Proposes what is known to follow, some of it changed."""

    def __init__(self, text, seed):
        self.text, self.random = text, np.random.default_rng(seed)

    def propose(self, ids, count):
        right = self.text[len(ids) : len(ids) + int(self.random.integers(0, count + 1))]
        return [97 if self.random.random() < 0.2 else int(token) for token in right]


@pytest.fixture(scope="module")
def made():
    return generator(random_model(BYTES), BYTE_ENTRIES, byte_suffixes(), make_mesh(1, 1))


def test_greedy_text_is_the_same_on_100_prompts(made, always):
    random = np.random.default_rng(0)
    accepted = proposed = 0
    for number in range(100):
        prompt = random.choice([*range(97, 103), 256], int(random.integers(1, 60))).astype(np.int32)
        [plain] = made.generate([prompt], GREEDY, 30, ())
        draft = LookupDraft() if number % 2 else Oracle([*prompt.tolist(), *plain], number)
        seen = []
        found, statistics = speculate(made, prompt, draft, GREEDY, 30, (), on_tokens=lambda _, new: seen.extend(new))
        assert found == plain == seen
        assert statistics.accepted + statistics.drafts + statistics.single >= 30
        accepted, proposed = accepted + statistics.accepted, proposed + statistics.proposed
    assert 0.2 < accepted / proposed < 0.95  # some are right and some are wrong


def test_a_stop_inside_a_draft_ends_the_text(made, always):
    prompt = np.array([99, 100, 97], np.int32)
    [plain] = made.generate([prompt], GREEDY, 30, ())
    stop = plain[17]
    found, _ = speculate(made, prompt, Oracle([*prompt.tolist(), *plain], 0), GREEDY, 30, {stop})
    assert found == plain[: plain.index(stop)]


@pytest.mark.parametrize(
    "settings", (pytest.param({}, marks=pytest.mark.slow), {"top_k": 4, "repetition_penalty": 1.3})
)
def test_samples_have_the_same_distribution(always, settings):
    """A chi-square test of the last two of four tokens, which a draft proposed, against sampling one by one."""
    config = dataclasses.replace(BYTES, vocab_size=8, expansion_size=None, layers=2, windows=(None, 3))
    model = jax.tree.map(lambda leaf: 0.5 * leaf, random_model(config))
    made = generator(model, VocabularyMask(*np.ones((2, 8), bool)), None, make_mesh(1, 1))
    sampling, prompt = SamplingConfig(1.0, **settings), np.array([1, 2, 3], np.int32)

    class Proposes:
        def propose(self, ids, count):
            return [int(ids[-1] + 1) % 8, 5, 2][:count]

    count, tables = 600, []
    for speculative in (False, True):
        table, accepted = np.zeros((8, 8)), 0
        for seed in range(count):
            if speculative:
                ids, statistics = speculate(made, prompt, Proposes(), sampling, 4, (), seed=count + seed)
                accepted += statistics.accepted
            else:
                [ids] = made.generate([prompt], sampling, 4, (), seed=seed)
            table[ids[2], ids[3]] += 1
        tables.append(table.ravel())
    assert accepted > 20
    both = np.stack(tables)
    often = both.sum(0) >= 10
    both = np.concatenate([both[:, often], both[:, ~often].sum(1, keepdims=True)], axis=1)
    both = both[:, both.sum(0) > 0]
    assert both.shape[1] > 6
    assert scipy.stats.chi2_contingency(both).pvalue > 1e-3


# --- the subword model as a draft ---------------------------------------------------------------------------------


def subword_draft(kind="llama"):
    original = vocabulary(kind)
    config = ModelConfig(original.size, 16, 24, 2, 2, 1, 8, (None, None))
    model = jax.tree.map(lambda leaf: 8.0 * leaf if leaf.ndim > 1 else leaf, initialize(config, jax.random.key(3)))
    generator = Generator.of([LoadedModel.of(model, original, None)], make_mesh(1, 1), np.dtype(np.float32))
    return ModelDraft(generator, byte_vocabulary(original)), original


def test_the_text_of_a_draft_is_cut_at_a_token():
    """The tokens before the cut and the bytes behind it spell the text, up to a character that is not complete."""
    draft, original = subword_draft()
    student = draft.student
    turn = sorted(student.special, key=student.special.get)[0]
    piece = (
        Segment(Special("bos")),
        Segment("the café 日本"),
        Segment(Markup((turn,), (turn,))),
        Segment("in the é日 end"),
    )
    [encoding] = student.encode([piece])
    ids, special = encoding.ids.tolist(), {i: word for word, i in student.special.items()}
    for end in range(1, len(ids) + 1):
        cuts = draft._cuts(ids[:end])
        for cut, left in cuts:
            spelled = b"".join(original.token_bytes[i] for i in cut) + left
            assert spelled == bytes(i for i in ids[:end] if i < 256)
            assert [i for i in cut if not original.token_bytes[i]] == [
                original.special[special[i]] for i in ids[:end] if i > 255
            ]
        assert ids[end - 1] > 255 or cuts[0][1]  # the last token may still change


def test_a_model_drafts_words(always):
    """With a student that agrees with its draft by chance alone."""
    draft, _ = subword_draft()
    student = draft.student
    config = dataclasses.replace(BYTES, vocab_size=student.size, expansion_size=None)
    made = Generator.of([LoadedModel.of(random_model(config), student, None)], make_mesh(1, 1), np.dtype(np.float32))
    for text in ("the cat", "日本é", "in"):
        [encoding] = student.encode([(Segment(text),)])
        [plain] = made.generate([encoding.ids], GREEDY, 24, student.stop_ids)
        found, statistics = speculate(made, encoding.ids, draft, GREEDY, 24, student.stop_ids)
        assert found == plain


def test_a_draft_proposes_the_bytes_of_what_it_would_write(monkeypatch):
    """Wherever the text has been cut, also within a token and within a character."""
    draft, original = subword_draft()
    text = "the café was in the 日本 and the end of it all"
    [encoding] = original.encode([(Segment(text),)])
    whole = encoding.ids.tolist()

    def known(rows, sampling, words, stops, max_bytes):
        [row] = rows
        return [whole[len(row) :][:words] if row.tolist() == whole[: len(row)] else []]

    monkeypatch.setattr(draft.generator, "generate", known)
    ids, proposed = [*text.encode()], 0
    for end in range(1, len(ids)):
        found = draft.propose(ids[:end], DRAFTS[1])
        assert found == ids[end : end + len(found)]
        proposed += len(found)
    assert proposed > 2 * len(ids)


def test_a_text_that_the_draft_would_not_have_written_goes_on_behind_its_last_token(monkeypatch):
    """Mid-word, where the draft's own next token spells another word than the one that stands there."""
    draft, original = subword_draft()
    [encoding] = original.encode([(Segment("and then"),)])
    other, after = map(original.token_bytes.index, (b" the", b"n"))
    seen = []

    def known(rows, sampling, words, stops, max_bytes):
        seen.append(len(rows[0]))
        return [[other] if len(seen) == 1 else [after]]

    monkeypatch.setattr(draft.generator, "generate", known)
    assert draft.propose([*b"and then"], 4) == [*b"n"]
    assert seen == [len(encoding.ids) - 1, len(encoding.ids)]


def test_drafts_that_cannot_be_are_refused(made):
    draft, original = subword_draft()
    other = dataclasses.replace(draft.student, normalizer=normalizers.NFKC())
    with pytest.raises(InputError, match="normalizes text otherwise"):
        ModelDraft(draft.generator, other)
    with pytest.raises(InputError, match="does not write bytes"):
        ModelDraft(draft.generator, original)
    with pytest.raises(InputError, match="empty"):
        speculate(made, np.zeros(0, np.int32), LookupDraft(), GREEDY, 3, ())


def test_what_occurred_before_is_looked_up():
    draft = LookupDraft()
    assert draft.propose([1, 2, 3, 4, 5, 1, 2, 3], 3) == [4, 5, 1]
    assert draft.propose([1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]  # the newest
    assert draft.propose([1, 2, 3, 4, 5, 1, 2, 3, 9, 5, 1, 2, 3], 2) == [9, 5]  # of the longest
    assert draft.propose([7, 8], 3) == [] and draft.propose([], 3) == []


def test_drafts_that_do_not_pay_are_left():
    pace = Pace()
    assert pace.wait() == 0
    for _ in range(40):
        pace.note_single(1.0, 1)
        for length in DRAFTS:
            pace.note_draft(length, 3.0, length, 0)
    assert 90 <= pace.wait() <= 101  # (3 - 1) / 0.02 tokens of one second: a trial loses 2 % of them
    pace.note_draft(pace.length(), 1000.0, pace.length(), 0)  # a program was compiled
    assert pace.wait() < 200
    for _ in range(40):
        pace.note_draft(8, 3.0, 8, 6)
    assert pace.wait() == 0
    for _ in range(20):
        pace.note_nothing(1e-6)  # that costs nothing
    assert pace.wait() == 0
    for _ in range(40):
        pace.note_nothing(2.0)
    assert 90 <= pace.wait() <= 101
    pace.note_single(60.0, 60)
    assert pace.alone == pace.wait() - 60
    assert speculation.Statistics(4, 2, 1, 3).__str__().startswith("drafts 1, 2 of 4 tokens accepted (50%)")


@pytest.mark.parametrize(
    ("accepted", "seconds", "best"),
    (
        (8, {8: 1.1}, 16),  # always right, and as good as free
        (1, {8: 1.0}, 16),  # seldom right, but longer ones cost nothing
        (1, {8: 2.4}, 4),  # seldom right, and each token costs
        (8, {8: 3.0, 16: 30.0}, 8),  # what has been measured counts
    ),
)
def test_the_length_of_a_draft_follows_what_was_accepted(accepted, seconds, best):
    pace = Pace()
    assert pace.length() == 8
    for _ in range(40):
        pace.note_single(1.0, 1)
        for length, each in seconds.items():
            pace.note_draft(length, each, length, accepted)
    assert pace.length() == best


def test_every_length_of_a_draft_gives_the_same_text(made, monkeypatch):
    monkeypatch.setattr(Pace, "wait", lambda self: 0)
    prompt = np.array([99, 100, 97], np.int32)
    [plain] = made.generate([prompt], GREEDY, 40, ())
    for length in DRAFTS:
        monkeypatch.setattr(Pace, "length", lambda self, length=length: length)
        found, statistics = speculate(made, prompt, Oracle([*prompt.tolist(), *plain], length), GREEDY, 40, ())
        assert found == plain and statistics.drafts
