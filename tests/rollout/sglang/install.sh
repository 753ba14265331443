#!/usr/bin/env bash
# install.sh VENV: SGLang for the CPU tests in an environment of its own, 2.4 GB, and in VENV/oldest the oldest version
# that is supported, over the same packages. About 100 s of CPU.
# SGLang's own dependencies would bring gigabytes of CUDA packages, so that everything is installed without dependencies
# and named in constraints.txt. PYTHON chooses the interpreter, TORCH_INDEX the index of CPU builds of torch.
# Ends with 75 where a package cannot be had: no network, or no index that has it.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${1:?usage: install.sh VENV}"
python="${PYTHON:-$(command -v python3.11 || command -v python3.12 || echo python3)}"
index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"

# --no-compile: byte code of all packages would take a minute more, and a third of their modules is ever imported
pip_install() { "$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-deps --no-compile "$@"; }
site_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
not_to_be_had() {
  echo "install.sh: $1 cannot be had from the places that pip knows: see its message above" >&2
  exit 75
}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# PyTorch's index is asked only where pip's configured places do not have the CPU build
pip_install -c "$here/constraints.txt" torch 2>/dev/null \
  || pip_install -c "$here/constraints.txt" --index-url "$index" torch || not_to_be_had torch
pip_install -r "$here/constraints.txt" || not_to_be_had "a package of constraints.txt"
site="$(site_of "$venv")"
cp "$here/cpu_shims.py" "$site/vcr1_sglang_cpu_shims.py"
echo "import vcr1_sglang_cpu_shims" > "$site/vcr1_sglang_cpu_shims.pth"

# its own sglang stands before the other one on the path, everything else is shared
[ -x "$venv/oldest/bin/python" ] || "$venv/bin/python" -m venv --without-pip "$venv/oldest"
oldest_site="$(site_of "$venv/oldest")"
pip_install --upgrade --target "$oldest_site" -r "$here/constraints-oldest.txt" || not_to_be_had "SGLang's oldest version"
echo "import site; site.addsitedir('$(realpath "$site")')" > "$oldest_site/all_but_sglang.pth"

# What each process of a server imports: it must load, and its byte code is written, which saves 14 s of CPU a process.
load() {
  env -u PYTHONDONTWRITEBYTECODE -u PYTHONPATH "$1/bin/python" - 2>"$1/imports.log" <<'PYTHON' || { cat "$1/imports.log" >&2; return 1; }
import sglang
import sglang.srt.entrypoints.engine
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.registry
import torch
from sglang.srt.managers.multimodal_processor import import_processors

import_processors("sglang.srt.multimodal.processors")
print("sglang", sglang.__version__, "on torch", torch.__version__, "in", sglang.__path__[0])
PYTHON
}
load "$venv" && load "$venv/oldest"
