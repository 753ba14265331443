#!/usr/bin/env bash
# install.sh VENV: SGLang for the CPU tests, in an environment of its own, 2.4 GB, about 2 minutes of CPU.
# SGLang's own dependencies would bring gigabytes of CUDA packages, so that everything is installed without dependencies
# and named in constraints.txt. PYTHON chooses the interpreter (3.11), TORCH_INDEX the index of CPU builds of torch.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${1:?usage: install.sh VENV}"
python="${PYTHON:-python3.11}"
index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
constraints="$here/constraints.txt"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# PyTorch's index is asked only where pip's configured places do not have the CPU build
pip install -qq --no-deps -c "$constraints" torch 2>/dev/null \
  || pip install -qq --no-deps -c "$constraints" --index-url "$index" torch
# everything pinned is installed; without dependencies, so that nothing else can come
pip install -qq --no-deps -r "$constraints"

site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cp "$here/cpu_shims.py" "$site/vcr1_sglang_cpu_shims.py"
echo "import vcr1_sglang_cpu_shims" > "$site/vcr1_sglang_cpu_shims.pth"
"$venv/bin/python" -m compileall -qq -j 0 "$site/sglang/srt" "$site/transformers/models/qwen2_5_vl" || true
"$venv/bin/python" -c 'import sglang, torch; from sglang import Engine; print("sglang", sglang.__version__, "on torch", torch.__version__)'
