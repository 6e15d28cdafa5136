"""What a compiled step moves through memory and over the network, read from the text of its program, and bounds.

Nothing runs and nothing is timed. Each instruction counts as often as the loops around it go round, unlike in the
compiler's own `cost_analysis`, which counts the body of a loop once. `least_sent` is what the same mathematics must
send.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from minalm.models.transformer import Transformer
from minalm.parallel.mesh import specs
from minalm.run.estimate import Topology

# --- chips --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a kind of chip moves bytes.

    Memory: the page of each chip in Google's documentation, docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. A
    link, one way: the table of "How to Think About TPUs", jax-ml.github.io/scaling-book/tpus, which is a tenth below
    what Google's pages advertise.
    """

    memory: float  # bytes a second from and to HBM
    link: float  # bytes a second over one link, one way
    closes: Callable[[tuple[int, ...], int], bool]  # whether a slice of this shape is a ring along an axis


def _whole_cubes(shape: tuple[int, ...], axis: int) -> bool:
    return all(size % 4 == 0 for size in shape)  # "3D mesh and 3D torus" on the page of v4


def _whole_pod(shape: tuple[int, ...], axis: int) -> bool:
    return shape[axis] == 16  # the optical links between the ends of a pod's rows


RATES = {
    "v4": Rates(1.2e12, 4.5e10, _whole_cubes),
    "v5e": Rates(8.19e11, 4.5e10, _whole_pod),
    "v5p": Rates(2.765e12, 9e10, _whole_cubes),
    "v6e": Rates(1.638e12, 9e10, _whole_pod),
}


def rates(topology: Topology) -> Rates:
    """Those of the topology's chips."""
    return RATES[topology.name.partition(":")[0]]


def links(topology: Topology) -> tuple[int, ...]:
    """Along each physical axis, the links of the chip that has the fewest: two along a ring, one at the end of a
    row."""
    closes = rates(topology).closes
    return tuple(
        0 if size == 1 else 2 if size > 2 and closes(topology.shape, axis) else 1
        for axis, size in enumerate(topology.shape)
    )


# --- memory and messages, from the compiled program ---------------------------------------------------------------

WIDTHS = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0, "c64": 8, "c128": 16}


WIDTHS |= {f"{kind}{bits}": bits / 8 for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)}


COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


NO_TRAFFIC = frozenset(  # other names for what is there already, and ends of what was counted where it started
    {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "domain"}
    | {"partition-id", "replica-id", "add-dependency", "copy-done", "async-update", "async-done", "slice-done"}
    | {f"{name}-done" for name in (*COLLECTIVES, "send", "recv")}
)


FREE_CALLS = ('custom_call_target="AllocateBuffer"', 'custom_call_target="ConcatBitcast"')  # memory named, not touched


ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")


