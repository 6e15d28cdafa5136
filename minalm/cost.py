"""What a training step costs on given chips, counted from its program: arithmetic, memory traffic, messages, bounds.

Nothing runs here and nothing is timed. Three sources, each for what it says exactly:

* the jaxpr of the step, for matrix products. It knows how often each loop goes round, inside `shard_map` its shapes are
  those of one device, and what `jax.checkpoint` computes again stands in it.
* the text of the compiled program, for collectives and for bytes that go through memory, each multiplied by the trips of
  the loops around it. The compiler's own totals (`cost_analysis`) count the body of every loop once, whatever its trips.
* the architecture, for the least that the same mathematics needs: `model_flops` and `least_sent`.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import jax
import jax.extend.core
from jax.sharding import Mesh
from jaxtyping import PyTree

from minalm.model import ModelConfig, Transformer
from minalm.sharding import P, specs
from minalm.text import InputError

# --- chips --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    Memory and arithmetic: the page of each chip in Google's documentation, docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p
    and /v6e. The speed of a link, one way: the table of "How to Think About TPUs", jax-ml.github.io/scaling-book/tpus,
    which is a tenth below what Google's pages advertise.
    """

    name: str
    memory: int  # bytes of HBM
    memory_rate: float  # bytes a second from and to HBM
    peak: float  # bfloat16 FLOP a second
    link_rate: float  # bytes a second over one link, one way
    dimensions: int  # of the network: a chip has a neighbour on both sides along each
    closes: Callable[[tuple[int, ...], int], bool]  # whether a slice of this shape is a ring along a dimension
    configuration: str | None = None  # libtpu's name for both cores of a chip working as one device


def _whole_cubes(shape: tuple[int, ...], dimension: int) -> bool:
    return all(size % 4 == 0 for size in shape)  # "3D mesh and 3D torus" on the page of v4


def _whole_pod(shape: tuple[int, ...], dimension: int) -> bool:
    return shape[dimension] == 16  # the optical links between the ends of a pod's rows


CHIPS = {
    "v4": Chip("TPU v4", 32 * 2**30, 1.2e12, 275e12, 4.5e10, 3, _whole_cubes, "megacore"),
    "v5e": Chip("TPU v5e", 16 * 2**30, 8.19e11, 197e12, 4.5e10, 2, _whole_pod),
    "v5p": Chip("TPU v5p", 95 * 2**30, 2.765e12, 459e12, 9e10, 3, _whole_cubes),
    "v6e": Chip("TPU v6e", 32 * 2**30, 1.638e12, 918e12, 9e10, 2, _whole_pod),
}
EXAMPLES = "v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are connected; without a chip: virtual CPU devices."""

    name: str
    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def links(self) -> int:
        """Links of the chip that has the fewest: two along a ring, one at the end of a row, none where it is alone."""
        return sum(
            0 if size == 1 else 2 if size > 2 and self.chip.closes(self.shape, dimension) else 1
            for dimension, size in enumerate(self.shape)
        )


