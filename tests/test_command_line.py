"""Presets, flags, files of settings, and the sentences about what does not exist."""

import dataclasses
import re

import pytest
import yaml

import train
from minalm.errors import InputError
from minalm.run.command_line import Command, changed, parse
from minalm.run.settings import plain


def command(*words: str) -> Command:
    return parse(train.PRESETS, "quickstart", words, prog="train.py", description="")


def test_a_preset_with_changes():
    found = command("quickstart-cross", "--steps", "7", "--losses.alm", "1", "--no-expansion")
    assert found.base == "preset quickstart-cross"
    assert changed(found) == {"steps": (7, 1500), "losses.alm": (1.0, 0.0)}
    assert changed(command()) == {} and command().config == train.PRESETS["quickstart"][1]


@pytest.mark.parametrize(
    "words, sentence",
    (
        (["quickstrat"], "there is no preset 'quickstrat': did you mean quickstart?"),
        (["gemma"], r"there is no preset 'gemma': give one of quickstart, .*, transfer, "),
        (["--leraning-rate", "1"], "there is no flag --leraning-rate: did you mean --learning-rate\\?"),
        (["quickstart", "--loses.alm=1"], "there is no flag --loses.alm: did you mean --losses.alm\\?"),
        (["quickstart", "--zzz"], "there is no flag --zzz: --help lists them"),
        (["--steps", "3", "quickstart"], "'quickstart' is neither a flag nor a value of one: the preset comes first"),
    ),
)
def test_what_does_not_exist_is_answered_with_the_nearest(words, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        command(*words)
    assert "\n" not in str(error.value)


FEW = ("quickstart", "quickstart-cross", "quickstart-bolmo", "gemma2-2b-it-byte")  # one of each kind


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in train.PRESETS]
)
def test_the_settings_of_a_run_are_a_file_for_another(name, tmp_path):
    """Every setting of every preset, none of which needs to be named again; what is done with a folder does not repeat."""
    file = tmp_path / "config.yaml"
    preset = train.PRESETS[name][1]
    ran = dataclasses.replace(
        preset,
        run=dataclasses.replace(preset.run, resume=True),
        student=dataclasses.replace(preset.student, tied=True, expansion=False),
        data=dataclasses.replace(preset.data, data=(tmp_path / "a b.txt", tmp_path / "c")),
        losses=dataclasses.replace(preset.losses, debias=False),
    )
    file.write_text(yaml.safe_dump(plain(ran), sort_keys=False))
    found = command("--config", str(file))
    assert found.base == str(file) and changed(found) == {"config": (str(file), None)}
    assert found.config == dataclasses.replace(ran, run=preset.run, config=file)
    again = command(f"--config={file}", "--seed", "3", "--losses.debias")
    assert changed(again).keys() == {"config", "seed", "losses.debias"}


def test_bad_files_of_settings(tmp_path):
    file = tmp_path / "config.yaml"
    cases = (
        ("stesp: 3", "has the setting 'stesp', which there is not: did you mean steps?"),
        ("losses: {amn: 3}", "has the setting 'losses.amn', which there is not: did you mean losses.alm?"),
        ("- 3", "holds no settings"),
        ("a: [", "holds no settings"),
        ("losses: 3", "holds no settings"),
        ("", "holds no settings"),
        ("architecture: {embed: 3}", "has an 'architecture' that is no preset's"),
    )
    for text, sentence in cases:
        file.write_text(text)
        with pytest.raises(InputError, match=re.escape(sentence)):
            command("--config", str(file))
    with pytest.raises(InputError, match="none.yaml cannot be read"):
        command("--config", str(tmp_path / "none.yaml"))


def test_help_has_no_line_breaks_of_its_own(capsys, monkeypatch):
    """A sentence is broken where the terminal ends and nowhere else."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as error:
        command("quickstart", "--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    docstring = (
        "Compile the step for chips that need not be there, for example v4:2x2x4, v5e:4x4 or cpu:8, show what it"
    )
    assert f"{docstring} takes of them, and end. Needs neither data nor weights." in text
    assert "the longest of its tokens that ends there." in text
