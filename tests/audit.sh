#!/usr/bin/env bash
# Known weaknesses of installed packages, by pip-audit: 0 none, 1 some, 75 where the list of weaknesses cannot be had.
#     tests/audit.sh [PYTHON] [REQUIREMENTS]
# PYTHON: of the environment that has pip-audit (`make audit` installs it) and is looked at. REQUIREMENTS: a file of pinned
# packages to look at instead, such as constraints-cpu.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${1:-.venv/bin/python}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

if [ -n "${2:-}" ]; then cp "$2" "$folder/all.txt"; else "$python" -m pip freeze --exclude-editable > "$folder/all.txt"; fi
# The list knows versions, not builds such as 2.13.0+cpu, and nothing that came from a file.
sed -nE 's/^([A-Za-z0-9._-]+==[^+; ]+).*/\1/p' "$folder/all.txt" > "$folder/pinned.txt"
"$python" -m pip_audit --version || { echo "tests/audit.sh: pip-audit is not installed: make audit installs it" >&2; exit 75; }
"$python" -m pip_audit --requirement "$folder/pinned.txt" --no-deps --disable-pip --progress-spinner off --timeout 30 \
  --format json --output "$folder/found.json" 2> "$folder/messages" || true # 1 for what is found and for what went wrong alike
if [ ! -s "$folder/found.json" ]; then
  tail -n 1 "$folder/messages" >&2
  echo "tests/audit.sh: the list of weaknesses cannot be had here, nothing was audited" >&2
  exit 75
fi
"$python" - "$folder/found.json" <<'PYTHON'
import json
import sys

packages = json.load(open(sys.argv[1], encoding="utf-8"))["dependencies"]
skipped = [package for package in packages if "skip_reason" in package]
weak = [(package, weakness) for package in packages for weakness in package.get("vulns", ())]
for package, weakness in weak:
    print(f"{package['name']} {package['version']}: {weakness['id']}, mended in {', '.join(weakness['fix_versions']) or 'no version'}")
for package in skipped:
    print(f"{package['name']}: not looked at: {package['skip_reason']}")
print(f"{len(packages) - len(skipped)} packages looked at, {len(weak)} known weaknesses")
if len(skipped) == len(packages):
    print("tests/audit.sh: the list of weaknesses cannot be had here, nothing was audited", file=sys.stderr)
    sys.exit(75)
sys.exit(bool(weak))
PYTHON
