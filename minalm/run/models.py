"""The models that a run begins with."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import equinox as eqx
import jax
import numpy as np
import tyro
from jaxtyping import Float32

from minalm.distill.losses import LOSSES, LossConfig
from minalm.errors import InputError, check_at_least, flag
from minalm.huggingface.configs import known_config
from minalm.huggingface.folder import GenerationConfig, read_generation_config, write_start
from minalm.huggingface.loaded import LoadedModel, model_folder
from minalm.models.bolmo import Bolmo
from minalm.models.bolmo_student import SAMPLE as POOL_SAMPLE
from minalm.models.bolmo_student import bolmo_from_teacher
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.kinds import abstract
from minalm.models.mapped import random_maps
from minalm.models.student import pad_rows, student_from_teacher
from minalm.models.transformer import Transformer, initialize
from minalm.tokenization.pair_bias import UnbiasedEnds, read_pair_bias
from minalm.tokenization.prefixes import Prefixes, find_prefixes, typical_prefixes
from minalm.tokenization.suffixes import LongestSuffix, bolmo_suffixes, longest_suffix
from minalm.tokenization.tokenizer_json import load_vocabulary, tokenizer_json
from minalm.tokenization.transfer import plan_transfer
from minalm.tokenization.vocabulary import (
    BOLMO_SPECIAL,
    Vocabulary,
    bolmo_vocabulary,
    byte_vocabulary,
    with_special_tokens,
)

WITHOUT_STAGE_1 = (
    "this Bolmo is new and learns without the guidance of its teacher: stage 1 (--losses.guided) usually comes first, and "
    "--student names what came of it"
)
ROW_MULTIPLE = 64  # a new vocabulary's tables are padded to it, so that a mesh can divide them


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The teacher, and what the student begins as."""

    teacher: Path | None = None
    """Hugging Face folder of the teacher, or its name on the hub as org/name; the student starts from it too. Without
    one only sft is possible."""
    student: Path | None = None
    """Start from this model instead, with its own tokenizer: a byte student of an earlier run, or a published one."""
    student_tokenizer: Literal["bytes"] | Path = "bytes"
    """What the student reads: bytes, or a tokenizer.json (or its folder)."""
    special_tokens: Annotated[Literal["keep", "change"], tyro.conf.arg(aliases=["--control"])] = "keep"
    """Special tokens and chat template of a student with a tokenizer: the teacher's, or that tokenizer's own."""
    tied: bool | None = None
    """Whether the student's output table is its input table. Default: not for bytes, else as the teacher's."""
    student_weights: Literal["transfer", "random"] = "transfer"
    """Start from the teacher's weights, or, to compare, from random ones of the same shape."""
    expansion: bool = True
    """Byte students: add to each byte's embedding the teacher's embedding of the longest of its tokens that ends
    there."""
    train_expansion: bool = False
    """Train the expansion table too. By default it stays as the teacher's embedding table is."""
    kind: Literal["transformer", "bolmo"] = "transformer"
    """A new student is its teacher with other tables; or a Bolmo: a byte encoder and decoder around its layers."""
    train_blocks: bool = True
    """Bolmo students: train the teacher's layers in their middle too (stage 2)."""
    local_heads: int = 16
    """New Bolmo students: heads of the mLSTM layers of encoder and decoder."""
    local_mlp: int | None = None
    """New Bolmo students: hidden units of a byte block. Default: 11/8 of the width."""
    encoder_layers: int = 1
    """New Bolmo students: byte blocks before the teacher's layers."""
    decoder_layers: int = 4
    """New Bolmo students: byte blocks after them."""
    # Of a student that has not its teacher's shape, with random weights.
    architecture: Annotated[ModelConfig | None, tyro.conf.Suppress] = None

    @property
    def inputs(self) -> list[Path]:
        """Files and folders that are read."""
        return [path for path in (self.teacher, self.student, self.student_tokenizer) if isinstance(path, Path)]

    def check(self, losses: LossConfig) -> None:
        """Raises InputError for settings that do not go together."""
        if self.train_expansion and not self.expansion:
            raise InputError("--train-expansion trains a table that --no-expansion leaves out: choose one")
        of_its_own = self.teacher is None or self.student_weights == "random"
        if self.architecture is not None and (self.student is not None or not of_its_own):
            raise InputError(
                "this preset trains an architecture of its own from random weights: use another with --teacher or "
                "--student"
            )
        if self.teacher is None:
            if losses.needs_teacher:
                names = [name for name in LOSSES if LOSSES[name].needs_teacher]
                zero = " ".join(f"{flag('losses.' + name)} 0" for name in names)
                raise InputError(f"{' and '.join(names)} need a teacher: give --teacher, or {zero}")
            if self.architecture is None and self.student is None:
                raise InputError("there is no model to start from: name a Hugging Face folder with --teacher")
            if self.student_tokenizer == "bytes" and self.student is None:
                raise InputError("without a teacher there is no tokenizer: name one with --student-tokenizer")
        check_at_least(self, {"local_heads": 1, "local_mlp": 1, "encoder_layers": 1, "decoder_layers": 2})
        if self.kind == "bolmo":
            for name in NOT_OF_A_BOLMO:
                if getattr(self, name) != getattr(StudentConfig, name):
                    given = "--no-expansion" if name == "expansion" else flag(name)
                    raise InputError(f"{given} is not for --kind bolmo, which reads bytes in its own way: leave it out")
            if self.teacher is None:
                raise InputError("--kind bolmo is made around a subword model: name one with --teacher")
        elif self.student is None:
            for name in (*OF_A_NEW_BOLMO, "train_blocks"):
                if getattr(self, name) != getattr(StudentConfig, name):
                    given = "--no-train-blocks" if name == "train_blocks" else flag(name)
                    raise InputError(f"{given} is for Bolmo students: add --kind bolmo, or leave it out")
        if self.student is not None:
            for name in OF_A_NEW_STUDENT:
                if getattr(self, name) != getattr(StudentConfig, name):  # the default
                    given = "--no-expansion" if name == "expansion" else flag(name)
                    raise InputError(f"--student brings its own tokenizer and tables: leave out {given}")
        elif self.student_tokenizer == "bytes":
            for name, value in (("special_tokens", "change"), ("tied", True)):
                if getattr(self, name) == value:
                    raise InputError(
                        f"{flag(name)} {value} is not for bytes: give --student-tokenizer, or leave it out"
                    )


