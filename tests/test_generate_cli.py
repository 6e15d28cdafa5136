"""The program that writes and talks: what it shows, where a text ends, and what it refuses."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small_tokenizers as small
from hypothesis import given
from hypothesis import strategies as st

from minalm import generate
from minalm.errors import InputError
from minalm.generation.text import Continuation, TextStream, stop_bytes
from minalm.huggingface.folder import GenerationConfig, save
from minalm.huggingface.loaded import LoadedModel, model_folder
from minalm.models.config import ModelConfig
from minalm.models.transformer import initialize
from minalm.tokenization.suffixes import longest_suffix
from minalm.tokenization.vocabulary import byte_vocabulary

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the time: XLA leaves out most optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# --- text ---------------------------------------------------------------------------------------------------------

TEXTS = st.lists(
    st.one_of(st.binary(max_size=4), st.sampled_from(["é", "日本", "\U0001f600", "ab", "stop"]).map(str.encode))
)


@given(TEXTS)
def test_pieces_of_bytes_become_the_whole_text(parts):
    stream = TextStream()
    assert "".join([*map(stream.add, parts), stream.close()]) == b"".join(parts).decode(errors="replace")


def test_a_character_is_shown_when_it_is_whole():
    stream = TextStream()
    shown = [stream.add(bytes([byte])) for byte in "aé日\U0001f600".encode() + b"\xe6A\xf0\x9f"]
    assert shown == ["a", "", "é", "", "", "日", "", "", "", "\U0001f600", "", "\ufffdA", "", ""]
    assert stream.close() == "\ufffd"


@given(TEXTS, st.lists(st.sampled_from([b"ab", b"aab", b"stop", b"b\xe6", b"\x97"]), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(parts, stops):
    stream, whole = TextStream(stops), b"".join(parts)
    places = [whole.find(stop) for stop in stops if stop in whole]
    kept = whole[: min(places)] if places else whole
    assert "".join([*map(stream.add, parts), stream.close()]) == kept.decode(errors="replace")
    assert stream.ended


@given(TEXTS, st.integers(1, 12))
def test_text_ends_at_the_last_whole_character_that_fits(parts, most):
    stream = TextStream((), most)
    text = "".join([*map(stream.add, parts), stream.close()])
    whole = b"".join(parts)
    expected = whole.decode(errors="replace")
    assert expected.startswith(text)
    if len(whole) >= most:
        cut = whole[:most]
        assert text in {cut[: most - n].decode(errors="replace") for n in range(4)}
    else:
        assert text == expected


def test_nothing_of_what_may_be_a_stop_string_is_shown():
    stream = TextStream([b"<end>"])
    assert [stream.add(part) for part in (b"a<e", b"nd", b"x<", b"end>b", b"c")] == ["a", "", "<endx", "", ""]


def test_ids_end_before_the_token_that_begins_a_stop_string():
    tokens = [b"a", b"ab", b"bst", b"op", b"s", b""]

    def taken(new, stops=("stop",), **limits):
        row = Continuation(tokens, stop_bytes(stops), limits.pop("most", 99), limits.pop("size", None))
        for token in new:
            row.add([token], {7})
        return row.ids, row.ended

    assert taken([0, 1, 2, 3, 0]) == ([0, 1], True)
    assert taken([0, 4, 5, 4, 0]) == ([0, 4, 5, 4, 0], False)
    assert taken([0, 7, 0]) == ([0], True)
    assert taken([0, 1, 1], (), most=2) == ([0, 1], True)
    assert taken([0, 1, 1], (), size=2) == ([0, 1], True)


@pytest.mark.parametrize("stop, words", (("", "is empty"), ("\ud800", "is no text")))
def test_a_stop_string_that_is_none(stop, words):
    with pytest.raises(InputError, match=words):
        stop_bytes(["a", stop])


# --- the program --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A subword model and its byte student, random, as folders; the student's has settings of its own to sample."""
    folder = tmp_path_factory.mktemp("models")
    original = small.vocabulary("llama")
    config = ModelConfig(original.size, 16, 24, 2, 2, 1, 8, (None, None))

    def random(config, seed):
        model = initialize(config, jax.random.key(seed))
        return jax.tree.map(lambda leaf: np.asarray(8.0 * leaf if leaf.ndim > 1 else leaf), model)

    save(folder / "subwords", random(config, 0), original, None, "float32", GenerationConfig(400))
    student = byte_vocabulary(original)
    search = longest_suffix(original, student)
    config = dataclasses.replace(config, vocab_size=student.size, expansion_size=original.size, tied=False)
    own = {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2}
    save(folder / "bytes", random(config, 1), student, search, "float32", GenerationConfig(300, own))
    save(folder / "others", random(config, 2), student, search, "float32", GenerationConfig(300))
    return folder


