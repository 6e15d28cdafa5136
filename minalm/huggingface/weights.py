"""A Hugging Face folder (config.json, safetensors) <-> a Transformer or a Bolmo. Every tensor too many or too few is refused."""

import contextlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from minalm.errors import InputError
from minalm.files import sync, sync_below
from minalm.huggingface import families
from minalm.huggingface.families import DTYPES, Parts, TensorMap
from minalm.huggingface.kinds import code, config_values, parse_config, tensor_maps
from minalm.models.bolmo import Bolmo
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.kinds import abstract, from_leaves
from minalm.models.transformer import Transformer, leaves
from minalm.tokenization.files import read_bytes

BLOCK = 4096  # rows of a tensor compared or converted at a time
HUB_FILES = ("*.json", "*.jinja")  # what is fetched of a model of the hub, beside its tensors
IGNORED = re.compile(  # tensors that transformers ignores too: buffers of old versions, which follow from config.json
    r".*\brotary_emb\.(inv_freq|cos_cached|sin_cached)"
)
INDEX = "model.safetensors.index.json"
MOST_TENSORS = 1 << 17  # of a model
STORED_DTYPES = {"BF16": DTYPES["bfloat16"], "F16": np.dtype(np.float16), "F32": DTYPES["float32"]}


def read_config(file: Path) -> ModelConfig | BolmoConfig:
    """The architecture that a config.json describes. Raises InputError, naming the key, for what is not implemented."""
    return parse_config(str(file), read_json(file))[1]