OF_A_NEW_BOLMO = ("local_heads", "local_mlp", "encoder_layers", "decoder_layers")
NOT_OF_A_BOLMO = ("student_tokenizer", "special_tokens", "tied", "student_weights", "expansion", "architecture")
OF_A_NEW_STUDENT = (
    "student_tokenizer",
    "special_tokens",
    "tied",
    "student_weights",
    "expansion",
    "kind",
    *OF_A_NEW_BOLMO,
)


@dataclasses.dataclass(frozen=True)
class Models:
    """What a run begins with."""

    student: LoadedModel
    teacher: LoadedModel | None
    trained: Transformer | Bolmo  # the student as bools: which parameters are trained
    generation_config: GenerationConfig
    prefixes: Prefixes | None = None  # of the teacher, if its next byte is asked for
    unbiased: UnbiasedEnds | None = None  # of the teacher's and the student's tokens, if chunks are `unbiased`
    # From the student's hidden states to the teacher's, if they are compared and the widths differ; trained, not exported.
    maps: Float32[np.ndarray, "depth embed teacher_embed"] | None = None
    teacher_runs: bool = True  # False: its tokenizer alone is used
    notes: tuple[str, ...] = ()  # what a user should know of them, a sentence each

    def write_student(self, folder: Path) -> None:
        """What of the student training does not change, as a folder."""
        student = self.student
        write_start(folder, student.model, self.trained, student.vocabulary, student.suffixes, self.generation_config)


