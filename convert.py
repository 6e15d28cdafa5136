"""Puts a language model on bytes or another tokenizer, or exports a trained one.

    python convert.py bytes google/gemma-2-2b-it gemma-2-2b-it-bytes
    python convert.py tokenizer Llama-3.2-3B-Instruct qwen/tokenizer.json llama-qwen
    python convert.py export runs/smollm2-135m-byte smollm2-bytes --step 160
    python convert.py inspect smollm2-bytes
    python convert.py pair-bias SmolLM2-135M-Instruct pairs.safetensors --data texts/
    python convert.py add-difference OLMo-bytes OUT --base OLMo --post-trained OLMo-Instruct

A model is a Hugging Face folder (config.json, *.safetensors, tokenizer.json),
  or the name of one on the Hugging Face hub: org/name.

* bytes, tokenizer: a model whose tables fit the new vocabulary, not yet trained
  on it. train.py makes such a start by itself; use them to look at one.
* export: what train.py has trained, as a folder that transformers loads.
* inspect: sizes and vocabulary of a model, progress of a run.
* pair-bias: what train.py reads for --losses.chunks unbiased.
* add-difference: what post-training changed in a model's blocks, added to
  the blocks of a byte model that was made from the same base.

`python convert.py VERB --help` explains a verb.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tyro.conf import Positional, arg

from minalm.distill.losses import LossConfig
from minalm.errors import InputError
from minalm.huggingface.arithmetic import add_difference as sum_with_difference
from minalm.huggingface.arithmetic import other_settings
from minalm.huggingface.bolmo import chat_template
from minalm.huggingface.families import DTYPES
from minalm.huggingface.folder import copy, read_generation_config, save
from minalm.huggingface.loaded import LoadedModel, model_folder
from minalm.huggingface.weights import find
from minalm.models.bolmo import Bolmo
from minalm.models.config import ModelConfig
from minalm.models.kinds import parameter_counts
from minalm.models.student import student_from_teacher
from minalm.models.transformer import leaves
from minalm.parallel.distributed import exit_on_input_error
from minalm.run import checkpoint
from minalm.run.export import export as export_run
from minalm.run.folder import RunFolder, is_run
from minalm.run.models import StudentConfig, new_vocabulary
from minalm.run.texts import DataConfig, read_texts
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.pair_bias import count_pairs, pair_bias, write_pair_bias
from minalm.tokenization.transfer import plan_transfer

# Arguments as the help names them. In a docstring, tyro joins the lines that begin with a letter.
Model = Positional[Annotated[Path, arg(metavar="MODEL", help="a Hugging Face folder, or org/name on its hub.")]]
Source = Positional[Annotated[Path, arg(metavar="SOURCE", help="a run (--out of train.py), or a model.")]]
Tokenizer = Positional[Annotated[Path, arg(metavar="TOKENIZER", help="a tokenizer.json, or a folder that holds one.")]]
Out = Positional[Annotated[Path, arg(metavar="OUT", help="the folder to write; it must not exist.")]]
Pairs = Positional[Annotated[Path, arg(metavar="OUT", help="the file to write; it must not exist.")]]
Dtype = Annotated[Literal["bfloat16", "float32"], arg(help="type of the stored weights.")]
Seed = Annotated[int, arg(help="for the random rows of tokens that share nothing with the old vocabulary (rare).")]
Step = Annotated[int | None, arg(metavar="STEP", help_behavior_hint="(default: the newest)")]


def to_bytes(model: Model, out: Out, expansion: bool = True, dtype: Dtype = "bfloat16", seed: Seed = 0) -> None:
    """Puts a model on bytes: 256 of them, and its own special tokens.

    Args:
        expansion: input expansion: each byte also reads the embedding of the longest original token that ends there.
    """
    write(StudentConfig(teacher=model, tied=False, expansion=expansion), out, dtype, seed)


def to_tokenizer(
    model: Model,
    tokenizer: Tokenizer,
    out: Out,
    special_tokens: Annotated[Literal["keep", "change"], arg(aliases=["--control"])] = "keep",
    tied: Annotated[bool | None, arg(help_behavior_hint="(default: as in the model)")] = None,
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
) -> None:
    """Puts a model on another tokenizer.

    Args:
        special_tokens: special tokens and chat template: keep the model's, or change to the tokenizer's.
        tied: whether the output table is the input table.
    """
    config = StudentConfig(teacher=model, student_tokenizer=tokenizer, special_tokens=special_tokens, tied=tied)
    write(config, out, dtype, seed)


def write(config: StudentConfig, out: Path, dtype: Dtype, seed: int) -> None:
    """Writes the model `config.teacher` on a new vocabulary, and prints what its tables were made of."""
    refuse_existing(out)
    folder = model_folder(config.teacher)
    teacher = LoadedModel.read(folder)
    if isinstance(teacher.model, Bolmo):
        raise InputError(
            f"{config.teacher} is a Bolmo, which reads bytes with its own parts: put a subword model on others"
        )
    vocabulary, suffixes = new_vocabulary(config, teacher)
    generation_config = read_generation_config(folder)
    tied = teacher.model.config.tied if config.tied is None else config.tied
    plan = plan_transfer(teacher.vocabulary, vocabulary)
    student = student_from_teacher(teacher.model, plan, suffixes is not None, tied, vocabulary.size, seed)
    save(out, student, vocabulary, suffixes, dtype, generation_config)
    origins = f"{plan.copied:,} copied, {plan.averaged:,} averaged, {plan.drawn:,} drawn"
    print(f"tokens      {teacher.vocabulary.size:,} -> {vocabulary.size:,}: {origins}")
    print(f"parameters  {parameters(teacher.model.config)} -> {parameters(student.config)}")
    print(f"written to  {out}")


def export(source: Source, out: Out, step: Step = None, dtype: Dtype = "bfloat16") -> None:
    """Writes the model that a run has trained as a folder for transformers.

    A byte model, published ones too, gets the code that transformers needs.

    Args:
        step: export a run as it was after so many steps.
    """
    refuse_existing(out)
    if is_run(source):
        export_run(RunFolder(source), out, dtype, step)
    elif step is not None:
        raise InputError(f"{source} is not a run, so it has no checkpoint {step}: leave out --step")
    else:
        folder = find(source)
        copy(folder, out, LoadedModel.read(folder).model, dtype)
    print(f"written to  {out}")


def inspect(source: Source) -> None:
    """Prints a model's sizes and vocabulary, and how far a run has come."""
    if is_run(source):
        run = RunFolder(source)
        start = run.start
        config, vocabulary, suffixes = start.config, start.vocabulary, start.suffixes
        print_line("steps", f"{max(checkpoint.steps(run.checkpoints), default=0):,} of {run.settings['steps']:,}")
        for row in run.log("evaluations").rows:
            bits = ", ".join(f"{side} {value:.3f}" for side, value in row["bits_per_byte"].items())
            print_line(f"after step {row['step']:,}", f"bits per byte: {bits}")
    else:
        loaded = LoadedModel.read(source)
        config, vocabulary, suffixes = loaded.model.config, loaded.vocabulary, loaded.suffixes
    for name, value in vars(config).items():
        print_line(name, value)
    for part, size in parameter_counts(config).items():
        print_line(f"{part} parameters", f"{size:,}")
    kind = "bytes" if vocabulary.tokenizer is None else f"longest token {max(map(len, vocabulary.token_bytes))} bytes"
    special = ", ".join(vocabulary.template_special) or "none"
    print_line("vocabulary", f"{vocabulary.size:,} ids, {kind}; special tokens {special}")
    if suffixes is not None:
        print_line("expansion", f"{len(suffixes.keys) - 1 + len(suffixes.special):,} original tokens")
    for note in vocabulary.notes:
        print_line("note", note)


