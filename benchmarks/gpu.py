"""Seconds of a training step on one GPU, and of its arithmetic peak; see gpu.sh. A case is a process of its own.

python benchmarks/gpu.py [--tiny]      # --tiny: small models on whatever device there is, to try the script
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PEAK = 989e12  # dense bfloat16 FLOP/s of an H100 SXM and of an H200, NVIDIA's data sheets


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    attention: str  # cudnn, or blocks of that many queries
    accumulation: int = 1
    tiny: bool = False


CASES = (
    Case("SmolLM2-135M", "cudnn"),
    Case("SmolLM2-135M", "blocks of 128"),
    Case("SmolLM2-135M", "blocks of 512"),
    Case("Gemma2-2B", "blocks of 128", accumulation=4),
    Case("Gemma2-2B", "blocks of 512", accumulation=4),
)


def architecture(case: Case):
    """The teacher's shape. The layers of the small ones suffice to have every kind of layer."""
    from minalm.models.config import ModelConfig

    smol = ModelConfig(
        vocab_size=49152, embed=576, mlp=1536, layers=30, heads=9, kv_heads=3, head_dim=64, windows=(None,) * 30
    )
    gemma = ModelConfig(
        vocab_size=256_000,
        embed=2304,
        mlp=9216,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        windows=(4096, None) * 13,
        attention_softcap=50.0,
        final_softcap=30.0,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=48.0,
    )
    shape = smol if case.model.startswith("Smol") else gemma
    if case.tiny:
        heads = {"heads": 3, "kv_heads": 1} if shape is smol else {"heads": 2, "kv_heads": 1}
        shape = dataclasses.replace(
            shape, vocab_size=4096, embed=48, mlp=64, layers=2, head_dim=16, windows=shape.windows[:2], **heads
        )
    return shape


def measure(case: Case) -> dict[str, float | str]:
    """Median seconds of a step, bytes at the peak, and FLOPs that the models need."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np

    import train
    from minalm import batches as batching
    from minalm.distill.losses import LossConfig
    from minalm.models import attention, head
    from minalm.models.transformer import initialize
    from minalm.parallel.mesh import make_mesh, shard_rows
    from minalm.run import estimate
    from minalm.run.compute import ComputeConfig
    from minalm.run.optimizer import OptimizerConfig, make_optimizer
    from minalm.text.corpus import text_corpus
    from minalm.text.stdlib import stdlib_documents
    from minalm.tokenization.suffixes import longest_suffix
    from minalm.tokenization.tokenizer_json import load_vocabulary
    from minalm.tokenization.vocabulary import byte_vocabulary

    attention.USE_CUDNN = case.attention == "cudnn"
    if not attention.USE_CUDNN:
        attention.QUERY_BLOCK = int(case.attention.split()[-1])
    rows, ours, theirs = (4, 128, 32) if case.tiny else (32, 2048, 512)
    teacher_shape = architecture(case)
    student_shape = dataclasses.replace(
        teacher_shape, vocab_size=320, tied=False, expansion_size=teacher_shape.vocab_size
    )
    compute = ComputeConfig(compute_dtype="bfloat16", remat="dots", accumulation=case.accumulation)
    losses, mesh = LossConfig(sft=1.0, alm=1.0, latents=1.0), make_mesh(1, 1)

    def side(shape, seed, dtype):
        make = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), initialize(shape, key)))
        whole = np.arange(shape.vocab_size)
        mask = head.VocabularyMask(np.ones_like(whole, bool), whole % 3 == 0)
        return SimpleNamespace(model=make(jax.random.key(seed)), mask=mask)

    teacher, student = side(teacher_shape, 1, compute.dtype), side(student_shape, 0, jnp.float32)
    trained = eqx.tree_at(lambda m: m.expansion, jax.tree.map(lambda _: True, student.model), False)
    optimizer = make_optimizer(OptimizerConfig(steps=10_000))
    models = SimpleNamespace(student=student, teacher=teacher, trained=trained)
    state, frozen = train.initial_state(models, mesh, optimizer, compute.dtype)
    del models, teacher, student

    tokens = load_vocabulary(ROOT / "quickstart_teacher")
    in_bytes = byte_vocabulary(tokens)
    sides = (
        batching.Side(in_bytes, longest_suffix(tokens, in_bytes), ours),
        batching.Side(tokens, None, theirs),
    )
    corpus = text_corpus(stdlib_documents("training", 0.05), ours)
    steps = 2 if case.tiny else 8
    batches = [shard_rows(batching.make_batch(corpus.batch(0, step, rows), *sides), mesh) for step in range(steps)]

    step = jax.jit(functools.partial(train.train_step, losses, compute, optimizer, mesh), donate_argnums=0)
    began = time.monotonic()
    compiled = step.lower(state, frozen, batches[0]).compile()
    compiling = time.monotonic() - began
    used = "cudnn" if "cudnn" in compiled.as_text() and "fmha" in compiled.as_text() else "blocks"
    seconds = []
    for number, batch in enumerate([batches[0], *batches]):
        began = time.monotonic()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        if number:  # the first one warms up
            seconds.append(time.monotonic() - began)
    assert np.isfinite([float(value) for value in metrics.values()]).all(), metrics
    (memory,) = [device.memory_stats() or {} for device in jax.local_devices()[:1]]
    return {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "compile": compiling,
        "flops": estimate.model_flops(student_shape, teacher_shape, rows, ours, theirs),
        "peak": memory.get("peak_bytes_in_use", 0),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "used": used,
        "device": f"{jax.local_devices()[0].device_kind}, jax {jax.__version__}",
    }


def main(tiny: bool) -> None:
    """Prints a table, a row for each case as soon as it is measured."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    columns = "model, attention, microbatches", "s a step (least)", "model FLOPs used", "peak GB (temporaries)"
    for number, case in enumerate(dataclasses.replace(case, tiny=tiny) for case in CASES):
        arguments = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(
                f"| {case.model}, {case.attention}, {case.accumulation} | failed: {done.stderr[-1500:]} |", flush=True
            )
            continue
        m = json.loads(done.stdout.splitlines()[-1])
        if number == 0:
            print(f"{m['device']}\n\n| {' | '.join(columns)} | compile s | in the program |\n|---|---|---|---|---|---|")
        print(
            f"| {case.model}, {case.attention}, {case.accumulation} | {m['seconds']:.3f} ({m['least']:.3f}) | "
            f"{m['flops'] / m['seconds'] / PEAK:.1%} | {m['peak'] / 1e9:.1f} ({m['temporary'] / 1e9:.1f}) | "
            f"{m['compile']:.0f} | {m['used']} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models on whatever device there is")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(Case(**json.loads(given.case)))))
    else:
        main(given.tiny)
