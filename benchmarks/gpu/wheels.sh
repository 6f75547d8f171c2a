#!/usr/bin/env bash
# Fetches, into a folder, what an image for GPUs lacks that has torch and the usual
# numerical packages (NumPy, SciPy, matplotlib, jaxtyping, linear_operator, torchmetrics,
# hypothesis, pytest, pytest-xdist):
#
#     benchmarks/gpu/wheels.sh WHEELS
#
# Three megabytes, at the versions of constraints.txt.
set -euo pipefail
wheels=${1:?"usage: benchmarks/gpu/wheels.sh WHEELS"}
root=$(cd "$(dirname "$0")/../.." && pwd)
names=(
  pyro-ppl pyro-api beartype
  laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv unfoldNd
)
pinned=()
for name in "${names[@]}"; do
  # A marker after the version is about older Pythons.
  found=$(grep -hiE "^${name//[-_]/[-_.]}==" "$root/constraints.txt" | cut -d' ' -f1 || true)
  pinned+=("${found:?"constraints.txt has no $name"}")
done
"${PYTHON:-python3}" -m pip --disable-pip-version-check download -q --no-deps \
  --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
  --dest "$wheels" "${pinned[@]}"
du -sh "$wheels"
