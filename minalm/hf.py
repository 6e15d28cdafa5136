"""A Hugging Face folder (config.json, safetensors) <-> a Transformer. Every tensor too many or too few is refused."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from minalm.families import DTYPES, abstract, config_values, from_leaves, leaves, parse_config, places
from minalm.model import ModelConfig, Transformer
from minalm.text import InputError


def read_config(file: Path) -> ModelConfig:
    """The architecture that a config.json describes. Raises InputError, naming the key, for what is not implemented."""
    return parse_config(str(file), _read_json(file))[1]


def load(folder: Path, dtype: DTypeLike) -> Transformer:
    """The model of a Hugging Face folder, as numpy arrays of `dtype`.

    Raises InputError for a folder that is incomplete, damaged, or needs what is not implemented. A tied model may hold
    its unembedding a second time, if both are equal.
    """
    family, config = parse_config(str(folder / "config.json"), _read_json(folder / "config.json"))
    wanted = places(family, config)
    files = _tensor_files(folder)
    shapes = {name: shape for file in files for name, shape in _shapes(file, files[file]).items()}
    tied_twice = config.tied and "lm_head.weight" in shapes
    if tied_twice:
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    for name, place in wanted.items():
        if name not in shapes:
            raise InputError(f"{folder} lacks the tensor {name}: take the files of the original model, all of them")
        if shapes[name] != place.stored_shape:
            raise InputError(
                f"{folder}: the tensor {name} has the shape {shapes[name]} where config.json asks for "
                f"{place.stored_shape}: take config.json and tensors from the same model"
            )
    if unexpected := sorted(shapes.keys() - wanted.keys()):
        raise InputError(
            f"{folder} holds the tensor {unexpected[0]}, which this architecture does not have: "
            "take config.json and tensors from the same model"
        )
    arrays = {leaf: np.empty(array.shape, dtype) for leaf, array in leaves(abstract(config)).items()}
    for file in files:
        with safe_open(file, framework="numpy") as tensors:
            for name in files[file]:
                place, tensor = wanted[name], tensors.get_tensor(name)
                if name != "lm_head.weight" or not tied_twice:
                    array = arrays[place.leaf]
                    target = array if place.layer is None else array[place.layer]
                    target[...] = place.from_stored(tensor)
    if tied_twice:
        _check_equal(folder, files, "model.embed_tokens.weight", "lm_head.weight")
    return from_leaves(config, arrays)


def save(
    folder: Path,
    model: Transformer,
    dtype: Literal["bfloat16", "float32"],
    *,
    vocabulary_size: int | None = None,
    expansion_size: int | None = None,
    keys: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | dict[str, Any]] | None = None,
) -> None:
    """Writes a model as a new Hugging Face folder, which appears whole or not at all.

    `vocabulary_size` and `expansion_size` cut the rows of tables that were padded past their tokenizers. `keys` are
    further keys of config.json (ids of control tokens, max_position_embeddings), `files` further files, as bytes or as
    the value of a JSON file. Raises InputError where the folder exists or no family expresses the architecture.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already: name another folder or remove it")
    config = replace(
        model.config,
        vocab_size=model.config.vocab_size if vocabulary_size is None else vocabulary_size,
        expansion_size=model.config.expansion_size if expansion_size is None else expansion_size,
    )
    values = {**(keys or {}), **config_values(config, dtype)}
    family, _ = parse_config(str(folder / "config.json"), values)  # refuses `keys` that could not be read back
    arrays = {leaf: np.asarray(array) for leaf, array in leaves(model).items()}
    tensors = {}
    for name, place in places(family, config).items():
        array = arrays[place.leaf]
        array = array[: place.shape[0]] if place.layer is None else array[place.layer]
        if array.shape != place.shape:
            raise ValueError(f"{place.leaf} has the shape {array.shape}, not {place.shape}")
        tensors[name] = np.ascontiguousarray(place.to_stored(array).astype(DTYPES[dtype]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        safetensors.numpy.save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        for name, content in {"config.json": values, **(files or {})}.items():
            if not isinstance(content, bytes):
                content = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
            (partial / name).write_bytes(content)
        # safetensors makes its file readable for the owner alone, whatever the umask.
        (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _tensor_files(folder: Path) -> dict[Path, list[str]]:
    """Each safetensors file of a folder -> the tensors in it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() and index.exists():
        raise InputError(f"{folder} holds model.safetensors and model.safetensors.index.json: remove one of them")
    if single.exists():
        return {single: list(_open(single))}
    if not index.exists():
        raise InputError(f"{folder} has no model.safetensors: convert its weights to safetensors")
    listed = _read_json(index)
    listed = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(listed, dict) or not all(
        isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors") for file in listed.values()
    ):
        raise InputError(
            f"{index} has no 'weight_map' of tensors to safetensors files: take it from the original model"
        )
    files = {folder / file: [] for file in sorted(set(listed.values()))}
    for name, file in listed.items():
        files[folder / file].append(name)
    for file, names in files.items():
        held = set(_open(file))
        if missing := sorted(set(names) - held):
            raise InputError(f"{file} lacks the tensor {missing[0]} that {index.name} promises: fetch the file again")
        if extra := sorted(held - set(names)):
            said = f"places in {listed[extra[0]]}" if extra[0] in listed else "does not list"
            raise InputError(
                f"{file} holds the tensor {extra[0]}, which {index.name} {said}: take all files from the same model"
            )
    return files


def _open(file: Path) -> list[str]:
    """The names of a file's tensors."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            return list(tensors.keys())
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: fetch all files of the model") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({error}): fetch it again") from error


def _shapes(file: Path, names: list[str]) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="numpy") as tensors:
        slices = {name: tensors.get_slice(name) for name in names}
        for name, part in slices.items():
            if part.get_dtype() not in ("BF16", "F16", "F32"):
                raise InputError(
                    f"{file}: the tensor {name} is {part.get_dtype()}, which is not implemented: "
                    "use a model in bfloat16, float16 or float32"
                )
        return {name: tuple(part.get_shape()) for name, part in slices.items()}


def _check_equal(folder: Path, files: Mapping[Path, list[str]], first: str, second: str) -> None:
    def tensor(name):
        file = next(file for file, names in files.items() if name in names)
        with safe_open(file, framework="numpy") as tensors:
            return tensors.get_tensor(name)

    if not np.array_equal(tensor(first), tensor(second)):
        raise InputError(
            f"{folder}: config.json says 'tie_word_embeddings' but {first} and {second} differ: "
            "set it to false, or remove the one that is not meant"
        )


def _read_json(file: Path) -> Any:
    def once(pairs):
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{file} gives {twice!r} twice: keep one")
        return result

    try:
        return json.loads(file.read_bytes(), object_pairs_hook=once)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{file} does not exist: name the folder of a Hugging Face model") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}): make it readable") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}): take it from the original model") from error
