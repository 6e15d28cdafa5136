"""One training step on CPU: time, temporary memory and FLOPs, and how they grow.

    python benchmarks/step.py [--tables base growth]

A model of Gemma 2's shape (width 256, 4 layers, 4 heads, 2 key and value heads of 64 channels, MLP 1024) becomes
byte-level: 320 rows, untied, frozen expansion; sft + alm + latents under gradmag. Weights are random, the text is the
standard library in the quickstart's tokens, so the chunks are real ones. Every case is a process of its own.

"of the limit" is the time that the step's matrix products would take at the rate of one large product on the same
machine, in the same process, over the measured time. The numbers of the reference are those of its own measurement
on a machine like this one (tokenkit, jax 0.5.0), not of this one.
"""

import argparse
import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

REFERENCE = {  # (vocabulary, dtype, batch) -> median seconds, temporary bytes
    (256_000, "float32", 8): (7.3, 2.44e9),
    (256_000, "float32", 16): (12.2, 4.88e9),
    (256_000, "bfloat16", 8): (6.8, 2.39e9),
    (32_000, "float32", 8): (4.5, 1.52e9),
    (32_000, "bfloat16", 8): (3.8, 1.47e9),
}


@dataclasses.dataclass(frozen=True)
class Case:
    vocabulary: int = 256_000
    dtype: str = "float32"
    batch: int = 8
    student_length: int = 512
    teacher_length: int = 128
    devices: int = 1
    fsdp: int = 1
    tp: int = 1
    accumulation: int = 1
    remat: str = "dots"
    losses: tuple[str, ...] = ("sft", "alm", "latents")
    steps: int = 5