NAME = re.compile(r"%[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a compiled program."""

    name: str
    arrays: tuple[tuple[float, bool], ...]  # of each array that it gives: bytes, and whether it is in fast memory
    operation: str
    operands: tuple[str, ...]
    number: int | None  # of a parameter: which; of a scalar constant: its value
    rest: str  # what stands behind the operands

    @property
    def size(self) -> float:
        """Bytes, wherever they lie."""
        return sum(size for size, _ in self.arrays)

    def called(self, *keys: str) -> list[str]:
        """The computations that the line names under these keys: `body=%region_1.2`, `branch_computations={...}`."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^{{}}]*\}}|%[\w.-]+)", self.rest)
        return [name for value in found for name in NAME.findall(value)]


Computation = dict[str, Instruction]  # by name, in the order of the text


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, taken apart."""

    computations: Mapping[str, Computation]
    roots: Mapping[str, str]  # of each computation the instruction that is its result
    entry: str
    devices: int


def parse_program(text: str) -> Program:
    """The text of a compiled program (`compiled.as_text()`), taken apart. Raises ValueError for another text."""
    computations, roots, entry, current = {}, {}, None, None
    for line in text.splitlines():
        if not line.startswith(" "):
            if (header := re.match(r"(ENTRY )?(%[\w.-]+) \(.*\{$", line)) is not None:
                current = header[2]
                computations[current] = {}
                entry = current if header[1] else entry
        elif current is not None and (start := re.match(r" +(ROOT )?(%[\w.-]+) = ", line)) is not None:
            kind, rest = _split(line[start.end() :], " ")
            operation, rest = rest.split("(", 1)
            operands, rest = _split("(" + rest, "")
            inner = operands[1:-1]
            computations[current][start[2]] = Instruction(
                name=start[2],
                arrays=tuple(_arrays(kind)),
                operation=operation,
                operands=tuple(NAME.findall(inner)) if operation not in ("constant", "parameter") else (),
                number=int(inner) if re.fullmatch(r"-?\d+", inner) else None,
                rest=rest,
            )
            if start[1]:
                roots[current] = start[2]
    if entry is None:
        raise ValueError("this is not the text of a compiled program")
    devices = re.search(r"num_partitions=(\d+)", text[: text.index("\n")])
    return Program(computations, roots, entry, int(devices[1]) if devices else 1)


def _split(text: str, end: str) -> tuple[str, str]:
    """The text up to the first `end` outside of brackets ("": to where the first bracket closes), and what follows."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and (character == end or not end):
            return text[: i + (not end)], text[i + 1 :]
    raise ValueError(f"brackets do not close in {text!r}")


def _padded(shape: list[int], layout: str) -> int:
    """Numbers that an array takes with its tiles filled up: `{1,0:T(8,128)(2,1)}` stores dimension 0, then 1, in tiles
    of 8 x 128; the further tiles order what is inside of a tile."""
    order = [int(number) for number in layout[1:-1].split(":")[0].split(",") if number]
    tile = re.search(r"T\(([\d,]+)\)", layout)
    sizes = [shape[dimension] for dimension in reversed(order)] if order else shape
    if tile is not None:
        tile = [int(number) for number in tile[1].split(",")]
        sizes = [1] * (len(tile) - len(sizes)) + sizes
        first = len(sizes) - len(tile)
        sizes = sizes[:first] + [-(-size // step) * step for size, step in zip(sizes[first:], tile)]
    return math.prod(sizes)


def _arrays(kind: str) -> Iterator[tuple[float, bool]]:
    """Of each array of a type like `(f32[8,128]{1,0:T(8,128)S(1)}, s32[])`: bytes with its padding, and whether it is
    in fast memory, which the compiler writes as a memory space S(...)."""
    for dtype, shape, layout in ARRAY.findall(kind):
        yield float(_padded([int(size) for size in shape.split(",") if size], layout) * WIDTHS[dtype]), "S(" in layout


Groups = tuple[tuple[int, ...], ...]  # of a collective: devices, by their number in the mesh, that exchange data


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one device and one step."""

    memory: float  # bytes read from and written to HBM
    messages: Mapping[tuple[str, Groups], float]  # kind of collective, who takes part -> bytes sent to other devices

    @property
    def sent(self) -> dict[str, float]:
        """Kind of collective -> bytes sent to other devices."""
        return {kind: float(sum(size for (k, _), size in self.messages.items() if k == kind)) for kind in COLLECTIVES}


def traffic(program: Program, trips: bool = True, fast: bool = False) -> Traffic:
    """What a compiled program moves, by the model of memory of XLA's own cost analysis: an instruction reads its
    operands and writes its results, of which slices and updates in place touch a slice, and what a fusion holds inside
    costs nothing. A collective counts once, where it starts or where the fusion that it became part of does.

    `trips` counts the body of a loop as often as it goes round, and `fast` counts what lies in the chip's fast memory
    too. Without trips and with fast memory, a CPU's program gives what `cost_analysis()["bytes accessed"]` says. A
    TPU's gives about a quarter less, on purpose: there an asynchronous copy counts again where it ends, and a slice or
    an update behind a bitcast counts as the whole. Kernels, which count for nothing there, read operands and write
    results.
    """

    @cache
    def of(name: str) -> Counter:
        computation, total = program.computations[name], Counter()
        for instruction in computation.values():
            for kind, size in line(computation, instruction).items():
                total[kind] += size
        return total

    def line(computation: Computation, instruction: Instruction) -> Counter:
        operation = instruction.operation
        if operation in NO_TRAFFIC or any(call in instruction.rest for call in FREE_CALLS):
            return Counter()
        if operation == "while":
            (body,), (condition,) = instruction.called("body"), instruction.called("condition")
            rounds = _rounds(program, instruction, condition) if trips else 1
            return Counter({kind: rounds * size for kind, size in (of(body) + of(condition)).items()})
        if operation == "conditional":
            branches = instruction.called("branch_computations", "true_computation", "false_computation")
            return max((of(branch) for branch in branches), key=lambda cost: cost["memory"])
        if operation in ("call", "async-start"):
            return sum((of(called) for called in instruction.called("to_apply", "calls")), Counter())
        memory = _read(program, computation, instruction, fast) + _written(program, computation, instruction, fast)
        return Counter({"memory": memory}) + _sent(program, computation, instruction)

    total = of(program.entry)
    memory = total.pop("memory", 0.0)
    return Traffic(float(memory), total)


def _rounds(program: Program, loop: Instruction, condition: str) -> int:
    """How often a loop goes round: what the compiler noted, or the constant that its condition compares a counter with.
    Raises ValueError if neither is there."""
    if (noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)) is not None:
        return int(noted[1])
    computation = program.computations[condition]
    result = computation[program.roots[condition]]
    if result.operation == "fusion":  # of the comparison alone
        computation = computation | program.computations[result.called("calls")[0]]
    bounds = [line.number for line in computation.values() if line.operation == "constant" and line.number is not None]
    if len(bounds) != 1:
        raise ValueError(f"the loop {loop.name} does not say how often it goes round")
    return bounds[0]


