"""Puts a language model on bytes or another tokenizer, or exports a trained one.

    python convert.py bytes google/gemma-2-2b-it gemma-2-2b-it-bytes
    python convert.py tokenizer Llama-3.2-3B-Instruct qwen/tokenizer.json llama-qwen
    python convert.py export runs/smollm2-135m-byte smollm2-bytes
    python convert.py inspect smollm2-bytes

A model is a Hugging Face folder (config.json, *.safetensors, tokenizer.json),
  or the name of one on the Hugging Face hub: org/name.

* bytes, tokenizer: a model whose tables fit the new vocabulary, not trained on
  it yet. train.py does this by itself and trains; use them to look at a start.
* export: what train.py has trained, as a folder that transformers loads.
* inspect: sizes and vocabulary of a model, progress of a run.

`python convert.py VERB --help` explains a verb.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

import train
from minalm import checkpoint, families, hf, student
from minalm.model import ModelConfig, Transformer
from minalm.ngrams import LongestSuffix, longest_suffix
from minalm.student import Usage, load_vocabularies, read_template, read_usage, student_from_teacher
from minalm.text import InputError
from minalm.transfer import TransferPlan, plan_transfer
from minalm.vocab import Vocabulary, byte_vocabulary, load_vocabulary, with_control

# Arguments as the help names them. Of a docstring, tyro joins the lines that begin with a letter.
Model = Positional[
    Annotated[Path, arg(metavar="MODEL", help="a Hugging Face folder, or a name on its hub (org/name).")]
]
Source = Positional[
    Annotated[
        Path, arg(metavar="SOURCE", help="a run (--out of train.py), a Hugging Face folder, or a name on its hub.")
    ]
]
Tokenizer = Positional[Annotated[Path, arg(metavar="TOKENIZER", help="a tokenizer.json, or a folder that holds one.")]]
Out = Positional[Annotated[Path, arg(metavar="OUT", help="the folder to write; it must not exist.")]]
Dtype = Annotated[Literal["bfloat16", "float32"], arg(help="how the weights are stored.")]
Seed = Annotated[int, arg(help="of the random rows of tokens that the original vocabulary has nothing for (rare).")]
Tied = Annotated[
    bool | None,
    arg(
        help="whether the output table is the input table.",
        help_behavior_hint="(default: as in the model)",
    ),
]
Step = Annotated[
    int | None,
    arg(
        metavar="STEP",
        help="of a run: the checkpoint after so many steps.",
        help_behavior_hint="(default: the newest)",
    ),
]
# Files of a model that go along as they are when it is written again. No code: what transformers needs is our own.
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
COPIED += ("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def to_bytes(model: Model, out: Out, expansion: bool = True, dtype: Dtype = "bfloat16", seed: Seed = 0) -> None:
    """Puts a model on bytes: 256 of them, and its own control tokens.

    python convert.py bytes google/gemma-2-2b-it gemma-2-2b-it-bytes

    Args:
        expansion: input expansion: each byte also reads the embedding of the longest original token that ends there.
    """
    refuse_existing(out)
    folder, teacher, old, _ = read_model(model)
    new = byte_vocabulary(old)
    ngrams = longest_suffix(old, new) if expansion else None
    write(teacher, old, new, ngrams, out, tied=False, dtype=dtype, seed=seed, usage=read_usage(folder))


def to_tokenizer(
    model: Model,
    tokenizer: Tokenizer,
    out: Out,
    control: Literal["keep", "change"] = "keep",
    tied: Tied = None,
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
) -> None:
    """Puts a model on another tokenizer.

    python convert.py tokenizer meta-llama/Llama-3.2-3B-Instruct qwen3 llama-qwen

    Args:
        control: control tokens and chat template: keep the model's, or change to the tokenizer's.
    """
    refuse_existing(out)
    folder, teacher, old, _ = read_model(model)
    new, usage = load_vocabulary(tokenizer), read_usage(folder)
    if control == "keep":
        new = with_control(new, old)
    else:
        usage = dataclasses.replace(usage, chat_template=read_template(tokenizer))
    write(teacher, old, new, None, out, teacher.config.tied if tied is None else tied, dtype, seed, usage)


def read_model(model: Path) -> tuple[Path, Transformer, Vocabulary, LongestSuffix | None]:
    """A model's folder, its weights (in their files), its vocabulary, and the search of its input expansion."""
    folder = hf.find(model)
    weights = hf.read(folder)
    vocabulary, ngrams = load_vocabularies(folder)
    vocabulary.boundary_mask(weights.config.vocab_size)  # raises if it has more ids than the table has rows
    return folder, weights, vocabulary, ngrams


