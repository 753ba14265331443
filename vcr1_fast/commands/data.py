"""`vcr1-fast data CONFIG`: which annotation files and videos of a configuration are here, and which are not.

Every file of data.train and data.eval is read as a run reads it; videos are looked up and not opened. Loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vcr1_fast.prompts.dataset import AnnotationFile, AnnotationSource, read_annotation_files
from vcr1_fast.run.exit_codes import FAILED
from vcr1_fast.run.telemetry import console, say
from vcr1_fast.settings.config import Config, ConfigError, DataFile
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.task import Task
from vcr1_fast.video.source_name import SourceName

NO_SUCH_FILE = "no such file"
NUM_SHOWN = 3  # missing videos and refused rows that are named of each file


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What is here of one annotation file."""

    path: str
    content: AnnotationFile | None  # None: the file is not there, or cannot be read as a whole
    problem: str  # why not; empty if it could be read
    found: tuple[str, ...]  # videos and images, each once, in the order of the rows
    missing: tuple[str, ...]


def check_files(config: Config, tasks: dict[str, Task]) -> list[FileCheck]:
    """One for each file of data.train and data.eval, in this order; a file of both is looked at once.

    Raises ConfigError when one of the two names a file twice.
    """
    train, held_out = config.data.sources("train"), config.data.sources("eval")
    for name, files in (("train", train), ("eval", held_out)):
        twice = next((file.path for number, file in enumerate(files) if file in files[:number]), None)
        if twice is not None:
            raise ConfigError(f"data.{name} names {twice} twice: name it once")
    return [_check(file, tasks, config) for file in dict.fromkeys([*train, *held_out])]


def _check(file: DataFile, tasks: dict[str, Task], config: Config) -> FileCheck:
    if not Path(file.path).expanduser().is_file():
        return FileCheck(file.path, None, NO_SUCH_FILE, (), ())
    source = AnnotationSource(file.path, file.video_root, file.format or "auto", file.task)
    try:
        (content,) = read_annotation_files([source], tasks, config.task.recipe)
    except ConfigError as error:
        return FileCheck(file.path, None, str(error), (), ())
    videos = dict.fromkeys(SourceName.parse(source).path for row in content.rows for source in row.sources)
    is_here = {video: is_there(video) for video in videos}
    found, missing = (tuple(video for video in videos if is_here[video] is wanted) for wanted in (True, False))
    return FileCheck(file.path, content, "", found, missing)


def is_there(video: str) -> bool:
    """Whether a video is a file with something in it, or a folder that is not empty."""
    try:
        return bool(os.path.getsize(video)) if os.path.isfile(video) else any(os.scandir(video))
    except (OSError, ValueError):
        return False


def data_command(config: Config) -> dict[str, Any]:
    """Prints a table, what is missing and what is refused. Returns what the JSON line says; exit_code 1 if a file or a
    video is missing or no row is usable.
    """
    checks = check_files(config, make_tasks(config.task, judge=config.judge))
    if not checks:
        raise ConfigError("neither data.train nor data.eval names a file: name one, such as --data.train=rows.jsonl")
    console.print(_table(checks))
    for check in checks:
        _say_what_is_wrong(check)
    if any(check.problem == NO_SUCH_FILE for check in checks):
        say("how to get public data sets, and where they go: docs/data.md; for the tiny model: vcr1-fast synth tiny")
    if any(check.missing for check in checks):
        say("data.video_root is the folder that video paths start from; default: that of the annotation file")
    is_complete = all(check.content and check.content.examples and not check.missing for check in checks)
    return {"files": [_as_dict(check) for check in checks], "exit_code": 0 if is_complete else FAILED}


def _say_what_is_wrong(check: FileCheck) -> None:
    if check.content is None:
        say(f"{check.path}: {check.problem}")
        return
    shown = [
        (check.missing, "videos or images are missing, such as", check.missing),
        (check.content.errors, "rows cannot be used, such as", [str(error) for error in check.content.errors]),
    ]
    for items, what, texts in shown:
        if items:
            say(f"{check.path}: {len(items):,} {what} {_listed(texts)}")


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(texts[:NUM_SHOWN]) + (", ..." if len(texts) > NUM_SHOWN else "")


def _table(checks: Sequence[FileCheck]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("annotation file", overflow="fold")
    table.add_column("schema", no_wrap=True)
    for name in ("rows", "usable", "videos", "missing"):
        table.add_column(name, justify="right")
    for check in checks:
        summary = check.content.summary if check.content else None
        counts = (summary.num_rows, summary.num_examples, len(check.found), len(check.missing)) if summary else ()
        cells = [f"{count:,}" for count in counts] or ["-"] * 4
        table.add_row(check.path, summary.schema if summary else "not found", *cells)
    return table


def _as_dict(check: FileCheck) -> dict[str, Any]:
    summary = check.content.summary if check.content else None
    return {
        "file": check.path,
        "problem": check.problem,
        "num_rows": summary.num_rows if summary else 0,
        "num_examples": summary.num_examples if summary else 0,
        "videos_found": len(check.found),
        "videos_missing": len(check.missing),
    }