def read_json(file: Path) -> Any:
    """The value of a JSON file. Raises InputError if it is missing, not JSON, or gives a key twice."""

    def once(pairs):
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{file} gives {twice!r} twice: keep one")
        return result

    try:
        return json.loads(read_bytes(file), object_pairs_hook=once)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{file} does not exist: name the folder of a Hugging Face model") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}): make it readable") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}): take it from the original model") from error


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A leaf of a model that stays in its file. Each indexing reads what it asks for, and keeps nothing.

    An index is made of slices; along the layers of stacked blocks it may be an int.
    """

    shape: tuple[int, ...]
    dtype: np.dtype  # of what is read
    tensor_map: TensorMap  # of its tensor; of stacked blocks, that of any layer
    tensors: tuple[Any, ...]  # safetensors' handles: one, or one for each layer of stacked blocks

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def astype(self, dtype: DTypeLike) -> "LazyTensor":
        return replace(self, dtype=np.dtype(dtype))

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> Shaped[np.ndarray, "..."]:
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (self.ndim - len(index))
        if self.ndim == len(self.tensor_map.shape):
            return self.tensor_map.from_stored(self.tensors[0], index).astype(self.dtype, copy=False)
        layers, index = index[0], index[1:]
        if isinstance(layers, int):
            return self.tensor_map.from_stored(self.tensors[layers], index).astype(self.dtype, copy=False)
        tensors = self.tensors[layers]
        array = np.empty((len(tensors), *self.tensor_map.cut_shape(index)), self.dtype)
        for layer, tensor in enumerate(tensors):
            array[layer] = self.tensor_map.from_stored(tensor, index)
        return array


def find(name: Path | str) -> Path:
    """The folder of a model: this path if it exists, else the model `org/name` of the Hugging Face hub.

    A model of the hub is fetched once, to the hub's own cache, without code and pickles. Raises InputError.
    """
    if Path(name).exists():
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name), re.ASCII):
        raise InputError(
            f"{name} does not exist: name the folder of a Hugging Face model, or one of the hub as org/name"
        )
    from huggingface_hub import snapshot_download  # half a second of import time that a folder need not pay

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=HUB_FILES, ignore_patterns="*/*"))
        try:
            tensors = sorted(set(_listed(folder / INDEX).values()))
        except InputError:  # there is no index, or it is damaged, as `read` will say
            tensors = ["model*.safetensors"]
        if all(any(folder.glob(name)) for name in tensors):
            return folder
        # Of the same commit, whose name the folder has; other forms of the weights are left where they are.
        files = [*HUB_FILES, *tensors]
        return Path(snapshot_download(str(name), revision=folder.name, allow_patterns=files, ignore_patterns="*/*"))
    except Exception as error:  # the hub, its client and the network raise whatever they raise, at the length of a page
        raise InputError(
            f"{name} is no folder here, and the Hugging Face hub did not give it ({type(error).__name__}): "
            "name a folder, or check the name, the login (hf auth login) and the network"
        ) from error


def read(folder: Path) -> Transformer | Bolmo:
    """The model of a Hugging Face folder, its leaves `LazyTensor`s: everything is checked, no weights are held.

    Raises InputError for a folder that is incomplete, damaged, or needs what is not implemented. A tied model may hold
    its table under the name of either, or both if they are equal.
    """
    family, config = parse_config(str(folder / "config.json"), read_json(folder / "config.json"))
    tied = isinstance(config, ModelConfig) and config.tied
    wanted, tensors = tensor_maps(family, config), _tensors(folder)
    tensors = _named(families.text_tensors(str(folder), family, tensors), tied)
    tied_twice = tied and "lm_head.weight" in tensors
    if tied_twice:
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    _check_tensors(folder, wanted, tensors)
    if tied_twice:
        del wanted["lm_head.weight"]
        _check_equal(folder, tensors, "model.embed_tokens.weight", "lm_head.weight")
    return from_leaves(config, _lazy_tensors(config, wanted, tensors))


def read_part(file: Path) -> dict[str, LazyTensor]:
    """The leaves, by name, that one safetensors file holds of the model whose config.json lies beside it.

    Raises InputError as `read` does.
    """
    family, config = parse_config(str(file.parent / "config.json"), read_json(file.parent / "config.json"))
    names, tensors = tensor_maps(family, config), _open(file)
    held = {part.leaf for name in tensors for part in names.get(name, ())}
    wanted = {name: parts for name, parts in names.items() if parts[0].leaf in held}
    _check_tensors(file, wanted, tensors)
    every = _lazy_tensors(config, wanted, tensors)
    return {leaf: every[leaf] for leaf in every if leaf in held}


def load(folder: Path, dtype: DTypeLike) -> Transformer | Bolmo:
    """As `read`, but the leaves are numpy arrays of `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype)[:], read(folder))


def save(
    folder: Path,
    model: Transformer | Bolmo,
    dtype: Literal["bfloat16", "float32"],
    *,
    vocabulary_size: int | None = None,
    keys: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | dict[str, Any]] | None = None,
    shard_size: int = 5_000_000_000,
) -> None:
    """Writes a model as a new Hugging Face folder, which appears whole or not at all.

    The leaves are numpy arrays, jax arrays on a mesh, or `LazyTensor`s; one tensor at a time is brought to the host.
    A file of tensors holds at most `shard_size` bytes of them, or a single tensor. `vocabulary_size` cuts the tables'
    rows past the tokenizer. `keys` are further keys of config.json (ids of special tokens, max_position_embeddings),
    `files` further files, as bytes or as the value of a JSON file. The code that transformers needs for a model with an
    input expansion, or a Bolmo, goes along (modeling_minalm.py, modeling_bolmo.py).

    Raises InputError where the folder exists or no family expresses the architecture.
    """
    config = model.config if vocabulary_size is None else replace(model.config, vocab_size=vocabulary_size)
    with new_folder(folder, config, dtype, keys, files) as (partial, names):
        if (file := code(config)) is not None:
            shutil.copyfile(Path(__file__).with_name(file), partial / file)
        _write_shards(partial, leaves(model), names, DTYPES[dtype], shard_size)


@contextlib.contextmanager
def new_folder(
    folder: Path,
    config: ModelConfig | BolmoConfig,
    dtype: Literal["bfloat16", "float32"],
    keys: Mapping[str, Any] | None,
    files: Mapping[str, bytes | dict[str, Any]] | None,
) -> Iterator[tuple[Path, dict[str, Parts]]]:
    """A new folder with config.json and the other files, to write tensors into; and the names of the model's tensors.

    The folder gets its name when the caller is done. After an error nothing is left. Arguments and errors as of `save`.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already: name another folder or remove it")
    values = {**(keys or {}), **config_values(config, dtype)}
    family, _ = parse_config(str(folder / "config.json"), values)  # refuses `keys` that could not be read back
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:12]}")
    partial.mkdir()
    try:
        for name, content in {"config.json": values, **(files or {})}.items():
            (partial / name).write_bytes(content if isinstance(content, bytes) else _json(content))
        yield partial, tensor_maps(family, config)
        sync_below(partial)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:  # a write alone does not say where
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise
    sync(folder.parent)


def write_part(file: Path, arrays: Mapping[str, Any], names: Mapping[str, Parts], dtype: np.dtype | None) -> None:
    """A safetensors file of those tensors of `names` whose leaves are in `arrays`, in `dtype` (None: each in its own).

    Why not safetensors' own writer (0.8): it takes the memory addresses of all tensors of a file at once. To have one
    tensor at a time on the host, it would need a second copy of the model on disk, mapped into memory. It also sorts
    the tensors, so that its files would differ from those of earlier versions of this package.
    """
    names = {name: parts for name, parts in names.items() if any(part.leaf in arrays for part in parts)}
    dtypes = {name: np.dtype(dtype or arrays[parts[0].leaf].dtype) for name, parts in names.items()}
    words = {dtype: word for word, dtype in STORED_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parts in names.items():
        shape = families.stored_shape(parts)
        start, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": words[dtypes[name]], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with file.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, parts in names.items():
            for part in parts:
                tensor = part.to_stored(_fetch(arrays[part.leaf], part))
                for row in range(0, len(tensor), BLOCK):
                    block = np.ascontiguousarray(tensor[row : row + BLOCK].astype(dtypes[name], copy=False))
                    out.write(block.view(np.uint8).data)


# --- tensors in files ---------------------------------------------------------------------------------------------


def _tensors(folder: Path) -> dict[str, Any]:
    """Name of each tensor of a folder -> safetensors' handle, which reads slices of it."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists() and index.exists():
        raise InputError(f"{folder} holds model.safetensors and model.safetensors.index.json: remove one of them")
    if single.exists():
        return _open(single)
    if not index.exists():
        raise InputError(f"{folder} has no model.safetensors: convert its weights to safetensors")
    listed = _listed(index)
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
    return _with_shared(result, read_json(index).get("metadata"))


def _named(tensors: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The tensors under the names that a whole model has: a model without its head is saved without "model.", and a
    tied table may stand under the output's name alone. Those that mean nothing are left out."""
    named = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}
    if any(name.startswith(("embed_tokens.", "layers.")) for name in named):
        named = {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in named.items()}
    if tied and "lm_head.weight" in named and "model.embed_tokens.weight" not in named:
        named["model.embed_tokens.weight"] = named.pop("lm_head.weight")
    return named


def _listed(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says. Raises InputError."""
    listed = read_json(index)
    listed = listed.get("weight_map") if isinstance(listed, dict) else None
    if isinstance(listed, dict) and len(listed) > MOST_TENSORS:
        raise InputError(
            f"{index} lists {len(listed):,} tensors, where no model has more than {MOST_TENSORS:,}: "
            "take it from the original model"
        )
    if not isinstance(listed, dict) or not all(
        isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors") for file in listed.values()
    ):
        raise InputError(
            f"{index} has no 'weight_map' of tensors to safetensors files: take it from the original model"
        )
    return listed


def _open(file: Path) -> dict[str, Any]:
    """The handles of a file's tensors. They keep the file open. A tensor that is shared is under each of its names."""
    if file.exists() and not file.is_file():
        raise InputError(f"{file} is a folder, a pipe or a device, and no file: fetch it again")
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = _with_shared({name: opened.get_slice(name) for name in opened.keys()}, opened.metadata())
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


def _with_shared(tensors: dict[str, Any], metadata: Any) -> dict[str, Any]:
    """Tensors under each name of theirs: of one that was saved for several names, safetensors' save_model leaves the
    others to a file's metadata, and huggingface_hub's to those of the index, as name -> the name that is there."""
    shared = metadata.items() if isinstance(metadata, dict) else ()
    return tensors | {n: tensors[held] for n, held in shared if isinstance(held, str) and held in tensors.keys() - {n}}


def _check_tensors(source: Path, wanted: Mapping[str, Parts], tensors: Mapping[str, Any]) -> None:
    """Raises InputError unless there are all of the wanted tensors, in their shapes, and no others."""
    for name, parts in wanted.items():
        if name not in tensors:
            raise InputError(f"{source} lacks the tensor {name}: take the files of the original model, all of them")
        if (shape := tuple(tensors[name].get_shape())) != (needed := families.stored_shape(parts)):
            raise InputError(
                f"{source}: the tensor {name} has the shape {shape} where config.json asks for "
                f"{needed}: take config.json and tensors from the same model"
            )
    if unexpected := sorted(tensors.keys() - wanted.keys()):
        raise InputError(
            f"{source} holds the tensor {unexpected[0]}, which this architecture does not have: "
            "take config.json and tensors from the same model"
        )


def _lazy_tensors(
    config: ModelConfig | BolmoConfig, wanted: Mapping[str, Parts], tensors: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """Every leaf of a model, of its tensors; the stacked blocks of a model of one layer have none."""
    held: dict[str, list[tuple[TensorMap, Any]]] = {}
    for name, parts in wanted.items():
        for part in parts:
            held.setdefault(part.leaf, []).append((part, tensors[name]))
    result = {}
    for leaf, array in leaves(abstract(config)).items():
        parts = sorted(held.get(leaf, []), key=lambda part: part[0].layer or 0)
        dtypes = {STORED_DTYPES[tensor.get_dtype()] for _, tensor in parts}
        result[leaf] = LazyTensor(
            array.shape,
            dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32),  # which holds all of the others
            parts[0][0] if parts else TensorMap(leaf, 0, array.shape[1:], 0),
            tuple(tensor for _, tensor in parts),
        )
    return result


def _check_equal(folder: Path, tensors: Mapping[str, Any], first: str, second: str) -> None:
    rows = tensors[first].get_shape()[0]
    for start in range(0, rows, BLOCK):
        block = slice(start, min(start + BLOCK, rows))
        if not np.array_equal(tensors[first][block], tensors[second][block]):
            raise InputError(
                f"{folder}: config.json says 'tie_word_embeddings' but {first} and {second} differ: "
                "set it to false, or remove the one that is not meant"
            )


def _write_shards(
    folder: Path, arrays: Mapping[str, Any], names: Mapping[str, Parts], dtype: np.dtype, shard_size: int
) -> None:
    """Writes model.safetensors, or where that would be larger than `shard_size` bytes, numbered files and an index."""
    from huggingface_hub import split_state_dict_into_shards_factory  # import time that reading need not pay

    split = split_state_dict_into_shards_factory(
        dict(names),
        get_storage_size=lambda parts: math.prod(families.stored_shape(parts)) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, held in split.filename_to_tensors.items():
        write_part(folder / file, arrays, {name: names[name] for name in held}, dtype)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_bytes(_json(index))


def _fetch(array: Any, tensor_map: TensorMap) -> Shaped[np.ndarray, "..."]:
    """What one tensor holds, on the host: a layer, or a whole leaf without the rows past the vocabulary."""
    if tensor_map.layer is not None:
        array = array[tensor_map.layer]
    elif isinstance(array, jax.Array):
        array = array.copy()  # a jax Array keeps what was fetched of it for as long as it lives
    array = np.asarray(array[: tensor_map.shape[0]])
    if array.shape != tensor_map.shape:
        raise ValueError(f"{tensor_map.leaf} has the shape {array.shape}, not {tensor_map.shape}")
    return array


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
