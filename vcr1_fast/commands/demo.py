"""`make demo`: the whole job on any machine. Writes clips, trains the tiny model with GRPO, prints before and after.

The same loop, packing and objective as a 7B run; only the model and the clips are small.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vcr1_fast.cli import exit_code_of
from vcr1_fast.run.telemetry import say
from vcr1_fast.settings.config import Config, DataFile
from vcr1_fast.settings.io import load_settings
from vcr1_fast.synth.config import Kind, SynthConfig

SHORT_STEPS = 40
DEMO_KINDS: tuple[Kind, ...] = ("grounding", "tracking")  # of the clips that the packaged settings train on


def demo(folder: Path, seed: int, short: bool) -> dict[str, Any]:
    """Run it; returns the summary whose JSON is the last line.

    Args:
        folder: receives data/ and run/; what an earlier demo left there is replaced.
        seed: of the data order and the sampling.
        short: fewer steps on fewer clips, to see that everything works; the gain is then smaller.
    """
    began = time.perf_counter()
    synth, config = settings(folder, seed, short)
    shutil.rmtree(folder / "run", ignore_errors=True)
    from vcr1_fast.synth.dataset import write_dataset

    write_dataset(synth)
    from vcr1_fast.train import train  # 5 s of torch and transformers, after the first line is on screen

    result = train(config)
    run = Path(result["run"])
    say(f"checkpoints:  {run / 'checkpoints'}")
    say(f"metrics:      {run / 'metrics.jsonl'}")
    say(f"TensorBoard:  tensorboard --logdir {run / 'tensorboard'}")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "tasks": {task: _summary(result["before"].get(task), after) for task, after in result["after"].items()},
        "run": str(run),
    }


def settings(folder: Path, seed: int, short: bool) -> tuple[SynthConfig, Config]:
    """The packaged settings of clips and training, moved into `folder`."""
    synth = load_settings(SynthConfig, "tiny", [])
    config = load_settings(Config, "tiny", [])
    if short:
        synth = replace(synth, num_train=48, num_eval=16)
        config = replace(config, train=replace(config.train, num_steps=SHORT_STEPS))
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description="Train the tiny model on synthetic clips.")
    parser.add_argument("--folder", type=Path, default=None, help="where data and run go (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of data order and sampling")
    parser.add_argument("--short", action="store_true", help=f"{SHORT_STEPS} steps on few clips")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("runs", "demo-short" if arguments.short else "demo")
    raise SystemExit(exit_code_of(lambda: demo(folder, arguments.seed, arguments.short)))


if __name__ == "__main__":
    main()
