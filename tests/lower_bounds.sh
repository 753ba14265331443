#!/usr/bin/env bash
# The oldest packages that pyproject.toml allows: a fresh environment with the lower bound of each dependency, in which the
# command line writes clips, trains, scores and exports the tiny model, and the tests that depend most on them run.
# About 10 minutes and 500 MB; needs an index of packages. Not part of `make test`.
#     tests/lower_bounds.sh [PYTHON of this project's environment [TESTS, and nothing else...]]
# torch alone is the one of that environment, because older builds for a CPU are not in every index: links, in a folder that
# a .pth names. Ends with 75 where a package cannot be had, else with 0 or 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root="$PWD"
python="$(realpath -s "${1:-.venv/bin/python}")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

"$python" -m venv "$folder/venv"
lowest="$folder/venv/bin/python"
site="$("$lowest" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
mkdir "$folder/torch"
"$python" - "$folder" <<'PYTHON'
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

folder = Path(sys.argv[1])
for name in ("torch", "triton"):
    try:
        found = distribution(name)
    except PackageNotFoundError:  # Triton is for Linux
        continue
    for top in sorted({file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}):
        (folder / "torch" / top).symlink_to(Path(str(found.locate_file(top))).absolute())
project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
tests = {"pytest", "pytest-timeout", "hypothesis"}
pins: list[str] = []
for line in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
    need = Requirement(line)
    if need.name == "torch" or (need.marker and not need.marker.evaluate()):
        continue
    if line in project["dependencies"] or need.name in tests:
        (lower,) = [spec.version for spec in need.specifier if spec.operator == ">="]
        extras = f"[{','.join(need.extras)}]" if need.extras else ""
        pins.append(f"{need.name}{extras}=={lower}")
torch_needs = [Requirement(line) for line in distribution("torch").requires or ()]
pins += [str(need) for need in torch_needs if not need.marker or need.marker.evaluate({"extra": ""})]  # any version
(folder / "lowest.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
PYTHON
echo "$folder/torch" > "$site/torch.pth"
"$lowest" -m pip install -q --disable-pip-version-check -r "$folder/lowest.txt" || {
  echo "tests/lower_bounds.sh: a package cannot be had, or the bounds contradict each other: see pip above" >&2
  exit 75
}
"$lowest" -m pip list --disable-pip-version-check

# A wheel of this tree, from a copy, because setup.py builds in place
mkdir "$folder/source" "$folder/run"
cp -r pyproject.toml setup.py README.md LICENSE csrc vcr1_fast kernels "$folder/source/"
"$lowest" -m pip install -q --disable-pip-version-check --no-deps "$folder/source"

# The command line, as a stranger runs it
export OMP_NUM_THREADS=1
[ $# -gt 1 ] || (
  cd "$folder/run"
  "$folder/venv/bin/vcr1-fast" doctor
  "$folder/venv/bin/vcr1-fast" synth tiny --num_train=16 --num_eval=8
  "$folder/venv/bin/vcr1-fast" train tiny --train.num_steps=3 --checkpoint.every=3
  "$folder/venv/bin/vcr1-fast" eval tiny --model.path=runs/tiny/grpo/model
  "$folder/venv/bin/vcr1-fast" export runs/tiny/grpo exported --dtype bfloat16
)
tests=(
  tests/settings tests/learner/test_exactness.py tests/learner/test_loading.py tests/run/test_export.py
  tests/run/test_checkpoint.py tests/rollout/test_engine_equals_trainer.py tests/video/test_readers.py tests/report
)
[ $# -lt 2 ] || tests=("${@:2}")
"$lowest" -m pytest -q -p no:cacheprovider "${tests[@]}"
