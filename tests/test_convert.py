"""A model onto a new vocabulary: student.py, and convert.py from the command line."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import forward
import jax
import numpy as np
import pytest
import small_tokenizers as small
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from real_tokenizers import real_tokenizer
from tokenizers import Tokenizer, models

import convert
from minalm.errors import InputError
from minalm.huggingface import families, weights
from minalm.huggingface import folder as student
from minalm.models import student as tables
from minalm.models import transformer
from minalm.models.config import ModelConfig
from minalm.models.transformer import Transformer
from minalm.parallel.mesh import ROWS, make_mesh, shard, shard_map, specs
from minalm.text.documents import Segment, Special
from minalm.tokenization import tokenizer_json
from minalm.tokenization.chat_template import read_chat_template
from minalm.tokenization.suffixes import longest_suffix
from minalm.tokenization.tokenizer_json import load_vocabulary
from minalm.tokenization.transfer import TransferPlan, plan_transfer
from minalm.tokenization.vocabulary import Vocabulary, byte_vocabulary, with_special_tokens

FAMILIES = {"llama": small.LLAMA, "gemma": small.GEMMA, "chatml": small.CHATML}
PADDED = 3  # rows of the teacher's table past its tokenizer


def random_model(config: ModelConfig) -> Transformer:
    shapes = transformer.leaves(transformer.abstract(config))
    random = np.random.default_rng(0)
    arrays = {leaf: random.normal(size=s.shape, scale=0.3).astype(np.float32) for leaf, s in shapes.items()}
    return transformer.from_leaves(config, arrays)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    """As Gemma 2's: tied, SentencePiece, a table larger than the tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    small.save(folder / "tokenizer", small.sentencepiece(False), small.GEMMA, bos_token="<bos>", pad_token="<pad>")
    files = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    config = ModelConfig(
        vocab_size=load_vocabulary(folder / "tokenizer").size + PADDED,
        embed=24,
        mlp=34,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=10,
        windows=(3, None, 3),
        query_scale=1 / math.sqrt(14),
        attention_softcap=5.0,
        final_softcap=3.0,
        norm_eps=1e-6,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=math.sqrt(24),
    )
    files["chat_template.jinja"] = small.CHATS["gemma"].encode()
    keys = {"max_position_embeddings": 640}
    weights.save(folder / "model", random_model(config), "float32", keys=keys, files=files)
    return folder / "model"


@pytest.fixture
def teacher(teacher_folder) -> Transformer:
    return weights.load(teacher_folder, np.float32)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory) -> Path:
    return small.save(tmp_path_factory.mktemp("other") / "tokenizer", small.byte_level(), small.CHATML)


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    convert.main()


def compute(model: Transformer, tokens: np.ndarray, suffix: np.ndarray | None) -> np.ndarray:
    """Logits [batch, time, vocab]."""
    mesh = make_mesh(1, 1)
    layout = (specs(model, mesh), ROWS, ROWS)
    mapped = shard_map(forward.logits, mesh=mesh, in_specs=layout, out_specs=P("fsdp", None, "tp"))
    return np.asarray(jax.jit(mapped)(shard(model, mesh), tokens, suffix))


# --- tokenizer.json -----------------------------------------------------------------------------------------------


def byte_tokenizer(special: tuple[str, ...]) -> tuple[Vocabulary, Tokenizer]:
    source = dataclasses.replace(
        byte_vocabulary(Vocabulary("source", None, None, {}, (), {}, {}), special), name="bytes"
    )
    return source, Tokenizer.from_str(json.dumps(tokenizer_json.tokenizer_json(source)))


@given(st.text())
def test_the_tokenizer_of_bytes_spells_the_bytes(text):
    _, tokenizer = byte_tokenizer(())
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@pytest.mark.parametrize(
    "text", ("", " a", "a  b\n\n\tc ", "<bos>", "é\u0301\ufb01日\U0001f600", "\x00\x7f\u00a0\u2581")
)
def test_the_tokenizer_of_bytes_does_not_touch_the_text(text):
    _, tokenizer = byte_tokenizer(small.GEMMA)
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode(text).ids == list(text.encode())


