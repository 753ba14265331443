"""`vcr1-fast report RUN [RUN2]`: one HTML file about a run, or two side by side. Loads no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vcr1_fast import __version__
from vcr1_fast.report.data import RESULT, read_run
from vcr1_fast.report.page import render
from vcr1_fast.run.telemetry import say, to_json

PAGE = "report.html"


def report_command(folders: list[str], output: str | None = None) -> Path:
    """Write the report of one run, or of two, to `output` (default: report.html in the first run's folder).

    Raises ConfigError when a folder is none of a run, OSError when the file cannot be written.
    """
    path = Path(output) if output else Path(folders[0]) / PAGE
    path.write_text(render([read_run(folder) for folder in folders]), encoding="utf-8")
    say(f"report: {path}, to be opened with a browser")
    return path


def leave_report(folder: Path, done: Mapping[str, Any]) -> None:
    """What a training leaves at its end: result.json and report.html. What fails is said in one line, not raised."""
    try:
        (folder / RESULT).write_text(to_json({"version": __version__, **done}) + "\n", encoding="utf-8")
        report_command([str(folder)])
    except Exception as error:  # a trained model must not be lost to a page about it
        print(f"warning: no report of the run: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
