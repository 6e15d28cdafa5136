"""What post-training changed in a subword model, added to byte models that were made from it (convert.py add-difference)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import bolmo_numpy as plain
import numpy as np
import pytest
import safetensors.numpy

import convert
from minalm.errors import InputError
from minalm.huggingface.folder import load_vocabularies
from minalm.tokenization.chats import ChatReader

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "quickstart_teacher"
ROWS = 4096


def perturbed(name, tensor):
    return (tensor + 0.1 * np.random.default_rng(len(name)).standard_normal(tensor.shape)).astype(tensor.dtype)


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, what post-training made of it, and three models: bytes with an expansion, a Bolmo, and the base itself."""
    place = tmp_path_factory.mktemp("models")
    shutil.copytree(TEACHER, place / "post")
    changed = {name: perturbed(name, tensor) for name, tensor in tensors_of(TEACHER).items()}
    safetensors.numpy.save_file(changed, place / "post" / "model.safetensors", {"format": "pt"})
    convert.to_bytes(TEACHER, place / "bytes", dtype="float32")
    values = json.loads((TEACHER / "config.json").read_text())
    config = {key: values[key] for key in values if key not in ("architectures", "tie_word_embeddings", "head_dim")} | {
        "model_type": "bolmo",
        "trunk_model_type": "llama",
        "vocab_size": 520,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "head_dim": 64,
        "local_rms_norm_eps": 1e-5,
        "num_local_encoder_layers": 1,
        "num_local_decoder_layers": 1,
        "num_local_heads": 4,
        "local_intermediate_size": 16,
        "subword_vocab_size": ROWS,
        "tokenizer_config": {"original_identifier": str(TEACHER)},
    }
    (place / "bolmo").mkdir()
    (place / "bolmo" / "config.json").write_text(json.dumps(config))
    tensors = plain.random_tensors(config, 0)
    safetensors.numpy.save_file(tensors, place / "bolmo" / "model.safetensors", {"format": "pt"})
    return place


def add(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert.py", "add-difference", *map(str, arguments)])
    convert.main()


def given(folders, post="post"):
    return "--base", TEACHER, "--post-trained", folders / post


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + "
    "message['content'] + '<|end_of_text|>' }}{% else %}{{ '<|user|>\n' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "eos", "written", "ends"),
    (
        (CHATML, "<|im_end|>", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>",)),
        (OLMO, "<|end_of_text|>", "<|user|>\nHi\n<|assistant|>\n", ()),
    ),
)
def test_a_bolmo_learns_to_chat(folders, tmp_path, monkeypatch, template, eos, written, ends):
    """It gets the post-trained model's template, whose special tokens are bytes to it, but for bos and the base's eos."""
    shutil.copytree(folders / "post", tmp_path / "post")
    settings = json.loads((TEACHER / "tokenizer_config.json").read_text()) | {
        "eos_token": eos,
        "chat_template": template,
    }
    (tmp_path / "post" / "tokenizer_config.json").write_text(json.dumps(settings))
    spec = json.loads((TEACHER / "tokenizer.json").read_text())
    if eos not in {token["content"] for token in spec["added_tokens"]}:
        used = {token["id"] for token in spec["added_tokens"]}
        spec["model"]["vocab"] = {word: i for word, i in spec["model"]["vocab"].items() if i != ROWS - 1}
        spec["model"]["merges"] = spec["model"]["merges"][:-1]
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": ROWS - 1, "content": eos})
        assert ROWS - 1 not in used
        base = tmp_path / "base"
        shutil.copytree(TEACHER, base)
        for place in (base, tmp_path / "post"):
            (place / "tokenizer.json").write_text(json.dumps(spec))
    else:
        base = TEACHER
    add(monkeypatch, folders / "bolmo", tmp_path / "out", "--base", base, "--post-trained", tmp_path / "post")
    vocabulary, _ = load_vocabularies(tmp_path / "out")
    reader = ChatReader(vocabulary, vocabulary, False, "2026-01-01")
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    [encoding] = vocabulary.encode([tuple(reader(chat, add_generation_prompt=True))])
    assert encoding.ids.tolist() == [257, *written.encode()]
    assert vocabulary.stop_strings == ends and vocabulary.stop_ids == [257]
    again = tmp_path / "again"
    convert.export(tmp_path / "out", again)
    assert load_vocabularies(again)[0].chat_template.sources == vocabulary.chat_template.sources


@pytest.mark.parametrize("kind", ("bytes", "bolmo"))
def test_blocks_alone_change(folders, tmp_path, monkeypatch, capsys, kind):
    add(monkeypatch, folders / kind, tmp_path / "out", *given(folders), "--alpha", 0.5)
    assert str(tmp_path / "out") in capsys.readouterr().out
    before, found = tensors_of(folders / kind), tensors_of(tmp_path / "out")
    base, post = tensors_of(TEACHER), tensors_of(folders / "post")
    assert found.keys() == before.keys()
    blocks = {name for name in before if name.startswith("model.layers.")}
    assert blocks == {name for name in base if name.startswith("model.layers.")}
    for name, tensor in before.items():
        expected = tensor + 0.5 * (post[name] - base[name]) if name in blocks else tensor
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-7)
        assert name in blocks or found[name].tobytes() == tensor.tobytes()
    for file in ("config.json", "tokenizer.json"):
        if kind == "bytes":
            assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((folders / kind / file).read_text())


