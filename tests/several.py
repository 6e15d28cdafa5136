"""What each of several processes runs for test_multihost.py. Without the environment that says so it is one process.

    python several.py runs JOBS      # JOBS: a JSON file, for each process a list of command lines of train.py
    python several.py gradients OUT  # a folder for the gradients on each mesh
"""

import functools
import json
import sys
import traceback
from pathlib import Path

from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parents[1]))
with install_import_hook("minalm", "beartype.beartype"):
    import train

import jax
import numpy as np

from minalm import data, families, processes, sharding
from minalm.sharding import P

MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))


def runs(jobs: Path) -> None:
    """Runs of train.py one after the other; the last ends the program as it ends itself. Prints, one line of JSON each,
    how a run ended, and the pieces that each call of make_batch got."""
    import test_train

    train.PRESETS["tiny"] = ("", test_train.TINY)
    make_batch = data.make_batch

    def recorded(pieces, student, teacher):
        texts = ["".join(part.content for part in piece if isinstance(part.content, str)) for piece in pieces]
        print(json.dumps({"pieces": texts}), flush=True)
        return make_batch(pieces, student, teacher)

    data.make_batch = recorded
    processes.join()
    *others, last = json.loads(jobs.read_text())[jax.process_index()]
    for words in others:
        try:
            train.cli(words)
            print(json.dumps({"ended": None}), flush=True)
        except SystemExit as end:
            print(json.dumps({"ended": end.code}), flush=True)
    train.cli(last)


def gradients(out: Path) -> None:
    """What test_step.gradients gives, from processes that each hold their own rows; and the count of marked rows."""
    import test_step

    processes.join()
    trained, fixed = test_step.models()
    for fsdp, tp in MESHES:
        mesh = sharding.make_mesh(fsdp, tp)
        rows = sharding.local_rows(mesh, test_step.ROWS_OF_BATCH)
        marked = np.arange(test_step.ROWS_OF_BATCH) % 5 == 1
        count = int(sharding.count_rows(marked[rows], mesh))
        print(json.dumps({"mesh": [fsdp, tp], "rows": rows, "count": count}), flush=True)
        if tp > 4:  # than the model divides over
            continue
        placed = [sharding.place(part, mesh) for part in (trained, fixed)]
        batch = sharding.place_rows(jax.tree.map(lambda leaf: leaf[rows], test_step.BATCH), mesh)
        layout = sharding.specs(trained, mesh)
        mapped = jax.shard_map(
            functools.partial(train.gradients, test_step.settings()),
            mesh=mesh,
            in_specs=(layout, sharding.specs(fixed, mesh), sharding.ROWS),
            out_specs=(layout, P()),
        )
        whole = jax.jit(mapped, compiler_options=test_step.QUICK, out_shardings=sharding.shardings(P(), mesh))
        with jax.default_matmul_precision("highest"):
            grad, metrics = jax.device_get(whole(*placed, batch))
        if processes.is_first():
            np.savez(out / f"{fsdp}x{tp}.npz", **families.leaves(grad), **metrics)


if __name__ == "__main__":
    try:
        {"runs": runs, "gradients": gradients}[sys.argv[1]](Path(sys.argv[2]))
    except Exception:
        traceback.print_exc()
        raise
