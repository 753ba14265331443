"""Captioning: what happens in the video? Answer: free text, compared with the true events by a judge.

Row: {"id", "task", "video", "duration_s", "events": ["...", ...]}, or "caption": "..." instead of or beside "events"
(the judge splits a caption into events once), and optionally "query", an instruction that replaces the usual one.

recipe fixed: format + F1 of event recall and event precision, so that a longer answer does not simply earn more.
recipe paper: VideoChat-R1 (arXiv 2504.06958): format + event recall. Its prompts and code were never released; the
questions to the judge are those of judge/entailment.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from vcr1_fast.judge.client import JudgeClient, JudgeUnavailableError
from vcr1_fast.judge.entailment import (
    MAX_CAPTION_CHARS,
    MAX_EVENT_CHARS,
    Verdict,
    count_entailed,
    harmonic_mean,
    split_events,
)
from vcr1_fast.settings.config import JudgeConfig, TaskConfig
from vcr1_fast.tasks.annotations import caption_truth, check_counts, mean
from vcr1_fast.tasks.answer_format import clip, has_paper_format, has_strict_format, tag_blocks
from vcr1_fast.tasks.benchmark_readers import read_caption
from vcr1_fast.tasks.prompt_file import Worded, Wording, one_line
from vcr1_fast.types import CaptionTruth, Example

Wanted = Literal["recall", "f1", "both"]  # f1: precision only where recall is above 0, for F1 is 0 otherwise
Pair = tuple[CaptionTruth, str]
NOTHING = Verdict(0.0, 0.0)
QUESTIONS = {
    "fixed": "{instruction} {reason} the description in <answer></answer>.",
    "paper": "{instruction} {reason}Write the description inside <answer></answer>.",
}
INSTRUCTIONS = {  # of a row without a query
    "fixed": "Describe what happens in the video: every action, in order, and nothing that is not seen.",
    "paper": "Describe the video in detail.",
}


class Captioning(Worded):
    """Reward parts: format, and f1 (fixed) or recall (paper) of events. Only `score` and `metrics` ask the judge."""

    name = "captioning"
    needs_video = True
    needs_query = False  # a row without "query" gets the usual instruction
    part_names: tuple[str, ...] = ("format", "recall", "f1")  # of an instance: those of its recipe

    def __init__(self, config: TaskConfig, judge: JudgeConfig | None = None) -> None:
        self.is_paper = config.recipe == "paper"
        self.think = config.think
        self.part_names = ("format", "recall") if self.is_paper else ("format", "f1")
        self.judge = JudgeClient(judge or JudgeConfig())
        self.wording = Wording(config, self.name, QUESTIONS, ("instruction",))
        self._instruction = INSTRUCTIONS[config.recipe]

    def parse_truth(self, row: Mapping[str, object]) -> CaptionTruth:
        """Events, caption or both, blanks evened out; an event that is listed twice counts once.

        Raises ValueError when both are missing, or one is empty, malformed or too long for the judge.
        """
        if row.get("events") is None and row.get("caption") is None:
            raise ValueError('"events" and "caption" are both missing, wanted a list of sentences or a text')
        events = [] if row.get("events") is None else row["events"]
        if not isinstance(events, list | tuple) or (not events and row.get("events") is not None):
            raise ValueError(f"events is {events!r:.60}, wanted a list of sentences, at least one")
        texts = [_text(event, f"events[{i}]", MAX_EVENT_CHARS) for i, event in enumerate(events)]
        caption = "" if row.get("caption") is None else _text(row["caption"], "caption", MAX_CAPTION_CHARS)
        return CaptionTruth(tuple(dict.fromkeys(texts)), caption)

    def question_fields(self, example: Example) -> dict[str, str]:
        """instruction: the query (fixed: in one line), or the recipe's own where the row has none."""
        return {"instruction": (example.query if self.is_paper else one_line(example.query)) or self._instruction}

    def target(self, example: Example) -> str:
        """The completion to learn from: the caption, or the events one after the other, after the reasoning."""
        return self.completion(_reference(caption_truth(example)), example.reasoning)

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Part "format" and part "f1" (fixed) or "recall" (paper) of N answers, each in [0, 1].

        format: the tags, and (fixed) a caption between them. An answer without a caption gets 0 and is not judged.
        Where the judge gives no verdict: judge.on_failure "zero" makes the judged part of all answers to that example
        0; "drop" raises JudgeUnavailableError, and scoring.py leaves the group out. Verdicts that did come are
        cached, so the other groups are not asked again.
        """
        check_counts(len(examples), len(answers))
        is_formatted = self.are_well_formed(examples, answers)
        captions = [_rewarded_caption(answer) for answer in answers]
        verdicts = self._verdicts(examples, captions, "recall" if self.is_paper else "f1")
        failures = {ex.id: v for ex, v in zip(examples, verdicts, strict=True) if isinstance(v, JudgeUnavailableError)}
        if failures and self.judge.config.on_failure == "drop":
            raise JudgeUnavailableError(_summary(failures, "left out"))
        if failures:
            print(_summary(failures, "judged as 0"), file=sys.stderr)
        judged = [
            NOTHING if isinstance(v, JudgeUnavailableError) or ex.id in failures else v
            for ex, v in zip(examples, verdicts, strict=True)
        ]
        values = [verdict.recall if self.is_paper else verdict.f1 for verdict in judged]
        return {"format": [float(ok) for ok in is_formatted], self.part_names[1]: values}

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """recall and precision are means over the videos, f1 is their harmonic mean, as Dream-1K computes it.

        The caption is what `benchmark_readers.read_caption` finds.
        judged: share of the answers that have a verdict (an empty one needs no judge). The others count as 0, so that
        an answer which confuses the judge gains nothing; a judge that is down does not raise. All in [0, 1]. Raises
        ValueError when there are no examples.
        """
        check_counts(len(examples), len(answers))
        verdicts = self._verdicts(examples, [clip(read_caption(answer)) for answer in answers], "both")
        failures = {ex.id: v for ex, v in zip(examples, verdicts, strict=True) if isinstance(v, JudgeUnavailableError)}
        if failures:
            print(_summary(failures, "counted as 0"), file=sys.stderr)
        known = [NOTHING if isinstance(v, JudgeUnavailableError) else v for v in verdicts]
        recall, precision = mean([v.recall for v in known]), mean([v.precision for v in known])
        judged = mean([float(not isinstance(v, JudgeUnavailableError)) for v in verdicts])
        return {"f1": harmonic_mean(recall, precision), "recall": recall, "precision": precision, "judged": judged}

    def sample_metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """recall and precision of each answer, of which `metrics` gives the means; {} where a verdict is missing.

        After `metrics` this asks nothing new. f1 is not a mean over videos and is left out.
        """
        check_counts(len(examples), len(answers))
        verdicts = self._verdicts(examples, [clip(read_caption(answer)) for answer in answers], "both")
        known = [verdict for verdict in verdicts if isinstance(verdict, Verdict)]
        if len(known) < len(verdicts):
            return {}
        return {"recall": [verdict.recall for verdict in known], "precision": [verdict.precision for verdict in known]}

    def are_readable(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        return [read_caption(answer) != "" for answer in answers]

    def are_well_formed(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        """The part "format" of `score`, without the judge."""
        has_format = has_paper_format if self.is_paper else has_strict_format
        return [
            has_format(clip(answer), self.think) and (self.is_paper or _rewarded_caption(answer) != "")
            for answer in answers
        ]

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        """empty: no caption, 0 by definition and without a judge. a_video: "A video.", which a strict judge gives 0.

        The second one asks the judge and so shows how lenient it is.
        """
        captions = {"empty": "", "a_video": "A video."}
        return {name: [self.completion(caption)] * len(examples) for name, caption in captions.items()}

    def _verdicts(
        self, examples: Sequence[Example], captions: Sequence[str], wanted: Wanted
    ) -> list[Verdict | JudgeUnavailableError]:
        """One verdict per caption; equal captions of one truth are judged once."""
        pairs: list[Pair] = [(caption_truth(ex), caption) for ex, caption in zip(examples, captions, strict=True)]
        asked = list(dict.fromkeys(pair for pair in pairs if pair[1]))
        deadline = self.judge.new_deadline()
        whole = list(dict.fromkeys(truth for truth, _ in asked if not truth.events))
        split = self.judge.map(lambda truth: split_events(self.judge, truth.caption, deadline), whole)
        events_of = dict(zip(whole, split, strict=True))

        def judge(pair: Pair) -> Verdict:
            truth, caption = pair
            events = events_of.get(truth, truth.events)
            if isinstance(events, JudgeUnavailableError):
                raise events
            # A reference in which nothing happens is one event, as in Dream-1K.
            return self._judge_one(
                events or (truth.caption[:MAX_EVENT_CHARS],), _reference(truth), caption, wanted, deadline
            )

        verdict_of = dict(zip(asked, self.judge.map(judge, asked), strict=True))
        return [verdict_of.get(pair, NOTHING) for pair in pairs]

    def _judge_one(
        self, events: tuple[str, ...], reference: str, caption: str, wanted: Wanted, deadline: float
    ) -> Verdict:
        recall = count_entailed(self.judge, events, caption, deadline) / len(events)
        if wanted == "recall" or (wanted == "f1" and recall == 0.0):
            return Verdict(recall, 0.0)
        claimed = split_events(self.judge, caption, deadline)
        precision = count_entailed(self.judge, claimed, reference, deadline) / len(claimed) if claimed else 0.0
        return Verdict(recall, precision)


def _reference(truth: CaptionTruth) -> str:
    """The whole reference as one text."""
    return truth.caption or " ".join(
        event if event.endswith((".", "!", "?")) else f"{event}." for event in truth.events
    )


def _rewarded_caption(answer: str) -> str:
    """What the last answer block says; "" where there is none or it holds no letter or digit."""
    text = clip(answer)
    return read_caption(text) if tag_blocks(text, "answer") else ""


def _text(value: object, name: str, max_chars: int) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        raise ValueError(f"{name} is {value!r:.60}, wanted text that is not empty")
    if len(text) > max_chars:
        raise ValueError(f"{name} has {len(text)} characters, wanted at most {max_chars}: the judge sees no more")
    return text


def _summary(failures: Mapping[str, JudgeUnavailableError], outcome: str) -> str:
    example_id, error = next(iter(failures.items()))
    return f"videos without a verdict, {outcome}: {len(failures)}; {example_id}: {error}"
