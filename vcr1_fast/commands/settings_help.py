"""What `vcr1-fast train --help` shows, and that of sft and eval: the settings that people change first.

The values of one table; their words and defaults are those of the settings. `--help-all` shows every setting.
Called by cli.py; imports no torch.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import Any

from vcr1_fast.settings.io import settings_parser

WIDTH = 100  # columns
HELP_COLUMN = 40  # where the words about a setting begin
HELP_LINES = 2  # of a setting at most, unless its first sentence is longer


@dataclass(frozen=True, slots=True)
class ShortHelp:
    """Of one command."""

    settings: tuple[str, ...]  # dotted keys
    examples: tuple[str, ...]


_MODEL_AND_VIDEO = ("model.path", "data.video_root", "video.fps", "video.max_frames", "video.total_pixels")

SHORT_HELP = {
    "train": ShortHelp(
        (
            *("data.train", "data.eval", *_MODEL_AND_VIDEO, "model.lora.rank"),
            *("rollout.engine", "rollout.group_size", "rollout.max_new_tokens"),
            *("optimizer.learning_rate", "algorithm.beta"),
            *("train.num_steps", "train.prompts_per_step", "train.output_dir", "checkpoint.every"),
        ),
        (
            "vcr1-fast train my.yaml --train.num_steps=500 --rollout.group_size=8",
            "vcr1-fast train my.yaml --dry-run=8    # memory, seconds and disk on 8 GPUs; --fast: sums",
            "torchrun --nproc-per-node=8 -m vcr1_fast train my.yaml",
        ),
    ),
    "sft": ShortHelp(
        (
            *("data.train", "data.eval", *_MODEL_AND_VIDEO, "model.lora.rank"),
            *("optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.schedule"),
            *("sft.num_steps", "sft.examples_per_step", "train.tokens_per_microbatch"),
            *("train.output_dir", "checkpoint.every"),
        ),
        (
            "vcr1-fast sft my.yaml --sft.num_steps=250",
            "torchrun --nproc-per-node=8 -m vcr1_fast sft my.yaml",
        ),
    ),
    "eval": ShortHelp(
        (
            *("data.eval", "model.path", "data.video_root", "data.format", "task.recipe", "task.think"),
            *("eval.video.fps", "eval.video.max_frames", "eval.video.total_pixels"),
            *("eval.max_new_tokens", "eval.temperature", "eval.max_examples", "eval.perceptions"),
            *("rollout.engine", "eval.output_dir", "eval.restart"),
        ),
        (
            "vcr1-fast eval my.yaml --model.path=runs/default/model --eval.max_examples=100",
            "vcr1-fast eval --data.eval=held_out.jsonl --model.path=runs/default/checkpoints/step_000100",
            "torchrun --nproc-per-node=8 -m vcr1_fast eval my.yaml",
        ),
    ),
}


def short_help(command: str, purpose: str, settings_class: type) -> str:
    """The text for a command of SHORT_HELP. `purpose`: the command in a few words."""
    shown = SHORT_HELP[command]
    actions = {action.dest: action for action in settings_parser(settings_class, command)._actions}
    lines = [
        f"usage: vcr1-fast {command} [CONFIG] [--section.field=value ...]",
        "",
        f"{purpose[0].upper()}{purpose[1:]}.",
        "CONFIG is a YAML file, `tiny` or `tiny3` of the package.",
        "",
        "The settings that matter most, with their defaults:",
    ]
    for key in shown.settings:
        lines += _setting_lines(key, actions[key].default, str(actions[key].help))
    lines += ["", "Examples:", *(f"  {example}" for example in shown.examples), ""]
    lines.append(f"Every setting: vcr1-fast {command} --help-all. What a file comes to: vcr1-fast config FILE.")
    return "\n".join(lines)


def _setting_lines(key: str, default: Any, text: str) -> list[str]:
    head = f"  --{key}={_shown_default(default)}"
    words = textwrap.wrap(_first_sentences(text), WIDTH - HELP_COLUMN)
    lines = [" " * HELP_COLUMN + line for line in words]
    if len(head) < HELP_COLUMN:
        return [head.ljust(HELP_COLUMN) + words[0], *lines[1:]]
    return [head, *lines]


def _shown_default(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return "[]" if default == () else str(default)


def _first_sentences(text: str) -> str:
    """As many whole sentences as fit into HELP_LINES, one at least."""
    sentences = re.split(r"(?<=\.) ", " ".join(text.split()))
    kept = sentences[0]
    for sentence in sentences[1:]:
        longer = f"{kept} {sentence}"
        if len(textwrap.wrap(longer, WIDTH - HELP_COLUMN)) > HELP_LINES:
            break
        kept = longer
    return kept