def test_programs_can_ask_for_control_tokens():
    """transformers renders a chat to text first, and reads the special tokens back from there."""
    vocabulary, tokenizer = byte_tokenizer(small.LLAMA)
    ids = tokenizer.encode("<|begin_of_text|>hi<|eot_id|>").ids
    assert ids == [vocabulary.special["<|begin_of_text|>"], *b"hi", vocabulary.special["<|eot_id|>"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_byte_vocabulary_comes_out_of_its_folder_again(tmp_path, teacher, family):
    original = load_vocabulary(small.save(tmp_path / "source", small.byte_level(), FAMILIES[family]))
    vocabulary = byte_vocabulary(original)
    model = random_model(dataclasses.replace(teacher.config, vocab_size=vocabulary.size + 7, tied=False))
    student.save(tmp_path / "model", model, vocabulary, None, "float32", student.GenerationConfig())
    found, none = student.load_vocabularies(tmp_path / "model")
    assert none is None and found.tokenizer is None
    for field in ("token_bytes", "special", "names", "stop_ids"):
        assert getattr(found, field) == getattr(vocabulary, field), field
    assert found.token_bytes == load_vocabulary(tmp_path / "model").token_bytes
    assert np.array_equal(found.boundary_mask(found.size), vocabulary.boundary_mask(found.size))
    assert weights.load(tmp_path / "model", np.float32).config.vocab_size == vocabulary.size
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    stops = values["eos_token_id"] if isinstance(values["eos_token_id"], list) else [values["eos_token_id"]]
    assert stops[0] == vocabulary.eos_id and stops == vocabulary.stop_ids
    assert values["pad_token_id"] == vocabulary.pad_id


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_with_added_control_tokens_comes_out_again(tmp_path, teacher, family):
    base = load_vocabulary(small.save(tmp_path / "base", small.byte_level(), small.CHATML))
    source = load_vocabulary(small.save(tmp_path / "source", small.sentencepiece(False), FAMILIES[family]))
    vocabulary = with_special_tokens(base, source)
    model = random_model(dataclasses.replace(teacher.config, vocab_size=vocabulary.size))
    student.save(tmp_path / "model", model, vocabulary, None, "float32", student.GenerationConfig())
    found, _ = student.load_vocabularies(tmp_path / "model")
    assert found.tokenizer is not None
    for field in ("token_bytes", "special", "names", "stop_ids"):
        assert getattr(found, field) == getattr(vocabulary, field), field
    piece = (Segment(Special("bos")), Segment("the user said é日\n\n"), Segment(Special("eos")))
    assert np.array_equal(found.encode([piece])[0].ids, vocabulary.encode([piece])[0].ids)


@pytest.mark.real
@pytest.mark.parametrize("base", ("bytes", "gemma2", "llama3", "qwen3"))
@pytest.mark.parametrize("source", ("gemma2", "llama3", "qwen3"))
def test_real_vocabularies_come_out_again(tmp_path, source, base):
    old = load_vocabulary(real_tokenizer(source))
    vocabulary = (
        byte_vocabulary(old) if base == "bytes" else with_special_tokens(load_vocabulary(real_tokenizer(base)), old)
    )
    config = ModelConfig(vocabulary.size, embed=2, mlp=2, layers=1, heads=1, kv_heads=1, head_dim=2, windows=(None,))
    student.save(tmp_path / "model", random_model(config), vocabulary, None, "float32", student.GenerationConfig())
    found, _ = student.load_vocabularies(tmp_path / "model")
    for field in ("token_bytes", "special", "names", "stop_ids"):
        assert getattr(found, field) == getattr(vocabulary, field), field


def test_ids_that_no_tokenizer_json_can_give_are_refused(tmp_path):
    """A Unigram model's pieces have their ids by their order, so nothing can stand behind a hole."""
    pieces = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)] + [("<unk>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, 256, byte_fallback=True))
    vocabulary = load_vocabulary(small.save(tmp_path / "base", tokenizer, ["<s>"]))
    with pytest.raises(InputError, match="cannot give '<new>' the id 1000"):
        tokenizer_json.tokenizer_json(dataclasses.replace(vocabulary, special={**vocabulary.special, "<new>": 1000}))


@pytest.mark.parametrize(
    "files, expected",
    (
        ({}, None),
        ({"tokenizer_config.json": {}}, None),
        ({"tokenizer_config.json": {"chat_template": "a"}}, {"default": "a"}),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "b"}]}}, {"default": "b"}),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "c"}, {"default": "c"}),
    ),
    ids=str,
)
def test_chat_template(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    found = read_chat_template(tmp_path, {}, ())
    assert found == expected if found is None else found.sources == expected


# --- student_from_teacher -----------------------------------------------------------------------------------------


def plan_of(*sources: list[int]) -> TransferPlan:
    start = np.cumsum([0, *map(len, sources)], dtype=np.int64)
    return TransferPlan(100, np.array([i for ids in sources for i in ids], np.int64), start)


@pytest.mark.parametrize("teacher_tied", (True, False))
def test_tables_of_an_untied_student(teacher, teacher_tied):
    teacher = random_model(dataclasses.replace(teacher.config, tied=teacher_tied))
    model = tables.student_from_teacher(teacher, plan_of([7], [3, 5], []), expansion=False, tied=False, rows=6)
    old_unembed = teacher.embed if teacher_tied else teacher.unembed
    for new, old in ((model.embed, teacher.embed), (model.unembed, old_unembed)):
        assert new.dtype == old.dtype and new.shape == (6, 24)
        np.testing.assert_array_equal(new[0], old[7])
        np.testing.assert_allclose(new[1], (old[3] + old[5]) / 2, rtol=1e-6)
        assert new[2].any() and not new[3:].any()
    assert not np.array_equal(model.embed[2], model.unembed[2])  # drawn separately
    assert model.config == dataclasses.replace(teacher.config, vocab_size=6, tied=False)


def test_tables_of_a_tied_student(teacher):
    model = tables.student_from_teacher(teacher, plan_of([7]), expansion=False, tied=True, rows=1)
    assert model.unembed is None and model.config.tied
    np.testing.assert_array_equal(model.embed, teacher.embed[7:8])


def test_all_else_is_the_teachers(teacher):
    model = tables.student_from_teacher(teacher, plan_of([7]), expansion=True, tied=False, rows=4)
    old, new = transformer.leaves(teacher), transformer.leaves(model)
    assert {leaf for leaf in new if leaf not in old} == {"expansion", "unembed"}
    for leaf in old.keys() - {"embed"}:
        assert np.array_equal(old[leaf], new[leaf]), leaf
    np.testing.assert_array_equal(model.expansion, teacher.embed)
    assert model.config.expansion_size == teacher.config.vocab_size


def test_new_tables_of_a_bfloat16_teacher_are_rounded_once(tmp_path, teacher_folder):
    bfloat16 = families.DTYPES["bfloat16"]
    teacher = weights.load(teacher_folder, bfloat16)
    model = tables.student_from_teacher(teacher, plan_of([7], [3, 5]), expansion=True, tied=False, rows=4)
    exact = (teacher.embed[3].astype(np.float32) + teacher.embed[5].astype(np.float32)) / 2
    assert np.array_equal(model.embed[1], exact) and not np.array_equal(exact.astype(bfloat16), exact)
    others = {
        leaf: array.dtype for leaf, array in transformer.leaves(model).items() if leaf not in ("embed", "unembed")
    }
    assert set(others.values()) == {bfloat16}
    weights.save(tmp_path / "model", model, "bfloat16")
    assert np.array_equal(
        weights.load(tmp_path / "model", np.float32).embed[1], exact.astype(bfloat16).astype(np.float32)
    )


@pytest.mark.parametrize("tied", (True, False))
def test_a_teacher_that_stays_in_its_file(tmp_path, teacher, tied):
    """The same student, bit for bit, of which all that is the teacher's own is not read before it is needed."""
    weights.save(tmp_path / "teacher", random_model(dataclasses.replace(teacher.config, tied=tied)), "bfloat16")
    stored, loaded = weights.read(tmp_path / "teacher"), weights.load(tmp_path / "teacher", np.float32)
    plan = plan_of([7], [3, 5], [], [2, 2, 9])
    lazy, eager = (tables.student_from_teacher(source, plan, True, False, 6, seed=4) for source in (stored, loaded))
    old, new = transformer.leaves(stored), transformer.leaves(lazy)
    assert new["expansion"] is old["embed"]
    assert all(new[leaf] is old[leaf] for leaf in new if leaf not in ("embed", "unembed", "expansion"))
    for leaf, array in transformer.leaves(eager).items():
        assert new[leaf].shape == array.shape and np.array_equal(new[leaf][:], array), leaf
    placed = shard(lazy, make_mesh(4, 2), np.float32)
    assert all(map(np.array_equal, jax.tree.leaves(placed), jax.tree.leaves(eager)))
    for name, model in (("lazy", lazy), ("eager", eager)):
        weights.save(tmp_path / name, model, "bfloat16", shard_size=20_000)
    written = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("lazy", "eager")]
    assert written[0] == written[1] and len(written[0]) > 3


