"""What a run reads: the models that it begins with, and its text."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import equinox as eqx
import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Float32

from minalm.batches import (
    Packer,
    Side,
    make_batch,
    sizes_of,
    steps_of_group,
    why_left_out,
    with_longer_patches,
)
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
from minalm.packing import packed_counts
from minalm.parallel.mesh import local_rows
from minalm.run.fingerprint import model_fingerprint
from minalm.text.corpus import Corpus, read_corpus, text_corpus
from minalm.text.documents import Piece, Special
from minalm.text.rows import RowReader
from minalm.text.sources import parse_source, shares
from minalm.text.stdlib import stdlib_documents
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.compression import Compression, ratio_at
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
from minalm.types import Batch

BATCHES = 100  # in which something must count
SAMPLE = 10  # batches in which the ends of chunks are looked at
PACKED_SAMPLE = 1024  # pieces by which it is known how many fit a step
WITHOUT_STAGE_1 = (
    "this Bolmo is new and learns without the guidance of its teacher: stage 1 (--losses.guided) usually comes first, and "
    "--student names what came of it"
)
MOST_LOST = 0.01  # of a text, for which a Bolmo's rows have no place
ROW_MULTIPLE = 64  # a new vocabulary's tables are padded to it, so that a mesh can divide them

# --- models -------------------------------------------------------------------------------------------------------


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


# --- text ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes rows."""

    data: tuple[Path, ...] = ()
    """Training text: files (.txt, .jsonl, .json, .parquet, each also .gz or .zst), folders of them, folders that
    `datasets` saved, or datasets of the hub as org/name, each maybe with :WEIGHT (docs/data.md)."""
    held_out: tuple[Path, ...] = ()
    """Text for the evaluation at both ends of the run, in the same forms."""
    text_column: str | None = None
    """The column of rows that is their text. By default the columns say what they are: text, messages, conversations,
    prompt and completion, or instruction and output."""
    skip_bad_rows: bool = False
    """Leave out the rows that cannot be read, and say which. Without it the first of them ends the run."""
    data_cache: Path | None = None
    """Folder of indexes, and of copies of what is compressed. Default: minalm in the user's cache folder."""
    stdlib: bool = False
    """Where --data or --held-out name no files: the sources of Python's standard library, split by a hash of paths."""
    stdlib_fraction: float = 1.0
    """Share of the standard library's training documents that the student sees."""
    mask_prompt: bool = False
    """Chats: only the assistant's turns count in the losses."""
    piece_bytes: int = 2048
    """Documents are cut into pieces of at most this many bytes, one a row."""
    student_length: int = 2048
    """Tokens of a row, student's side. What is longer is cut off."""
    teacher_length: int = 512
    """Tokens of a row, teacher's side. What is longer is cut off."""
    batch_size: int = 32
    """Rows of a step, over all devices."""
    packing: bool = False
    """Several pieces in a row, each read as it would be alone. Held-out text is not packed."""
    compression: Compression = "none"
    """Bolmo students, stage 2: which ends of the teacher's tokens are left out of what the boundaries learn. space: those
    that no space follows, by chance; bpe: those within the pairs of tokens that a row repeats most."""
    bytes_per_patch: tuple[float, float] = (4.3, 4.3)
    """With --compression: at the start, and after --compression-steps."""
    compression_steps: int = 150_000
    """Steps over which the bytes per patch grow."""

    @property
    def inputs(self) -> list[Path]:
        """Files and folders that are read."""
        return [Path(parse_source(str(name)).name) for name in (*self.data, *self.held_out)]

    @property
    def cache(self) -> Path:
        """The folder of indexes and copies."""
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return self.data_cache or Path(home, "minalm")

    def check(self, needs_text: bool) -> None:
        """Raises InputError for values that make no sense."""
        # A row of one token has nothing to predict.
        check_at_least(self, {"batch_size": 1, "student_length": 2, "teacher_length": 2})
        check_at_least(self, {"compression_steps": 1})
        if not 1.0 <= self.bytes_per_patch[0] <= self.bytes_per_patch[1] < math.inf:
            raise InputError(
                f"--bytes-per-patch is {self.bytes_per_patch[0]} {self.bytes_per_patch[1]}: give two numbers of at least 1, "
                "the second not below the first"
            )
        for name in ("bytes_per_patch", "compression_steps"):
            if self.compression == "none" and getattr(self, name) != getattr(DataConfig, name):
                raise InputError(f"{flag(name)} is for --compression: add that, or leave it out")
        if not 0.0 < self.stdlib_fraction <= 1.0:
            raise InputError(f"--stdlib-fraction is {self.stdlib_fraction}: it must be above 0 and at most 1")
        if needs_text and not self.data and not self.stdlib:
            raise InputError("there is no text to train on: name files or folders with --data")
        shares([parse_source(str(name)) for name in self.data])
        if weighted := [name for name in self.held_out if parse_source(str(name)).weight is not None]:
            raise InputError(f"--held-out {weighted[0]} has a weight, which is for --data alone: leave it out")