def parse_topology(name: str) -> Topology:
    """`v4:2x2x4` or `cpu:8`. Raises InputError for what is neither."""
    kind, _, shape = name.partition(":")
    if re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", shape):
        sizes = tuple(map(int, shape.split("x")))
        if kind == "cpu" and len(sizes) == 1:
            return Topology(name, None, sizes)
        if kind in CHIPS and len(sizes) == CHIPS[kind].dimensions:
            return Topology(name, CHIPS[kind], sizes)
    raise InputError(f"--compile-only {name} is no topology that is known here: give one like {EXAMPLES}")


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, real enough to compile for. Raises InputError without the compiler, or if it knows no
    such chips. Must come before all else that asks jax for devices."""
    jax.config.update("jax_platforms", "cpu")  # compiles for TPUs too, and takes none
    if topology.chip is None:
        jax.config.update("jax_num_cpu_devices", topology.shape[0])
        return jax.devices()
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--compile-only {topology.name} needs the compiler for TPUs: install it with pip install 'minalm[tpu]'"
        )
    from jax.experimental import topologies

    os.environ |= {  # ask nobody which chips this machine has, nor warn of it; other processes may use libtpu too
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    options = {"chip_config_name": topology.chip.configuration} if topology.chip.configuration else {}
    try:
        return topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"--compile-only {topology.name}: TPU's compiler refuses it ({error}): give one like {EXAMPLES}"
        ) from error


# --- what the mathematics needs -----------------------------------------------------------------------------------


def forward_flops(config: ModelConfig, batch: int, time: int) -> float:
    """FLOPs of the matrix products of one forward pass over [batch, time] tokens, logits at every position included.

    A product of [m, k] and [k, n] is 2 m k n. Attention counts the pairs of query and key that see each other: about
    half of time x time, or less under a window.
    """
    heads = config.embed * config.head_dim * (2 * config.heads + 2 * config.kv_heads)  # q, o and k, v
    weights = config.layers * (heads + 3 * config.embed * config.mlp) + config.vocab_size * config.embed
    pairs = sum(_pairs(time, window) for window in config.windows)
    return 2.0 * batch * time * weights + 4.0 * batch * config.heads * config.head_dim * pairs


def _pairs(time: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees: query t sees the last `window` of its t + 1 keys."""
    seen = min(time, window or time)
    return seen * (seen + 1) // 2 + (time - seen) * seen


def model_flops(
    student: ModelConfig, teacher: ModelConfig | None, batch: int, student_time: int, teacher_time: int
) -> float:
    """FLOPs of a step without anything computed twice: the student forward and backward (a backward pass is twice a
    forward pass: a product each for the inputs and for the weights), and the teacher forward."""
    total = 3.0 * forward_flops(student, batch, student_time)
    return total if teacher is None else total + forward_flops(teacher, batch, teacher_time)


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


# --- FLOPs, from the jaxpr ----------------------------------------------------------------------------------------


def product_flops(jaxpr: jax.extend.core.Jaxpr, platform: str) -> float:
    """FLOPs of the matrix products of a program on one device, 2 m k n each; all else in a transformer is small.

    A loop counts its body as often as it goes round, a condition its dearest branch, code that depends on the platform
    the branch of `platform`, and a Pallas kernel its body for each step of its grid. Splash attention skips the blocks above
    the diagonal as it runs, which are left out; what it skips for a window is not. What stands outside of `shard_map` counts whole. Raises ValueError for products in a loop whose
    number of rounds is not known.
    """

    def of(inner) -> float:
        return product_flops(inner.jaxpr if isinstance(inner, jax.extend.core.ClosedJaxpr) else inner, platform)

    total = 0.0
    for equation in jaxpr.eqns:
        values, name = equation.params, equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = values["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        elif name == "scan":
            total += values["length"] * of(values["jaxpr"])
        elif name == "while":
            if of(values["body_jaxpr"]):
                raise ValueError("there are matrix products in a loop whose number of rounds is not known")
        elif name == "cond":
            platforms = values.get("branches_platforms")  # of lax.platform_dependent; None: all others
            chosen = [] if platforms is None else [p is None or platform in p for p in platforms]
            branches = [of(branch) for branch in values["branches"]]
            total += branches[chosen.index(True)] if True in chosen else max(branches)
        elif name == "pallas_call":
            grid, called = values["grid_mapping"].grid, str(values["name"])
            share = 1.0
            if called.startswith("splash"):  # [batch, head, query, key] forward, [batch, key, head, query] backward
                across, along = grid[-3 if "dkv" in called else -2], grid[-1]
                share = (along + 1) / (2 * along) if across == along else 1.0
            total += share * math.prod(grid) * of(values["jaxpr"])
        else:  # calls of all kinds
            total += sum(of(inner) for inner in jax.extend.core.jaxprs_in_params(values))
    return total


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


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one device and one step."""

    memory: float  # bytes read from and written to HBM
    sent: Mapping[str, float]  # kind of collective -> bytes sent to other devices


def traffic(program: Program, trips: bool = True, fast: bool = False) -> Traffic:
    """What a compiled program moves, by the model of memory of XLA's own cost analysis: an instruction reads its operands
    and writes its results, of which slices and updates in place touch a slice, and what a fusion holds inside costs
    nothing. A collective counts once, where it starts or where the fusion that it became part of does.

    `trips` counts the body of a loop as often as it goes round, and `fast` counts what lies in the chip's fast memory
    too. Without trips and with fast memory, a CPU's program gives what `cost_analysis()["bytes accessed"]` says. A TPU's
    gives about a quarter less, on purpose: there an asynchronous copy counts again where it ends, and a slice or an
    update behind a bitcast counts as the whole. Kernels, which count for nothing there, read operands and write results.
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
    return Traffic(float(total["memory"]), {kind: float(total[kind]) for kind in COLLECTIVES})


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
            sent = Counter({"reduce-scatter": sent["all-reduce"] / 2})
        return sent
    kind = instruction.operation.removesuffix("-start")
    if kind not in COLLECTIVES:
        return sent
    n = _group_size(program, instruction)
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
    sent[kind] = factor * sum(computation[name].size for name in instruction.operands)
    return sent


def _group_size(program: Program, instruction: Instruction) -> int:
    """Devices that take part in one group of a collective: `{{0,1},{2,3}}`, `[2,2]<=[4]`, or all where none are named."""
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.rest)) is not None:
        return listed[1].count(",") + 1
    if (counted := re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.rest)) is not None:
        return int(counted[1])
    return program.devices


