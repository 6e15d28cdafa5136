"""Models of Hugging Face folders: onto bytes, onto another tokenizer, or looked at.

    python convert.py bytes gemma-2-2b-it gemma-2-2b-it-bytes
    python convert.py tokenizer Llama-3.2-3B-Instruct qwen/tokenizer.json llama-qwen
    python convert.py inspect gemma-2-2b-it-bytes

What these write is where training starts: a model that has not been trained on its new vocabulary yet.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from minalm import families, hf, student
from minalm.model import ModelConfig
from minalm.text import InputError
from minalm.transfer import TransferPlan, plan_transfer
from minalm.vocab import Vocabulary, byte_vocabulary, load_vocabulary, with_control

Dtype = Literal["bfloat16", "float32"]


def to_bytes(
    folder: Positional[Path], out: Positional[Path], expansion: bool = True, dtype: Dtype = "bfloat16", seed: int = 0
) -> None:
    """Puts a model on the byte vocabulary: 256 bytes and the control tokens of its chat template.

    Args:
        folder: the model's Hugging Face folder.
        out: the folder to write; it must not exist.
        expansion: add the embedding of the longest original token that ends at each byte to the byte's own.
        dtype: how the weights are stored.
        seed: of the rows that the original vocabulary has nothing for.
    """
    old = load_vocabulary(folder)
    write(folder, old, byte_vocabulary(old), out, expansion, tied=False, dtype=dtype, seed=seed)


def to_tokenizer(
    folder: Positional[Path],
    tokenizer: Positional[Path],
    out: Positional[Path],
    dtype: Dtype = "bfloat16",
    seed: int = 0,
) -> None:
    """Puts a model on another tokenizer, to which the control tokens of the model's chat template are added.

    Args:
        folder: the model's Hugging Face folder.
        tokenizer: a tokenizer.json, or a folder that holds one.
        out: the folder to write; it must not exist.
        dtype: how the weights are stored.
        seed: of the rows that the original vocabulary has nothing for.
    """
    old = load_vocabulary(folder)
    new = with_control(load_vocabulary(tokenizer), old)
    tied = hf.read_config(folder / "config.json").tied
    write(folder, old, new, out, False, tied, dtype, seed)


def write(
    folder: Path, old: Vocabulary, new: Vocabulary, out: Path, expansion: bool, tied: bool, dtype: Dtype, seed: int
) -> None:
    """Writes the model of `folder` on the vocabulary `new` and reports what its tables were made of."""
    if out.exists():
        raise InputError(f"{out} exists already: name another folder or remove it")
    teacher = hf.load(folder, families.DTYPES[dtype])
    old.boundary_mask(teacher.config.vocab_size)  # raises if the tokenizer has more ids than the table has rows
    plan = plan_transfer(old, new)
    model = student.student_from_teacher(teacher, plan, expansion, tied, new.size, seed)
    kept = student.read_chat_template(folder), student.read_max_length(folder)
    student.save(out, model, new, old if expansion else None, dtype, *kept)
    print(f"tokens      {old.size:,} -> {new.size:,}: {origins(plan)}")
    print(f"parameters  {parameters(teacher.config)} -> {parameters(model.config)}")
    print(f"written to  {out}")


def inspect(folder: Positional[Path]) -> None:
    """Prints a model's architecture, sizes and vocabulary, without reading its weights.

    Args:
        folder: the model's Hugging Face folder.
    """
    config = hf.read_config(folder / "config.json")
    vocabulary, original = student.load_vocabularies(folder)
    for field in dataclasses.fields(config):
        print(f"{field.name:<22}{getattr(config, field.name)}")
    for part, size in parts(config).items():
        print(f"{part + ' parameters':<22}{size:,}")
    print(f"{'vocabulary':<22}{describe(vocabulary)}")
    if original is not None:
        print(f"{'expansion':<22}{describe(original)}")


def origins(plan: TransferPlan) -> str:
    return f"{plan.copied:,} copied, {plan.averaged:,} averaged, {plan.drawn:,} drawn"


def parts(config: ModelConfig) -> dict[str, int]:
    """The number of parameters in the tables, in the layers, and in all."""
    sizes = {leaf: math.prod(array.shape) for leaf, array in families.leaves(families.abstract(config)).items()}
    tables = {leaf: size for leaf, size in sizes.items() if leaf in ("embed", "expansion", "unembed")}
    total = sum(sizes.values())
    return {**tables, "other": total - sum(tables.values()), "all": total}


def parameters(config: ModelConfig) -> str:
    sizes = parts(config)
    total = sizes.pop("all")
    return f"{total:,} ({', '.join(f'{part} {size:,}' for part, size in sizes.items())})"


def describe(vocabulary: Vocabulary) -> str:
    kind = "bytes" if vocabulary.tokenizer is None else f"longest token {max(map(len, vocabulary.token_bytes))} bytes"
    return f"{vocabulary.size:,} ids, {kind}; control tokens {', '.join(vocabulary.template_control) or 'none'}"


def main() -> None:
    verbs = {"bytes": to_bytes, "tokenizer": to_tokenizer, "inspect": inspect}
    try:
        tyro.extras.subcommand_cli_from_dict(verbs, description=__doc__)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