@pytest.mark.slow
def test_the_whole_difference_makes_the_other_model(folders, tmp_path, monkeypatch, capsys):
    add(monkeypatch, TEACHER, tmp_path / "out", *given(folders), "--with-table")
    post, found = tensors_of(folders / "post"), tensors_of(tmp_path / "out")
    for name, tensor in tensors_of(TEACHER).items():
        expected = post[name] if name.startswith(("model.layers.", "model.embed_tokens.")) else tensor
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "table"), (("bytes", "expand_embed_tokens"), ("bolmo", "local_encoder.subword_embedding"))
)
def test_the_table_of_subwords(folders, tmp_path, monkeypatch, kind, table):
    add(monkeypatch, folders / kind, tmp_path / "out", *given(folders), "--with-table")
    base, post, name = tensors_of(TEACHER), tensors_of(folders / "post"), f"model.{table}.weight"
    difference = post["model.embed_tokens.weight"] - base["model.embed_tokens.weight"]
    before, found = tensors_of(folders / kind), tensors_of(tmp_path / "out")
    np.testing.assert_allclose(found[name], before[name] + difference, rtol=1e-5, atol=1e-6)
    changed = {name for name in before if found[name].tobytes() != before[name].tobytes()}
    assert {name.split(".")[1] for name in changed} == {"layers", table.split(".")[0]}


@pytest.mark.parametrize("dtype", ("bfloat16", pytest.param("float32", marks=pytest.mark.slow)))
def test_nothing_added_is_nothing_changed(folders, tmp_path, monkeypatch, dtype):
    convert.export(folders / "bytes", tmp_path / "model", dtype=dtype)
    add(monkeypatch, tmp_path / "model", tmp_path / "out", *given(folders), "--alpha", 0)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_other_settings_are_said(folders, tmp_path, monkeypatch, capsys):
    shutil.copytree(folders / "post", tmp_path / "longer")
    values = json.loads((TEACHER / "config.json").read_text()) | {"rope_theta": 50_000.0}
    (tmp_path / "longer" / "config.json").write_text(json.dumps(values))
    add(monkeypatch, folders / "bolmo", tmp_path / "out", *given(folders, tmp_path / "longer"))
    assert "longer has other settings, of which nothing is taken over: rope\n" in capsys.readouterr().out


def test_what_is_refused(folders, tmp_path, monkeypatch):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            add(monkeypatch, *arguments)
        assert not (tmp_path / "out").exists()
        return stop.value.code  # one sentence, with which the program ends with code 1

    base, post, out = TEACHER, folders / "post", tmp_path / "out"
    said = refused(folders / "bolmo", out, "--base", base, "--post-trained", folders / "bytes")
    assert "have different vocabularies: --base is the model that --post-trained was made from" in said
    assert "is a Bolmo" in refused(folders / "bolmo", out, "--base", base, "--post-trained", folders / "bolmo")
    assert "--alpha is nan" in refused(folders / "bolmo", out, *given(folders), "--alpha", "nan")
    assert "exists already" in refused(folders / "bolmo", post, *given(folders))
    convert.to_bytes(TEACHER, tmp_path / "plain", expansion=False)
    assert "has no table of the subwords" in refused(tmp_path / "plain", out, *given(folders), "--with-table")
    shutil.copytree(post, tmp_path / "shallow")
    values = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "shallow" / "config.json").write_text(json.dumps(values))
    tensors = {name: tensor for name, tensor in tensors_of(post).items() if "layers.3." not in name}
    safetensors.numpy.save_file(tensors, tmp_path / "shallow" / "model.safetensors", {"format": "pt"})
    said = refused(folders / "bolmo", out, *given(folders, tmp_path / "shallow"))
    assert "differs in shape" in said and "all three models must have the same blocks" in said


def test_a_bolmo_is_no_start_and_can_be_looked_at(folders, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="is a Bolmo, which reads bytes with its own parts"):
        convert.to_bytes(folders / "bolmo", tmp_path / "out")
    convert.inspect(folders / "bolmo")
    said = capsys.readouterr().out
    assert "BolmoConfig" not in said and "decoder_layers        1" in said and "260 ids, bytes" in said


@pytest.mark.slow
def test_from_the_command_line(folders, tmp_path):
    command = [
        sys.executable,
        ROOT / "convert.py",
        "add-difference",
        folders / "bolmo",
        tmp_path / "out",
        *given(folders),
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
