"""Named runs of train.py: for each a sentence, and the groups of settings that differ from their defaults."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minalm.distill.losses import LossConfig
from minalm.models.config import ModelConfig
from minalm.parallel.mesh import MeshConfig
from minalm.run.compute import ComputeConfig
from minalm.run.folder import RunConfig
from minalm.run.optimizer import OptimizerConfig
from minalm.run.setup import DataConfig, StudentConfig

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
    "quickstart-cross": (
        "The quickstart's teacher teaches a narrower model, on bytes, from random weights.",
        dict(
            run=RunConfig(out=Path("runs/quickstart-cross")),
            student=StudentConfig(
                teacher=TEACHER,
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
            losses=LossConfig(**BEST),
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