def _weigh(instruction: Instruction, fast: bool) -> float:
    """Bytes of what an instruction gives that count."""
    return sum(size for size, is_fast in instruction.arrays if fast or not is_fast)


def _read(program: Program, computation: Computation, instruction: Instruction, fast: bool) -> float:
    """Bytes that an instruction reads."""
    total = 0.0
    for position, name in enumerate(instruction.operands):
        full = _weigh(computation[name], fast)
        total += min(full, _used(program, computation, instruction, position)) if full else 0.0
    return total


def _used(program: Program, computation: Computation, instruction: Instruction, position: int) -> float:
    """Bytes of an operand that an instruction uses, wherever they lie: of slices and gathers those that are found, of
    what is updated in place none, or as many as are added to."""
    operation, operands = instruction.operation, instruction.operands
    if position == 0 and operation in ("slice", "dynamic-slice", "gather"):
        return instruction.size
    if position == 0 and operation == "slice-start":  # ((operand), result, context)
        return instruction.arrays[1][0]
    if position == 0 and operation == "dynamic-update-slice":
        return 0.0
    if position == 0 and operation == "scatter":
        return computation[operands[-1]].size
    if operation == "fusion":
        (inner,) = instruction.called("calls")
        lines = program.computations[inner]
        (parameter,) = (p.name for p in lines.values() if p.operation == "parameter" and p.number == position)
        return _used_inside(program, lines, parameter)
    return computation[operands[position]].size


def _used_inside(program: Program, computation: Computation, name: str) -> float:
    """Bytes of a value that the instructions of a fused computation use."""
    total = 0.0
    for line in computation.values():
        for position, operand in enumerate(line.operands):
            if operand == name and line.operation in ("bitcast", "get-tuple-element"):  # the value by another name
                total += _used_inside(program, computation, line.name)
            elif operand == name:
                total += _used(program, computation, line, position)
    return min(total, computation[name].size)


def _written(program: Program, computation: Computation, instruction: Instruction, fast: bool) -> float:
    """Bytes that an instruction writes."""
    if instruction.operation in (
        "copy-start",
        "slice-start",
    ):  # (result, operand, context), ((operand), result, context)
        size, is_fast = instruction.arrays[instruction.operation == "slice-start"]
        return size if fast or not is_fast else 0.0
    full = _weigh(instruction, fast)
    if instruction.operation.endswith("-start"):  # a collective's operands and results
        return full - sum(_weigh(computation[name], fast) for name in instruction.operands)
    if not full:
        return 0.0
    if instruction.operation == "fusion":
        (inner,) = instruction.called("calls")
        return min(full, _made(program, program.computations[inner], program.roots[inner], instruction.arrays, fast))
    return min(full, _made(program, computation, instruction.name, instruction.arrays, fast))


