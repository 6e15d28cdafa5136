"""Runs of train.py that make a Bolmo: both stages, going on exactly, what they read, and bad input."""

import json
import re
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tokenizers as small
from test_train import arguments, exported, files, interrupted, lines, quick_compilation, refused, run, tiny_preset  # noqa: F401

from minalm.batches import Side, make_batch, with_longer_patches
from minalm.distill.losses import LossConfig
from minalm.errors import InputError
from minalm.huggingface.folder import GenerationConfig, read_start
from minalm.huggingface.loaded import LoadedModel
from minalm.models.bolmo_student import pooled
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.kinds import abstract
from minalm.models.transformer import initialize, leaves
from minalm.run.models import Models, StudentConfig, bolmo_config, for_losses, new_student
from minalm.run.optimizer import OptimizerConfig, decays, make_optimizer
from minalm.text.documents import Segment, Special
from minalm.tokenization.compression import kept_by_pairs, kept_by_space, ratio_at
from minalm.tokenization.suffixes import bolmo_suffixes
from minalm.tokenization.vocabulary import Vocabulary, bolmo_vocabulary

STAGE_1 = dict(
    kind="bolmo",
    local_heads=2,
    decoder_layers=2,
    no_train_blocks=True,
    train_expansion=True,
    losses__latents=0,
    losses__representation=4,
    losses__boundary=4,
    losses__guided=True,
    losses__representation_blocks=2,
    losses__balance="fixed",
    losses__chunks="unconstrained",
    losses__divergence="binary_kl",
    losses__tau=5,
    teacher_length=64,
    student_length=72,
)
STAGE_2 = dict(
    train_expansion=True,
    losses__alm=0,
    losses__latents=0,
    losses__boundary=4,
    losses__balance="fixed",
    teacher_length=64,
    student_length=72,
    block_learning_rate=1e-3,
)


@pytest.fixture(scope="module")
def first(files, tmp_path_factory):
    """Stage 1, four steps."""
    out = tmp_path_factory.mktemp("bolmo") / "first"
    run(files, out, **STAGE_1)
    return out


def test_stage_1_learns_around_the_teachers_blocks(first):
    rows = lines(first)
    assert {f"loss/{name}" for name in ("sft", "alm", "representation", "boundary")} <= rows[0].keys()
    assert rows[-1]["bits_per_byte"] < rows[0]["bits_per_byte"] and rows[-1]["patches_lost"] == 0.0
    start = read_start(first / "student")
    assert start.frozen and all(name.startswith("patches.") for name in start.frozen)
    config = json.loads((first / "hf" / "config.json").read_text())
    assert config["model_type"] == "bolmo" and config["num_local_heads"] == 2


def test_a_run_goes_on_as_if_it_had_not_stopped(files, first, tmp_path):
    with interrupted(after=3):
        run(files, tmp_path / "run", **STAGE_1)
    run(files, tmp_path / "run", resume=True, **STAGE_1)
    assert lines(tmp_path / "run") == lines(first)
    for name, tensor in exported(first).items():
        assert np.array_equal(exported(tmp_path / "run")[name], tensor), name


@pytest.mark.slow
def test_stage_2_begins_with_what_came_of_stage_1(files, first, tmp_path):
    run(files, tmp_path / "second", student=first, **STAGE_2)
    rows, before = lines(tmp_path / "second"), exported(first)
    assert {"loss/sft", "loss/boundary"} == {name for name in rows[0] if name.startswith("loss/")}
    assert rows[-1]["loss/sft"] < rows[0]["loss/sft"]
    after = exported(tmp_path / "second")
    assert all(not np.array_equal(after[name], tensor) for name, tensor in before.items() if "layers" in name)


def test_bad_input_is_one_sentence(files, tmp_path):
    """Found before a model is read."""
    cases = (
        ({"losses__guided": None}, "--losses.representation compares with a teacher that guides: add"),
        ({"student_tokenizer": "x.json"}, "--student-tokenizer is not for --kind bolmo"),
        ({"kind": None, "local_heads": None}, "--decoder-layers is for Bolmo students: add --kind bolmo"),
        ({"kind": None, "local_heads": None, "decoder_layers": None}, "--no-train-blocks is for Bolmo students"),
        ({"compression_steps": 5}, "--compression-steps is for --compression: add that"),
        ({"teacher": None}, "need a teacher"),
        ({"block_learning_rate": 0.1, "learning_rate": 0}, "--block-learning-rate is a multiple of --learning-rate"),
        ({"decoder_layers": 1}, "--decoder-layers is 1: it must be a number of at least 2"),
    )
    for changes, sentence in cases:
        assert sentence in refused(arguments(files, tmp_path / "run", **{**STAGE_1, **changes})), changes
        assert not (tmp_path / "run").exists()


