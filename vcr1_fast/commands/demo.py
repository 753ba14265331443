"""`make demo`: the whole job on any machine. Writes clips, trains a tiny model with GRPO, prints before and after.

The same loop, packing and objective as a 7B run; only the model and the clips are small. `make demo-full` takes more
clips and steps, those of the packaged settings.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from vcr1_fast.cli import exit_code_of
from vcr1_fast.report import PAGE
from vcr1_fast.run.model_folder import PACKAGED
from vcr1_fast.run.telemetry import console, say
from vcr1_fast.settings.config import Config, DataFile
from vcr1_fast.settings.io import load_settings
from vcr1_fast.synth.config import Kind, SynthConfig

NUM_STEPS = 40  # a minute on two cores, of which it raises mIoU from 0.49 to 0.86
NUM_TRAIN, NUM_EVAL = 48, 16  # clips of each kind
DEMO_KINDS: tuple[Kind, ...] = ("grounding", "tracking")  # of the clips that the packaged settings train on


def demo(folder: Path, seed: int, is_full: bool = False, model: str = "tiny") -> dict[str, Any] | None:
    """Run it; returns the summary whose JSON is the last line, None where a terminal got a table instead.

    Args:
        folder: receives data/ and run/; what an earlier demo left there is replaced.
        seed: of the data order and the sampling.
        is_full: all steps and clips of the packaged settings; the gain is then larger.
        model: a packaged one.
    """
    began = time.perf_counter()
    synth, config = settings(folder, seed, is_full, model)
    shutil.rmtree(folder / "run", ignore_errors=True)
    from vcr1_fast.synth.dataset import write_dataset

    write_dataset(synth)
    from vcr1_fast.train import train  # 5 s of torch and transformers, after the first line is on screen

    result = train(config)
    run = Path(result["run"])
    tasks = {task: _summary(result["before"].get(task), after) for task, after in result["after"].items()}
    seconds = round(time.perf_counter() - began, 1)
    if console.is_terminal:
        console.print(_table(tasks, seconds))
    say(f"how it learned, and what it answers, in a browser: {(run / PAGE).resolve().as_uri()}")
    say(f"its numbers, here: vcr1-fast watch {shlex.quote(str(run))}")
    return None if console.is_terminal else {"seconds": seconds, "tasks": tasks, "run": str(run)}


def settings(folder: Path, seed: int, is_full: bool = False, model: str = "tiny") -> tuple[SynthConfig, Config]:
    """The packaged settings of clips and training, moved into `folder`, with fewer clips and steps unless `is_full`."""
    synth = load_settings(SynthConfig, model, [])
    config = load_settings(Config, model, [])
    if not is_full:
        synth = replace(synth, num_train=NUM_TRAIN, num_eval=NUM_EVAL)
        config = replace(config, train=replace(config.train, num_steps=NUM_STEPS))
    data = folder / "data"
    train = replace(config.train, output_dir=str(folder / "run"), seed=seed)
    files = replace(
        config.data, train=_moved(config.data.sources("train"), data), eval=_moved(config.data.sources("eval"), data)
    )
    return replace(synth, output_dir=str(data), kinds=DEMO_KINDS), replace(config, train=train, data=files)


def _moved(files: list[DataFile], folder: Path) -> tuple[str, ...]:
    return tuple(str(folder / Path(file.path).name) for file in files)


def _summary(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, float | None]:
    """Headline metric before and after, and the best score that needs no model."""
    trivial = max(next(iter(metrics.values())) for metrics in after["trivial"].values())
    return {
        "before": _headline(before) if before else None,
        "after": _headline(after),
        "trivial": round(trivial, 4),
    }


def _headline(score: dict[str, Any]) -> float:
    return round(next(iter(score["metrics"].values())), 4)


def _table(tasks: Mapping[str, Mapping[str, float | None]], seconds: float) -> Table:
    """The summary for people."""
    table = Table(f"held-out score, {seconds:.0f} s", box=box.SIMPLE)
    columns = {"before": "before", "after": "after", "trivial": "best without a model"}
    for title in columns.values():
        table.add_column(title, justify="right")
    for task, scores in tasks.items():
        values = (scores[name] for name in columns)
        table.add_row(task, *("" if value is None else f"{value:.3f}" for value in values))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description="Train a tiny model on synthetic clips.")
    parser.add_argument("--model", choices=sorted(PACKAGED), default="tiny", help="tiny: Qwen2.5-VL, tiny3: Qwen3-VL")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where data and run go (default: runs/demo, runs/demo-tiny3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data order and sampling")
    parser.add_argument("--full", action="store_true", help="more clips and steps: `make demo-full`, to runs/demo-full")
    arguments = parser.parse_args()
    name = "demo" + ("-full" if arguments.full else "") + (f"-{arguments.model}" if arguments.model != "tiny" else "")
    folder = arguments.folder or Path("runs", name)
    raise SystemExit(exit_code_of(lambda: demo(folder, arguments.seed, arguments.full, arguments.model)))


if __name__ == "__main__":
    main()
