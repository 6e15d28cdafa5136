"""A Hugging Face folder (config.json, safetensors) <-> a Transformer. Every tensor too many or too few is refused."""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from minalm.families import DTYPES, MODELING, Place, abstract, config_values, from_leaves, leaves, parse_config, places
from minalm.model import ModelConfig, Transformer
from minalm.text import InputError

BLOCK = 4096  # rows of a tensor compared or converted at a time
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")  # what is fetched of a model of the hub
STORED_DTYPES = {"BF16": DTYPES["bfloat16"], "F16": np.dtype(np.float16), "F32": DTYPES["float32"]}


def read_config(file: Path) -> ModelConfig:
    """The architecture that a config.json describes. Raises InputError, naming the key, for what is not implemented."""
    return parse_config(str(file), read_json(file))[1]


def read_json(file: Path) -> Any:
    """The value of a JSON file. Raises InputError if it is none, is missing, or gives a key twice."""

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


@dataclass(frozen=True, eq=False)
class Stored:
    """A leaf of a model that stays in its file: what is read is what is asked for, each time again.

    Takes an int for the layer of stacked blocks, and slices.
    """

    shape: tuple[int, ...]
    dtype: np.dtype  # of what is read
    place: Place  # of the tensor; of stacked blocks, of any layer's
    tensors: tuple[Any, ...]  # safetensors' handles: one, or one for each layer of stacked blocks

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def astype(self, dtype: DTypeLike) -> "Stored":
        return replace(self, dtype=np.dtype(dtype))

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> Shaped[np.ndarray, "..."]:
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (self.ndim - len(index))
        if self.ndim == len(self.place.shape):
            return self.place.from_stored(self.tensors[0], index).astype(self.dtype, copy=False)
        layers, index = index[0], index[1:]
        if isinstance(layers, int):
            return self.place.from_stored(self.tensors[layers], index).astype(self.dtype, copy=False)
        tensors = self.tensors[layers]
        array = np.empty((len(tensors), *self.place.cut_shape(index)), self.dtype)
        for layer, tensor in enumerate(tensors):
            array[layer] = self.place.from_stored(tensor, index)
        return array


def find(name: Path | str) -> Path:
    """The folder of a model: what exists under this path, or what the Hugging Face hub has under a name as `org/name`.

    What the hub has is fetched once, to the hub's own cache; no code and no pickles. Raises InputError.
    """
    if Path(name).exists():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name), re.ASCII):
        raise InputError(
            f"{name} does not exist: name the folder of a Hugging Face model, or one of the hub as org/name"
        )
    from huggingface_hub import snapshot_download  # half a second of import time that a folder need not pay

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES, ignore_patterns="*/*"))
    except Exception as error:  # the hub, its client and the network raise whatever they raise, at the length of a page
        raise InputError(
            f"{name} is no folder here, and the Hugging Face hub did not give it ({type(error).__name__}): "
            "name a folder, or check the name, the login (hf auth login) and the network"
        ) from error


def read(folder: Path) -> Transformer:
    """The model of a Hugging Face folder, as `Stored` leaves: everything is checked, and no weights are held.

    Raises InputError for a folder that is incomplete, damaged, or needs what is not implemented. A tied model may hold
    its unembedding a second time, if both are equal.
    """
    family, config = parse_config(str(folder / "config.json"), read_json(folder / "config.json"))
    wanted, tensors = places(family, config), _tensors(folder)
    tied_twice = config.tied and "lm_head.weight" in tensors
    if tied_twice:
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    for name, place in wanted.items():
        if name not in tensors:
            raise InputError(f"{folder} lacks the tensor {name}: take the files of the original model, all of them")
        if (shape := tuple(tensors[name].get_shape())) != place.stored_shape:
            raise InputError(
                f"{folder}: the tensor {name} has the shape {shape} where config.json asks for "
                f"{place.stored_shape}: take config.json and tensors from the same model"
            )
    if unexpected := sorted(tensors.keys() - wanted.keys()):
        raise InputError(
            f"{folder} holds the tensor {unexpected[0]}, which this architecture does not have: "
            "take config.json and tensors from the same model"
        )
    if tied_twice:
        del wanted["lm_head.weight"]
        _check_equal(folder, tensors, "model.embed_tokens.weight", "lm_head.weight")
    held: dict[str, list[tuple[Place, Any]]] = {}
    for name, place in wanted.items():
        held.setdefault(place.leaf, []).append((place, tensors[name]))
    return from_leaves(
        config,
        {leaf: _stored(leaf, array.shape, held.get(leaf, [])) for leaf, array in leaves(abstract(config)).items()},
    )


def load(folder: Path, dtype: DTypeLike) -> Transformer:
    """As `read`, but the leaves are numpy arrays of `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype)[:], read(folder))


def save(
    folder: Path,
    model: Transformer,
    dtype: Literal["bfloat16", "float32"],
    *,
    vocabulary_size: int | None = None,
    expansion_size: int | None = None,
    keys: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | dict[str, Any]] | None = None,
    shard_size: int = 5_000_000_000,
) -> None:
    """Writes a model as a new Hugging Face folder, which appears whole or not at all.

    Its leaves are numpy arrays, jax arrays on a mesh or `Stored`: one tensor at a time is brought to the host. A file of
    tensors holds at most `shard_size` bytes of them, or a single tensor.
    `vocabulary_size` and `expansion_size` cut the rows of tables that were padded past their tokenizers. `keys` are
    further keys of config.json (ids of control tokens, max_position_embeddings), `files` further files, as bytes or as
    the value of a JSON file. With an input expansion, the code that transformers needs goes along (modeling_minalm.py).
    Raises InputError where the folder exists or no family expresses the architecture.
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        contents = {"config.json": values, **(files or {})}
        if config.expansion_size is not None:
            contents[f"{MODELING}.py"] = Path(__file__).with_name(f"{MODELING}.py").read_bytes()
        for name, content in contents.items():
            (partial / name).write_bytes(content if isinstance(content, bytes) else _json(content))
        _write_tensors(partial, leaves(model), places(family, config), DTYPES[dtype], shard_size)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


