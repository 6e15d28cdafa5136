"""The shape of the code, read from its sources: imports run one way, the host side is free of jax, all is described."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {path.stem: path for path in (ROOT / "minalm").glob("*.py") if path.stem != "__init__"}

# What each module may import from this package.
IMPORTS = {
    "text": set(),
    "stdlib_text": {"text"},
    "chat": {"text"},
    "vocab": {"chat", "text"},
    "align": {"vocab"},
    "ngrams": {"text", "vocab"},
    "transfer": {"text", "vocab"},
    "types": set(),
    "data": {"text", "vocab", "align", "ngrams", "types"},
    "sharding": {"text"},
    "layers": set(),
    "attention": {"layers", "sharding"},
    "model": {"attention", "layers", "sharding"},
    "head": {"layers", "sharding", "types"},
    "losses": {"sharding", "text", "types"},
    "gradmag": {"losses", "sharding"},
    "evaluate": {"head", "losses", "model", "sharding", "text", "types"},
    "generate": {"head", "model", "sharding"},
    "families": {"model", "text"},
    "hf": {"families", "model", "text"},
    "student": {"chat", "families", "hf", "model", "ngrams", "text", "transfer", "vocab"},
    "modeling_minalm": set(),  # no part of the package: copied into folders, where transformers runs it
    "checkpoint": {"text"},
    "cost": {"model", "sharding", "text"},
    "processes": {"text"},
    "report": {"cost", "types", "vocab"},
}
HOST = ("text", "stdlib_text", "chat", "vocab", "align", "ngrams", "transfer")  # numpy only


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """The dotted names of all modules that a module imports, inside its functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "minalm" and len(part) > 1}


def test_every_module_has_its_place():
    assert IMPORTS.keys() == MODULES.keys()


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_run_one_way(module):
    found = own(imported(parsed(MODULES[module])))
    assert found <= IMPORTS[module]


def test_the_order_has_no_circles():
    done: set[str] = set()
    while len(done) < len(IMPORTS):
        ready = {module for module, needs in IMPORTS.items() if needs <= done} - done
        assert ready, f"a circle among {IMPORTS.keys() - done}"
        done |= ready


def test_nothing_imports_the_programs():
    for path in MODULES.values():
        tops = {name.split(".")[0] for name in imported(parsed(path))}
        assert not tops & {"train", "convert", "tests"}, path


def test_host_modules_do_not_load_jax():
    code = f"import sys; import {', '.join(f'minalm.{module}' for module in HOST)}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"jax", "jaxlib", "equinox", "optax", "orbax", "torch", "transformers"}


def test_programs_start_without_what_they_may_not_need():
    code = "import sys; import train, convert; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {
        "orbax",
        "tensorstore",
        "torch",
        "transformers",
        "datasets",
        "hypothesis",
        "beartype",
        "pytest",
    }


def test_only_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in project["dependencies"]}
    declared = {{"pyyaml": "yaml", "orbax_checkpoint": "orbax"}.get(name, name) for name in declared}
    package = [path for module, path in MODULES.items() if module != "modeling_minalm"]
    for path in (*package, ROOT / "train.py", ROOT / "convert.py"):
        tops = {name.split(".")[0] for name in imported(parsed(path))}
        known = {"minalm"} | ({"train"} if path.stem == "convert" else set())
        assert tops - sys.stdlib_module_names - known <= declared, path


def test_collectives_are_in_one_file():
    collectives = {"psum", "pmax", "all_gather", "all_to_all", "psum_scatter", "axis_index", "ppermute", "pmean"}
    for module, path in MODULES.items():
        used = {node.attr for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}
        assert module == "sharding" or not used & collectives, path


def public_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_are_described_and_annotated(module):
    tree = parsed(MODULES[module])
    assert ast.get_docstring(tree), module
    for function in public_functions(tree):
        arguments = function.args
        assert ast.get_docstring(function), f"{module}.{function.name} has no docstring"
        assert all(a.annotation for a in (*arguments.args, *arguments.kwonlyargs)), f"{module}.{function.name}"
        if (module, function.name) != ("sharding", "param"):  # a field of any type, of any number of dimensions
            assert function.returns is not None, f"{module}.{function.name}"
            assert arguments.vararg is None and arguments.kwarg is None, f"{module}.{function.name}"


@pytest.mark.parametrize("module", [*MODULES, "train", "convert"])
def test_annotations_are_checked_at_run_time(module):
    """`from __future__ import annotations` would turn off the shape checks of module fields."""
    path = MODULES.get(module, ROOT / f"{module}.py")
    assert "__future__" not in imported(parsed(path))
    names = {node.id for node in ast.walk(parsed(path)) if isinstance(node, ast.Name)}
    assert "hasattr" not in names