def _made(
    program: Program, computation: Computation, name: str, arrays: tuple[tuple[float, bool], ...], fast: bool
) -> float:
    """Bytes of a result that are new: of an update in place the slice. `arrays` says where each part of it lies."""
    line = computation[name]
    if line.operation == "tuple" and len(line.operands) == len(arrays):
        parts = zip(line.operands, arrays)
        return sum(_made(program, computation, operand, (array,), fast) for operand, array in parts)
    if line.operation == "bitcast":
        return _made(program, computation, line.operands[0], arrays, fast)
    if line.operation == "fusion":
        (inner,) = line.called("calls")
        return _made(program, program.computations[inner], program.roots[inner], arrays, fast)
    if line.operation in ("dynamic-update-slice", "scatter"):
        update = computation[line.operands[1 if line.operation == "dynamic-update-slice" else -1]].size
        return update if fast or not arrays[0][1] else 0.0
    return sum(size for size, is_fast in arrays if fast or not is_fast)


def _sent(program: Program, computation: Computation, instruction: Instruction) -> Counter:
    """Bytes that one of n devices sends in a collective, if the instruction is one, or a fusion around one.

    On a ring, of an operand of b bytes: all-gather (n - 1) b, reduce-scatter and all-to-all (n - 1) / n b, all-reduce
    2 (n - 1) / n b, since it is a reduce-scatter and an all-gather; a permutation sends b.
    """
    sent = Counter()
    if instruction.operation == "fusion":
        (inner,) = instruction.called("calls")
        for line in program.computations[inner].values():
            sent += _sent(program, program.computations[inner], line)
        if "all-reduce-scatter" in instruction.name + inner:  # whose result is sliced at once
            sent = Counter({("reduce-scatter", groups): size / 2 for (_, groups), size in sent.items()})
        return sent
    kind = instruction.operation.removesuffix("-start")
    if kind not in COLLECTIVES:
        return sent
    groups = _groups(program, instruction)
    n = len(groups[0])
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
    sent[kind, groups] = factor * sum(computation[name].size for name in instruction.operands)
    return sent


def _groups(program: Program, instruction: Instruction) -> Groups:
    """The groups of devices of a collective: `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)`,
    `mesh['fsdp'=2,'tp'=2] {'tp'}`, or all in one where none are named. Of a permutation, its pairs of sender and
    receiver."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", instruction.rest)
    if listed is not None:
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", instruction.rest)
    named = re.search(r"replica_groups=mesh\[([^\]]+)\] \{([^}]*)\}", instruction.rest)
    if named is not None:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        own = re.findall(r"'(\w+)'", named[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        ids = np.moveaxis(ids, [list(sizes).index(axis) for axis in own], range(-len(own), 0))
        return tuple(map(tuple, ids.reshape(-1, math.prod(sizes[axis] for axis in own)).tolist()))
    if counted is None:
        if re.search(r"replica_groups=(?!\{\})", instruction.rest) is not None:
            raise ValueError(f"groups of devices in an unknown form: {instruction.rest}")
        return (tuple(range(program.devices)),)
    shape, dims = ([int(size) for size in part.split(",")] for part in counted.groups()[:2])
    ids = np.arange(math.prod(dims)).reshape(dims)
    if counted[3] is not None:
        ids = ids.transpose([int(axis) for axis in counted[3].split(",")])
    return tuple(map(tuple, ids.reshape(shape).tolist()))


# --- bounds -------------------------------------------------------------------------------------------------------


def spanned(groups: Groups, coordinates: Sequence[Sequence[int]]) -> frozenset[int]:
    """The physical axes of the network that the devices of a group span, in any of the groups. `coordinates` are those
    of the mesh's devices, in its order (`[device.coords for device in mesh.devices.flat]`)."""
    return frozenset(
        axis
        for group in groups
        for axis in range(len(coordinates[0]))
        if len({coordinates[device][axis] for device in group}) > 1
    )


def network_bound(traffic: Traffic, topology: Topology, coordinates: Sequence[Sequence[int]]) -> float:
    """Seconds that the messages of a step take at least.

    A collective uses the links of the axes that its devices span, and no others. So all bytes that must stay within
    some of the axes go over the links of these: the bound is the largest over all sets of axes. It is reached if each
    collective uses all of its axes at once and collectives on different axes run at the same time.
    """
    along, rate = links(topology), rates(topology).link
    sent = Counter()
    for (_, groups), size in traffic.messages.items():
        sent[spanned(groups, coordinates)] += size
    sent.pop(frozenset(), None)
    axes = [axis for axis, count in enumerate(along) if count]
    sets = [frozenset(some) for n in range(1, len(axes) + 1) for some in itertools.combinations(axes, n)]
    return max(
        (
            sum(size for used, size in sent.items() if used <= some) / (rate * sum(along[axis] for axis in some))
            for some in sets
        ),
        default=0.0,
    )


