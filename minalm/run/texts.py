"""The text of a run: training and held-out batches, and what is checked of them before it starts."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from minalm.batches import Packer, Side, make_batch, sizes_of, steps_of_group, why_left_out, with_longer_patches
from minalm.distill.losses import LossConfig
from minalm.errors import InputError, check_at_least, flag
from minalm.models.bolmo import Bolmo
from minalm.models.transformer import Transformer
from minalm.packing import packed_counts
from minalm.parallel.mesh import local_rows
from minalm.run.models import Models
from minalm.text.corpus import Corpus, read_corpus, text_corpus
from minalm.text.documents import Piece, Special
from minalm.text.rows import RowReader
from minalm.text.sources import parse_source, shares
from minalm.text.stdlib import stdlib_documents
from minalm.tokenization.chats import ChatReader
from minalm.tokenization.compression import Compression, ratio_at
from minalm.types import Batch

BATCHES = 100  # in which something must count
SAMPLE = 10  # batches in which the ends of chunks are looked at
PACKED_SAMPLE = 1024  # pieces by which it is known how many fit a step
MOST_LOST = 0.01  # of a text, for which a Bolmo's rows have no place


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