def measure(case: Case) -> dict[str, float]:
    """Seconds, bytes and FLOPs of one case, in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import train
    from minalm import batches as batching
    from minalm.distill.losses import LOSSES, LossConfig
    from minalm.huggingface.folder import GenerationConfig
    from minalm.huggingface.loaded import LoadedModel
    from minalm.models.config import ModelConfig
    from minalm.models.head import VocabularyMask
    from minalm.models.transformer import initialize
    from minalm.parallel.mesh import make_mesh, shard_rows
    from minalm.presets import TEACHER
    from minalm.run import estimate
    from minalm.run.compute import ComputeConfig
    from minalm.run.models import Models, StudentConfig, trained_parameters, with_prefixes
    from minalm.run.optimizer import OptimizerConfig, make_optimizer
    from minalm.text.corpus import text_corpus
    from minalm.text.stdlib import stdlib_documents
    from minalm.tokenization.suffixes import longest_suffix
    from minalm.tokenization.tokenizer_json import load_vocabulary
    from minalm.tokenization.vocabulary import byte_vocabulary

    losses = LossConfig(**{name: float(name in case.losses) for name in LOSSES})
    compute = ComputeConfig(case.dtype, case.accumulation, case.remat)
    shape = ModelConfig(
        vocab_size=case.vocabulary,
        embed=256,
        mlp=1024,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=64,
        windows=(4096, None, 4096, None),
        attention_softcap=50.0,
        final_softcap=30.0,
        norm_plus_one=True,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=16.0,
    )
    student_shape = dataclasses.replace(shape, vocab_size=320, tied=False, expansion_size=case.vocabulary)
    mesh = make_mesh(case.fsdp, case.tp)
    student, teacher = (initialize(c, jax.random.key(i)) for i, c in enumerate((student_shape, shape)))

    tokens = load_vocabulary(TEACHER)
    in_bytes = byte_vocabulary(tokens)
    if "next_byte" in losses.names:  # as many entries as the table has rows: of one, two or three of the tokens
        spelled = [token for token in tokens.token_bytes if token]
        more = (a + b + c for c in (b"", *spelled) for b in (b"", *spelled) for a in spelled)
        known = dict.fromkeys(tokens.token_bytes)
        for token in more:
            if len(known) == case.vocabulary:
                break
            known.setdefault(token)
        new = tuple(known)[len(dict.fromkeys(tokens.token_bytes)) :]
        tokens = dataclasses.replace(tokens, token_bytes=(tokens.token_bytes + new)[: case.vocabulary])

    def loaded(model, vocabulary):
        rows = model.config.vocab_size
        mask = VocabularyMask(np.ones(rows, bool), np.arange(rows) % 3 == 0)
        return LoadedModel(model, vocabulary, None, mask)

    trained = trained_parameters(StudentConfig(), student)
    models = Models(loaded(student, in_bytes), loaded(teacher, tokens), trained, GenerationConfig())
    if losses.needs_bytes:
        models = with_prefixes(models, losses)
    optimizer = make_optimizer(OptimizerConfig(steps=10_000))
    state, frozen = train.initial_state(models, mesh, optimizer, compute.dtype)
    del student, teacher
    corpus = text_corpus(stdlib_documents("training", 0.05), case.student_length)
    sides = (
        batching.Side(in_bytes, longest_suffix(tokens, in_bytes), case.student_length),
        batching.Side(tokens, None, case.teacher_length, models.prefixes),
    )
    batches = [
        shard_rows(batching.make_batch(corpus.batch(0, i, case.batch), *sides), mesh) for i in range(max(case.steps, 1))
    ]

    step = jax.jit(functools.partial(train.train_step, losses, compute, optimizer, mesh), donate_argnums=0)
    traced = step.trace(state, frozen, batches[0])
    began = time.monotonic()
    compiled = traced.lower().compile()
    found = {
        "compile": time.monotonic() - began,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "flops": estimate.product_flops(traced.jaxpr.jaxpr, "cpu") * case.fsdp * case.tp,
        "model_flops": estimate.model_flops(student_shape, shape, case.batch, case.student_length, case.teacher_length),
    }
    if case.steps:
        state, metrics = compiled(state, frozen, batches[0])
        jax.block_until_ready(metrics)
        seconds = []
        for batch in batches:
            began = time.monotonic()
            state, metrics = compiled(state, frozen, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.monotonic() - began)
        assert np.isfinite([float(value) for value in metrics.values()]).all()
        found |= {"seconds": statistics.median(seconds), "least": min(seconds), "rate": product_rate(jax, jnp)}
    return found | {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def product_rate(jax, jnp) -> float:
    """FLOP/s of a large float32 matrix product here: the best of five."""
    size = 3072
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.monotonic()
        product(a, a).block_until_ready()
        best = min(best, time.monotonic() - began)
    return 2 * size**3 / best


def run(case: Case) -> dict[str, float]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(case.devices)}
    arguments = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def base() -> None:
    print(
        "| teacher's vocabulary, dtype, batch | s a step (least) | of the limit | temporary | GFLOP, of the model's own",
        end="",
    )
    print(" | compile s | resident | time, temporary of the reference's |")
    print("|---|---|---|---|---|---|---|---|")
    for (vocabulary, dtype, batch), (seconds, temporary) in REFERENCE.items():
        m = run(Case(vocabulary, dtype, batch))
        limit = m["flops"] / m["rate"] / m["seconds"]
        print(
            f"| {vocabulary:,} {dtype} {batch} | {m['seconds']:.2f} ({m['least']:.2f}) | {limit:.0%} | "
            f"{m['temporary'] / 1e6:,.0f} MB | {m['flops'] / 1e9:.0f}, {m['flops'] / m['model_flops']:.2f} | "
            f"{m['compile']:.0f} | {m['resident'] / 1e9:.1f} GB | "
            f"{m['seconds'] / seconds:.2f}, {m['temporary'] / temporary:.2f} |",
            flush=True,
        )


def recipes() -> None:
    """next_byte beside alm, each three times, in turn."""
    print(
        "| teacher's vocabulary, float32, batch 8 | losses | s a step (least of three medians) | temporary |\n|---|---|---|---|"
    )
    for vocabulary in (256_000, 32_000):
        cases = [Case(vocabulary, losses=losses) for losses in (("sft", "alm"), ("next_byte",), ("sft", "next_byte"))]
        found = {case: [] for case in cases}
        for _ in range(3):
            for case in cases:
                found[case].append(run(case))
        for case, measured in found.items():
            seconds = min(m["seconds"] for m in measured)
            print(
                f"| {vocabulary:,} | {' + '.join(case.losses)} | {seconds:.2f} | {measured[0]['temporary'] / 1e6:,.0f} MB |",
                flush=True,
            )


GROWTH = {
    "batch": [dict(batch=n) for n in (4, 8, 16, 32)],
    "accumulation at batch 32": [dict(batch=32, accumulation=n) for n in (1, 2, 4, 8)],
    "length": [dict(batch=2, student_length=n, teacher_length=n // 4) for n in (512, 1024, 2048, 4096)],
    "vocabulary": [dict(vocabulary=n) for n in (32_000, 64_000, 128_000, 256_000)],
    "devices": [dict(devices=8, fsdp=f, tp=t) for f, t in ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (2, 4))],
    "rematerialisation": [dict(remat=r) for r in ("none", "dots", "full")],
}


def growth() -> None:
    """Compiled and not run."""
    for name, changes in GROWTH.items():
        print(f"\n| {name} | temporary of a device | GFLOP |\n|---|---|---|")
        for change in changes:
            m = run(dataclasses.replace(Case(vocabulary=32_000, steps=0), **change))
            values = ", ".join(f"{key} {value}" for key, value in change.items() if key != "devices")
            print(f"| {values} | {m['temporary'] / 1e6:,.0f} MB | {m['flops'] / 1e9:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=("base", "growth", "recipes"), default=("base", "growth"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(Case(**json.loads(given.case)))))
    else:
        for table in given.tables:
            {"base": base, "growth": growth, "recipes": recipes}[table]()