def load_models(config: StudentConfig, student_length: int, seed: int) -> Models:
    """Reads vocabularies and checks models; no weights are held but the tables of a new vocabulary.

    Raises InputError for models and tokenizers that are damaged, incomplete or do not fit.
    """
    teacher = None if config.teacher is None else LoadedModel.read(config.teacher)
    generation_config = GenerationConfig()
    if config.student is not None or teacher is not None:
        generation_config = read_generation_config(model_folder(config.student or config.teacher))
    if config.student is not None:
        student = LoadedModel.read(config.student)
        model, vocabulary, suffixes = student.model, student.vocabulary, student.suffixes
        if not isinstance(model, Bolmo):
            model = pad_rows(model, padded_rows(vocabulary))
    else:
        vocabulary, suffixes = new_vocabulary(config, teacher)
        model = new_student(config, teacher, vocabulary, suffixes, seed)
    if isinstance(model, Bolmo):
        teacher = teacher_of_bolmo(teacher, model)
    if (model.config.blocks if isinstance(model, Bolmo) else model.config).layers < 2:
        raise InputError(f"{config.student or config.teacher} has one layer: use a model of at least two")
    tokenizer_json(vocabulary)  # raises if the student's tokenizer could not be saved at the end
    length = max(generation_config.max_length or 0, student_length)  # a teacher's tokens are longer than bytes
    return Models(
        student=LoadedModel.of(model, vocabulary, suffixes),
        teacher=teacher,
        trained=trained_parameters(config, model),
        generation_config=dataclasses.replace(generation_config, max_length=length),
        notes=(WITHOUT_STAGE_1,) if config.kind == "bolmo" else (),
    )


def teacher_of_bolmo(teacher: LoadedModel | None, student: Bolmo) -> LoadedModel:
    """The teacher with something in front of a text, as a Bolmo has it: bos, or what ends a document.

    Raises InputError if there is no teacher, whose tokenizer says where patches end, or if it does not fit.
    """
    if teacher is None:
        raise InputError("a Bolmo learns where the tokens of its subword model end: name that model with --teacher")
    theirs, ours = teacher.model.config, student.config.blocks
    if (theirs.embed, theirs.layers) != (ours.embed, ours.layers):
        raise InputError(
            f"the teacher has {theirs.layers} layers of width {theirs.embed}, the Bolmo's own in its middle are "
            f"{ours.layers} of width {ours.embed}: name the subword model that it was made of with --teacher"
        )
    names = teacher.vocabulary.names
    if "bos_token" in names:
        return teacher
    if "eos_token" not in names:
        raise InputError("the teacher has neither bos nor eos, one of which stands before a text: use another")
    names = {**names, "bos_token": names["eos_token"]}
    return dataclasses.replace(teacher, vocabulary=dataclasses.replace(teacher.vocabulary, names=names))


def trained_parameters(config: StudentConfig, student: Transformer | Bolmo) -> Transformer | Bolmo:
    """The student with True in the place of each parameter that is trained, False of each that stays as it is."""
    trained = jax.tree.map(lambda _: True, student)
    if student.expansion is not None and not config.train_expansion:
        trained = eqx.tree_at(lambda model: model.expansion, trained, False)
    if isinstance(student, Bolmo) and not config.train_blocks:
        trained = eqx.tree_at(lambda model: model.patches, trained, jax.tree.map(lambda _: False, student.patches))
    return trained


def bolmo_config(config: StudentConfig, teacher: ModelConfig) -> BolmoConfig:
    """The architecture of a new Bolmo around this teacher. Raises InputError for heads that do not divide its width."""
    if teacher.embed % (2 * config.local_heads):
        raise InputError(
            f"--local-heads {config.local_heads} does not divide half of the teacher's width of {teacher.embed}: "
            "choose a number that does"
        )
    return BolmoConfig(
        vocab_size=256 + len(BOLMO_SPECIAL),
        expansion_size=teacher.vocab_size,
        blocks=teacher,
        heads=config.local_heads,
        mlp=teacher.embed * 11 // 8 if config.local_mlp is None else config.local_mlp,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
    )