def test_a_student_with_an_expansion_is_no_teacher(teacher):
    model = tables.student_from_teacher(teacher, plan_of([7]), expansion=True, tied=False, rows=1)
    with pytest.raises(InputError, match="byte student"):
        tables.student_from_teacher(model, plan_of([0]), expansion=False, tied=False, rows=1)


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expansion", (True, False))
def test_bytes(tmp_path, monkeypatch, capsys, teacher_folder, expansion):
    flags = [] if expansion else ["--no-expansion"]
    run(monkeypatch, "bytes", teacher_folder, tmp_path / "out", "--dtype", "float32", *flags)
    printed = capsys.readouterr().out
    assert "301 -> 261: 261 copied, 0 averaged, 0 drawn" in printed

    model = weights.load(tmp_path / "out", np.float32)
    vocabulary, suffixes = student.load_vocabularies(tmp_path / "out")
    old = load_vocabulary(teacher_folder)
    expected = byte_vocabulary(old)
    assert (vocabulary.token_bytes, vocabulary.special) == (expected.token_bytes, expected.special)
    made = tables.student_from_teacher(
        weights.load(teacher_folder, np.float32), plan_transfer(old, expected), expansion, False, expected.size
    )
    assert model.config == made.config and not model.config.tied
    for leaf, array in transformer.leaves(made).items():
        assert np.array_equal(array, transformer.leaves(model)[leaf]), leaf
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == small.CHATS["gemma"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 640

    # The folder alone is enough to run the model.
    piece = (Segment(Special("bos")), Segment("the user said é日"), Segment(Special("eos")))
    ids = vocabulary.encode([piece])[0].ids[None]
    if expansion:
        suffix = suffixes(ids)
        assert np.array_equal(suffix, longest_suffix(old, expected)(ids)) and len(set(suffix[0])) > 5
    else:
        assert suffixes is None
        suffix = None
    assert np.isfinite(compute(model, ids, suffix)).all()


def test_tokenizer(tmp_path, monkeypatch, capsys, teacher_folder, other_tokenizer):
    run(monkeypatch, "tokenizer", teacher_folder, other_tokenizer, tmp_path / "out")
    assert "301 -> 321: " in capsys.readouterr().out
    old, new = load_vocabulary(teacher_folder), load_vocabulary(tmp_path / "out")
    base = load_vocabulary(other_tokenizer / "tokenizer.json")
    assert new.token_bytes[: base.size] == base.token_bytes
    assert new.chat_template.sources == old.chat_template.sources and set(small.GEMMA) <= set(new.special)
    model = weights.load(tmp_path / "out", families.DTYPES["bfloat16"])
    assert model.config.tied and model.config.vocab_size == new.size
    teacher = weights.load(teacher_folder, families.DTYPES["bfloat16"])
    for word in small.GEMMA:
        assert np.array_equal(model.embed[new.special[word]], teacher.embed[old.special[word]])


def test_inspect(tmp_path, monkeypatch, capsys, teacher_folder):
    run(monkeypatch, "bytes", teacher_folder, tmp_path / "out")
    capsys.readouterr()
    run(monkeypatch, "inspect", tmp_path / "out")
    printed = {line[:22].strip(): line[22:] for line in capsys.readouterr().out.splitlines()}
    model = weights.load(tmp_path / "out", np.float32)
    assert printed["windows"] == "(3, None, 3)" and printed["expansion_size"] == "304"
    assert printed["expansion parameters"] == f"{304 * 24:,}"
    assert printed["all parameters"] == f"{sum(array.size for array in transformer.leaves(model).values()):,}"
    assert printed["vocabulary"].startswith("261 ids, bytes; special tokens <bos>")
    old = load_vocabulary(teacher_folder)
    found = {token for token in old.token_bytes if 0 < len(token) <= 16}
    assert printed["expansion"] == f"{len(found) + len(small.GEMMA)} original tokens"


def test_bad_input_is_one_sentence_and_exit_code_1(tmp_path, teacher_folder):
    """In a process of its own: what a user sees."""
    script = Path(convert.__file__)
    for arguments in (("bytes", tmp_path / "nowhere", tmp_path / "out"), ("bytes", teacher_folder, teacher_folder)):
        done = subprocess.run([sys.executable, script, *arguments], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1 and str(arguments[1]) in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ("tokenizer.json", "config.json", "model.safetensors"))
def test_incomplete_folders(tmp_path, monkeypatch, teacher_folder, file):
    (tmp_path / "model").mkdir()
    for path in teacher_folder.iterdir():
        if path.name != file:
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "bytes", tmp_path / "model", tmp_path / "out")
    assert exit.value.code.startswith("error: ") and file in exit.value.code  # printed to stderr, exit code 1
    assert not (tmp_path / "out").exists()