def pairs_of_tokens(
    teacher: Model,
    out: Pairs,
    data: Annotated[tuple[Path, ...], arg(metavar="PATHS")] = (),
    stdlib: bool = False,
    stdlib_fraction: float = 1.0,
    student: Annotated[Path | None, arg(metavar="MODEL")] = None,
    student_tokenizer: Annotated[Literal["bytes"] | Path, arg(metavar="TOKENIZER")] = "bytes",
    special_tokens: Annotated[Literal["keep", "change"], arg(aliases=["--control"])] = "keep",
    piece_bytes: int = 2048,
    pieces: int = 100_000,
) -> None:
    """Writes what the ends of a teacher's and a student's tokens exclude, by counts in text.

    train.py reads it with --losses.chunks unbiased --losses.pair-bias OUT.

    Args:
        data: the training text, or text like it, in the forms that train.py reads.
        stdlib: where --data names no files, the training split of Python's standard library.
        stdlib_fraction: share of the standard library's documents.
        student: a model that brings its own tokenizer.
        student_tokenizer: what a new student reads: bytes, or a tokenizer.json (or its folder).
        special_tokens: of a student with a tokenizer: keep the teacher's, or change to the tokenizer's.
        piece_bytes: documents are cut into pieces of at most this many bytes.
        pieces: the most pieces that are read; of more, so many are chosen at random.
    """
    if out.exists():
        raise InputError(f"{out} exists already: name another file or remove it")
    if pieces < 1:
        raise InputError(f"--pieces is {pieces}: it must be a number of at least 1")
    config = StudentConfig(
        teacher=teacher, student=student, student_tokenizer=student_tokenizer, special_tokens=special_tokens
    )
    config.check(LossConfig())
    texts = DataConfig(data=data, stdlib=stdlib, stdlib_fraction=stdlib_fraction, piece_bytes=piece_bytes)
    texts.check(needs_text=True)
    loaded = LoadedModel.read(teacher)
    theirs = loaded.vocabulary
    ours = LoadedModel.read(student).vocabulary if student is not None else new_vocabulary(config, loaded)[0]
    read_chat = ChatReader(ours, theirs, mask_prompt=False, date=datetime.now(UTC).date().isoformat())
    corpus = read_texts(texts, "training", read_chat)
    chosen = np.sort(corpus.order(0, 0, min(pieces, len(corpus)))).tolist()
    counts = count_pairs(map(corpus.piece, chosen), ours, theirs)
    pairs = pair_bias(counts, ours, theirs)
    write_pair_bias(out, pairs, ours, theirs)
    tokens = f"{counts.teacher_tokens.sum():,} tokens of the teacher, {counts.student_tokens.sum():,} of the student"
    print_line("text", f"{counts.pieces:,} pieces, {counts.left_out:,} left out; {tokens}")
    print_line("pairs", f"{len(pairs.count):,}, at {pairs.count.sum():,} places where both end")
    for threshold in (1e-1, 1e-2, 1e-3, 1e-4):
        share = pairs.count[pairs.unbiased(threshold)].sum() / pairs.count.sum()
        print_line(f"threshold {threshold:g}", f"{share:.1%} of the places may end a chunk")
    print(f"written to  {out}")