@dataclasses.dataclass(frozen=True)
class Texts:
    """The text of a run, and what makes batches of it. A batch is a function of (seed, step)."""

    config: DataConfig
    training: Corpus
    held_out: Corpus | None
    notes: Sequence[str]  # what a user should know of the chats, a sentence each
    student: Side
    teacher: Side | None
    seed: int
    mesh: Mesh
    needs_bytes: bool  # whether the losses compare the next byte; the evaluation does where it can
    packer: Packer | None = None  # if rows are packed

    def rows(self, pieces: list[Piece]) -> Batch:
        """Of a batch of these pieces, the rows of this process's devices."""
        return make_batch([pieces[row] for row in local_rows(self.mesh, len(pieces))], self.student, self.teacher)

    def batch(self, step: int) -> Batch:
        """What the update after `step` others learns from."""
        config = self.config
        rows = config.batch_size
        if self.packer is not None:
            own = local_rows(self.mesh, rows)
            return jax.tree.map(lambda leaf: leaf[own], self.packer(step))
        without = dataclasses.replace(self, teacher=self.teacher and self.teacher._replace(prefixes=None))
        batch = (self if self.needs_bytes else without).rows(self.training.batch(self.seed, step, rows))
        if config.compression == "none":
            return batch
        ratio = ratio_at(*config.bytes_per_patch, config.compression_steps, step)
        return with_longer_patches(batch, config.compression, ratio, self.seed, step)

    def places(self, step: int) -> list[str]:
        """Where the pieces of the update after `step` others are, of all processes; of packed rows, those of its group."""
        size = self.config.batch_size
        if self.packer is not None:
            step, size = step // steps_of_group(size), self.packer.count
        order = self.training.order(self.seed, step, size)
        return [self.training.where(number) for number in order.tolist()]

    def first_chat(self) -> Piece | None:
        """The first piece of training text that is of a chat, if there is one among the first thousand."""
        pieces = map(self.training.piece, range(min(len(self.training), 1000) if self.training.has_chats else 0))
        return next((piece for piece in pieces if piece[0].content != Special("bos")), None)

    def held_out_batches(self, skip: int, count: int) -> Iterator[Batch]:
        """`count` rows of held-out text behind the first `skip`; the last batch is filled up with empty rows."""
        pieces = self.held_out.batch(0, 0, min(skip + count, len(self.held_out)))[skip:]
        pieces += [()] * (-len(pieces) % self.config.batch_size)
        for first in range(0, len(pieces), self.config.batch_size):
            yield self.rows(pieces[first : first + self.config.batch_size])


def load_texts(
    config: DataConfig,
    models: Models,
    seed: int,
    mesh: Mesh,
    date: str,
    losses: LossConfig,
    say: Callable[[str], None] = lambda text: None,
) -> Texts:
    """Training and held-out text; all of it is read and checked. `date` is what chat templates take for today; `say`
    hears what takes time.

    Raises InputError.
    """
    check_packing(config, models)
    student, teacher = models.student, models.teacher
    if config.compression != "none" and (not isinstance(student.model, Bolmo) or models.teacher_runs):
        raise InputError(
            "--compression is for stage 2 of a Bolmo, without a loss that compares with the teacher: leave it out"
        )
    vocabularies = student.vocabulary, (teacher or student).vocabulary
    read_chat = ChatReader(*vocabularies, config.mask_prompt, date)
    training = read_texts(config, "training", read_chat, say)
    held_out = read_texts(config, "held_out", read_chat, say)
    notes = text_notes(filter(None, (training, held_out)))
    notes += [note for vocabulary in dict.fromkeys(vocabularies) for note in vocabulary.notes]
    if models.maps is not None:
        _, ours, theirs = models.maps.shape
        notes.append(
            f"hidden states of width {ours} are compared with the teacher's of width {theirs} through a map that is learnt "
            "too, and is no part of the student"
        )
    if losses.needs_bytes and models.prefixes.missing:
        words = ", ".join(map(repr, models.prefixes.missing))
        notes.append(
            f"next_byte leaves out the probability of the teacher's special tokens that the student lacks: {words}"
        )
    texts = Texts(
        config=config,
        training=training,
        held_out=held_out,
        notes=notes,
        student=Side(
            student.vocabulary, student.suffixes, config.student_length, patches=isinstance(student.model, Bolmo)
        ),
        teacher=teacher
        and Side(teacher.vocabulary, teacher.suffixes, config.teacher_length, models.prefixes, models.unbiased),
        seed=seed,
        mesh=mesh,
        needs_bytes=losses.needs_bytes,
    )
    notes += [*models.notes, *check_targets(texts, losses)]
    if config.packing:
        packer, note = packed_batches(texts)
        texts, notes = dataclasses.replace(texts, packer=packer), [*notes, note]
    return dataclasses.replace(texts, notes=[*notes, *unbiased_share(texts), *check_patches(texts)])