def written(capfd, *arguments, text=None, monkeypatch=None):
    """Standard output and standard error."""
    if text is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))
    generate.run(parsed(arguments))
    return capfd.readouterr()


def parsed(arguments):
    return generate.parse([*map(str, arguments)])


def test_a_pipe_gets_the_text_alone(folders, capfd, monkeypatch):
    arguments = folders / "bytes", "--temperature", 0, "--max-bytes", 24
    by_argument = written(capfd, *arguments, "the cat")
    by_input = written(capfd, *arguments, text="the cat\n", monkeypatch=monkeypatch)
    assert by_argument.out == by_input.out and 0 < len(by_argument.out.encode()) <= 3 * 24
    assert "\n" not in by_argument.out or by_argument.out.strip("\n")
    assert "left out" in by_argument.err  # the penalty of the folder
    assert written(capfd, *arguments, "the cat", "--lookup", "--stats").out == by_argument.out
    drafted = written(capfd, *arguments, "the cat", "--draft", folders / "subwords", "--stats")
    assert drafted.out == by_argument.out and "made one by one" in drafted.err


def test_settings_are_the_model_s_own_unless_given(folders, capfd):
    written(capfd, folders / "bytes", "--max-bytes", 4, "the", "--top-k", 3)
    # What is given is not said again.
    own = GenerationConfig(None, {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2})
    original = small.vocabulary("llama")

    def found(vocabulary, **flags):
        chosen = generate.sampling_of(generate.Sampling(**flags), own, vocabulary, Path("model"))
        return {name: value for name, value in vars(chosen).items() if value is not None}

    assert found(original) == {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2}
    assert capfd.readouterr().err.splitlines()[-1].endswith("temperature 0.7, top_k 5, repetition_penalty 1.2")
    assert found(byte_vocabulary(original)) == {"temperature": 0.7, "top_k": 5}
    assert found(original, temperature=0.0, repetition_penalty=1.0) == {"temperature": 0.0, "repetition_penalty": 1.0}
    assert found(original, top_k=2, min_p=0.1) == {
        "temperature": 0.7, "top_k": 2, "min_p": 0.1, "repetition_penalty": 1.2,
    }  # fmt: skip


def test_prompts_of_a_file(folders, capfd, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\nin\n日本 was\n")
    arguments = folders / "bytes", "--temperature", 0, "--max-bytes", 16
    lines = written(capfd, *arguments, "--prompts", tmp_path / "prompts.txt", "--batch-size", 2).out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == ["the cat", "in", "日本 was"]
    for row in rows:
        assert row["continuation"] == written(capfd, *arguments, row["prompt"]).out


def test_a_stop_string_ends_the_text(folders, capfd):
    arguments = folders / "subwords", "--temperature", 0, "--max-bytes", 40, "the cat"
    whole = written(capfd, *arguments).out
    stop = whole[5:8]
    assert written(capfd, *arguments, "--stop", "never seen", "--stop", stop).out == whole[: whole.index(stop)]


def test_a_conversation(folders, capfd, monkeypatch):
    """Each turn reads the whole chat; the second goes on from what the first has read."""
    arguments = folders / "bytes", "--chat", "--temperature", 0, "--max-bytes", 12, "--system", "Be short."
    both = written(capfd, *arguments, text="the cat\nand the dog\n\nnever read\n", monkeypatch=monkeypatch).out
    first = written(capfd, *arguments, "the cat").out
    assert both.startswith(first) and len(both) > len(first)
    config = parsed(arguments)
    writer = generate.Writer(config, [folders / "bytes"])
    chat = [("system", "Be short."), ("user", "the cat"), ("assistant", first[:-1]), ("user", "and the dog")]
    prompt = writer.messages([{"role": role, "content": content} for role, content in chat])
    assert both == first + writer.write(prompt, lambda text: None) + "\n"


def test_a_conversation_without_a_template_is_a_text(folders, capfd, monkeypatch):
    """With a model whose template is taken away."""

    class Plain:
        @staticmethod
        def read(folder):
            loaded = LoadedModel.read(folder)
            return dataclasses.replace(loaded, vocabulary=dataclasses.replace(loaded.vocabulary, chat_template=None))

    monkeypatch.setattr(generate, "LoadedModel", Plain)
    arguments = folders / "bytes", "--temperature", 0, "--max-bytes", 12
    heard = written(capfd, *arguments, "--chat", "the cat")
    assert "has no chat template" in heard.err
    assert heard.out == written(capfd, *arguments, "the cat\n").out + "\n"


def test_a_long_conversation_forgets_its_beginning(folders):
    writer = generate.Writer(parsed([folders / "bytes", "--chat"]), [folders / "bytes"])
    messages = [{"role": "system", "content": "Be short."}]
    for number in range(4):
        messages += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "answer"}]
    messages.append({"role": "user", "content": "the last"})
    kept = [messages[0], *messages[5:]]
    writer.positions = 4 * len(writer.messages(kept)[0]) // 3 + 2
    prompt = writer.conversation(messages)
    assert messages == kept
    np.testing.assert_array_equal(prompt[0], writer.messages(kept)[0])
    writer.positions = 1  # the last question stays, to be refused if it is too long
    writer.conversation(messages)
    assert [message["content"] for message in messages] == ["Be short.", "the last"]


