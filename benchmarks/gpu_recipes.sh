#!/bin/sh
# The published recipe (sft + alm + latents) beside next_byte + sft on one GPU without a network, about 8 minutes each:
#
#     MODEL=smollm2 TEXT=texts HELD_OUT=others WHEELS=wheels OUT=curves sh benchmarks/gpu_recipes.sh
#
# MODEL is the Hugging Face folder of SmolLM2-135M-Instruct; its model.safetensors may lie there in parts
# (split -b 60M model.safetensors model.safetensors.part), which are joined in a temporary folder. TEXT and HELD_OUT are
# .txt or .jsonl files, or folders of them. WHEELS are packages that are missing, as in gpu.sh. What remains in OUT are the
# settings, the curves and the summary of each run; the students are not kept. STEPS, BATCH and SECONDS_A_RUN change the
# size: 800 steps of 32 rows of 2,048 bytes take about 7 minutes at the speed of docs/performance.md.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$WORK/site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
fi
mkdir -p "$WORK/model" "$OUT"
cp "$MODEL"/*.json "$WORK/model/"
if [ -e "$MODEL/model.safetensors" ]; then
    cp "$MODEL/model.safetensors" "$WORK/model/"
else
    cat "$MODEL"/model.safetensors.part* > "$WORK/model/model.safetensors"
fi
failed=0
STEPS=${STEPS:-800}
LENGTH=${LENGTH:-2048}
for recipe in next published; do
    case $recipe in
    next) losses="--losses.sft 1 --losses.alm 0 --losses.latents 0 --losses.next-byte 1" ;;
    published) losses="--losses.sft 1 --losses.alm 1 --losses.latents 1" ;;
    esac
    # shellcheck disable=SC2086
    XLA_PYTHON_CLIENT_PREALLOCATE=false timeout "${SECONDS_A_RUN:-540}" "$PYTHON" train.py smollm2-135m-byte \
        --teacher "$WORK/model" --data $TEXT --held-out $HELD_OUT --batch-size "${BATCH:-32}" --piece-bytes "$LENGTH" \
        --student-length "$LENGTH" --teacher-length "${TEACHER_LENGTH:-768}" --steps "$STEPS" \
        --warmup-steps $((STEPS / 10)) --learning-rate "${RATE:-3e-4}" --evaluation-rows "${ROWS:-64}" \
        --evaluation-interval $((STEPS / 8)) --samples 2 --log-interval 10 --save-interval "$STEPS" \
        $losses --out "$WORK/$recipe" || failed=1
    mkdir -p "$OUT/$recipe"
    for file in config.yaml metrics.jsonl evaluations.jsonl samples.jsonl summary.json; do
        [ -e "$WORK/$recipe/$file" ] && cp "$WORK/$recipe/$file" "$OUT/$recipe/"
    done
done
exit $failed