def check_packing(config: DataConfig, models: Models) -> None:
    """Raises InputError if rows are to be packed for a model that does not keep the texts of a row apart."""
    for name, side in (("student", models.student), ("teacher", models.teacher)):
        if config.packing and side is not None and not isinstance(side.model, Transformer):
            raise InputError(
                f"--packing is for models whose layers are attention alone, and the {name} is a "
                f"{type(side.model).__name__}, which would read the texts of a row as one: leave out --packing"
            )


def packed_batches(texts: Texts) -> tuple[Packer, str]:
    """What packs the rows of a run, and what a user should know of it.

    A group of steps takes as many pieces as find room on average in the first PACKED_SAMPLE, less half a standard
    deviation.
    """
    teacher = texts.teacher if texts.teacher is None or texts.needs_bytes else texts.teacher._replace(prefixes=None)
    batch = texts.config.batch_size
    rows, lengths = batch * steps_of_group(batch), (texts.student.length, (texts.teacher or texts.student).length)
    sizes = sizes_of(texts.training.batch(texts.seed, 0, max(8 * rows, PACKED_SAMPLE)), texts.student, teacher)
    counts = packed_counts(sizes, lengths, rows)
    count = max(1, int(np.mean(counts) - np.std(counts) / 2))
    waiting = sum(max(0, count - each) for each in counts) / (count * len(counts))
    alone = sizes.student.mean() / lengths[0]
    note = (
        f"{rows} rows hold {count} texts, and {alone * count * (1 - waiting) / rows:.0%} of the student's tokens are of "
        f"texts, {alone:.0%} without --packing; about {waiting:.1%} of the texts find no room and wait for another epoch"
    )

    def pieces(group: int) -> list[Piece]:
        return texts.training.batch(texts.seed, group, count)

    return Packer(pieces, count, texts.student, teacher, batch), note


