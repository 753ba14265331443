"""Which examples of data.train a run learns from: those of a list, of some lengths, without some words.

`draw_by_difficulty` makes such a list as TimeLens does (TencentARC/TimeLens, training/data/grounding.py): rows that the
model answers rarely but not never are drawn most often. data.rewards chooses by an earlier run, see difficulty.py.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vcr1_fast.settings.config import ConfigError, DataConfig
from vcr1_fast.types import Example

NUM_BINS = 20


def draw_by_difficulty(
    scores: Mapping[str, float], target: int, mean: float, std: float, seed: int
) -> list[tuple[str, float]]:
    """`target` of the ids, drawn without replacement, with their scores in [0, 1]; in the order of `scores`.

    A row of score s is drawn with weight exp(-(s - mean)^2 / (2 std^2)) / n, where n rows lie in its twentieth of
    [0, 1]: among what is drawn, scores then lie as that bell does, however the pool's lie. Raises ConfigError when
    fewer rows have a weight.
    """
    values = np.array(list(scores.values()), np.float64)
    bins = np.minimum((values * NUM_BINS).astype(int), NUM_BINS - 1)
    weights = np.exp(-0.5 * ((values - mean) / std) ** 2) / np.bincount(bins, minlength=NUM_BINS)[bins]
    num_weighted = int((weights > 0).sum())
    if num_weighted < target:
        raise ConfigError(
            f"{target:,} rows are to be drawn of {len(values):,}, of which {num_weighted:,} have a weight above 0: "
            "lower the target, or widen the bell"
        )
    drawn = np.random.default_rng(seed).choice(len(values), target, replace=False, p=weights / weights.sum())
    names = list(scores)
    return [(names[index], float(values[index])) for index in sorted(drawn)]


def read_ids(path: str | Path) -> set[str]:
    """The ids of data.only. Raises ConfigError when the file cannot be read or a line has none."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.only: cannot read {file}: {error}; wanted what `vcr1-fast select` writes") from None
    found: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            name = json.loads(line)["id"]
        except (ValueError, LookupError, TypeError, RecursionError):
            name = None
        if not isinstance(name, str):
            raise ConfigError(f'data.only: {file}:{number} is {line!r:.80}, wanted {{"id": text, ...}}')
        found.add(name)
    return found


def chosen(examples: Sequence[Example], config: DataConfig) -> tuple[Sequence[Example], str]:
    """What data.only, duration_range_s, max_query_words and excluded_words leave, and a line on what they left out.

    Raises ConfigError when nothing is left, or data.only names an id that no example has.
    """
    listed = read_ids(config.only) if config.only is not None else None
    if listed is not None and (unknown := listed - {example.id for example in examples}):
        raise ConfigError(
            f"data.only names {len(unknown):,} of {len(listed):,} ids that data.train does not have, such as "
            f"{min(unknown)!r}: select from the files that are trained on"
        )
    left_out: Counter[str] = Counter()
    kept: list[Example] = []
    for example in examples:
        reason = "not in data.only" if listed is not None and example.id not in listed else _unfit(example, config)
        left_out.update([reason] if reason else [])
        kept += [] if reason else [example]
    told = f"data.train: {len(kept):,} of {len(examples):,} examples are trained on"
    if left_out:
        told += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    if not kept:
        raise ConfigError(f"{told}: nothing is left, widen these settings")
    return kept, told if left_out else ""


def _unfit(example: Example, config: DataConfig) -> str:
    shortest, longest = config.duration_range_s or (0.0, math.inf)
    if math.isfinite(example.duration_s) and not shortest <= example.duration_s <= longest:
        return "by data.duration_range_s"
    words = [word for part in example.query.lower().split() if (word := part.strip(".,;:!?\"'()"))]
    if config.max_query_words is not None and len(words) > config.max_query_words:
        return "by data.max_query_words"
    if not {word.lower() for word in config.excluded_words}.isdisjoint(words):
        return "by data.excluded_words"
    return ""
