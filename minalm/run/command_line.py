"""The command line of a program with presets: the name of one, then flags; tyro makes them of the configuration.

A name that does not exist is answered with the nearest one that does.
"""

import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tyro
import yaml

from minalm.errors import InputError, flag
from minalm.run.settings import DOTTED, flat, plain

# What a folder is done with is said each time, and not repeated from a file.
NOT_OF_A_FILE = ("config", "resume", "overwrite", "accept_changes", "compile_only")


class Command(NamedTuple):
    """What a command line asks for."""

    config: Any
    base: str  # what its settings are compared with, in words: a preset or a file
    base_settings: Mapping[str, Any]  # by the names of their flags


def parse(
    presets: Mapping[str, tuple[str, Any]], default: str, arguments: Sequence[str], prog: str, description: str
) -> Command:
    """The configuration that a command line asks for. `presets`: name -> (a sentence, configuration); `default` is the
    one that is taken where none is named.

    `--config FILE` puts the settings of a file, by the names of their flags, in the place of the preset's. Raises
    InputError for an unknown preset, flag or setting.
    """
    described = next(iter(presets.values()))[1]
    if {"-h", "--help"} & set(arguments):
        for kind in {type(described): None, **dict.fromkeys(map(type, vars(described).values()))}:
            _unwrap_help(kind)
        if arguments[0] in ("-h", "--help"):
            tyro.extras.overridable_config_cli(presets, args=["--help"], prog=prog, description=description)
    name, flags = default, list(arguments)
    if flags and not flags[0].startswith("-"):
        name = flags.pop(0)
        if name not in presets:
            near = difflib.get_close_matches(name, presets, 1)
            hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(presets)}"
            raise InputError(f"there is no preset {name!r}: {hint}")
    base, preset, file = f"preset {name}", presets[name][1], _file_of(flags)
    if file is not None:
        base, settings = str(file), read_settings(file, flat(plain(preset)))
        preset = _with_architecture(file, settings, _cli(_flags(settings, preset), prog, preset), presets)
    return Command(_cli(flags, f"{prog} {name}", preset, presets[name][0]), base, flat(plain(preset)))


def changed(command: Command) -> dict[str, tuple[Any, Any]]:
    """The settings that are not the preset's or the file's -> (what they are, what they are there)."""
    now = flat(plain(command.config))
    return {
        name: (value, command.base_settings[name])
        for name, value in now.items()
        if value != command.base_settings[name]
    }


def read_settings(file: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a YAML file, by the names of their flags. Raises InputError for what is none of `known`."""
    try:
        settings = yaml.safe_load(file.read_text("utf-8"))
        settings = flat(settings)
    except OSError as error:
        raise InputError(f"--config {file} cannot be read ({error.strerror}): name a file of settings") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, AttributeError, TypeError) as error:
        raise InputError(f"--config {file} holds no settings: give them as config.yaml of a run does") from error
    for name in settings:
        if name not in known:
            raise InputError(f"{file} has the setting {name!r}, which there is not{_nearest(str(name), known)}")
    return {name: value for name, value in settings.items() if name not in NOT_OF_A_FILE}


def _cli(flags: Sequence[str], prog: str, default: Any, description: str = "") -> Any:
    """The configuration `default` with these flags. Raises InputError for an unknown one."""
    found, unknown = tyro.cli(
        type(default),
        args=flags,
        prog=prog,
        description=description,
        default=default,
        config=(tyro.conf.AvoidSubcommands,),
        return_unknown_args=True,
    )
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            raise InputError(f"{name!r} is neither a flag nor a value of one: the preset comes first, then flags")
        known = [flag(setting) for setting in flat(plain(default))]
        raise InputError(f"there is no flag {name}{_nearest(name.replace('_', '-'), known)}")
    return found


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f": did you mean {near[0]}?" if near else ": --help lists them"


def _file_of(flags: Sequence[str]) -> Path | None:
    """The file that --config names."""
    for n, word in enumerate(flags):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or len(flags) > n + 1):
            return Path(value if equals else flags[n + 1])
    return None


def _flags(settings: Mapping[str, Any], config: Any) -> list[str]:
    """The flags that give these settings of a configuration."""
    switches = set()
    for name, value in vars(config).items():
        prefix = f"{name}." if name in DOTTED else ""
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        switches |= {prefix + field.name for field in fields if field.type is bool}
    words = []
    for name, value in settings.items():
        if name in switches:
            group, dot, last = name.rpartition(".")
            words.append(flag(name if value else f"{group}{dot}no_{last}"))
        elif name != "architecture":  # which has no flag
            words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return words


def _with_architecture(file: Path, settings: Mapping[str, Any], config: Any, presets: Mapping[str, Any]) -> Any:
    """The configuration with the architecture of the settings, which no flag gives, from the preset that has it."""
    wanted = settings.get("architecture", plain(config)["architecture"])
    for _, preset in presets.values():
        if plain(preset)["architecture"] == wanted:
            student = dataclasses.replace(config.student, architecture=preset.student.architecture)
            return dataclasses.replace(config, student=student)
    raise InputError(f"{file} has an 'architecture' that is no preset's: give --student, or leave it out")


def _unwrap_help(kind: type) -> None:
    """Gives tyro the docstrings of a dataclass' fields without their line breaks, which it would keep."""
    if not dataclasses.is_dataclass(kind):
        return
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for before, after in zip(tree.body, tree.body[1:]):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(after.value.value.split())
            fields[before.target.id].metadata = MappingProxyType({"help": text})
