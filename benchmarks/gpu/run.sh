#!/usr/bin/env bash
# All that a GPU is needed for, in one command, on a machine without a network:
#
#     DATA=folder benchmarks/gpu/run.sh WHEELS OUT
#
# WHEELS is what benchmarks/gpu/wheels.sh has fetched. Each stage has its minutes, and
# writes to OUT as it goes: a run that is cut short still counts. DATA holds
# `fashion-mnist`, 30 MB, for the last stage, which is left out without it. DEVICE=cpu
# tries the others out, small.
set -uo pipefail
wheels=$(realpath "${1:?"usage: benchmarks/gpu/run.sh WHEELS OUT"}")
mkdir -p "${2:?"usage: benchmarks/gpu/run.sh WHEELS OUT"}"
out=$(realpath "$2")
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
workers=${WORKERS:-$(nproc)}
cd "$(dirname "$0")/../.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS" | tee -a "$out/log.txt"; }

# Only what the machine does not have: its torch stays.
step "set up"
missing=()
for wheel in "$wheels"/*.whl; do
  name=$(basename "$wheel" | cut -d- -f1 | tr _ -)
  "$python" -m pip show -q "$name" >/dev/null 2>&1 || missing+=("$wheel")
done
if [ "${#missing[@]}" -gt 0 ]; then
  "$python" -m pip install -q --no-index --no-deps --target "$site" "${missing[@]}" ||
    exit 1
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYRO_SUBNET_DEVICE=$device
"$python" -c 'import torch; print(torch.__version__, torch.cuda.is_available())' |
  tee -a "$out/log.txt"

# 1. The tests whose tensors follow PYRO_SUBNET_DEVICE, and those of a card alone. Files
# that import what the machine has not are left out, and said to be.
step "tests"
if [ "$device" = cpu ]; then
  tests=(tests/tensors/test_triangular.py)
else
  tests=(tests/tensors tests/curvature tests/gaussians tests/fit tests/guides)
fi
OMP_NUM_THREADS=1 timeout "${STAGE_1:-180}" "$python" -m pytest -q -n "$workers" \
  -p no:cacheprovider --continue-on-collection-errors --tb=short "${tests[@]}" >"$out/tests.txt" 2>&1
echo "tests: exit status $?" | tee -a "$out/log.txt"
tail -n 20 "$out/tests.txt"

# 2. The engine beside laplace-torch, by the rules of benchmarks/engine/README.md.
step "rows"
if [ "$device" = cpu ]; then
  cases=(toy) backends=(--backends)  # ours alone
else
  cases=(resnet18-batchnorm cnn paper-size large-factor) backends=()
fi
for case in "${cases[@]}"; do
  timeout "${STAGE_2:-80}" "$python" -m benchmarks.engine --cases "$case" \
    "${backends[@]}" --device "$device" --pairs 1 --timeout 60 >"$out/$case.txt" 2>&1
  cat "$out/$case.txt"
done
# 3. A trained network at the paper's size, where DATA holds FashionMNIST.
if [ -n "${DATA:-}" ]; then
  step "images"
  timeout "${STAGE_3:-240}" "$python" -m benchmarks.gpu.images --data "$DATA" \
    --out "$out" --device "$device" --minutes "${MINUTES:-3}"
fi
step "done"
