"""What each of several processes runs for test_multihost.py; see `runs` and `gradients`.

python several.py runs JOBS      # a JSON file: for each process a list of command lines of train.py
python several.py gradients OUT  # a folder
"""

import functools
import json
import sys
from pathlib import Path

from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parents[1]))
with install_import_hook("minalm", "beartype.beartype"):
    import train

import jax
import numpy as np

from minalm import data, families, processes, sharding
from minalm.model import ModelConfig
from minalm.sharding import P

MESHES = ((8, 1), (4, 2), (2, 4))


def note(folder: Path, **values: object) -> None:
    """Adds a line of JSON to this process's notes; on stdout, the lines of several threads mix."""
    with (folder / f"notes {jax.process_index()}").open("a") as file:
        file.write(json.dumps(values) + "\n")


def runs(jobs: Path) -> None:
    """Runs of train.py one after the other; the last ends the program. An empty command line is an error of all.

    Notes how each run ended, and the texts of the pieces that each call of make_batch got.
    """
    import test_train

    train.PRESETS["tiny"] = ("", test_train.TINY)
    make_batch, generate = data.make_batch, train.generate

    def recorded(pieces, student, teacher):
        texts = ["".join(part.content for part in piece if isinstance(part.content, str)) for piece in pieces]
        note(jobs.parent, texts=texts)
        return make_batch(pieces, student, teacher)

    data.make_batch = recorded
    train.generate = lambda *arguments, new_tokens, **others: generate(*arguments, new_tokens=6, **others)
    processes.join()
    *others, last = json.loads(jobs.read_text())[jax.process_index()]
    for words in others:
        try:
            if words:
                train.cli(words)
            else:
                with train.one_sentence():
                    raise train.InputError("all find the same")
            note(jobs.parent, ended=0)
        except SystemExit as end:
            note(jobs.parent, ended=end.code)
    train.cli(last)


def parameters(config: ModelConfig, seed: int):
    """As test_step.parameters, but drawn by numpy: in a tenth of the time, and on the host."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(0.0, 0.3, leaf.shape).astype(np.float32), families.abstract(config))


def held_here(array: jax.Array) -> np.ndarray:
    result = np.full(array.shape, np.nan, array.dtype)
    for shard in array.addressable_shards:
        result[shard.index] = shard.data
    return result


def gradients(out: Path) -> None:
    """As test_step.gradients on each mesh, from processes that each hold their own rows.

    Each writes to `out` what it has of the gradients, NaN for what only the other has.
    """
    import test_step

    test_step.parameters = parameters
    processes.join()
    trained, fixed = test_step.models()
    for fsdp, tp in MESHES:
        mesh = sharding.make_mesh(fsdp, tp)
        rows = sharding.local_rows(mesh, test_step.ROWS_OF_BATCH)
        batch = sharding.place_rows(jax.tree.map(lambda leaf: leaf[rows], test_step.BATCH), mesh)
        layout = sharding.specs(trained, mesh)
        mapped = sharding.on_mesh(
            functools.partial(train.gradients, test_step.settings()),
            mesh=mesh,
            in_specs=(layout, sharding.specs(fixed, mesh), sharding.ROWS),
            out_specs=(layout, P()),
        )
        placed = sharding.place(trained, mesh), sharding.place(fixed, mesh), batch
        with jax.default_matmul_precision("highest"):
            grad, metrics = jax.jit(mapped, compiler_options=test_step.QUICK)(*placed)
        held = {name: held_here(leaf) for name, leaf in (families.leaves(grad) | metrics).items()}
        np.savez(out / f"{fsdp}x{tp} {jax.process_index()}.npz", **held)

    # Rows on several processes, and processes with several parts of the rows.
    marked = np.arange(test_step.ROWS_OF_BATCH) % 5 == 1
    for fsdp, tp in ((8, 1), (2, 4), (1, 8)):
        mesh = sharding.make_mesh(fsdp, tp)
        rows = sharding.local_rows(mesh, test_step.ROWS_OF_BATCH)
        placed = sharding.place_rows(np.arange(test_step.ROWS_OF_BATCH)[rows], mesh)
        shards = [[shard.index[0].start or 0, *shard.data.tolist()] for shard in placed.addressable_shards]
        count = int(sharding.count_rows(marked[rows], mesh))
        note(out, fsdp=fsdp, rows=rows, shards=shards, count=count)


if __name__ == "__main__":
    {"runs": runs, "gradients": gradients}[sys.argv[1]](Path(sys.argv[2]))
