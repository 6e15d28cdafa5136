#!/bin/sh
# Tests and times on one NVIDIA GPU, in at most 8 minutes and without a network:
#
#     WHEELS=wheels sh benchmarks/gpu.sh [--tiny]
#
# It needs Python 3.12 or another of the versions in pyproject.toml, with jax for CUDA and cuDNN, equinox, optax,
# orbax-checkpoint, tokenizers, safetensors, huggingface-hub, pytest, pytest-xdist and hypothesis. What else is missing
# (tyro, docstring-parser, typeguard, beartype, rich, ...) can lie as wheels in the folder that WHEELS names. They are
# unpacked into a folder that is removed at the end; the installation is left as it is.
#
# Tests run in float32 at the highest precision of matrix products. Those that need several devices are skipped: gradients
# on a mesh, heads over `tp`, a batch in parts over a mesh. The kernel for TPUs is left out, interpreted as well.
# Each test is named as it ends. If the time is up first, pytest is interrupted, and says why those failed that did.
# --tiny tries the times with small models on whatever device there is, and leaves the tests out.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    SITE=$(mktemp -d)
    trap 'rm -rf "$SITE"' EXIT
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SITE" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
failed=0
if [ "${1:-}" != "--tiny" ]; then
    MINALM_TEST_PLATFORM=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false \
        timeout -s INT -k 10 "${TEST_SECONDS:-150}" "$PYTHON" -m pytest -v -n4 --dist=load --tb=short -rs -W default \
        tests/test_attention.py tests/test_losses.py tests/test_step.py -k "${TESTS:-not kernel and not refused}" || failed=1
fi
timeout "${TIME_SECONDS:-320}" "$PYTHON" benchmarks/gpu.py "$@" || failed=1
exit $failed
