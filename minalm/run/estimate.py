"""What a training step takes of given chips: memory, arithmetic, and the time that the arithmetic needs at least.

Nothing runs here and nothing is timed. The step is compiled for the chips, which need not be there. The compiler says
how much memory it takes. Its arithmetic is counted in the jaxpr: that knows how often each loop goes round, its shapes
inside `shard_map` are those of one device, and what `jax.checkpoint` computes again stands in it. (The compiler's own
`cost_analysis` counts the body of each loop once.) benchmarks/roofline.py also reads the compiled program.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from minalm.distill.losses import LossConfig
from minalm.errors import InputError
from minalm.models.bolmo import Bolmo
from minalm.models.config import BolmoConfig, ModelConfig
from minalm.models.transformer import Transformer
from minalm.parallel.mesh import ROWS, shardings
from minalm.run.models import Models
from minalm.run.texts import DataConfig
from minalm.types import AlignedChunks, Batch, BytePlaces, Tokens

# --- chips --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    `memory` is what the compiler (libtpu 0.0.42.1) calls available HBM when it refuses a program that is too large: on
    most chips less than the page of the chip says. `peak` is from that page: docs.cloud.google.com/tpu/docs/v4, /v5e,
    /v5p and /v6e.
    """

    name: str
    memory: int  # bytes of HBM that a program can use
    peak: float  # bfloat16 FLOP/s
    dimensions: int  # of the network: a chip has a neighbour on both sides along each
    configuration: str | None = None  # libtpu's name for both cores of a chip working as one device


CHIPS = {
    "v4": Chip("TPU v4", int(30.75 * 2**30), 275e12, 3, "megacore"),
    "v5e": Chip("TPU v5e", int(15.75 * 2**30), 197e12, 2),
    "v5p": Chip("TPU v5p", int(95.74 * 2**30), 459e12, 3),
    "v6e": Chip("TPU v6e", int(31.25 * 2**30), 918e12, 2),
}
# JAX's name of a device begins with -> dense bfloat16 FLOP/s; the first that fits. GPUs: NVIDIA's data sheets.
PEAKS = {
    "TPU v4": CHIPS["v4"].peak,
    "TPU v5 lite": CHIPS["v5e"].peak,
    "TPU v5e": CHIPS["v5e"].peak,
    "TPU v5": CHIPS["v5p"].peak,
    "TPU v6": CHIPS["v6e"].peak,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}
EXAMPLES = "v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are connected; without a chip: virtual CPU devices."""

    name: str
    chip: Chip | None
    shape: tuple[int, ...]


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


def topology_devices(topology: Topology) -> Sequence[jax.Device]:
    """The devices of a topology, real enough to compile for. Must come before anything else asks JAX for devices.

    Raises InputError without the compiler for TPUs, or if it knows no such chips.
    """
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
    return block_flops(config, batch, time, config.layers) + 2.0 * batch * time * config.vocab_size * config.embed


def block_flops(config: ModelConfig, batch: int, time: int, layers: int) -> float:
    """FLOPs of the matrix products of the first `layers` blocks."""
    heads = config.embed * config.head_dim * (2 * config.heads + 2 * config.kv_heads)  # q, o and k, v
    weights = layers * (heads + 3 * config.embed * config.mlp)
    pairs = sum(_pairs(time, window) for window in config.windows[:layers])
    return 2.0 * batch * time * weights + 4.0 * batch * config.heads * config.head_dim * pairs


def byte_flops(config: BolmoConfig, batch: int, time: int) -> dict[str, float]:
    """FLOPs of the matrix products of one forward pass over [batch, time] bytes by what reads every byte of a Bolmo:
    its cells (what their recurrence needs), the rest of its byte blocks, and all around them."""
    blocks = config.encoder_layers + config.decoder_layers
    maps = 4 * config.embed**2 + 2 * config.embed * config.heads + 3 * config.embed * config.mlp
    around = 3 * config.embed**2 + 2 * config.vocab_size * config.embed  # predictor, depool; head
    each = {
        "cells": 2 * blocks * config.heads * config.key_dim * config.value_dim,
        "byte blocks": blocks * maps,
        "predictor, projection, head": around,
    }
    return {name: 2.0 * batch * time * weights for name, weights in each.items()}


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