def check_targets(texts: Texts, losses: LossConfig) -> list[str]:
    """What a user should know of the texts that are left out, if those are most of the first batch.

    Raises InputError if there is nothing to learn: if in the first BATCHES batches, or in all text, nothing counts in
    one of the losses that are on. Of several processes each looks at its own rows.
    """
    waiting = set(losses.names)
    rows, size = texts.config.batch_size, len(texts.training)
    left_out, seen, example = 0, 0, None
    for step in range(min(BATCHES, -(-size // rows))):
        pieces = texts.training.batch(texts.seed, step, rows)
        pieces = [pieces[row] for row in local_rows(texts.mesh, rows)]
        batch = make_batch(pieces, texts.student, texts.teacher)
        left_out, seen = left_out + int(batch.left_out.sum()), seen + len(pieces)
        example = next((p for p, out in zip(pieces, batch.left_out) if out), None) if example is None else example
        waiting = {name for name in waiting if not counts_in(name, batch)}
        if not waiting:
            break
    why = "" if example is None else why_left_out(example, texts.student, texts.teacher)
    if waiting and left_out == seen:
        raise InputError(
            f"all of the first {seen} texts are left out, since a tokenizer does not spell them ({why}): "
            "use another tokenizer"
        )
    if waiting:
        also = f", and {left_out} texts are left out: {why}" if left_out else ""
        which = "the losses" if len(waiting) == len(losses.names) else " or ".join(sorted(waiting))
        raise InputError(
            f"nothing in the first {seen} texts counts in {which}{also}: "
            "give other text, longer rows, or no --mask-prompt"
        )
    share = f"{left_out} of the first {seen} texts are left out, since a tokenizer does not spell them: {why}"
    return [share] if 2 * left_out > seen else []


def counts_in(loss: str, batch: Batch) -> bool:
    """Whether anything in a batch counts in the loss of this name."""
    chunks = batch.chunks
    if loss == "alm":
        return bool((chunks.teacher_chunk >= 0).any())
    if loss == "next_byte":
        return bool((batch.bytes.within >= 0).any() or (batch.bytes.after >= 0).any())
    if loss in ("latents", "representation"):
        return bool(((chunks.student_chunk_end >= 0) & (chunks.teacher_chunk_end >= 0)).any())
    return bool(batch.student.weight.any())


def check_patches(texts: Texts) -> list[str]:
    """How much of the first batches' text a Bolmo's rows have no place for, if any.

    Raises InputError if that is more than MOST_LOST of it. Of several processes each looks at its own rows.
    """
    if not texts.student.patches:
        return []
    rows, whole, read = texts.config.batch_size, 0, 0
    for step in range(min(SAMPLE, -(-len(texts.training) // rows))):
        pieces = texts.training.batch(texts.seed, step, rows)
        pieces = [pieces[row] for row in local_rows(texts.mesh, rows)]
        batch = make_batch(pieces, texts.student, texts.teacher)
        used = [piece for piece, left_out in zip(pieces, batch.left_out, strict=True) if not left_out]
        whole += sum(len(part.content.encode()) for piece in used for part in piece if isinstance(part.content, str))
        read += int(batch.chunks.text_bytes.sum())
    lost = 1.0 - read / max(whole, 1)
    if lost <= 0.0:
        return []
    says = (
        f"{lost:.2%} of the text in the first batches has no place in rows of --student-length "
        f"{texts.config.student_length} bytes and --teacher-length {texts.config.teacher_length} patches"
    )
    if lost > MOST_LOST:
        raise InputError(f"{says}: raise what is too small, or lower --piece-bytes")
    return [says]


def unbiased_share(texts: Texts) -> list[str]:
    """How many chunks of the first batches may end, if chunks are `unbiased`, and of how many the pair is unknown.

    Of several processes each looks at its own rows.
    """
    if texts.teacher is None or texts.teacher.unbiased is None:
        return []
    ends = unbiased = unknown = 0
    for step in range(min(SAMPLE, -(-len(texts.training) // texts.config.batch_size))):
        batch = texts.batch(step)
        chunks, of_text = batch.chunks, batch.chunks.text_bytes > 0
        last = [
            np.take_along_axis(side.inputs, np.maximum(chunk_end, 0), axis=1)[of_text]
            for side, chunk_end in (
                (batch.teacher, chunks.teacher_chunk_end),
                (batch.student, chunks.student_chunk_end),
            )
        ]
        ends, unbiased = ends + int(of_text.sum()), unbiased + int(chunks.unbiased[of_text].sum())
        unknown += int((texts.teacher.unbiased.pairs.find(*last) < 0).sum())
    shares = [f"{count / max(ends, 1):.1%}" for count in (unbiased, unknown)]
    return [
        f"{shares[0]} of the first {ends:,} places where tokens of both sides end are unbiased and end a chunk; "
        f"{shares[1]} are of pairs that --losses.pair-bias does not know, and end none"
    ]


def read_texts(
    config: DataConfig,
    split: Literal["training", "held_out"],
    read_chat: ChatReader,
    say: Callable[[str], None] = lambda text: None,
) -> Corpus | None:
    """The documents of --data or --held-out or, where it names nothing, of the standard library if that is wanted.
    Raises InputError."""
    fraction = config.stdlib_fraction if split == "training" else 1.0

    def library() -> list[str]:
        return stdlib_documents(split, fraction)

    if names := config.data if split == "training" else config.held_out:
        reader = RowReader(read_chat, config.text_column, config.mask_prompt, config.skip_bad_rows)
        return read_corpus(names, config.piece_bytes, reader, config.cache, library, say)
    return text_corpus(library(), config.piece_bytes) if config.stdlib else None


def text_notes(corpora: Iterable[Corpus]) -> list[str]:
    """What a user should know of texts, a sentence each."""
    notes, chats = [], Counter()
    for corpus in corpora:
        notes += corpus.notes
        chats.update(corpus.chats)
    return [*(f"{count:,} chats {note}" for note, count in chats.items()), *notes]


def fingerprints(student: StudentConfig, texts: Texts, losses: LossConfig) -> dict[str, str]:
    """What a run reads -> a hash of it. The text of the standard library is included, so that another Python version is
    detected."""
    found = {"the training text": texts.training.fingerprint}
    if texts.held_out is not None:
        found["the held-out text"] = texts.held_out.fingerprint
    for name, path in (("teacher", student.teacher), ("student", student.student)):
        if path is not None:
            found[f"the model of --{name}"] = model_fingerprint(model_folder(path))
    if isinstance(student.student_tokenizer, Path):
        found["the tokenizer of --student-tokenizer"] = model_fingerprint(student.student_tokenizer)
    if losses.pair_bias is not None:
        found["the file of --losses.pair-bias"] = model_fingerprint(losses.pair_bias)
    return found