def test_an_ensemble(folders, capfd):
    arguments = "--temperature", 0, "--max-bytes", 16, "the cat"
    alone = written(capfd, folders / "bytes", *arguments).out
    assert written(capfd, folders / "bytes", folders / "bytes", *arguments).out == alone
    other = written(capfd, folders / "others", *arguments).out
    assert other != alone
    nearly = written(capfd, folders / "bytes", folders / "others", *arguments, "--weights", 1e-6, 1, "--mean", "log")
    assert nearly.out == other


@pytest.mark.parametrize(
    "arguments, words",
    (
        ((), "there is no model"),
        (("missing/folder/there", "x"), "missing/folder/there does not exist"),
        (("BYTES", "x" * 400), "400 tokens and the model 300 positions"),
        (("BYTES", "SUBWORDS", "x"), "writes text in other tokens"),
        (("BYTES", "x", "--stop", ""), "--stop is empty"),
        (("BYTES", "x", "--max-bytes", "0"), "--max-bytes is 0"),
        (("BYTES", "x", "--top-p", "2"), "--top-p is 2"),
        (("BYTES", "x", "--draft", "BYTES", "--lookup"), "choose one"),
        (("BYTES", "OTHERS", "x", "--lookup"), "an ensemble has no draft"),
        (("BYTES", "OTHERS", "x", "--weights", "1"), "--weights 1"),
        (("SUBWORDS", "x", "--draft", "SUBWORDS"), "does not write bytes"),
        (("BYTES", "x", "--system", "y"), "give --chat too"),
        (("BYTES", "--prompts", "FILE", "--chat"), "leave out one"),
    ),
)
def test_what_is_refused(folders, arguments, words):
    names = {"BYTES": folders / "bytes", "SUBWORDS": folders / "subwords", "OTHERS": folders / "others"}
    with pytest.raises(InputError, match=words) as error:
        generate.run(parsed([names.get(word, word) for word in arguments]))
    assert "\n" not in str(error.value)


def test_a_run_without_a_model_says_how_to_make_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="convert.py export"):
        model_folder(tmp_path / "run")
    (tmp_path / "run" / "hf").mkdir()
    assert model_folder(tmp_path / "run") == tmp_path / "run" / "hf"


def test_ctrl_c_ends_the_program_quietly(folders):
    """While it waits for a prompt, and while it writes."""
    command = [sys.executable, "-m", "minalm.generate", str(folders / "bytes")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    settings = dict(cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process = subprocess.Popen([*command, "--max-bytes", "280", "the cat"], **settings)
    assert process.stdout.read(1)  # it writes
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert b"Traceback" not in error and process.returncode in (130, 0), error.decode()  # 0: it was done
    process = subprocess.Popen([*command, "--chat"], **settings)
    process.stdin.write(b"the\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert b"Traceback" not in error and process.returncode == 0, error.decode()
