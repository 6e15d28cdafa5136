"""Settings of every test: eight virtual CPU devices, strict dtype promotion, shape checks by jaxtyping and beartype.

What XLA has compiled is kept in a folder until the tests end, so that equal programs are compiled once, by whichever of
the processes that share the tests (pytest-xdist) comes first.
"""

import atexit
import os
import shutil
import tempfile

PLATFORM = os.environ.get("MINALM_TEST_PLATFORM", "cpu")  # "cuda": on one GPU, see benchmarks/gpu.sh
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = PLATFORM

import jax
import pytest

from minalm.errors import InputError

jax.config.update("jax_numpy_dtype_promotion", "strict")

if "MINALM_TEST_COMPILED" not in os.environ:  # the first process, whose environment the others get
    os.environ["MINALM_TEST_COMPILED"] = tempfile.mkdtemp(prefix="minalm-tests-")
    atexit.register(shutil.rmtree, os.environ["MINALM_TEST_COMPILED"], ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = os.path.join(os.environ["MINALM_TEST_COMPILED"], "cache")  # of indexes of texts
jax.config.update("jax_compilation_cache_dir", os.environ["MINALM_TEST_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
if PLATFORM != "cpu":  # a GPU multiplies float32 in fewer bits by default
    jax.config.update("jax_default_matmul_precision", "highest")


LONG = ("test_multihost", "test_train", "test_step", "test_export")  # files, in the order of their time


def pytest_collection_modifyitems(items):
    """The slowest files first: of two processes, none should be left alone with a long one at the end."""
    place = {name: n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """On one GPU, tests that need several devices are skipped."""
    try:
        return (yield)
    except InputError as error:
        if PLATFORM != "cpu" and "devices but there" in str(error):
            pytest.skip(str(error))
        raise