def test_losses_that_a_student_does_not_have_are_refused(files):
    """Of models whose shapes alone are known."""
    shape = BolmoConfig(260, 40, teacher().model.config, heads=2, mlp=8, decoder_layers=2)
    of_bolmo, other = (
        Models(LoadedModel.of_shapes(model), None, model, GenerationConfig())
        for model in map(abstract, (shape, shape.blocks))
    )
    cases = (
        (of_bolmo, LossConfig(alm=0.0), "gradmag weighs by gradients of the last layer, which a Bolmo's boundaries"),
        (of_bolmo, LossConfig(balance="fixed"), "alm compares a Bolmo's patches with the teacher's tokens"),
        (of_bolmo, LossConfig(alm=0.0, latents=1.0, balance="fixed"), "--losses.latents is not for a Bolmo"),
        (
            of_bolmo,
            LossConfig(representation=1.0, guided=True, balance="fixed"),
            "--losses.representation-blocks is 4, but the teacher has 2 layers",
        ),
        (other, LossConfig(boundary=1.0), "--losses.boundary is for Bolmo students: add --kind bolmo"),
    )
    for models, losses, sentence in cases:
        with pytest.raises(InputError, match=re.escape(sentence)):
            for_losses(models, losses, 0)


def test_text_that_has_no_place_is_said_or_refused(files, tmp_path):
    found = refused(arguments(files, tmp_path / "run", **{**STAGE_1, "teacher_length": 20}))
    assert re.search(
        r"\d+\.\d\d% of the text in the first batches has no place in rows of --student-length 72 bytes", found
    )
    assert not (tmp_path / "run").exists()


# --- what a new one begins with -----------------------------------------------------------------------------------


def forty() -> Vocabulary:
    """A vocabulary of 38 letters, eos and pad."""
    words = [bytes([97 + number]) for number in range(38)]
    names = {"eos_token": "<eos>", "pad_token": "<pad>"}
    return Vocabulary("forty", None, None, {}, (*words, b"", b""), {"<eos>": 38, "<pad>": 39}, names)


def teacher() -> LoadedModel:
    config = ModelConfig(
        vocab_size=40, embed=32, mlp=20, layers=2, heads=2, kv_heads=2, head_dim=16, windows=(None,) * 2, tied=False
    )
    model = jax.device_get(initialize(config, jax.random.key(0)))
    random = np.random.default_rng(0)
    spread = random.uniform(0.5, 2.0, 32) * random.normal(size=(40, 32)) + random.normal(size=32)
    return LoadedModel.of(eqx.tree_at(lambda m: m.embed, model, spread.astype(np.float32)), forty(), None)


def new_bolmo(original: LoadedModel):
    """(a new Bolmo, the search of its input expansion)"""
    student = bolmo_vocabulary(original.vocabulary)
    suffixes = bolmo_suffixes(original.vocabulary, student)
    settings = StudentConfig(kind="bolmo", local_heads=2, decoder_layers=2)
    return new_student(settings, original, student, suffixes, 0), suffixes


def test_a_new_bolmo_gives_its_blocks_what_they_are_used_to():
    """`pool` has the mean and the deviation of the teacher's table in each channel, and so have the rows of bytes."""
    original = teacher()
    model, suffixes = new_bolmo(original)
    table = original.model.embed
    ids = np.random.default_rng(0).integers(0, 256, (8, 256)).astype(np.int32)
    found = pooled(model, ids, suffixes(ids)).reshape(-1, 32)
    np.testing.assert_allclose(found.std(0), table.std(0), rtol=0.2)
    np.testing.assert_allclose(found.mean(0), table.mean(0), atol=0.2)
    np.testing.assert_allclose(model.embed.mean(0), table.mean(0), atol=0.4)
    assert np.array_equal(model.expansion, table)
    assert model.patches.blocks.attention.q is original.model.blocks.attention.q
    assert np.all(leaves(model)["decoder.mlstm.input_bias"] == -10.0)
    assert np.array_equal(model.boundary.q, np.eye(32))


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_say_where_the_teachers_tokens_end():
    original = small.vocabulary("olmo2")
    student = bolmo_vocabulary(original)
    ours = Side(student, bolmo_suffixes(original, student), 40, patches=True)
    text = "the cat reads two bytes"
    piece = (Segment(Special("bos")), Segment(text), Segment(Special("eos")))
    batch = make_batch([piece], ours, Side(original, None, 30))
    (encoding,) = original.encode([piece], "teacher")
    ends = [0, *np.cumsum([len(original.token_bytes[i]) for i in encoding.ids[1:-1]]).tolist()]
    assert len(ends) > 3
    ends[-1] += 1  # the last token and the end of the document are one patch
    used = batch.student.patch_ends[0] >= 0
    assert batch.student.patch_ends[0][used].tolist() == ends
    assert batch.student.inputs[0, : len(text) + 2].tolist() == [257, *text.encode(), 257]
    short = make_batch([piece], ours, Side(original, None, 4))
    assert short.student.weight[0].sum() == short.student.patch_ends[0].max() == ends[3]  # what has no place counts not


