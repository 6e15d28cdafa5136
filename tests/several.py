"""What each of several processes runs for test_multihost.py; see `runs`, `gradients` and `restore`.

python several.py runs JOBS      # a JSON file: for each process a list of command lines of train.py
python several.py gradients OUT  # a folder
python several.py restore OUT    # a folder
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
from jax.sharding import NamedSharding

from minalm import batches
from minalm.errors import InputError
from minalm.evaluation import samples
from minalm.models import transformer
from minalm.models.config import ModelConfig
from minalm.parallel import distributed
from minalm.parallel.mesh import ROWS, P, local_rows, make_mesh, shard, shard_map, shard_rows, specs
from minalm.run import checkpoint
from minalm.run import texts as run_texts

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
    make_batch = batches.make_batch

    def recorded(pieces, student, teacher):
        texts = ["".join(part.content for part in piece if isinstance(part.content, str)) for piece in pieces]
        note(jobs.parent, texts=texts)
        return make_batch(pieces, student, teacher)

    run_texts.make_batch = recorded
    samples.NEW_TOKENS = 6
    distributed.join()
    *others, last = json.loads(jobs.read_text())[jax.process_index()]
    for words in others:
        try:
            if words:
                train.cli(words)
            else:
                with distributed.exit_on_input_error():
                    raise InputError("all find the same")
            note(jobs.parent, ended=0)
        except SystemExit as end:
            note(jobs.parent, ended=end.code)
    train.cli(last)


def parameters(config: ModelConfig, seed: int):
    """As test_step.parameters, but drawn by numpy: in a tenth of the time, and on the host."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: random.normal(0.0, 0.3, leaf.shape).astype(np.float32), transformer.abstract(config)
    )


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
    distributed.join()
    config, (trained, fixed) = test_step.settings(), test_step.models()
    for fsdp, tp in MESHES:
        mesh = make_mesh(fsdp, tp)
        rows = local_rows(mesh, test_step.ROWS_OF_BATCH)
        batch = shard_rows(jax.tree.map(lambda leaf: leaf[rows], test_step.BATCH), mesh)
        layout = specs(trained, mesh)
        mapped = shard_map(
            functools.partial(train.gradients, config.losses, config.compute),
            mesh=mesh,
            in_specs=(layout, specs(fixed, mesh), ROWS),
            out_specs=(layout, P()),
        )
        placed = shard(trained, mesh), shard(fixed, mesh), batch
        with jax.default_matmul_precision("highest"):
            grad, metrics = jax.jit(mapped, compiler_options=test_step.QUICK)(*placed)
        held = {name: held_here(leaf) for name, leaf in (transformer.leaves(grad) | metrics).items()}
        np.savez(out / f"{fsdp}x{tp} {jax.process_index()}.npz", **held)

    # Rows on several processes, and processes with several parts of the rows.
    for fsdp, tp in ((8, 1), (2, 4), (1, 8)):
        mesh = make_mesh(fsdp, tp)
        rows = local_rows(mesh, test_step.ROWS_OF_BATCH)
        placed = shard_rows(np.arange(test_step.ROWS_OF_BATCH)[rows], mesh)
        shards = [[shard.index[0].start or 0, *shard.data.tolist()] for shard in placed.addressable_shards]
        note(out, fsdp=fsdp, rows=rows, shards=shards)


def restore(out: Path) -> None:
    """A checkpoint of both processes, which the second finds damaged as it goes on."""
    distributed.join()
    mesh = make_mesh(8, 1)
    state = {"student": {"x": jax.device_put(np.arange(16.0, dtype=np.float32), NamedSharding(mesh, P("fsdp")))}}
    for name in ("whole", "damaged"):
        with checkpoint.Checkpoints(out / name) as checkpoints:
            checkpoints.save(1, state, {}, {})
    with distributed.barrier():
        if jax.process_index() == 0:
            for part in (out / "damaged" / "1").rglob("*"):
                if part.is_file():
                    part.write_bytes(b"")
    found = checkpoint.restore(out / "whole", state, 1)["student"]["x"]
    assert all((np.asarray(shard.data) == np.arange(16.0)[shard.index]).all() for shard in found.addressable_shards)
    with distributed.exit_on_input_error(), distributed.barrier():
        checkpoint.restore(out / ("damaged" if jax.process_index() else "whole"), state, 1)


if __name__ == "__main__":
    {"runs": runs, "gradients": gradients, "restore": restore}[sys.argv[1]](Path(sys.argv[2]))
