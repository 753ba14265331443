"""A run that learns nothing says so: three of its answers, and why that may be, read off the answers themselves.

In: the groups of a step in which no weight moved. Out: lines for people. `lines` and `likely_causes` are pure functions
of one such step; `SignalWatch` counts the steps, and says it once after train.no_signal_steps of them in a row, and at
the end of a run without any signal. Called by train.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vcr1_fast.learner.sharding import gather_all
from vcr1_fast.learner.step import UpdateReport
from vcr1_fast.run.answers import MAX_GROUPS, answer_lines, group_row
from vcr1_fast.run.run import Run
from vcr1_fast.run.telemetry import say
from vcr1_fast.run.terminal import console
from vcr1_fast.types import RolloutGroup

NUM_SHOWN = 3  # groups
FEW_TOKENS = 4  # of a pair of frames: 56 x 56 pixels


@dataclass(frozen=True, slots=True)
class Evidence:
    """One step without a signal, over all ranks."""

    rows: Sequence[Mapping[str, Any]]  # of answers.group_row, each with "tokens_per_pair" of frames of its videos
    num_updates: int
    num_skipped: int  # updates whose gradient was not finite
    num_too_large: int  # groups above train.max_group_tokens
    max_new_tokens: int
    temperature: float

    @property
    def answers(self) -> list[Mapping[str, Any]]:
        return [answer for row in self.rows for answer in row["answers"] if answer["is_sampled"]]


def lines(evidence: Evidence, num_steps: int, width: int) -> list[str]:
    """What is printed, at most `width` columns where answers are shown. `num_steps`: in a row, this one included."""
    head = f"no signal: in {num_steps} steps in a row no update had a gradient that is not 0"
    rows = evidence.rows[:NUM_SHOWN]
    shown = [line for row in rows for line in answer_lines(row, width)]
    causes = likely_causes(evidence) or ["none of the usual causes is seen in these answers"]
    return [head + ("; of its answers:" if rows else ""), *shown, *(f"  likely: {cause}" for cause in causes)]


def likely_causes(evidence: Evidence) -> list[str]:
    """Each cause whose evidence is there, what comes first in the data path first."""
    return [cause for look in _LOOKS if (cause := look(evidence))]


def _no_groups(evidence: Evidence) -> str:
    if evidence.rows:
        return ""
    return "no group was left to train on: see bad samples and reward failures in the step lines"


def _too_large(evidence: Evidence) -> str:
    if not evidence.num_too_large:
        return ""
    return f"{evidence.num_too_large} groups were left out because they are larger than train.max_group_tokens"


def _not_finite(evidence: Evidence) -> str:
    if not evidence.num_skipped:
        return ""
    return (
        f"{evidence.num_skipped} of {evidence.num_updates} updates were skipped, their gradient was not finite: lower "
        "optimizer.learning_rate"
    )


def _small_frames(evidence: Evidence) -> str:
    seen = [tokens for row in evidence.rows for tokens in row["tokens_per_pair"]]
    tokens = statistics.median(seen or [FEW_TOKENS + 1])
    if tokens > FEW_TOKENS:
        return ""
    return (
        f"two frames together are {tokens:g} tokens, in which little can be seen: raise video.min_frame_pixels or "
        "video.total_pixels, or take fewer frames (video.fps, video.max_frames)"
    )


def _single_answers(evidence: Evidence) -> str:
    if not evidence.rows or any(len(row["answers"]) > 1 for row in evidence.rows):
        return ""
    return "each group has one answer, which has nothing to be compared with: raise rollout.group_size"


def _all_truncated(evidence: Evidence) -> str:
    answers = evidence.answers
    if not answers or any(answer["finish_reason"] == "stop" for answer in answers):
        return ""
    return (
        f"all {len(answers)} answers were cut at rollout.max_new_tokens={evidence.max_new_tokens}: raise it, or teach "
        "shorter ones with `vcr1-fast sft`"
    )


def _never_in_form(evidence: Evidence) -> str:
    formats = [answer["parts"]["format"] for answer in evidence.answers if "format" in answer["parts"]]
    if not formats or any(formats):
        return ""
    return (
        f"none of {len(formats)} answers has the form that the question asks for: see above what the model says; teach "
        "it with `vcr1-fast sft` first, or ask in other words (task.prompts)"
    )


def _same_answers(evidence: Evidence) -> str:
    groups = [[answer["text"] for answer in row["answers"] if answer["is_sampled"]] for row in evidence.rows]
    groups = [texts for texts in groups if len(texts) > 1]
    if not groups or any(len(set(texts)) > 1 for texts in groups):
        return ""
    return (
        f"the answers to a question are all the same text, at rollout.temperature={evidence.temperature:g}: raise it, "
        "and look at rollout.top_k and top_p"
    )


def _same_rewards(evidence: Evidence) -> str:
    groups = [row["answers"] for row in evidence.rows if len(row["answers"]) > 1]
    differ = any(len({answer["text"] for answer in answers}) > 1 for answers in groups)
    if not differ or any(len({answer["reward"] for answer in answers}) > 1 for answers in groups):
        return ""
    answers = [answer for group in groups for answer in group]
    names = sorted({name for answer in answers for name in answer["parts"]})
    means = {name: statistics.fmean(a["parts"][name] for a in answers if name in a["parts"]) for name in names}
    best, worst = (all(a["parts"][n] == limit for a in answers for n in a["parts"]) for limit in (1, 0))
    advice = "see above what is asked and what is true"
    if best:
        advice = "the questions are too easy; data.reward_range leaves such out"
    elif worst:
        advice = "the questions are too hard, or the truth or the videos are wrong"
    parts = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    return f"answers to a question differ, but all get the same reward (mean {parts}): {advice}"


_LOOKS: tuple[Callable[[Evidence], str], ...] = (
    *(_no_groups, _too_large, _not_finite, _small_frames, _single_answers),
    *(_all_truncated, _never_in_form, _same_answers, _same_rewards),
)


class SignalWatch:
    """Whether a run had a signal, and what it says while it has none. The same on every rank."""

    def __init__(self, run: Run, has_signal: bool) -> None:
        """`has_signal`: of earlier starts of the run."""
        self.has_signal = has_signal
        self._run, self._num_steps, self._has_said = run, 0, False
        self._own: Evidence | None = None  # the last step's, if it had no signal; this rank's rows

    def note(self, groups: Sequence[RolloutGroup], reports: Sequence[UpdateReport]) -> None:
        """Take in a step. A collective when it is the last of train.no_signal_steps in a row."""
        if any(report.has_signal for report in reports):
            self.has_signal, self._num_steps, self._own = True, 0, None
            return
        self._num_steps += 1
        self._own = self._evidence(groups, reports)
        if self._num_steps == self._run.config.train.no_signal_steps and not self._has_said:
            self._has_said = True
            self._say()

    def finish(self) -> list[str]:
        """The likely causes, after saying them, where no step of the run had a signal. A collective."""
        if self.has_signal or self._own is None:
            return []
        if self._num_steps == self._run.config.train.no_signal_steps:  # said just now
            return likely_causes(self._over_ranks(self._own))
        return self._say()

    def _say(self) -> list[str]:
        assert self._own is not None
        evidence = self._over_ranks(self._own)
        say("\n".join(lines(evidence, self._num_steps, console.width)))
        return likely_causes(evidence)

    def _evidence(self, groups: Sequence[RolloutGroup], reports: Sequence[UpdateReport]) -> Evidence:
        tasks, world, rollout = self._run.tasks, self._run.world, self._run.config.rollout
        rows = [
            group_row(0, group, tasks[group.prompt.example.task])
            | {"tokens_per_pair": [p.num_tokens / p.grid_thw[0] for p in group.prompt.media if p.kind == "video"]}
            for group in groups[: max(MAX_GROUPS // world.world_size, 1)]
        ]
        return Evidence(
            rows,
            num_updates=len(reports),
            num_skipped=sum(report.skipped for report in reports),
            num_too_large=int(sum(report.sums.get("groups_too_large", 0) for report in reports)),
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
        )

    def _over_ranks(self, own: Evidence) -> Evidence:
        """With the rows of every rank; the rest is the same on all. A collective."""
        rows = [row for part in gather_all(own.rows, self._run.world) for row in part]
        return replace(own, rows=rows)