def test_longer_patches_keep_some_of_the_ends():
    original = small.vocabulary("olmo2")
    student = bolmo_vocabulary(original)
    ours = Side(student, bolmo_suffixes(original, student), 120, patches=True)
    text = "the cat reads the cat and the cat writes bytes of the cat again and again"
    piece = (Segment(Special("bos")), Segment(text), Segment(Special("eos")))
    batch = make_batch([piece, ()], ours, Side(original, None, 100))
    before = batch.student.patch_ends[0][batch.student.patch_ends[0] >= 0].tolist()
    for kind in ("bpe", "space"):
        longer = with_longer_patches(batch, kind, 6.0, seed=0, step=3)
        ends = longer.student.patch_ends[0][longer.student.patch_ends[0] >= 0].tolist()
        assert ends == sorted(set(ends)) and set(ends) < set(before) and ends[-1] == before[-1] and ends[0] == 0
        assert (longer.student.patch_ends[1] == -1).all()
        again = with_longer_patches(batch, kind, 6.0, seed=0, step=3)
        assert np.array_equal(longer.student.patch_ends, again.student.patch_ends)


def test_pairs_are_joined_most_frequent_first_until_the_ratio():
    ids = np.array([9, 1, 2, 3, 1, 2, 4, 1, 2, 1])
    random = np.random.default_rng(0)
    assert kept_by_pairs(ids, 20, 20 / 9, random).tolist() == [True, False, *[True] * 8]
    assert (~kept_by_pairs(ids, 21, 3.0, random)).nonzero()[0].tolist() == [1, 4, 7]
    assert kept_by_pairs(ids, 20, 2.0, random).all()
    assert kept_by_pairs(ids, 20, 100.0, random).sum() == 2  # bos and all else


def test_words_are_never_joined_by_space():
    before = np.array([False, True, False, False, True, False, True])
    kept = kept_by_space(before, 14, 14.0, np.random.default_rng(0))
    assert kept.tolist() == [True, True, False, False, True, False, True]
    assert kept_by_space(before, 14, 14 / 6, np.random.default_rng(0)).sum() == 6


def test_the_ratio_grows_straight():
    assert [ratio_at(4.0, 6.0, 10, done) for done in (0, 5, 10, 99)] == [4.0, 5.0, 6.0, 6.0]


def test_long_tokens_and_names_of_special_tokens_are_found():
    """Against a search through all beginnings; a token of 40 bytes is longer than the window of other students."""
    long = b"abcdefgh" * 5
    words = [b"a", b"h", b"gh", b"defgh", long, long[3:]]
    special = {"<eos>": len(words), "<tool>": len(words) + 1, "<pad>": len(words) + 2}
    original = replace(
        small.vocabulary("olmo2"),
        token_bytes=(*words, b"", b"", b""),
        special=special,
        names={"eos_token": "<eos>", "pad_token": "<pad>"},
    )
    student = bolmo_vocabulary(original)
    ids = [257, *b"x", *long, *b"<tool>", 257, 256, *long[:20]]
    known = {word: i for i, word in enumerate(words)} | {b"<tool>": special["<tool>"]}
    expected = []
    for place, last in enumerate(ids):
        if last >= 256:
            expected.append({257: special["<eos>"], 256: special["<pad>"]}[last])
            continue
        start = max(at for at in range(place + 1) if ids[at] >= 256) + 1
        beginnings = (bytes(ids[begin : place + 1]) for begin in range(start, place + 1))
        expected.append(next((known[word] for word in beginnings if word in known), 0))
    assert bolmo_suffixes(original, student)(np.array([ids]))[0].tolist() == expected
    assert words.index(long) in expected and special["<tool>"] in expected


# --- the optimizer ------------------------------------------------------------------------------------------------


class Parts(eqx.Module):
    """A model of two parameters, by whose names the optimizer tells them apart."""

    patches: jax.Array
    pool: jax.Array


def test_blocks_have_a_learning_rate_of_their_own():
    model = Parts(jnp.array([2.0]), jnp.array([2.0]))
    config = OptimizerConfig(steps=10, learning_rate=0.5, warmup_steps=0, block_learning_rate=0.125, clip_norm=1.0)
    optimizer = make_optimizer(config)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(model, optimizer.init(model), model)
    np.testing.assert_allclose([updates.patches[0], updates.pool[0]], [-0.125, -0.5], rtol=1e-5)


def test_what_is_looked_up_does_not_decay():
    shape = BolmoConfig(260, 40, teacher().model.config, heads=2, mlp=8, decoder_layers=2)
    for name, decayed in leaves(decays(abstract(shape))).items():
        last = name.split(".")[-1]
        assert decayed == (not last.endswith(("norm", "bias")) and name not in ("embed", "expansion")), name
    assert decays(abstract(shape)).unembed and decays(abstract(shape.blocks)).embed


def test_a_bolmo_whose_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match="--local-heads 3 does not divide half of the teacher's width of 32"):
        bolmo_config(StudentConfig(local_heads=3), teacher().model.config)