# --- what fsdp x tp must send -------------------------------------------------------------------------------------


def least_sent(
    student: Transformer,
    trained: Transformer,
    teacher: Transformer | None,
    mesh: Mesh,
    batch: int,
    student_time: int,
    teacher_time: int,
    tail_gradients: int,
    width: int,
) -> dict[str, float]:
    """Bytes that one device must send in a step if parameters are stored in slices over fsdp and products are divided
    over tp, by kind of collective; numbers of `width` bytes travel. `trained` is the student, None where it is frozen.

    Of n = fsdp and t = tp devices on a ring, of b bytes in all: all-gather, reduce-scatter and all-to-all send
    (n - 1) / n b, an all-reduce twice that. A parameter is P / t numbers after its gather over fsdp.

    * Layers of the student: gathered for the forward pass and, but for the last, again for the backward pass; their
      gradients reduce-scattered, that of the last layer once for each loss that is balanced by it (`tail_gradients`).
    * Unembedding of the student: gathered once, its gradient reduce-scattered once. The teacher: gathered once.
    * Tables that are looked up in are not gathered: each device sends its ids (4 bytes), and gets the rows that it
      asked for by an all-to-all, which the gradient takes back: once for all tables, since their rows are added up.
    * Gradients of what fsdp does not divide (norms, biases): all-reduced over the devices that hold a copy.
    * Over t, all-reduces of an activation, [batch / n, time, embed]: two in each layer forward, behind attention and
      the MLP; two backward, before them, and one before the unembedding, those of the last layer and the unembedding
      once for each of the `tail_gradients`; one for each table that is looked up in.

    What is small is left out: a few float32 numbers for each position from the logits, and sums over the batch. A run
    that keeps all layers as they were gathered (`--remat none`, if they fit) sends less.
    """
    n, t = mesh.shape["fsdp"], mesh.shape["tp"]
    blocks, last, unembedding = _whole(student, mesh)
    gathers = 2 * blocks + last + unembedding
    scatters = blocks + tail_gradients * last + unembedding
    copies = sum(
        2 * leaf.size * (n * t - 1) / (n * t)  # a bias is divided over t, but is a copy on n devices: too small to tell
        for leaf, spec in zip(jax.tree.leaves(trained), _layouts_of(specs(trained, mesh)), strict=True)
        if "fsdp" not in spec
    )
    hidden = batch / n * student_time * student.config.embed
    tables = 1 + (student.expansion is not None)
    rows = hidden * (tables + any(table is not None for table in (trained.embed, trained.expansion)))
    ids = batch / n * student_time * tables
    reduces = hidden * (2 * student.config.layers + 2 * (student.config.layers - 1) + 3 * tail_gradients + tables)
    if teacher is not None:
        gathers += sum(_whole(teacher, mesh))
        hidden = batch / n * teacher_time * teacher.config.embed
        tables = 1 + (teacher.expansion is not None)
        rows += hidden * tables
        ids += batch / n * teacher_time * tables
        reduces += hidden * (2 * teacher.config.layers + tables)
    return {
        "all-gather": (n - 1) / n * width * gathers + (n - 1) * 4 * ids,
        "reduce-scatter": (n - 1) / n * width * scatters,
        "all-reduce": 2 * (t - 1) / t * width * reduces + width * copies,
        "all-to-all": (n - 1) / n * width * rows,
        "collective-permute": 0.0,
    }


def _whole(model: Transformer, mesh: Mesh) -> tuple[float, ...]:
    """Numbers that a device holds of blocks, last block and unembedding once they are gathered over fsdp."""
    layouts = specs(model, mesh)

    def of(part: str) -> float:
        pairs = zip(jax.tree.leaves(getattr(model, part)), _layouts_of(getattr(layouts, part)), strict=True)
        return sum(leaf.size / (mesh.shape["tp"] if "tp" in spec else 1) for leaf, spec in pairs if "fsdp" in spec)

    return of("blocks"), of("last"), of("embed" if model.unembed is None else "unembed")


def _layouts_of(tree: PyTree) -> list[P]:
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, P))
