#!/usr/bin/env bash
# Exports of three short runs, of both families, load in transformers 4.51, 4.57 and the one of this environment, with the same logits to 1e-5,
# and in AutoProcessor. About 5 minutes and 200 MB; needs an index of packages.
#     tests/run/export_versions.sh [PYTHON of this project's environment]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python="${1:-.venv/bin/python}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD:$PWD/kernels"

"$python" -m tests.run.export_versions make "$folder/runs" > "$folder/make.log" 2>&1 || { cat "$folder/make.log"; exit 1; }

# An environment of its own for each release; torch and what it needs are this one's, links in a folder that a .pth names.
shared="$folder/shared"
mkdir "$shared"
"$python" - "$shared" <<'PYTHON'
import re
import sys
from importlib.metadata import distribution, requires
from pathlib import Path

wanted, seen = ["torch", "numpy", "safetensors", "regex", "pyyaml", "tqdm", "packaging", "filelock", "fsspec"], set()
while wanted:
    name = wanted.pop()
    if name in seen:
        continue
    seen.add(name)
    for file in distribution(name).files or ():
        top = file.parts[0]
        link = Path(sys.argv[1]) / top
        if top not in ("..", "__pycache__") and not link.exists():
            link.symlink_to(Path(str(distribution(name).locate_file(top))).absolute())
    needs = [need for need in requires(name) or () if "extra ==" not in need and "python_version <" not in need]
    wanted += [re.match(r"[\w.-]+", need)[0].lower() for need in needs if "platform_system" not in need]
PYTHON

check() {
  local version="$1" path="$2"
  shift 2
  "$python" -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install -qq --no-deps "transformers==$version" "$@"
  echo "$shared" > "$("$folder/$version/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
  PYTHONPATH="$path" "$folder/$version/bin/python" -m tests.run.export_versions check "$folder/runs"
}
# Processors of newer releases need torchvision, which nothing else may see.
"$python" -m pip install -qq --no-deps --target "$folder/oracle" -r tests/video/oracle.txt
common="pillow requests urllib3 idna certifi charset-normalizer"
check 4.51.3 "$PWD" huggingface-hub==0.30.2 tokenizers==0.21.1 $common
check 4.57.1 "$PWD:$folder/oracle" huggingface-hub==0.35.3 tokenizers==0.22.1 $common
PYTHONPATH="$PYTHONPATH:$folder/oracle" "$python" -m tests.run.export_versions check "$folder/runs"
