"""How much memory it takes to read and write models: measured from outside, in processes of their own."""

import os
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from real_models import real_model
from safetensors.numpy import save_file

from minalm.huggingface import families, weights
from minalm.huggingface.families import DTYPES, parse_config, stored_shape, tensor_maps
from minalm.models.config import ModelConfig

ROOT = Path(__file__).parents[1]
MB = 1_000_000
SMALL = ModelConfig(65_536, 512, 1024, layers=6, heads=8, kv_heads=4, head_dim=64, windows=(None,) * 6)  # 92 MB
LARGE = ModelConfig(262_144, 640, 2048, layers=18, heads=4, kv_heads=1, head_dim=256, windows=(None,) * 18)

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone says what is needed here")

START = """
import sys
from pathlib import Path
import jax, numpy as np
from minalm.huggingface import families, weights
from minalm.models import student
from minalm.parallel import mesh as sharding
from minalm.tokenization import transfer
mesh = sharding.make_mesh(8, 1)
bfloat16 = families.DTYPES["bfloat16"]
folder, out = map(Path, sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
"""


def anonymous(process: int) -> int:
    """Bytes of memory that are no pages of files, which the system drops when it needs the room."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def peak(work: str, *arguments: Path) -> int:
    """The most bytes that `work` needs at a time, beyond what Python and jax have before it on eight devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    with subprocess.Popen(
        [sys.executable, "-c", f"{START}{work}\nprint('done', flush=True)\nsys.stdin.readline()", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "ready\n"
        start = highest = anonymous(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        while not select.select([child.stdout], [], [], 0.002)[0]:
            highest = max(highest, anonymous(child.pid))
        assert child.stdout.readline() == "done\n"
        return max(highest, anonymous(child.pid)) - start


def synthetic(folder: Path, config: ModelConfig) -> tuple[int, int]:
    """Writes a model of random bits in bfloat16 and returns the bytes of all tensors and of the largest one."""
    random = np.random.default_rng(0)
    values = families.config_values(config, "bfloat16")
    tensors = {
        name: random.integers(0, 0x4000, stored_shape(parts), np.uint16).view(DTYPES["bfloat16"])
        for name, parts in tensor_maps(*parse_config("the test", values)).items()
    }
    folder.mkdir()
    (folder / "config.json").write_bytes(weights._json(values))
    save_file(tensors, folder / "model.safetensors")
    sizes = [tensor.nbytes for tensor in tensors.values()]
    return sum(sizes), max(sizes)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, int, int]:
    folder = tmp_path_factory.mktemp("small") / "model"
    return folder, *synthetic(folder, SMALL)


def test_reading_onto_devices(tmp_path, small):
    """What whole arrays on the host would cost is measured too, so that this measures something."""
    folder, size, _ = small
    assert size < peak("model = sharding.shard(weights.read(folder), mesh)", folder, tmp_path) < 1.3 * size
    assert peak("model = sharding.shard(weights.load(folder, bfloat16), mesh)", folder, tmp_path) > 1.9 * size


def test_writing_what_lies_in_a_file(tmp_path, small):
    folder, _, largest = small
    assert (
        largest
        < peak("weights.save(out, weights.read(folder), 'bfloat16')", folder, tmp_path / "same")
        < largest + 25 * MB
    )
    # Other bits come block by block: float32 costs no float32 table.
    assert peak("weights.save(out, weights.read(folder), 'float32')", folder, tmp_path / "wide") < largest + 45 * MB


def test_a_byte_student(tmp_path, small):
    """The largest table, which the new rows are made of, and no float32 or float64 copy of it."""
    folder, size, largest = small
    work = """
teacher = weights.read(folder)
start = np.append(np.arange(301), [300] * 20)  # 300 rows are copied, 20 drawn
plan = transfer.TransferPlan(teacher.config.vocab_size, np.arange(300), start)
weights.save(out, student.student_from_teacher(teacher, plan, expansion=True, tied=False, rows=320), "bfloat16")
"""
    assert largest < peak(work, folder, tmp_path / "out") < largest + 60 * MB


@pytest.mark.real
@pytest.mark.parametrize("model", ("synthetic", "gemma3"))
def test_reading_gemma_3_270m_onto_devices(tmp_path, model):
    """536 MB in bfloat16, of which the table is 336; also a model of random bits and of the same sizes."""
    if model == "synthetic":
        folder = tmp_path / "model"
        size, _ = synthetic(folder, LARGE)
    else:
        if "gemma3_text" not in [family.model_type for family in families.FAMILIES]:
            pytest.skip("gemma3_text is not implemented")
        folder = real_model("gemma3")
        size = (folder / "model.safetensors").stat().st_size
    needed = peak("model = sharding.shard(weights.read(folder), mesh, bfloat16)", folder, tmp_path)
    print(f"{needed / MB:.0f} MB of memory for {size / MB:.0f} MB of weights")
    assert 0.99 * size < needed < 1.3 * size
