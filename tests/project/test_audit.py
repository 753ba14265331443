"""tests/audit.sh: its exit codes, with a pip-audit that finds what it is told."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PIP_AUDIT = """
import os, sys
if "--version" not in sys.argv:
    told = os.environ["TOLD"]
    if told:
        open(sys.argv[sys.argv.index("--output") + 1], "w").write(told)
    pinned = open(sys.argv[sys.argv.index("--requirement") + 1]).read()
    sys.exit(0 if pinned == "torch==2.13.0\\nrich==15.0.0\\n" else "other pins: " + pinned)
"""
RICH = {"name": "rich", "version": "15.0.0", "vulns": []}
TORCH = {"name": "torch", "skip_reason": "not found"}
WEAK = RICH | {"vulns": [{"id": "X-1", "fix_versions": ["15.0.1"]}]}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([RICH, TORCH], 0, "1 packages looked at, 0 known weaknesses"),
        ([WEAK, TORCH], 1, "rich 15.0.0: X-1, mended in 15.0.1"),
        ([TORCH], 75, "nothing was audited"),
        (None, 75, "nothing was audited"),
    ],
)
def test_exit_codes(tmp_path: Path, packages: list[dict[str, Any]] | None, code: int, said: str):
    (tmp_path / "pip_audit").mkdir()
    (tmp_path / "pip_audit" / "__main__.py").write_text(PIP_AUDIT, encoding="utf-8")
    (tmp_path / "pins.txt").write_text("torch==2.13.0+cpu; sys_platform == 'linux'\nrich==15.0.0\n# no pin\n")
    told = "" if packages is None else json.dumps({"dependencies": packages})
    done = subprocess.run(
        [ROOT / "tests" / "audit.sh", sys.executable, tmp_path / "pins.txt"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "TOLD": told},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "other pins" in done.stderr) == (code, False), done.stderr
    assert said in done.stdout + done.stderr
