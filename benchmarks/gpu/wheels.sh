#!/usr/bin/env bash
# Fetches what a machine with a GPU, Python 3.12, torch and pytest lacks, into a folder:
#
#     benchmarks/gpu/wheels.sh WHEELS
#
# Seven megabytes and NumPy, at the versions of constraints.txt.
set -euo pipefail
wheels=${1:?"usage: benchmarks/gpu/wheels.sh WHEELS"}
root=$(cd "$(dirname "$0")/../.." && pwd)
names=(
  numpy packaging psutil safetensors tqdm
  pyro-ppl pyro-api opt_einsum jaxtyping wadler_lindig beartype
  laplace-torch asdfghjkl backpack-for-pytorch curvlinops-for-pytorch einconv einops
  linear_operator mpmath torchmetrics lightning-utilities unfoldNd
  hypothesis pytest-xdist execnet
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