def add_difference(
    model: Model,
    out: Out,
    base: Annotated[Path, arg(metavar="MODEL")],
    post_trained: Annotated[Path, arg(metavar="MODEL")],
    alpha: float = 1.0,
    with_table: bool = False,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None, arg(help_behavior_hint="(default: as in the model)")
    ] = None,
) -> None:
    """Adds what post-training changed in a subword model to a model made from it.

    A Bolmo without a chat template gets that of the post-trained model, whose special tokens it spells.

    Args:
        base: the subword model that both were made from.
        post_trained: what post-training made of it.
        alpha: how many times the difference is added; 0: nothing.
        with_table: also to the table of subwords: the input expansion of a byte model, or the embedding of a subword model.
        dtype: type of the stored weights.
    """
    refuse_existing(out)
    names = (model, base, post_trained)
    folders = [model_folder(name) for name in names]
    loaded = tuple(map(LoadedModel.read, folders))
    changed = sum_with_difference(loaded, names, alpha, with_table)
    stored = {leaf.dtype for leaf in leaves(loaded[0].model).values()}
    kept = "bfloat16" if stored == {DTYPES["bfloat16"]} else "float32"
    template = chat_template(loaded[1].vocabulary, loaded[2].vocabulary) if isinstance(changed, Bolmo) else None
    copy(folders[0], out, changed, dtype or kept, template)
    for name, other in zip(names[1:], loaded[1:]):
        if settings := other_settings(loaded[0].model.config, other.model.config):
            print(f"{name} has other settings, of which nothing is taken over: {', '.join(settings)}")
    print(f"written to  {out}")


def print_line(name: str, value: object) -> None:
    print(f"{name:<22}{value}")


def parameters(config: ModelConfig) -> str:
    *parts, (_, total) = parameter_counts(config).items()
    return f"{total:,} ({', '.join(f'{part} {size:,}' for part, size in parts)})"


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists already: name another folder or remove it")


def main() -> None:
    verbs = {"bytes": to_bytes, "tokenizer": to_tokenizer, "export": export, "inspect": inspect}
    verbs |= {"pair-bias": pairs_of_tokens, "add-difference": add_difference}
    with exit_on_input_error():
        tyro.extras.subcommand_cli_from_dict(verbs, prog="convert.py", description=__doc__)


if __name__ == "__main__":
    main()
