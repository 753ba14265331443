"""How hard each example was for the policy: rewards.jsonl, written by one run and read by another to choose examples.

One line per group: {"id", "task", "step", "reward"}, the reward being the mean over the sampled answers. Source of the
idea: Time-R1 (2503.13377), which leaves out what is solved already; examples never solved teach as little.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.learner.sharding import World, gather_all
from vcr1_fast.settings.config import ConfigError
from vcr1_fast.types import Example, RolloutGroup


def log_rewards(path: Path, step: int, groups: Sequence[RolloutGroup], world: World) -> None:
    """Append the mean reward of every group of all ranks; rank 0 writes. A collective. Raises OSError on rank 0."""
    rows = [row for part in gather_all([_row(group, step) for group in groups], world) for row in part]
    if world.is_main and rows:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _row(group: RolloutGroup, step: int) -> dict[str, object]:
    example = group.prompt.example
    drawn = [reward for reward, c in zip(group.rewards, group.completions, strict=True) if c.is_sampled]
    return {"id": example.id, "task": example.task, "step": step, "reward": sum(drawn) / len(drawn)}


def read_rewards(path: str | Path) -> dict[str, float]:
    """Example id -> mean reward. Of several lines for one id the last counts: the policy that it met last.

    A last line without an end, torn by a kill, is passed over.

    Raises ConfigError when the file is missing or a line is not {"id": text, "reward": finite number, ...}.
    """
    path = Path(path).expanduser()
    try:
        *lines, torn = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.rewards: cannot read {path}: {error}; wanted rewards.jsonl of an earlier run"
        ) from error
    if torn:
        print(f"data.rewards: the last line of {path} is cut short and is passed over", file=sys.stderr)
    rewards: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            reward, example_id = float(row["reward"]), row["id"]
            if not isinstance(example_id, str) or not math.isfinite(reward):
                raise ValueError(f"id is {example_id!r:.60} and reward {reward}")
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"id": text, "reward": number}'
            raise ConfigError(f"data.rewards: {path}:{number}: wanted {wanted}, got {line!r:.80}") from error
        rewards[example_id] = reward
    return rewards


def select_by_reward(
    examples: Sequence[Example], rewards: dict[str, float], reward_range: tuple[float, float]
) -> tuple[list[Example], str]:
    """The examples whose reward lies in the range, ends included, and those without one, in their order; and a line on
    what was left out.

    Raises ConfigError when no example is left, or none has a reward: the file is then of other data.
    """
    low, high = reward_range
    if not any(example.id in rewards for example in examples):
        raise ConfigError("data.rewards has no id of data.train: name rewards.jsonl of a run on the same files")
    num_below = sum(rewards.get(example.id, low) < low for example in examples)
    num_above = sum(rewards.get(example.id, high) > high for example in examples)
    kept = [example for example in examples if low <= rewards.get(example.id, low) <= high]
    if not kept:
        raise ConfigError(
            f"data.reward_range {low} .. {high} leaves no example: {num_below} are below and {num_above} above"
        )
    num_unknown = sum(example.id not in rewards for example in kept)
    return kept, (
        f"data.reward_range: {len(kept):,} examples; left out {num_below:,} below and {num_above:,} above; "
        f"{num_unknown:,} of those kept have no reward yet"
    )
