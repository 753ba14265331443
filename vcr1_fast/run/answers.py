"""What the policy says while it trains: rewards.jsonl, samples/step_N.jsonl, texts and pictures, a printed answer.

A line of samples/step_N.jsonl is one group: {"step", "id", "task", "video", "question", "truth", "times_s", "answers"},
each answer {"text", "parsed", "parts", "reward", "advantage", "finish_reason", "num_tokens", "is_sampled"}; `truth` and
`parsed` are texts for people, see tasks/shown.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from vcr1_fast.evaluation.samples import write_lines
from vcr1_fast.learner.sharding import World, gather_all
from vcr1_fast.prompts.difficulty import log_rewards
from vcr1_fast.run.run import Run, due
from vcr1_fast.run.telemetry import Telemetry, say
from vcr1_fast.run.terminal import console, printable
from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.prompt_file import one_line
from vcr1_fast.tasks.shown import shown_answer, shown_question, shown_times_s, shown_truth
from vcr1_fast.tasks.task import Task
from vcr1_fast.tasks.unlabelled import read_answer
from vcr1_fast.types import Completion, Interval, RolloutGroup
from vcr1_fast.video.draw import GIVEN, STRIP_FRAMES, bar, side_by_side
from vcr1_fast.video.formats import VideoFormat
from vcr1_fast.video.patches import to_frames

MAX_GROUPS = 32  # of a file
MAX_TEXT_GROUPS = 4  # of a step in TensorBoard, which keeps all of them in memory
MAX_PICTURE_PX = 112  # about the height of a frame in a picture: with 8 of 16 : 9 and 4 groups 0.5 MB a step
MIN_ANSWER_WIDTH = 20  # characters that are printed of an answer even where its line gets longer than the terminal


def log_answers(run: Run, telemetry: Telemetry, step: int, groups: Sequence[RolloutGroup]) -> None:
    """Record what this step drew, as the settings ask. `groups` have rewards and advantages. A collective."""
    with telemetry.forgiven("rewards.jsonl"):
        log_rewards(run.folder / "rewards.jsonl", step, groups, run.world)
    config = run.config.train
    is_kept, is_printed = due(config.samples_every, step), due(config.print_every, step)
    if not is_kept and not is_printed:
        return
    rows = gather_rows(step, groups, run.tasks, run.world)
    if not run.world.is_main or not rows:
        return
    if is_kept:
        with telemetry.forgiven("samples"):
            write_samples(run.folder / "samples" / f"step_{step}.jsonl", rows)
        pictures: dict[str, np.ndarray] = {}
        with telemetry.forgiven("pictures", Exception):  # of rank 0's own groups, the first of the rows
            pictures |= clip_pictures(groups[:MAX_TEXT_GROUPS], run.config.task, run.source.video_format)
        telemetry.log_media(step, {"samples": "\n\n".join(map(as_text, rows[:MAX_TEXT_GROUPS]))}, pictures)
    if is_printed:
        row = rows[step // config.print_every % len(rows)]  # not always the first of its step
        say("\n".join(answer_lines(row, console.width)))


def gather_rows(
    step: int, groups: Sequence[RolloutGroup], tasks: Mapping[str, Task], world: World
) -> list[dict[str, Any]]:
    """At most MAX_GROUPS rows, from each rank as many. A collective."""
    share = max(MAX_GROUPS // world.world_size, 1)
    rows = [group_row(step, group, tasks[group.prompt.example.task]) for group in groups[:share]]
    return [row for part in gather_all(rows, world) for row in part][:MAX_GROUPS]


def group_row(step: int, group: RolloutGroup, task: Task) -> dict[str, Any]:
    """What a line of samples/step_N.jsonl says of one group."""
    example = group.prompt.example
    answers = [
        {
            "text": completion.text,
            "parsed": shown_answer(completion.text),
            "parts": {name: values[i] for name, values in group.reward_parts.items()},
            "reward": group.rewards[i],
            "advantage": group.advantages[i],
            "finish_reason": completion.finish_reason,
            "num_tokens": completion.num_tokens,
            "is_sampled": completion.is_sampled,
        }
        for i, completion in enumerate(group.completions)
    ]
    return {
        "step": step,
        "id": example.id,
        "task": example.task,
        "video": example.video,
        "question": shown_question(task, example),
        "truth": shown_truth(task, example),
        "times_s": shown_times_s(example),
        "answers": answers,
    }


def write_samples(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a group. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    write_lines(path, rows)


def as_text(row: Mapping[str, Any]) -> str:
    """All answers of a group, for people."""
    answers = [
        f"reward {answer['reward']:.3f}, advantage {answer['advantage']:+.3f}: {answer['text']}"
        for answer in row["answers"]
    ]
    return "\n".join([f"{row['id']} ({row['task']}): {row['question']}", f"truth: {row['truth']}", *answers])


def clip_pictures(
    groups: Sequence[RolloutGroup], config: TaskConfig, video_format: VideoFormat
) -> dict[str, np.ndarray]:
    """Name -> picture, of those groups that have one."""
    pictures = {f"samples/{i}": clip_picture(group, config, video_format) for i, group in enumerate(groups)}
    return {name: picture for name, picture in pictures.items() if picture is not None}


def clip_picture(group: RolloutGroup, config: TaskConfig, video_format: VideoFormat) -> np.ndarray | None:
    """[H, W, 3] uint8: frames that the model saw, side by side; below them the true periods in blue and those that the
    first drawn answer says in orange, where the truth is of periods; of several videos and images the first. None where
    there is none, or its pixels are not kept."""
    if not group.prompt.media:
        return None
    patches, truth = group.prompt.media[0], group.prompt.example.truth
    num_pairs = patches.grid_thw[0]
    pairs = sorted({round((i + 0.5) * num_pairs / STRIP_FRAMES - 0.5) for i in range(STRIP_FRAMES)})
    frames_FHW3 = to_frames(patches, pairs, video_format)
    if frames_FHW3 is None:
        return None
    stride = max(1, frames_FHW3.shape[1] // MAX_PICTURE_PX)
    row_HW3 = side_by_side(frames_FHW3[:, ::stride, ::stride].numpy())
    true_s: Sequence[Interval] | None = getattr(truth, "intervals_s", None)
    if true_s is None or patches.duration_s <= 0:
        return row_HW3
    said = read_answer(group.prompt.example, _drawn(group.completions).text, config) or {}
    width_px, duration_s = row_HW3.shape[1], patches.duration_s
    bars = bar(width_px, true_s, duration_s, GIVEN), bar(width_px, said.get("intervals", ()), duration_s)
    return np.concatenate([row_HW3, *bars])


def _drawn(completions: Sequence[Completion]) -> Completion:
    return next((completion for completion in completions if completion.is_sampled), completions[0])


def answer_lines(row: Mapping[str, Any], width: int) -> list[str]:
    """The question and the group's first drawn answer with what was made of it, cut to `width` columns, no control
    characters."""
    drawn = next((answer for answer in row["answers"] if answer["is_sampled"]), row["answers"][0])
    read = _shortened(drawn["parsed"] or "nothing", width // 4)
    rest = f" | read {read} | truth {_shortened(row['truth'], width // 4)} | reward {drawn['reward']:.3f}"
    space = max(width - cell_len(rest) - len("  said: "), MIN_ANSWER_WIDTH)
    asked = _shortened(f"asked ({row['task']}): {row['question']}", width - 2)
    return [f"  {asked}", f"  said: {_shortened(drawn['text'], space)}{rest}"]


def _shortened(text: str, width: int) -> str:
    line = Text(printable(one_line(text)))
    line.truncate(width, overflow="ellipsis")
    return line.plain