def model_shapes(config: StudentConfig, student_length: int, seed: int) -> Models:
    """The models that a run would load; for a known model that is not on disk, only its shapes. Fetches nothing.

    Raises InputError if the shapes are not known without a download.
    """
    if config.teacher is None or config.teacher.exists():
        return load_models(config, student_length, seed)
    teacher = known_config(str(config.teacher))
    if teacher is None or config.student is not None or config.student_tokenizer != "bytes":
        raise InputError(
            f"--compile-only fetches nothing, and without {config.teacher} the shapes of this run are not known: "
            "name the folder of the teacher"
        )
    if config.kind == "bolmo":
        student = bolmo_config(config, teacher)
    else:
        student = dataclasses.replace(
            teacher,
            vocab_size=256 + ROW_MULTIPLE,  # bytes, and up to that many special tokens
            tied=False,
            expansion_size=teacher.vocab_size if config.expansion else None,
        )
    student, teacher = (LoadedModel.of_shapes(abstract(shape)) for shape in (student, teacher))
    return Models(student, teacher, trained_parameters(config, student.model), GenerationConfig())


def padded_rows(vocabulary: Vocabulary) -> int:
    """Rows of a table for this vocabulary."""
    return -(-vocabulary.size // ROW_MULTIPLE) * ROW_MULTIPLE


def new_vocabulary(config: StudentConfig, teacher: LoadedModel | None) -> tuple[Vocabulary, LongestSuffix | None]:
    """What a new student reads, and the search of its input expansion. Raises InputError."""
    if config.kind == "bolmo":
        vocabulary = bolmo_vocabulary(teacher.vocabulary)
        return vocabulary, bolmo_suffixes(teacher.vocabulary, vocabulary)
    if config.student_tokenizer == "bytes":
        vocabulary = byte_vocabulary(teacher.vocabulary)
        return vocabulary, longest_suffix(teacher.vocabulary, vocabulary) if config.expansion else None
    vocabulary = load_vocabulary(config.student_tokenizer)
    if config.special_tokens == "keep" and teacher is not None:
        vocabulary = with_special_tokens(vocabulary, teacher.vocabulary)
    return vocabulary, None


def new_student(
    config: StudentConfig,
    teacher: LoadedModel | None,
    vocabulary: Vocabulary,
    suffixes: LongestSuffix | None,
    seed: int,
) -> Transformer | Bolmo:
    """The teacher on another vocabulary, a Bolmo around it, or a model of random weights."""
    expansion = suffixes is not None
    if teacher is None:
        return initialize(config.architecture, jax.random.key(seed))
    if config.kind == "bolmo":
        sample = np.random.default_rng(seed).integers(0, 256, POOL_SAMPLE, np.int32)
        shape = bolmo_config(config, teacher.model.config)
        return bolmo_from_teacher(teacher.model, shape, sample, suffixes(sample), seed)
    if config.architecture is not None:
        original = teacher.model.config.vocab_size if expansion else None
        rows = padded_rows(vocabulary)
        shape = dataclasses.replace(config.architecture, vocab_size=rows, expansion_size=original)
        return initialize(shape, jax.random.key(seed))
    tied = config.tied
    if tied is None:
        tied = teacher.model.config.tied and config.student_tokenizer != "bytes"
    plan = plan_transfer(teacher.vocabulary, vocabulary)
    student = student_from_teacher(teacher.model, plan, expansion, tied, padded_rows(vocabulary), seed)
    return student if config.student_weights == "transfer" else initialize(student.config, jax.random.key(seed))


def with_prefixes(models: Models, losses: LossConfig) -> Models:
    """The models with what is to know of the teacher's entries, for a loss on the next byte and to evaluate bytes.

    Raises InputError if a loss asks for it and the student or the teacher has no bytes.
    """
    student, teacher = models.student, models.teacher
    in_bytes = student.vocabulary is not None and student.vocabulary.tokenizer is None
    if teacher is None or isinstance(student.model, Bolmo) or not (losses.needs_bytes or in_bytes):
        return models
    rows = teacher.model.config.vocab_size, student.model.config.vocab_size
    if teacher.vocabulary is None:
        return dataclasses.replace(models, prefixes=typical_prefixes(*rows))
    found = find_prefixes(teacher.vocabulary, student.vocabulary, *rows)
    return dataclasses.replace(models, prefixes=found)


def with_unbiased_ends(models: Models, losses: LossConfig) -> Models:
    """The models with what is to know of pairs of their tokens, for `unbiased` chunks.

    Raises InputError if the file is missing, damaged, or of other tokenizers.
    """
    if losses.pair_bias is None:
        return models
    pairs = read_pair_bias(losses.pair_bias, models.student.vocabulary, models.teacher.vocabulary)
    return dataclasses.replace(models, unbiased=UnbiasedEnds(pairs, losses.pair_bias_threshold))


def with_maps(models: Models, losses: LossConfig, seed: int) -> Models:
    """The models with maps of the student's hidden states, where a loss compares them and widths differ.

    Raises InputError if the states of all layers are compared and the models have not as many.
    """
    if not losses.needs_states:
        return models
    ours, theirs = (side.model.config for side in (models.student, models.teacher))
    if losses.compares_all_layers and ours.layers != theirs.layers:
        raise InputError(
            f"--losses.latents-layers all compares layer by layer, but the student has {ours.layers} layers and the "
            f"teacher {theirs.layers}: compare the last one alone"
        )
    if ours.embed == theirs.embed:
        return models
    depth = ours.layers + 1 if losses.compares_all_layers else 1
    return dataclasses.replace(models, maps=random_maps(depth, ours.embed, theirs.embed, seed))


def for_losses(models: Models, losses: LossConfig, seed: int) -> Models:
    """The models with all that the losses read beside them. Raises InputError for losses that are not for this kind of
    student."""
    if isinstance(models.student.model, Bolmo):
        return of_bolmo(models, losses)
    for name in ("representation", "boundary", "guided"):
        if getattr(losses, name):
            raise InputError(f"{flag('losses.' + name)} is for Bolmo students: add --kind bolmo, or leave it out")
    return with_maps(with_unbiased_ends(with_prefixes(models, losses), losses), losses, seed)


def of_bolmo(models: Models, losses: LossConfig) -> Models:
    """The models of a run that trains a Bolmo. Raises InputError for losses that it does not have."""
    for name in ("latents", "next_byte"):
        if getattr(losses, name) > 0.0:
            raise InputError(
                f"{flag('losses.' + name)} is not for a Bolmo, which has no states of tokens and no plain bytes: leave it out"
            )
    if losses.balance != "fixed":
        raise InputError(
            "gradmag weighs by gradients of the last layer, which a Bolmo's boundaries have none of: "
            "add --losses.balance fixed"
        )
    if losses.alm > 0.0 and not losses.guided:
        raise InputError(
            "alm compares a Bolmo's patches with the teacher's tokens, which only --losses.guided makes the same: add it, "
            "or --losses.alm 0"
        )
    layers = models.student.model.config.blocks.layers
    if losses.guided and losses.representation_blocks > layers:
        raise InputError(
            f"--losses.representation-blocks is {losses.representation_blocks}, but the teacher has {layers} layers: "
            "give at most that"
        )
    notes = () if losses.guided else models.notes
    return dataclasses.replace(models, teacher_runs=losses.needs_teacher, notes=notes)
