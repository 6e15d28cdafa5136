"""The shape of the code, read from its sources: imports run one way, the host side is free of jax, all is described."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minalm"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}

# Folders, and modules outside of any, in layers. A module imports from the layers before its own and from its own folder,
# never from another folder of its layer.
LAYERS = (
    ("errors", "types"),
    ("files",),
    ("text", "parallel"),
    ("tokenization", "packing"),
    ("batches", "models"),
    ("distill", "huggingface"),
    ("generation",),
    ("evaluation",),
    ("run",),
    ("presets", "generate", "report"),
)
HOST = ("errors", "files", "text", "tokenization")  # numpy only
# No part of the package: copied into folders, where transformers runs them.
COPIED = ("huggingface.modeling_minalm", "huggingface.modeling_bolmo")


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


def imported_at_once(tree: ast.Module) -> set[str]:
    """The dotted names of the modules that are loaded with a module: not those that its functions import."""
    inside = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    names = set()
    for node in ast.walk(tree):
        if node not in inside and isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
    return names


def own(names: set[str]) -> set[str]:
    """The modules of this package among dotted names."""
    found = {name.removeprefix("minalm.") for name in names if name.startswith("minalm.")}
    return {name for name in found if name in MODULES}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_its_place():
    assert {room(module) for module in MODULES} <= {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    layer = next(number for number, names in enumerate(LAYERS) if room(module) in names)
    allowed = {name for names in LAYERS[:layer] for name in names} | {room(module)}
    found = own(imported(parsed(MODULES[module])))
    assert {room(name) for name in found} <= allowed
    assert not (module in COPIED and found)


@pytest.mark.parametrize("folder", sorted({room(module) for module in MODULES}))
def test_a_folder_has_no_circles(folder):
    needs = {m: own(imported(parsed(MODULES[m]))) & MODULES.keys() for m in MODULES if room(m) == folder}
    needs = {module: {name for name in names if room(name) == folder} for module, names in needs.items()}
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {module for module, names in needs.items() if names <= done} - done
        assert ready, f"a circle among {needs.keys() - done}"
        done |= ready


def test_nothing_imports_the_programs():
    for path in MODULES.values():
        tops = {name.split(".")[0] for name in imported(parsed(path))}
        assert not tops & {"train", "convert", "tests"}, path


def test_host_modules_do_not_load_jax():
    modules = [module for module in MODULES if room(module) in HOST]
    code = f"import sys; import {', '.join(f'minalm.{module}' for module in modules)}; print(*sys.modules)"
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
    extras = [
        line
        for extra in ("eval", "data", "hub", "tensorboard", "wandb")
        for line in project["optional-dependencies"][extra]
    ]
    extras = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in extras}
    package = [path for module, path in MODULES.items() if module not in COPIED]
    for path in (*package, ROOT / "train.py", ROOT / "convert.py"):
        for names, allowed in (
            (imported_at_once(parsed(path)), declared),
            (imported(parsed(path)), declared | extras),
        ):
            tops = {name.split(".")[0] for name in names}
            of_python = sys.stdlib_module_names | {"compression"}  # from 3.14 on
            assert tops - of_python - {"minalm"} <= allowed, path


def test_collectives_are_in_one_file():
    collectives = {"psum", "pmax", "all_gather", "all_to_all", "psum_scatter", "axis_index", "ppermute", "pmean"}
    for module, path in MODULES.items():
        used = {node.attr for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}
        assert module == "parallel.collectives" or not used & collectives, path


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
        if (module, function.name) != ("parallel.mesh", "param"):  # a field of any type, of any number of dimensions
            assert function.returns is not None, f"{module}.{function.name}"
            assert arguments.vararg is None and arguments.kwarg is None, f"{module}.{function.name}"


@pytest.mark.parametrize("module", [*MODULES, "train", "convert"])
def test_annotations_are_checked_at_run_time(module):
    """`from __future__ import annotations` would turn off the shape checks of module fields."""
    path = MODULES.get(module, ROOT / f"{module}.py")
    assert "__future__" not in imported(parsed(path))
    names = {node.id for node in ast.walk(parsed(path)) if isinstance(node, ast.Name)}
    assert "hasattr" not in names
