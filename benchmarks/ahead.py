"""What the headline presets need of TPUs, compiled ahead of time on meshes of 16 chips: nothing runs, nothing is timed.

    pip install -e '.[tpu]' && python benchmarks/ahead.py [--topology v4:2x2x4] [--meshes 16x1 8x2 4x4]

Every compilation is a process of its own, one after the other. A bound is what a step cannot be faster than; their
sum is what it takes if nothing overlaps and each part runs at its bound.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

PRESETS = ("gemma2-2b-it-byte", "llama3.2-3b-it-byte")


def measure(preset: str, topology: str, fsdp: int, tp: int, remat: str) -> dict:
    import roofline

    import train
    from minalm.parallel.mesh import MeshConfig
    from minalm.run.models import model_shapes

    config = train.PRESETS[preset][1]
    compute = dataclasses.replace(config.compute, remat=remat)
    config = dataclasses.replace(config, compile_only=topology, mesh=MeshConfig(fsdp, tp), compute=compute)
    began = time.monotonic()
    found = train.estimated(config)
    moved = roofline.traffic(roofline.parse_program(found.compiled.as_text()))
    models = model_shapes(config.student, config.data.student_length, config.seed)
    student = models.student.model
    least = roofline.least_sent(
        student,
        train.eqx.filter(student, models.trained),
        models.teacher.model if config.losses.needs_teacher else None,
        found.mesh,
        config.data.batch_size,
        config.data.student_length,
        config.data.teacher_length,
        tail_gradients=1 if config.losses.balance == "fixed" else len(config.losses.names),
        width=compute.dtype.itemsize,
    )
    coordinates = [device.coords for device in found.mesh.devices.flat]
    axes = {}
    for (_, groups), size in moved.messages.items():
        over = "".join("xyz"[axis] for axis in sorted(roofline.spanned(groups, coordinates)))
        axes[over] = axes.get(over, 0.0) + size
    return {
        "seconds": time.monotonic() - began,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "memory": sum(found.memory.values()),
        "temporaries": found.memory["temporaries"],
        "flops": found.flops * fsdp * tp,
        "share": found.flops * fsdp * tp / found.model_flops,
        "traffic": moved.memory,
        "sent": moved.sent,
        "least": least,
        "axes": axes,
        "bounds": {
            "compute": found.compute_bound,
            "memory": moved.memory / roofline.rates(found.topology).memory,
            "network": roofline.network_bound(moved, found.topology, coordinates),
        },
    }


def run(*case: str | int) -> dict:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(topology: str, meshes: list[str], remats: list[str]) -> None:
    print(f"{topology}, per chip:\n")
    print("| preset, mesh, remat | HBM (temporaries) GiB | FLOPs, of the model's own | HBM traffic GB |", end="")
    print(" bound s: compute, memory, network | their sum s | command s, GB resident |\n|---|---|---|---|---|---|---|")
    rows = []
    for preset in PRESETS:
        for mesh in meshes:
            for remat in remats:
                m = run(preset, topology, *map(int, mesh.split("x")), remat)
                rows.append((preset, mesh, remat, m))
                bounds = m["bounds"]
                shown = (f"**{v:.3f}**" if v == max(bounds.values()) else f"{v:.3f}" for v in bounds.values())
                print(
                    f"| {preset}, {mesh}, {remat} | {m['memory'] / 2**30:.1f} ({m['temporaries'] / 2**30:.1f}) | "
                    f"{m['flops']:.3g}, {m['share']:.2f} | {m['traffic'] / 1e9:.0f} | {', '.join(shown)} | "
                    f"{sum(bounds.values()):.2f} | "
                    f"{m['seconds']:.0f}, {m['resident'] / 1e9:.1f} |",
                    flush=True,
                )
    print("\nSent by a chip in a step, GB, and the least that FSDP x TP must send:\n")
    kinds = list(rows[0][3]["sent"])
    print(f"| preset, mesh, remat | {' | '.join(kinds)} | in all | over axes |\n|{'---|' * (len(kinds) + 3)}")
    for preset, mesh, remat, m in rows:
        each = [f"{m['sent'][kind] / 1e9:.2f} ({m['least'][kind] / 1e9:.2f})" for kind in kinds]
        axes = ", ".join(f"{over}: {size / 1e9:.2f}" for over, size in sorted(m["axes"].items()) if size >= 5e6)
        total = f"{sum(m['sent'].values()) / 1e9:.1f} ({sum(m['least'].values()) / 1e9:.1f})"
        print(f"| {preset}, {mesh}, {remat} | {' | '.join(each)} | {total} | {axes} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v4:2x2x4")
    parser.add_argument("--meshes", nargs="+", default=["16x1", "8x2", "4x4"])
    parser.add_argument("--remats", nargs="+", default=["dots"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(*json.loads(given.case))))
    else:
        main(given.topology, given.meshes, given.remats)