def write(
    teacher: Transformer,
    old: Vocabulary,
    new: Vocabulary,
    ngrams: LongestSuffix | None,
    out: Path,
    tied: bool,
    dtype: Dtype,
    seed: int,
    usage: Usage,
) -> None:
    """Writes a model on the vocabulary `new` and reports what its tables were made of."""
    plan = plan_transfer(old, new)
    model = student_from_teacher(teacher, plan, ngrams is not None, tied, new.size, seed)
    student.save(out, model, new, ngrams, dtype, usage)
    print(f"tokens      {old.size:,} -> {new.size:,}: {origins(plan)}")
    print(f"parameters  {parameters(teacher.config)} -> {parameters(model.config)}")
    print(f"written to  {out}")


def export(source: Source, out: Out, step: Step = None, dtype: Dtype = "bfloat16") -> None:
    """Writes the model that a run has trained as a folder for transformers.

    python convert.py export runs/smollm2-135m-byte smollm2-bytes --step 160

    A byte model, published ones too, gets the code that transformers needs.
    """
    refuse_existing(out)
    if is_run(source):
        config = train.read_settings(source / "config.yaml")
        models = train.load_models(config)
        model = train.trained_student(config, models, source / "checkpoints", step)
        student.save(out, model, models.student_vocabulary, models.student_ngrams, dtype, models.usage)
    else:
        if step is not None:
            raise InputError(f"{source} is not a run, so it has no checkpoint {step}: leave out --step")
        folder, model, _, _ = read_model(source)
        values = hf.read_json(folder / "config.json")
        copied = {file: (folder / file).read_bytes() for file in COPIED if (folder / file).is_file()}
        hf.save(out, model, dtype, keys=families.informative(values), files=copied)
    print(f"written to  {out}")


def inspect(source: Source) -> None:
    """Prints a model's sizes and vocabulary, and how far a run has come.

    python convert.py inspect runs/smollm2-135m-byte
    """
    if is_run(source):
        config = train.read_settings(source / "config.yaml")
        models = train.load_models(config)
        model, vocabulary, ngrams = models.student.config, models.student_vocabulary, models.student_ngrams
        line("steps", f"{checkpoint.latest(source / 'checkpoints') or 0:,} of {config.steps:,}")
        for evaluation in train.read_rows(source / "evaluations.jsonl"):
            bits = ", ".join(f"{side} {value:.3f}" for side, value in evaluation["bits_per_byte"].items())
            line(f"after step {evaluation['step']:,}", f"bits per byte: {bits}")
    else:
        _, weights, vocabulary, ngrams = read_model(source)
        model = weights.config
    for field in dataclasses.fields(model):
        line(field.name, getattr(model, field.name))
    for part, size in parts(model).items():
        line(f"{part} parameters", f"{size:,}")
    line("vocabulary", describe(vocabulary))
    if ngrams is not None:
        line("expansion", f"{len(ngrams.keys) - 1 + len(ngrams.control):,} original tokens")


# --- runs of train.py ---------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether train.py wrote the folder, or something that may be taken for it: a model may come with a config.yaml."""
    return (folder / "config.yaml").is_file() and not (folder / "config.json").exists()


# --- what is printed ----------------------------------------------------------------------------------------------


def line(name: str, value: object) -> None:
    print(f"{name:<22}{value}")


def origins(plan: TransferPlan) -> str:
    return f"{plan.copied:,} copied, {plan.averaged:,} averaged, {plan.drawn:,} drawn"


def parts(config: ModelConfig) -> Mapping[str, int]:
    """The number of parameters in the tables, in the layers, and in all."""
    sizes = {leaf: math.prod(array.shape) for leaf, array in families.leaves(families.abstract(config)).items()}
    tables = {leaf: size for leaf, size in sizes.items() if leaf in ("embed", "expansion", "unembed")}
    total = sum(sizes.values())
    return {**tables, "other": total - sum(tables.values()), "all": total}


def parameters(config: ModelConfig) -> str:
    sizes = dict(parts(config))
    total = sizes.pop("all")
    return f"{total:,} ({', '.join(f'{part} {size:,}' for part, size in sizes.items())})"


def describe(vocabulary: Vocabulary) -> str:
    kind = "bytes" if vocabulary.tokenizer is None else f"longest token {max(map(len, vocabulary.token_bytes))} bytes"
    return f"{vocabulary.size:,} ids, {kind}; control tokens {', '.join(vocabulary.template_control) or 'none'}"


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists already: name another folder or remove it")


def main() -> None:
    verbs = {"bytes": to_bytes, "tokenizer": to_tokenizer, "export": export, "inspect": inspect}
    with train.one_sentence():
        tyro.extras.subcommand_cli_from_dict(verbs, prog="convert.py", description=__doc__)


if __name__ == "__main__":
    main()
