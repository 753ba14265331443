"""Object tracking: where is the object at each instant, given its box at the first one? Answer: a list of boxes.

Row: {"id", "task", "video", "query", "duration_s", "boxes": [[x0, y0, x1, y1], ...], "times_s": [...]}; corners as
fractions of width and height.

recipe fixed: any number of boxes, the instants are told, box 0 (which the prompt gives away) earns nothing.
recipe paper: VideoChat-R1 (arXiv 2504.06958) on GOT-10k: 8 boxes at untold instants, box 0 counts, loose validity test.
Held-out scores read answers as its evaluation does (`benchmark_readers.read_boxes`), in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.annotations import (
    check_counts,
    frac_at_least,
    mean,
    read_duration_s,
    read_numbers,
    read_rows,
    track_truth,
)
from vcr1_fast.tasks.answer_format import BoxList
from vcr1_fast.tasks.answers_batch import Rule, have_format, read_box_lists
from vcr1_fast.tasks.benchmark_readers import read_boxes
from vcr1_fast.tasks.frame_overlap import success_metrics
from vcr1_fast.tasks.overlap import track_iou_batch
from vcr1_fast.tasks.prompt_file import Worded, Wording
from vcr1_fast.types import Box, Example, TrackTruth

PAPER_NUM_BOXES = 8
QUESTIONS = {
    "fixed": "Track this object: {query_line}. At {start_time_s} s its box is {start_box_short}, corners as fractions "
    "of width and height. {reason} its boxes at {times_s} s as a list of {num_boxes} such boxes in <answer></answer>.",
    "paper": 'Follow the object "{object}" through the video. It starts at {start_box}: a box [x0, y0, x1, y1], '
    "corners as fractions of width and height between 0 and 1. {reason}Give its boxes at regular times as a list of "
    "{num_boxes} such lists, the first box included, inside <answer></answer>.",
}
PLACEHOLDERS = ("object", "start_box", "start_box_short", "start_time_s", "times_s", "num_boxes")
REQUIRED = (("object", "query", "query_line"), ("start_box", "start_box_short"))


class ObjectTracking(Worded):
    """Reward parts: format, and iou, the mean overlap of the predicted boxes with the true ones."""

    name = "object_tracking"
    needs_video = True
    part_names: tuple[str, ...] = ("format", "iou")

    def __init__(self, config: TaskConfig) -> None:
        self.rule: Rule = config.recipe
        self.is_paper = config.recipe == "paper"
        self.think = config.think
        self.first_box = 0 if self.is_paper else 1
        self.wording = Wording(config, self.name, QUESTIONS, PLACEHOLDERS, REQUIRED)

    def parse_truth(self, row: Mapping[str, object]) -> TrackTruth:
        """Boxes as fractions and their instants in seconds, rising.

        Raises ValueError for missing, malformed or non-finite numbers and when boxes and times_s differ in number.
        fixed: also for a box outside the picture or without area, and for fewer than 2. paper: also unless there are 8.
        """
        boxes: list[Box] = [(x0, y0, x1, y1) for x0, y0, x1, y1 in read_rows(row, "boxes", "box", 4)]
        times_s = read_numbers(row.get("times_s"), "times_s")
        if len(times_s) != len(boxes):
            raise ValueError(f"there are {len(boxes)} boxes but {len(times_s)} times_s, wanted one instant per box")
        if self.is_paper and len(boxes) != PAPER_NUM_BOXES:
            raise ValueError(f"there are {len(boxes)} boxes, wanted {PAPER_NUM_BOXES} (task.recipe is paper)")
        _check_times(times_s, read_duration_s(row))
        if not self.is_paper:
            _check_boxes(boxes)
        return TrackTruth(tuple(boxes), times_s)

    def question_fields(self, example: Example) -> dict[str, str]:
        """start_box: as Python writes a list of floats, in as many digits as it takes, "[0.093, 0.0, 0.8, 0.797]".
        start_box_short: two decimals, no blanks, "[0.09,0.00,0.80,0.80]". Times: seconds, two decimals."""
        truth = track_truth(example)
        times_s = [f"{time_s:.2f}" for time_s in truth.times_s]
        return {
            "object": example.query,
            "start_box": str(list(truth.boxes[0])),
            "start_box_short": _box_text(truth.boxes[0]),
            "start_time_s": times_s[0],
            "times_s": ", ".join(times_s),
            "num_boxes": str(len(truth.boxes)),
        }

    def target(self, example: Example) -> str:
        """The completion to learn from: all true boxes, two decimals, no blanks, after the example's reasoning."""
        return self._answer([_box_text(box) for box in track_truth(example).boxes], example.reasoning)

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Parts "format" and "iou" of N answers, each in [0, 1].

        format is 1 when the tags are right and the answer holds a list of the right number of boxes: fixed, finite
        numbers only; paper, 8 lists of 4 values of any kind. iou is the mean over boxes 1.. (fixed) or over all 8
        (paper); an answer without a full list of numbers gets 0.
        """
        is_formatted, tracks = self._read_all(examples, answers)
        return {"format": is_formatted, "iou": _track_iou(tracks, examples, self.first_box)}

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """mean_overlap and r@0.5, r@0.7, the shares of answers in which the overlap reaches 0.5 and 0.7.

        These leave box 0 out; `..._with_first` count it (the paper's "Overlap"). Those that the recipe rewards come
        first. ao, sr@0.5 and sr@0.75 are GOT-10k's, over all boxes of all answers, see `success_metrics`.
        In [0, 1]; unreadable answers count as 0. Raises ValueError when there are no examples.
        """
        tracks = _said_tracks(examples, answers)
        metrics: dict[str, float] = {}
        for first_box in (self.first_box, 1 - self.first_box):
            overlap, suffix = _track_iou(tracks, examples, first_box), "" if first_box else "_with_first"
            metrics[f"mean_overlap{suffix}"] = mean(overlap)
            metrics |= {f"r@{threshold}{suffix}": frac_at_least(overlap, threshold) for threshold in (0.5, 0.7)}
        return metrics | success_metrics(tracks, [track_truth(ex).boxes for ex in examples])

    def are_readable(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        """Whether there is a box for each instant."""
        return [bool(track) for track in _said_tracks(examples, answers)]

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        """repeat_first_box: the given box at every instant, with four decimals."""
        answers: list[str] = []
        for example in examples:
            boxes = track_truth(example).boxes
            answers.append(self._answer([_box_text(boxes[0], decimals=4)] * len(boxes)))
        return {"repeat_first_box": answers}

    def _answer(self, boxes: list[str], reasoning: str = "") -> str:
        return self.completion(f"[{','.join(boxes)}]", reasoning)

    def _read_all(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], list[list[Box]]]:
        """Format reward and predicted track of every answer; the track is empty where it cannot be scored."""
        check_counts(len(examples), len(answers))
        box_lists = read_box_lists(answers, self.rule, pick="first" if self.is_paper else "last")
        has_tags = have_format(answers, self.rule, self.think)
        is_formatted: list[float] = []
        tracks: list[list[Box]] = []
        for example, rows, has_format in zip(examples, box_lists, has_tags, strict=True):
            is_list, track = self._track(rows, len(track_truth(example).boxes))
            is_formatted.append(float(is_list and has_format))
            tracks.append(track)
        return is_formatted, tracks

    def _track(self, rows: BoxList | None, num_boxes: int) -> tuple[bool, list[Box]]:
        """Whether this is a list of boxes as the recipe understands it, and the boxes if they are numbers."""
        if rows is None or len(rows) != (PAPER_NUM_BOXES if self.is_paper else num_boxes):
            return False, []
        track: list[Box] = []
        for x0, y0, x1, y1 in rows:
            if x0 is None or y0 is None or x1 is None or y1 is None:
                return self.is_paper, []
            track.append((x0, y0, x1, y1))
        if not self.is_paper and not all(math.isfinite(corner) for box in track for corner in box):
            return False, []
        return True, track


def _said_tracks(examples: Sequence[Example], answers: Sequence[str]) -> list[list[Box]]:
    """The boxes of each answer, for scores; none unless there is one for each instant."""
    check_counts(len(examples), len(answers))
    tracks = [read_boxes(answer) or [] for answer in answers]
    counts = [len(track_truth(example).boxes) for example in examples]
    return [track if len(track) == count else [] for track, count in zip(tracks, counts, strict=True)]


def _track_iou(tracks: list[list[Box]], examples: Sequence[Example], first_box: int) -> list[float]:
    return track_iou_batch(tracks, [track_truth(ex).boxes for ex in examples], first_box)


def _box_text(box: Box, decimals: int = 2) -> str:
    return "[" + ",".join(f"{corner:.{decimals}f}" for corner in box) + "]"


def _check_times(times_s: Sequence[float], duration_s: float | None) -> None:
    for i, time_s in enumerate(times_s):
        if time_s < 0 or (i > 0 and time_s <= times_s[i - 1]):
            raise ValueError(f"times_s[{i}] is {time_s}, wanted 0 or more and after the instant before it")
        if duration_s is not None and time_s > duration_s:
            raise ValueError(f"times_s[{i}] is {time_s} s, but the video ends at {duration_s} s")


def _check_boxes(boxes: Sequence[Box]) -> None:
    if len(boxes) < 2:
        raise ValueError("there is 1 box, wanted at least 2: box 0 is given in the prompt")
    for i, box in enumerate(boxes):
        if not all(0.0 <= corner <= 1.0 for corner in box):
            raise ValueError(f"box {i} is {list(box)}, wanted corners between 0 and 1 (fractions of width and height)")
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"box {i} is {list(box)}, wanted x0 < x1 and y0 < y1")