# --- bounds -------------------------------------------------------------------------------------------------------


def memory(arguments: Mapping[str, PyTree], analysis: Any) -> dict[str, int]:
    """Bytes that lie in the memory of one device during a step, by what they are. `arguments` are the step's as shapes on
    a mesh, `analysis` is the compiled program's. A donated argument and the result in its place are one."""
    found = {}
    for name, tree in arguments.items():
        leaves = jax.tree.leaves(tree)
        found[name] = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    padding = max(0, analysis.argument_size_in_bytes - sum(found.values()))
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return found | {
        "padding and results": padding + results,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step takes of each chip. Bytes and FLOPs are those of one chip unless said otherwise."""

    topology: Topology
    mesh: tuple[int, int]  # fsdp, tp
    compile_seconds: float
    memory: Mapping[str, int]  # what lies in HBM -> bytes
    flops: float
    model_flops: float  # of the whole step on all chips
    traffic: Traffic
    least_sent: Mapping[str, float]
    steps: int

    @property
    def devices(self) -> int:
        return math.prod(self.mesh)

    def bounds(self) -> dict[str, float]:
        """Seconds that a step takes at least, by what would be the only limit. A chip sends over all its links at once,
        and the chip that has the fewest links is what all others wait for."""
        chip = self.topology.chip
        sent = sum(self.traffic.sent.values())
        return {
            "compute": self.flops / chip.peak,
            "memory": self.traffic.memory / chip.memory_rate,
            "network": sent / (self.topology.links * chip.link_rate) if sent else 0.0,
        }

    def check(self) -> None:
        """Raises InputError if it does not fit."""
        chip, total = self.topology.chip, sum(self.memory.values())
        if chip is not None and total > chip.memory:
            raise does_not_fit(self.topology, self.mesh, f"a chip would need {total / 2**30:.1f} GiB")


def compiler_need(message: str) -> str:
    """What the compiler says, in an error, that a chip would need: one of its two ways to put it."""
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    if found is None:
        return "a chip would need more"
    size, unit, used, used_unit = found.groups()
    return f"a chip would need {size} {unit}iB of temporaries" if size else f"a chip would need {used} {used_unit}iB"


def does_not_fit(topology: Topology, mesh: tuple[int, int], need: str) -> InputError:
    """The sentence about a run that is too large for its chips."""
    return InputError(
        f"the run does not fit {topology.name} as {mesh[0]}x{mesh[1]}: {need} and has "
        f"{topology.chip.memory / 2**30:.0f} GiB: use more chips, a smaller --batch-size, or --remat full"
    )
