"""The report in Chromium: `VCR1_BROWSER_PYTHON=VENV/bin/python pytest tests/report/test_screenshots.py --basetemp=OUT`,
where VENV has PyQt6-WebEngine, a pip package that brings the browser. The pictures stay in OUT, to be looked at."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_report import page_of, sample, write_evaluation, write_run
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset

PYTHON = os.environ.get("VCR1_BROWSER_PYTHON")
HOSTILE = "<script>window.ran = true</script><svg onload='window.ran = true'><img src=x onerror='window.ran = true'>"
SCREENS = {"laptop": (1280, 900), "phone": (390, 844)}

pytestmark = pytest.mark.skipif(not PYTHON, reason="VCR1_BROWSER_PYTHON names no interpreter with PyQt6-WebEngine")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with curves, a real clip with periods, and an answer that would run."""
    folder = tmp_path_factory.mktemp("report")
    write_dataset(SynthConfig(output_dir=str(folder / "d"), num_train=1, num_eval=1), show_progress=False)
    row = json.loads((folder / "d" / "eval_grounding.jsonl").read_text().splitlines()[0])
    video = str(next((folder / "d").rglob(Path(row["video"]).name)))
    said = "<think>" + "a long thought without end " * 40 + f"</think><answer>1.0 to 3.0</answer>{HOSTILE}"
    clips = [
        replace(sample(f"clip {i}", 0.2 + 0.3 * i), video=video, answer=said, question="q" * 300, truth="1.00 to 3.00")
        for i in range(2)
    ]
    runs = [write_run(folder / name) for name in ("a", "b")]
    for run in runs:
        write_evaluation(run, "model", clips)
    page_of(*runs)
    return runs[0] / "report.html"


def shoot(report: Path, picture: Path, screen: str, scheme: str) -> dict[str, Any]:
    width, height = SCREENS[screen]
    command = [str(PYTHON), str(Path(__file__).with_name("shoot.py")), str(report), str(picture)]
    done = subprocess.run([*command, str(width), str(height), scheme], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_runs_nothing_is_cut_and_dark_is_dark(report: Path, tmp_path: Path, screen: str):
    facts = {scheme: shoot(report, tmp_path / f"{screen}_{scheme}.png", screen, scheme) for scheme in ("light", "dark")}
    for fact in facts.values():
        assert fact["saved"] and not fact["ran"]
        assert fact["width"] <= fact["window"] == SCREENS[screen][0]
        assert fact["console"] == []
        assert fact["stops"] > 4  # the clips' details and the links to sections
    light, dark = (
        sum(map(int, facts[scheme]["background"].strip("rgba()").split(",")[:3])) for scheme in ("light", "dark")
    )
    assert light > 600 > 200 > dark
