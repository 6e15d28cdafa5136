"""The PyTrees that cross module borders.

Axis names used everywhere: `batch` rows (one piece of text each), `time` positions of one side, `chunk` aligned
chunks, `embed` hidden channels, `vocab` vocabulary entries. The next-token shift happens once, on the host.
"""

import equinox as eqx
from jaxtyping import Array, Bool, Float, Float32, Int
from numpy import ndarray


class Guide(eqx.Module):
    """What a Bolmo student is given of its subword teacher in stage 1, where the teacher's tokens end."""

    states: Float[Array, "batch patch embed"]  # after the last block: what the student's decoder reads
    early: Float[Array, "batch patch embed"]  # after the first `blocks`, with which the student's are compared
    blocks: int = eqx.field(static=True)


class Tokens(eqx.Module):
    """One side of a batch. `targets[:, t]` follows `inputs[:, t]`; the last target is padding of weight 0."""

    inputs: Int[Array | ndarray, "batch time"]
    targets: Int[Array | ndarray, "batch time"]
    weight: Float[Array | ndarray, "batch time"]  # 1 where the target counts for next-token prediction, else 0
    suffix: (
        Int[Array | ndarray, "batch time"] | None
    )  # longest original subword ending at inputs[:, t]; None: no expansion
    # Bolmo students: the position at which each token of the teacher ends, -1 where there is none. As many patches have
    # a place.
    patch_ends: Int[Array | ndarray, "batch patch"] | None = None
    # The number of the text in the row that each position is of; its positions, and what it sees, begin anew. None: there
    # is one text in each row.
    segments: Int[Array | ndarray, "batch time"] | None = None
    guide: Guide | None = None  # stage 1: patches end where the teacher's tokens do, and its states stand for them


class AlignedChunks(eqx.Module):
    """Where two tokenizations of the same text end at the same byte. Unused chunk columns hold -1.

    `*_chunk[:, t]` is the chunk of *target* t (-1: in no chunk). `*_chunk_end` is the position whose next-token
    distribution follows the chunk's last token, that is (index of the last target) + 1; a chunk made of the very
    first token alone (bos) has chunk_end 0 and no target.
    """

    student_chunk: Int[Array | ndarray, "batch student_time"]
    teacher_chunk: Int[Array | ndarray, "batch teacher_time"]
    student_chunk_end: Int[Array | ndarray, "batch chunk"]
    teacher_chunk_end: Int[Array | ndarray, "batch chunk"]
    # A chunk of the `space` chunking may end here: a special part, or on both sides the next token starts with a space.
    before_space: Bool[Array | ndarray, "batch chunk"]
    text_bytes: Int[Array | ndarray, "batch chunk"]  # UTF-8 bytes of text in the chunk; 0: a special part, or unused
    # A chunk of the `unbiased` chunking may end here: a special part, or no tokenization bias (tokenization/pair_bias.py).
    unbiased: Bool[Array | ndarray, "batch chunk"] | None = None  # None: not asked for
    text_end: Bool[Array | ndarray, "batch chunk"] | None = None  # the last chunk of a text; None: one text in each row


class BytePlaces(eqx.Module):
    """Where the teacher says what byte follows each of the student's tokens; -1: nowhere."""

    within: Int[Array | ndarray, "batch student_time"]  # teacher's position that predicts the token under way
    node: Int[Array | ndarray, "batch student_time"]  # what of that token has been read (tokenization/prefixes.py)
    after: Int[Array | ndarray, "batch student_time"]  # teacher's position of a token that ended here: its next begins


class Batch(eqx.Module):
    """Everything one step reads. Without a teacher the student's tokens are aligned with themselves."""

    student: Tokens
    teacher: Tokens | None
    chunks: AlignedChunks
    # How many texts the two tokenizers do not spell alike: they have no weight.
    left_out: Bool[Array | ndarray, " batch"] | Int[Array | ndarray, " batch"]
    bytes: BytePlaces | None = None  # where the next byte is compared; None: not asked for


class TokenStats(eqx.Module):
    """All that a loss may know of the vocabulary axis."""

    logp: Float32[Array, "batch time"]  # log p(targets[:, t] | inputs[:, :t+1]), natural logarithm
    boundary: Float32[Array, "batch time"]  # log of the probability that a boundary entry comes next


class ByteTargets(eqx.Module):
    """What a teacher implies of the student's next byte, as probabilities of the student's entries ("outcomes")."""

    known: Float32[Array, "batch student_time outcome"]
    open: Float32[Array, "batch student_time"]  # the probability of which the teacher does not say what it falls on
    counted: Bool[Array, "batch student_time"]  # whether the teacher says anything


class ByteScores(eqx.Module):
    """A student's distribution of the next byte beside its targets."""

    cross_entropy: Float32[Array, "batch time"]  # nats
    greedy: Bool[Array, "batch time"]  # whether the most probable outcome is the same


class PatchOutput(eqx.Module):
    """Of a Bolmo student: where its patches end."""

    boundary: Float32[Array, "batch time"]  # log of the probability that one ends at inputs[:, t]
    ends: Float32[Array, "batch time"]  # 1 where one does, else 0
    early: Float[Array, "batch patch embed"] | None  # states to be compared with those of a guide


class ModelOutput(eqx.Module):
    """All that a loss may know of a model. What was not asked for is None."""

    stats: TokenStats
    states: Float[Array, "batch depth chunk embed"] | None = None  # at the ends of chunks
    byte_targets: ByteTargets | None = None  # of a teacher
    byte_scores: ByteScores | None = None  # of a student
    patches: PatchOutput | None = None  # of a Bolmo student
    guide: Guide | None = None  # of its teacher
