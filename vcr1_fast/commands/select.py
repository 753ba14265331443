"""`vcr1-fast select`: answers to a pool of examples -> the list of those that are worth training on, for data.only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from vcr1_fast.evaluation.samples import read_samples, write_lines
from vcr1_fast.prompts.difficulty import read_rewards
from vcr1_fast.prompts.selection import draw_by_difficulty
from vcr1_fast.run.telemetry import console
from vcr1_fast.settings.config import ConfigError

NUM_ROWS = 10


def select_command(
    answers: str, output: str, target: int, mean: float, std: float, seed: int, metric: str
) -> dict[str, Any]:
    """Writes `output` and prints how many of each tenth of the scores were there and were drawn.

    answers: samples.jsonl of vcr1-fast eval, whose `metric` counts, or rewards.jsonl of a run, whose mean rewards do.

    Raises ConfigError for a file of another kind, a score outside of [0, 1], and a target that cannot be met.
    """
    scores = read_rewards(answers) if metric == "reward" else _metrics(answers, metric)
    wrong = next((name for name, score in scores.items() if not 0 <= score <= 1), None)
    if wrong is not None:
        raise ConfigError(f"{answers}: {metric} of {wrong!r} is {scores[wrong]}, wanted a score in [0, 1]")
    drawn = draw_by_difficulty(scores, target, mean, std, seed)
    write_lines(Path(output), [{"id": name, metric: score} for name, score in drawn])
    _show(scores, dict(drawn), metric)
    average = math.fsum(score for _, score in drawn) / len(drawn)
    return {"output": output, "num_rows": len(scores), "num_drawn": len(drawn), f"mean_{metric}": average}


def _metrics(file: str, metric: str) -> dict[str, float]:
    """By id, of the samples that have the metric; an answer without text has score 0 by itself."""
    samples = read_samples(file)
    scores = {sample.id: sample.metrics[metric] for sample in samples if metric in sample.metrics}
    if not scores:
        known = sorted({name for sample in samples for name in sample.metrics})
        raise ConfigError(f"no sample of {file} has the metric {metric!r}; they have {', '.join(known) or 'none'}")
    return scores


def _show(scores: Mapping[str, float], drawn: Mapping[str, float], metric: str) -> None:
    table = Table(metric, "rows", "drawn", title="from which scores rows were drawn")
    for row in range(NUM_ROWS):
        low, high = row / NUM_ROWS, (row + 1) / NUM_ROWS
        counts = [
            sum(low <= s and (s < high or row == NUM_ROWS - 1) for s in part.values()) for part in (scores, drawn)
        ]
        table.add_row(f"{low:.1f} .. {high:.1f}", *(f"{count:,}" for count in counts))
    console.print(table)
