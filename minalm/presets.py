"""Named runs of train.py: for each a sentence, and the groups of settings that differ from their defaults."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minalm.distill.losses import LossConfig
from minalm.models.config import ModelConfig
from minalm.parallel.mesh import MeshConfig
from minalm.run.compute import ComputeConfig
from minalm.run.folder import RunConfig
from minalm.run.models import StudentConfig
from minalm.run.optimizer import OptimizerConfig
from minalm.run.texts import DataConfig

TEACHER = Path(__file__).parents[1] / "quickstart_teacher"  # of the quickstart; beside the package in the repository
BEST = {"sft": 1.0, "alm": 0.0, "next_byte": 1.0}  # of the recipes compared in docs/recipes.md
FROM_THE_HUB = " Needs --data; the teacher is the hub's unless --teacher names a folder."


PUBLISHED = {"sft": 1.0, "alm": 1.0, "latents": 1.0}


def headline(name: str, teacher: str, losses: Mapping[str, float] = PUBLISHED) -> dict[str, Any]:
    """What both published byte models were trained with, written out whatever the defaults are; with other `losses`."""
    return dict(
        run=RunConfig(out=Path("runs") / name),
        student=StudentConfig(teacher=Path(teacher), expansion=True, train_expansion=False),
        data=DataConfig(batch_size=32, piece_bytes=2048, student_length=2048, teacher_length=512),
        losses=LossConfig(
            **losses,
            balance="gradmag",
            preserve_magnitude=True,
            chunks="merged",
            debias=True,
            gamma=0.1,
            divergence="binary_ce",
            tau=100.0,
            latents_layers="last",
            latents_norm="l2_channelwise",
        ),
        optimizer=OptimizerConfig(
            steps=20_000,
            learning_rate=3e-5,
            warmup_steps=2_000,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            weight_decay=0.0,
            clip_norm=None,
        ),
        compute=ComputeConfig(compute_dtype="bfloat16", remat="dots"),
        mesh=MeshConfig(fsdp=8, tp=2),  # of 16 chips this sends the least (docs/performance.md); published: 4 x 4
    )


BOLMO_STAGE_1 = LossConfig(
    # Published: 1, 1, 4 and 4, where cross-entropy and distillation are divided by another number than they are summed
    # over, which weighs them 1.36 times.
    sft=1.36,
    alm=1.36,
    representation=4.0,
    boundary=4.0,
    guided=True,
    representation_blocks=4,
    balance="fixed",
    chunks="unconstrained",
    debias=False,  # published: debiased, by a mass that leaves out the bytes that end a patch
    divergence="binary_kl",
    tau=5.0,
)
BOLMO_STAGE_2 = LossConfig(sft=1.36, alm=0.0, boundary=4.0, balance="fixed")


def bolmo(stage: int, size: str, teacher: str, local_mlp: int, rates: tuple[float, float | None]) -> dict[str, Any]:
    """What both published Bolmos were trained with. `rates`: of what is new, and in stage 2 of the teacher's layers.

    Two things differ. Norms and biases do not decay. A row is a piece of text of up to 16,384 bytes, with room for 4,096
    patches; published are rows of 4,096 tokens in 24,576 places for bytes, of which a quarter stays empty.
    """
    name = f"bolmo-{size}-stage{stage}"
    rate, block_rate = rates
    new = dict(kind="bolmo", local_heads=16, local_mlp=local_mlp, encoder_layers=1, decoder_layers=4)
    start = new if stage == 1 else dict(student=Path(f"runs/bolmo-{size}-stage1"))
    return dict(
        run=RunConfig(out=Path("runs") / name),
        student=StudentConfig(teacher=Path(teacher), train_expansion=True, train_blocks=stage == 2, **start),
        data=DataConfig(
            batch_size=32 if stage == 1 else 64, piece_bytes=16_384, student_length=16_640, teacher_length=4_096
        ),
        losses=BOLMO_STAGE_1 if stage == 1 else BOLMO_STAGE_2,
        optimizer=OptimizerConfig(
            steps=75_000 if stage == 1 else 150_000,
            learning_rate=rate,
            block_learning_rate=block_rate,
            warmup_steps=7_500 if stage == 1 else 15_000,
            beta1=0.9,
            beta2=0.999 if stage == 1 else 0.95,
            epsilon=1e-8,
            weight_decay=0.1,
            clip_norm=0.5,
        ),
        compute=ComputeConfig(compute_dtype="bfloat16", remat="dots"),
        mesh=MeshConfig(fsdp=16, tp=1),
    )


def small_bolmo(
    name: str, student: StudentConfig, losses: LossConfig, steps: int, rates: tuple[float, float | None]
) -> dict[str, Any]:
    """A run on the quickstart's text. `rates`: of what is new, and of the teacher's layers."""
    rate, block_rate = rates
    return dict(
        run=RunConfig(out=Path("runs") / name, save_interval=500),
        student=dataclasses.replace(student, teacher=TEACHER, train_expansion=True),
        data=DataConfig(
            stdlib=True, stdlib_fraction=0.25, batch_size=4, piece_bytes=384, student_length=384, teacher_length=160
        ),
        losses=losses,
        optimizer=OptimizerConfig(
            steps=steps,
            learning_rate=rate,
            block_learning_rate=block_rate,
            warmup_steps=50,
            weight_decay=0.1,
            clip_norm=0.5,
        ),
        compute=ComputeConfig(compute_dtype="float32"),
    )


BOLMO_SIZES = {  # teacher, hidden units of a byte block, learning rates of stage 1 and of stage 2
    "1b": ("allenai/OLMo-2-0425-1B", 2816, (7e-4, None), (5.2e-5, 2.6e-5)),
    "7b": ("allenai/Olmo-3-1025-7B", 5504, (5e-4, None), (3.66e-5, 1.83e-5)),
}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": (
        "A small subword model becomes byte-level on the text of Python's own library: minutes on 2 CPU cores.",
        dict(
            run=RunConfig(out=Path("runs/quickstart"), save_interval=500),
            student=StudentConfig(teacher=TEACHER, train_expansion=True),
            data=DataConfig(
                stdlib=True, stdlib_fraction=0.25, batch_size=4, piece_bytes=384, student_length=384, teacher_length=128
            ),
            losses=LossConfig(**BEST),
            optimizer=OptimizerConfig(steps=1_500, learning_rate=6e-3, warmup_steps=50),
            compute=ComputeConfig(compute_dtype="float32"),
        ),
    ),
    "quickstart-bolmo": (
        "The quickstart's teacher becomes a Bolmo at once, without stage 1: minutes on 2 CPU cores.",
        small_bolmo(
            "quickstart-bolmo", StudentConfig(kind="bolmo", local_heads=4), BOLMO_STAGE_2, 700, rates=(6e-3, None)
        ),
    ),
    "quickstart-bolmo-stage1": (
        "The same in two stages, in as many steps. 1: the parts around the teacher learn, guided by it.",
        small_bolmo(
            "quickstart-bolmo-stage1",
            StudentConfig(kind="bolmo", local_heads=4, train_blocks=False),
            dataclasses.replace(BOLMO_STAGE_1, representation_blocks=2),
            350,
            rates=(6e-3, None),
        ),
    ),
    "quickstart-bolmo-stage2": (
        "Stage 2, from runs/quickstart-bolmo-stage1: all of it learns.",
        small_bolmo(
            "quickstart-bolmo-stage2",
            StudentConfig(student=Path("runs/quickstart-bolmo-stage1")),
            BOLMO_STAGE_2,
            350,
            rates=(3e-3, 1.5e-3),
        ),
    ),
    "quickstart-cross": (
        "The quickstart's teacher teaches a narrower model, on bytes, from random weights.",
        dict(
            run=RunConfig(out=Path("runs/quickstart-cross")),
            student=StudentConfig(
                teacher=TEACHER,
                student_weights="random",
                expansion=False,
                architecture=ModelConfig(
                    vocab_size=320,  # replaced by as many as the special tokens need
                    embed=96,
                    mlp=288,
                    layers=4,
                    heads=2,
                    kv_heads=1,
                    head_dim=48,
                    windows=(None,) * 4,
                    tied=False,
                ),
            ),
            data=DataConfig(stdlib=True, batch_size=4, piece_bytes=384, student_length=384, teacher_length=128),
            losses=LossConfig(**BEST, latents=1.0),  # from random weights, hidden states help: docs/recipes.md
            optimizer=OptimizerConfig(steps=1_500, learning_rate=6e-3, warmup_steps=50),
            compute=ComputeConfig(compute_dtype="float32"),
        ),
    ),
    "quickstart-teacher": (
        "Pretrains the quickstart's teacher: next-token prediction alone, from random weights.",
        dict(
            run=RunConfig(out=Path("runs/quickstart-teacher")),
            student=StudentConfig(
                student_tokenizer=Path("runs/quickstart-tokenizer"),
                architecture=ModelConfig(
                    vocab_size=4096,
                    embed=128,
                    mlp=384,
                    layers=4,
                    heads=2,
                    kv_heads=1,
                    head_dim=64,
                    windows=(None,) * 4,
                ),
            ),
            data=DataConfig(stdlib=True, batch_size=16, piece_bytes=448, student_length=128),
            losses=LossConfig(alm=0.0, balance="fixed"),
            optimizer=OptimizerConfig(steps=4_500, learning_rate=4e-3, warmup_steps=100, clip_norm=1.0),
            compute=ComputeConfig(compute_dtype="float32"),
        ),
    ),
    "gemma2-2b-it-byte": (
        "Gemma 2 2B IT becomes byte-level, as published." + FROM_THE_HUB,
        headline("gemma2-2b-it-byte", "google/gemma-2-2b-it"),
    ),
    "llama3.2-3b-it-byte": (
        "Llama 3.2 3B Instruct becomes byte-level, as published." + FROM_THE_HUB,
        headline("llama3.2-3b-it-byte", "meta-llama/Llama-3.2-3B-Instruct"),
    ),
    # Not published: the same with another loss. That it is better is known of models of 1 and 135 million parameters
    # (docs/recipes.md), not of these.
    "gemma2-2b-it-byte-next": (
        "Gemma 2 2B IT becomes byte-level by next_byte + sft." + FROM_THE_HUB,
        headline("gemma2-2b-it-byte-next", "google/gemma-2-2b-it", BEST),
    ),
    "llama3.2-3b-it-byte-next": (
        "Llama 3.2 3B Instruct becomes byte-level by next_byte + sft." + FROM_THE_HUB,
        headline("llama3.2-3b-it-byte-next", "meta-llama/Llama-3.2-3B-Instruct", BEST),
    ),
    # For whatever is given, so with the losses that any pair of tokenizers allows; a start, compared with nothing.
    "transfer": (
        "Any teacher, text and student: give --teacher and --data, and --student or --student-tokenizer if not bytes.",
        dict(
            run=RunConfig(out=Path("runs/transfer"), save_interval=500),
            data=DataConfig(batch_size=16, piece_bytes=1024, student_length=1024, teacher_length=384),
            losses=LossConfig(sft=1.0, alm=1.0),
            optimizer=OptimizerConfig(steps=2_000, learning_rate=1e-4, warmup_steps=100, clip_norm=1.0),
        ),
    ),
    "smollm2-135m-byte": (
        "SmolLM2 135M Instruct becomes byte-level on one device." + FROM_THE_HUB,
        dict(
            run=RunConfig(out=Path("runs/smollm2-135m-byte"), log_interval=1, save_interval=20),
            student=StudentConfig(teacher=Path("HuggingFaceTB/SmolLM2-135M-Instruct")),
            data=DataConfig(batch_size=4, piece_bytes=512, student_length=512, teacher_length=192),
            losses=LossConfig(sft=1.0, alm=1.0, latents=1.0),
            optimizer=OptimizerConfig(steps=200, learning_rate=3e-4, warmup_steps=20),  # an hour of two CPU cores
        ),
    ),
}
for size, (teacher, local_mlp, *rates) in BOLMO_SIZES.items():
    for stage, (does, pair) in enumerate(
        zip(("the parts around the teacher learn, guided by it.", "all of stage 1's student learns."), rates), start=1
    ):
        text = f"Bolmo {size.upper()}, stage {stage} of 2, as published: {does}" + FROM_THE_HUB
        PRESETS[f"bolmo-{size}-stage{stage}"] = text, bolmo(stage, size, teacher, local_mlp, pair)