def test_damaged_tensors(tmp_path, monkeypatch, teacher_folder):
    (tmp_path / "model").mkdir()
    for path in teacher_folder.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "bytes", tmp_path / "model", tmp_path / "out")
    assert exit.value.code.startswith(f"error: {file} is damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_transformers_runs_a_plain_student(tmp_path, monkeypatch, teacher_folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run(monkeypatch, "bytes", teacher_folder, tmp_path / "out", "--no-expansion", "--dtype", "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = np.array([tokenizer("<bos>the user said é日").input_ids], np.int32)
    assert ids[0].tolist()[1:] == list("the user said é日".encode())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor(ids).long()).logits.numpy()
    found = compute(weights.load(tmp_path / "out", np.float32), ids, None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


# --- a run's student, without what training changes ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("bytes, expansion frozen", "bytes, expansion trained", "tokens"))
def test_a_start_and_its_trained_leaves_are_the_student(tmp_path, teacher_folder, other_tokenizer, kind):
    """Every file of the export is the same, byte for byte, as where the teacher is at hand."""
    teacher, (old, _) = weights.read(teacher_folder), student.load_vocabularies(teacher_folder)
    generation_config = dataclasses.replace(student.read_generation_config(teacher_folder), sampling={"top_k": 3})
    of_bytes = kind.startswith("bytes")
    new = byte_vocabulary(old) if of_bytes else with_special_tokens(load_vocabulary(other_tokenizer), old)
    suffixes = longest_suffix(old, new) if of_bytes else None
    rows = -(-new.size // 64) * 64
    whole = tables.student_from_teacher(teacher, plan_transfer(old, new), of_bytes, not of_bytes, rows)
    is_trained = jax.tree.map(lambda _: True, whole)
    if kind == "bytes, expansion frozen":
        is_trained = eqx.tree_at(lambda model: model.expansion, is_trained, False)
    student.write_start(tmp_path / "start", whole, is_trained, new, suffixes, generation_config)

    start = student.read_start(tmp_path / "start")
    assert start.config == whole.config and start.config.vocab_size == rows > new.size
    assert list(start.frozen) == (["expansion"] if kind == "bytes, expansion frozen" else [])
    trained, _ = eqx.partition(jax.tree.map(lambda leaf: leaf[:].astype(np.float32), whole), is_trained)
    assert jax.tree.structure(start.trained()) == jax.tree.structure(trained)
    assert jax.tree.map(np.shape, start.trained()) == jax.tree.map(np.shape, trained)
    student.save(tmp_path / "expected", whole, new, suffixes, "float32", generation_config)
    again = (start.vocabulary, start.suffixes, "float32", start.generation_config)
    student.save(tmp_path / "found", start.model(trained), *again)
    expected, found = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("expected", "found")
    )
    assert found == expected and len(found) == (6 if of_bytes else 5)


def test_a_start_keeps_the_bits_of_what_is_frozen(tmp_path, teacher_folder):
    """Whatever is frozen, stacked blocks too, in the type that it is stored in."""
    teacher, (vocabulary, _) = weights.read(teacher_folder), student.load_vocabularies(teacher_folder)
    teacher = jax.tree.map(lambda leaf: leaf[:].astype(families.DTYPES["bfloat16"]), teacher)
    teacher = eqx.tree_at(lambda model: model.norm, teacher, teacher.norm.astype(np.float16))
    is_trained = jax.tree.map(lambda _: True, teacher)
    is_trained = eqx.tree_at(lambda model: (model.norm, model.embed), is_trained, (False, False))
    is_trained = eqx.tree_at(
        lambda model: model.blocks, is_trained, replace_fn=lambda blocks: jax.tree.map(lambda _: False, blocks)
    )
    student.write_start(tmp_path / "start", teacher, is_trained, vocabulary, None, student.GenerationConfig())
    frozen = student.read_start(tmp_path / "start").frozen
    expected = {
        leaf: array
        for leaf, array in transformer.leaves(teacher).items()
        if leaf in ("embed", "norm") or leaf.startswith("blocks.")
    }
    assert frozen.keys() == expected.keys()
    for leaf, array in expected.items():
        assert frozen[leaf].dtype == array.dtype and np.array_equal(frozen[leaf][:], array), leaf


def test_a_damaged_start_is_refused(tmp_path, teacher_folder):
    teacher, (old, _) = weights.read(teacher_folder), student.load_vocabularies(teacher_folder)
    new = byte_vocabulary(old)
    whole = tables.student_from_teacher(teacher, plan_transfer(old, new), True, False, new.size)
    is_trained = eqx.tree_at(lambda model: model.expansion, jax.tree.map(lambda _: True, whole), False)
    student.write_start(
        tmp_path / "start", whole, is_trained, new, longest_suffix(old, new), student.GenerationConfig()
    )
    with pytest.raises(InputError, match="start exists already"):
        student.write_start(tmp_path / "start", whole, is_trained, new, None, student.GenerationConfig())
    file = tmp_path / "start" / "frozen.safetensors"
    content = file.read_bytes()
    for damaged, words in (
        (content[:-1], "frozen.safetensors is damaged"),
        (content.replace(b"expand_embed", b"expand_dembe"), "holds the tensor model.expand_dembe_tokens.weight"),
        (None, "frozen.safetensors is missing"),
    ):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(InputError, match=words):
            student.read_start(tmp_path / "start")