class Work(NamedTuple):
    """What a step has to do, as far as it is known."""

    flops: float  # that the models need, with nothing computed twice
    peak: float | None  # FLOP/s of all chips together


def work(data: DataConfig, models: Models, losses: LossConfig, mesh: Mesh, dtype: jnp.dtype) -> Work:
    """What a run's step has to do."""
    kind = mesh.devices.flat[0].device_kind
    return Work(run_flops(data, models, losses), peak(kind, mesh.size, dtype))


def peak(kind: str, chips: int, dtype: jnp.dtype) -> float | None:
    """bfloat16 FLOP/s of some chips of a kind, as JAX calls it (`Device.device_kind`); None where that is not known, or
    not what a step is computed in."""
    found = next((flops for name, flops in PEAKS.items() if kind.startswith(name)), None)
    return None if found is None or dtype != jnp.bfloat16 else found * chips


# --- FLOPs, from the jaxpr ----------------------------------------------------------------------------------------


def run_flops(data: DataConfig, models: Models, losses: LossConfig) -> float:
    """`model_flops` of a run's step."""
    if parts := bolmo_flops(data, models, losses):
        return sum(parts.values())
    teacher = models.teacher.model.config if losses.needs_teacher else None
    student = models.student.model.config
    return model_flops(student, teacher, data.batch_size, data.student_length, data.teacher_length)


def bolmo_flops(data: DataConfig, models: Models, losses: LossConfig) -> dict[str, float]:
    """`model_flops` of a step of a Bolmo by its parts; of another student nothing. In stage 1 the first blocks of the
    teacher in its middle are frozen: their backward pass has the product for the inputs alone."""
    student = models.student.model.config
    if not isinstance(student, BolmoConfig):
        return {}
    rows, patches = data.batch_size, min(data.student_length, data.teacher_length)
    parts = {name: 3.0 * flops for name, flops in byte_flops(student, rows, data.student_length).items()}
    parts["pooling"] = 3.0 * 2.0 * rows * patches * student.embed**2
    if not losses.guided:
        return {**parts, "blocks of patches": 3.0 * block_flops(student.blocks, rows, patches, student.blocks.layers)}
    parts["first blocks of patches"] = 2.0 * block_flops(student.blocks, rows, patches, losses.representation_blocks)
    return {**parts, "teacher": forward_flops(models.teacher.model.config, rows, data.teacher_length)}


