#!/usr/bin/env bash
# The oldest transformers that pyproject.toml allows and the newest 5.x: both model families' exactness, positions, loading
# and decoding. About 6 minutes and 200 MB; needs an index of packages. Not part of `make test`.
#     tests/transformers_versions.sh [PYTHON of this project's environment]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="$(realpath -s "${1:-.venv/bin/python}")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1
for version in "==5.12.1" "<6"; do
  # with what it pins, before everything else; a newer `kernels` than the oldest one knows raises when it is imported
  "$python" -m pip install -qq --disable-pip-version-check --target "$folder/$version" "transformers$version" "kernels<0.13"
  export PYTHONPATH="$folder/$version"
  "$python" -c 'import transformers; print("transformers", transformers.__version__)'
  "$python" -m pytest -q -n 2 --dist loadfile -p no:cacheprovider tests/learner/test_exactness.py \
    tests/learner/test_families.py tests/learner/test_tower_attention.py tests/learner/test_loading.py tests/prompts \
    tests/rollout/test_local_engine.py
done