# --- tensors in files ---------------------------------------------------------------------------------------------


def _tensors(folder: Path) -> dict[str, Any]:
    """The name of each tensor of a folder -> safetensors' handle, which reads slices of it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() and index.exists():
        raise InputError(f"{folder} holds model.safetensors and model.safetensors.index.json: remove one of them")
    if single.exists():
        return _open(single)
    if not index.exists():
        raise InputError(f"{folder} has no model.safetensors: convert its weights to safetensors")
    listed = read_json(index)
    listed = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(listed, dict) or not all(
        isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors") for file in listed.values()
    ):
        raise InputError(
            f"{index} has no 'weight_map' of tensors to safetensors files: take it from the original model"
        )
    result = {}
    for file in sorted(set(listed.values())):
        held = _open(folder / file)
        if missing := sorted(name for name in listed if listed[name] == file and name not in held):
            raise InputError(
                f"{folder / file} lacks the tensor {missing[0]} that {index.name} promises: fetch the file again"
            )
        if extra := sorted(name for name in held if listed.get(name) != file):
            said = f"places in {listed[extra[0]]}" if extra[0] in listed else "does not list"
            raise InputError(
                f"{folder / file} holds the tensor {extra[0]}, which {index.name} {said}: "
                "take all files from the same model"
            )
        result |= held
    return result


def _open(file: Path) -> dict[str, Any]:
    """The handles of a file's tensors. They keep the file open."""
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_slice(name) for name in opened.keys()}
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing: fetch all files of the model") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({error}): fetch it again") from error
    for name, tensor in tensors.items():
        if tensor.get_dtype() not in STORED_DTYPES:
            raise InputError(
                f"{file}: the tensor {name} is {tensor.get_dtype()}, which is not implemented: "
                "use a model in bfloat16, float16 or float32"
            )
    return tensors


def _stored(leaf: str, shape: tuple[int, ...], held: list[tuple[Place, Any]]) -> Stored:
    """A leaf of its tensors; the stacked blocks of a model of one layer have none."""
    held = sorted(held, key=lambda item: item[0].layer or 0)
    dtypes = {STORED_DTYPES[tensor.get_dtype()] for _, tensor in held}
    return Stored(
        shape,
        dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32),  # which holds all of the others
        held[0][0] if held else Place(leaf, 0, shape[1:], 0),
        tuple(tensor for _, tensor in held),
    )


def _check_equal(folder: Path, tensors: Mapping[str, Any], first: str, second: str) -> None:
    rows = tensors[first].get_shape()[0]
    for start in range(0, rows, BLOCK):
        block = slice(start, min(start + BLOCK, rows))
        if not np.array_equal(tensors[first][block], tensors[second][block]):
            raise InputError(
                f"{folder}: config.json says 'tie_word_embeddings' but {first} and {second} differ: "
                "set it to false, or remove the one that is not meant"
            )


def _write_tensors(
    folder: Path, arrays: Mapping[str, Any], names: Mapping[str, Place], dtype: np.dtype, shard_size: int
) -> None:
    """Writes model.safetensors, or where that would be larger than `shard_size` bytes, numbered files and an index."""
    sizes = {name: math.prod(place.shape) * dtype.itemsize for name, place in names.items()}
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", arrays, names, dtype)
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, arrays, {name: names[name] for name in shard}, dtype)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_bytes(_json(index))


def _write_file(file: Path, arrays: Mapping[str, Any], names: Mapping[str, Place], dtype: np.dtype) -> None:
    """A safetensors file: the length of its header, the header (JSON), the tensors one after the other.

    safetensors' own writer wants all tensors of a file at once; here one at a time is on the host.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, place in names.items():
        start, end = end, end + math.prod(place.shape) * dtype.itemsize
        stored_as = next(key for key, value in STORED_DTYPES.items() if value == dtype)
        header[name] = {"dtype": stored_as, "shape": place.stored_shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with file.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for place in names.values():
            tensor = place.to_stored(_fetch(arrays[place.leaf], place))
            for row in range(0, len(tensor), BLOCK):
                block = np.ascontiguousarray(tensor[row : row + BLOCK].astype(dtype, copy=False))
                out.write(block.view(np.uint8).data)


def _fetch(array: Any, place: Place) -> Shaped[np.ndarray, "..."]:
    """What belongs in one tensor, on the host: a layer, or all but the rows past the vocabulary."""
    if place.layer is not None:
        array = array[place.layer]
    elif isinstance(array, jax.Array):
        array = array.copy()  # an Array keeps what was fetched of it; this one does not live long
    array = np.asarray(array[: place.shape[0]])
    if array.shape != place.shape:
        raise ValueError(f"{place.leaf} has the shape {array.shape}, not {place.shape}")
    return array


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
