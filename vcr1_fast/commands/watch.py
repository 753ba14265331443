"""`vcr1-fast watch RUN`: the numbers of a run as a table that follows it; of a finished one, as it ended. No torch."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vcr1_fast.run.metric_names import METRICS, metric_of
from vcr1_fast.run.step_line import HEADLINES, WINDOW, clock, number
from vcr1_fast.run.terminal import console
from vcr1_fast.settings.error import ConfigError

SECONDS_BETWEEN_LOOKS = 1.0
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 12  # of a curve, characters: a row fits 80 columns


class RunRecord:
    """The steps of a run's metrics.jsonl, read on as they are written."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError when `folder` is none of a run."""
        self.folder = Path(folder)
        self._path = self.folder / "metrics.jsonl"
        if not self._path.is_file():
            raise ConfigError(
                f"there is no metrics.jsonl in {folder}: give the folder of a run, its train.output_dir, once it trains"
            )
        self._num_bytes = 0
        self.records: list[dict[str, Any]] = []

    def read_on(self) -> None:
        """What was written since. A resumed run begins its file anew, and a line that is being written is left."""
        if self._path.stat().st_size < self._num_bytes:
            self._num_bytes, self.records = 0, []
        with self._path.open("rb") as file:
            file.seek(self._num_bytes)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._num_bytes += len(whole) + len(newline)
        for line in whole.decode("utf-8", "replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                self.records.append(record)

    def values(self) -> dict[str, list[float]]:
        """Metric -> what every line that has it says, in order; null, which stands for no number, is left out."""
        found: dict[str, list[float]] = {}
        for record in self.records:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    found.setdefault(name, []).append(float(value))
        return found

    @property
    def step(self) -> int:
        return max((int(record.get("step", 0)) for record in self.records), default=0)

    def num_steps(self) -> int | None:
        """How many steps the run is to have, where its config.yaml says so."""
        try:
            config = yaml.safe_load((self.folder / "config.yaml").read_text("utf-8"))
            section = "sft" if any("nll" in record for record in self.records) else "train"
            return int(config[section]["num_steps"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            return None

    def has_ended(self) -> bool:
        """Whether the last step, and a score after it where there were scores before, are written."""
        last = [record for record in self.records if record.get("step") == self.num_steps()]
        scored = any(_is_score(record) for record in self.records)
        return any(any(name in record for name in HEADLINES) for record in last) and (
            not scored or any(_is_score(record) for record in last)
        )


def _is_score(record: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in record)


def watch_command(folder: str, *, shows_all: bool, follows: bool) -> None:
    """Show the table; follow the run until it has ended or Ctrl-C. Raises ConfigError, see `RunRecord`."""
    run = RunRecord(folder)
    run.read_on()
    if not follows or run.has_ended():
        console.print(table(run, shows_all))
        return
    with Live(table(run, shows_all), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not run.has_ended():
            time.sleep(SECONDS_BETWEEN_LOOKS)
            run.read_on()
            live.update(table(run, shows_all), refresh=True)


def table(run: RunRecord, shows_all: bool) -> Group:
    """One row a metric: the last value, the mean of the last steps, and its way since the start."""
    values = run.values()
    rows = Table(box=box.SIMPLE, pad_edge=False)
    rows.add_column("metric", no_wrap=True)
    rows.add_column("last", justify="right", no_wrap=True)
    rows.add_column(f"mean of {WINDOW}", justify="right", no_wrap=True)
    rows.add_column("since the start", no_wrap=True)
    for name in _in_order(values, shows_all):
        column = values[name]
        recent = column[-WINDOW:]
        rows.add_row(Text(name), number(column[-1]), number(sum(recent) / len(recent)), curve(column))
    return Group(Text(_head(run, values)), rows)


def _head(run: RunRecord, values: Mapping[str, Sequence[float]]) -> str:
    num_steps, seconds = run.num_steps(), values.get("step_time", [])[-WINDOW:]
    if not num_steps:
        return f"{run.folder}: step {run.step}"
    left_s = (num_steps - run.step) * sum(seconds) / len(seconds) if seconds else 0.0
    rest = f", {clock(left_s)} left" if left_s else ""
    return f"{run.folder}: step {run.step} of {num_steps}{rest}"


def _in_order(values: Mapping[str, object], shows_all: bool) -> list[str]:
    """Names as metric_names lists them; unknown ones, of a newer release, last."""
    places = {metric: place for place, metric in enumerate(METRICS)}
    known = {name: metric_of(name) for name in values}
    wanted = [name for name, metric in known.items() if shows_all or (metric is not None and metric.is_main)]
    return sorted(wanted, key=lambda name: places.get(known[name], len(places)))  # type: ignore[arg-type]


def curve(values: Sequence[float], width: int = WIDTH) -> str:
    """At most `width` bars, each the mean of as many neighbours, from the lowest to the highest of them."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[0] * count
    return "".join(BARS[int((value - low) / (high - low) * (len(BARS) - 1) + 0.5)] for value in means)