def product_flops(jaxpr: jax.extend.core.Jaxpr, platform: str) -> float:
    """FLOPs of the matrix products of a program on one device, 2 m k n each; all else in a transformer is small.

    A loop counts its body as often as it goes round, a condition its most expensive branch, code that depends on the
    platform the branch of `platform`, and a Pallas kernel its body for each step of its grid. The blocks above the
    diagonal, which splash attention skips, are left out; the blocks that it skips for a window are not. What stands
    outside `shard_map` counts whole. Raises ValueError for products in a loop whose number of rounds is not known.
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


# --- the step, compiled -------------------------------------------------------------------------------------------


def batch_shapes(data: DataConfig, models: Models, mesh: Mesh, unbiased: bool = False) -> Batch:
    """What `batches.make_batch` makes for these models, as shapes on the mesh; `unbiased`: for such chunks."""

    def rows(*length: int, dtype: Any = np.int32) -> np.ndarray:
        return np.zeros((data.batch_size, *length), dtype)

    def tokens(model: Transformer | Bolmo, length: int) -> Tokens:
        suffix = None if model.expansion is None else rows(length)
        ends = rows(chunks) if isinstance(model, Bolmo) else None
        segments = rows(length) if data.packing else None
        return Tokens(rows(length), rows(length), rows(length, dtype=np.float32), suffix, ends, segments=segments)

    student, teacher = data.student_length, data.student_length if models.teacher is None else data.teacher_length
    chunks = min(student, teacher)
    batch = Batch(
        student=tokens(models.student.model, student),
        teacher=models.teacher and tokens(models.teacher.model, teacher),
        chunks=AlignedChunks(
            student_chunk=rows(student),
            teacher_chunk=rows(teacher),
            student_chunk_end=rows(chunks),
            teacher_chunk_end=rows(chunks),
            before_space=rows(chunks, dtype=bool),
            text_bytes=rows(chunks),
            unbiased=rows(chunks, dtype=bool) if unbiased else None,
            text_end=rows(chunks, dtype=bool) if data.packing else None,
        ),
        bytes=models.prefixes and BytePlaces(*(rows(student) for _ in range(3))),
        left_out=rows() if data.packing else rows(dtype=bool),
    )
    layout = shardings(ROWS, mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), batch)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step takes of each chip. Bytes and FLOPs are those of one chip unless said otherwise."""

    topology: Topology
    mesh: Mesh
    compile_seconds: float
    memory: Mapping[str, int]  # what lies in HBM -> bytes
    flops: float  # of the matrix products
    model_flops: float  # of the whole step on all chips, with nothing computed twice
    steps: int  # of the run
    flops_of: Mapping[str, float]  # the model's own FLOPs by what they are; empty: not told apart
    compiled: jax.stages.Compiled

    @property
    def compute_bound(self) -> float:
        """Seconds that a step takes at least, if its matrix products run at the chip's peak."""
        return self.flops / self.topology.chip.peak

    def check(self) -> None:
        """Raises InputError if it does not fit."""
        chip, total = self.topology.chip, sum(self.memory.values())
        if chip is not None and total > chip.memory:
            needs = f"a chip would need {total / 2**30:.2f} GiB and has {chip.memory / 2**30:.2f} GiB"
            raise does_not_fit(self.topology, self.mesh, needs)


def estimate(
    step: Any,
    arguments: tuple[PyTree, PyTree, PyTree],
    topology: Topology,
    mesh: Mesh,
    model_flops: float,
    steps: int,
    flops_of: Mapping[str, float] | None = None,
) -> Estimate:
    """Compiles a step and says what it takes. Raises InputError if it does not fit.

    `step` is the function that the run would call, from `jax.jit`, and `arguments` are its arguments, state, frozen and
    batch, as shapes on the mesh. `model_flops`, `steps` and `flops_of` are kept as they are.
    """
    state, frozen, batch = arguments
    parts = {
        "trained parameters": state.student,
        "optimizer": state.optimizer,
        "teacher and other frozen": frozen,
        "batch": batch,
    }
    began = time.monotonic()
    traced = step.trace(*arguments)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if error.error_code_string != "RESOURCE_EXHAUSTED":
            raise
        raise does_not_fit(topology, mesh, str(error).splitlines()[0].rstrip(".")) from error
    found = Estimate(
        topology=topology,
        mesh=mesh,
        compile_seconds=time.monotonic() - began,
        memory=memory(parts, compiled.memory_analysis()),
        flops=product_flops(traced.jaxpr.jaxpr, "tpu" if topology.chip else "cpu"),
        model_flops=model_flops,
        steps=steps,
        flops_of=flops_of or {},
        compiled=compiled,
    )
    found.check()
    return found


def memory(parts: Mapping[str, PyTree], analysis: Any) -> dict[str, int]:
    """Bytes that lie in the memory of one device during a step, by what they are. `parts` are the step's arguments as
    shapes on a mesh, `analysis` is the compiled program's. A donated argument and the result in its place are one."""
    found = {}
    for name, tree in parts.items():
        leaves = jax.tree.leaves(tree)
        found[name] = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    padding = max(0, analysis.argument_size_in_bytes - sum(found.values()))
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return found | {
        "padding and results": padding + results,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


def does_not_fit(topology: Topology, mesh: Mesh, reason: str) -> InputError:
    """The sentence about a run that is too large for its chips."""
    return InputError(
        f"the run does not fit {topology.name} as {mesh.shape['fsdp']}x{mesh.shape['tp']} ({reason}): "
        "use more chips, a smaller --batch-size, --accumulation (the batch in microbatches), or --remat full"
    )
