"""How much a predicted interval or track overlaps the true one. Called by the tasks, once per batch of answers.

The plain functions are the definition of correct, in float64. The batch functions hand all answers of a step to the
compiled module in one call and equal the plain ones bit for bit; `native.in_use()` says what computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np

from vcr1_fast import native
from vcr1_fast.types import Box, Interval

IntervalOverlap = Literal["set", "hull", "iop"]


def hull_iou(predicted: Sequence[Interval], truth: Sequence[Interval]) -> float:
    """Shared length / length of the smallest interval that holds both; the reward of VideoChat-R1 (arXiv 2504.06958).

    Lists of several intervals are first replaced by the interval that encloses them. A hull of length <= 0 gives 1.0,
    as in the original (it takes a reversed ground truth to get there). An empty list gives 0. In [0, 1].
    """
    if not predicted or not truth:
        return 0.0
    p_lo, p_hi = min(start for start, _ in predicted), max(end for _, end in predicted)
    t_lo, t_hi = min(start for start, _ in truth), max(end for _, end in truth)
    hull_s = max(p_hi, t_hi) - min(p_lo, t_lo)
    if hull_s <= 0.0:
        return 1.0
    shared_s = min(p_hi, t_hi) - max(p_lo, t_lo)
    return shared_s / hull_s if shared_s > 0.0 else 0.0


def connected_pieces(intervals: Sequence[Interval]) -> list[Interval]:
    """The union of intervals as disjoint pieces in order of time; empty and reversed intervals add nothing."""
    pieces: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if pieces and start <= pieces[-1][1]:
            pieces[-1] = (pieces[-1][0], max(pieces[-1][1], end))
        else:
            pieces.append((start, end))
    return pieces


def set_iou(predicted: Sequence[Interval], truth: Sequence[Interval]) -> float:
    """|A and B| / |A or B|, both lists read as sets of instants; 0 when they share none. In [0, 1]."""
    shared_s = _shared_s(connected_pieces(predicted), connected_pieces(truth))
    if not shared_s > 0.0:
        return 0.0
    return min(1.0, shared_s / _total_s(connected_pieces([*predicted, *truth])))


def set_iop(predicted: Sequence[Interval], truth: Sequence[Interval]) -> float:
    """|A and B| / |A|, the share of the prediction A that lies in the truth B; in [0, 1].

    IoP of NExT-GQA (arXiv 2309.01327), both lists read as sets of instants. A prediction without length counts as its
    instants: the share of them that the truth covers, ends included, as in NExT-GQA's script. 0 for an empty one.
    """
    pieces = connected_pieces(predicted)
    if not pieces:
        num_covered = 0
        for instant, _ in predicted:
            num_covered += any(start <= instant <= end for start, end in truth)
        return num_covered / len(predicted) if predicted else 0.0
    shared_s = _shared_s(pieces, connected_pieces(truth))
    return min(1.0, shared_s / _total_s(pieces)) if shared_s > 0.0 else 0.0


def _shared_s(p_pieces: Sequence[Interval], t_pieces: Sequence[Interval]) -> float:
    shared_s, i, j = 0.0, 0, 0
    while i < len(p_pieces) and j < len(t_pieces):
        overlap_s = min(p_pieces[i][1], t_pieces[j][1]) - max(p_pieces[i][0], t_pieces[j][0])
        if overlap_s > 0.0:
            shared_s += overlap_s
        if p_pieces[i][1] < t_pieces[j][1]:
            i += 1
        else:
            j += 1
    return shared_s


def _total_s(pieces: Sequence[Interval]) -> float:
    total_s = 0.0
    for start, end in pieces:  # not sum(): from Python 3.12 on it compensates rounding
        total_s += end - start
    return total_s


def box_iou(a: Box, b: Box) -> float:
    """Shared area / area of the union of two boxes (x0, y0, x1, y1).

    0 when they do not meet, when one is reversed, and when the union is not a positive number. In [0, 1].
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if not width > 0.0 or not height > 0.0:
        return 0.0
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    if not union > 0.0:
        return 0.0
    iou = shared / union
    return min(1.0, iou) if iou >= 0.0 else 0.0  # infinity / infinity is NaN and counts 0


def mean_track_iou(predicted: Sequence[Box], truth: Sequence[Box], first_box: int) -> float:
    """Mean `box_iou` over boxes first_box, first_box + 1, ... of two tracks.

    first_box 0 is the paper's "overlap"; 1 leaves out the box that the prompt gives away. 0 when the tracks have
    different numbers of boxes, or none from first_box on.
    """
    if len(predicted) != len(truth) or len(truth) <= first_box:
        return 0.0
    total = 0.0
    for i in range(first_box, len(truth)):
        total += box_iou(predicted[i], truth[i])
    return total / (len(truth) - first_box)


def interval_iou_batch_plain(
    predicted: Sequence[Sequence[Interval]], truth: Sequence[Sequence[Interval]], kind: IntervalOverlap
) -> list[float]:
    """IoU of N answers with their truths: N lists of intervals (seconds, not NaN) on either side -> N floats.

    kind "set" is `set_iou`, "hull" is `hull_iou`, "iop" is `set_iop`; an answer without intervals gets 0.
    Raises ValueError when the two sides have different lengths.
    """
    _check_lengths(predicted, truth)
    overlap = _INTERVAL_OVERLAPS[kind]
    return [overlap(p, t) for p, t in zip(predicted, truth, strict=True)]


def interval_iou_batch_native(
    predicted: Sequence[Sequence[Interval]], truth: Sequence[Sequence[Interval]], kind: IntervalOverlap
) -> list[float]:
    """The same as `interval_iou_batch_plain` in one call of the compiled module, which must be there."""
    _check_lengths(predicted, truth)
    p_rows, p_offsets = ragged([sorted(intervals) for intervals in predicted], width=2)
    t_rows, t_offsets = ragged([sorted(intervals) for intervals in truth], width=2)
    out = np.empty(len(predicted), np.float64)
    native.compute("interval_overlap", (p_rows, p_offsets, t_rows, t_offsets, kind), out)
    return out.tolist()


def track_iou_batch_plain(
    predicted: Sequence[Sequence[Box]], truth: Sequence[Sequence[Box]], first_box: int
) -> list[float]:
    """`mean_track_iou` of N answers with their truths: N lists of boxes on either side -> N floats.

    Raises ValueError when the two sides have different lengths.
    """
    _check_lengths(predicted, truth)
    return [mean_track_iou(p, t, first_box) for p, t in zip(predicted, truth, strict=True)]


def track_iou_batch_native(
    predicted: Sequence[Sequence[Box]], truth: Sequence[Sequence[Box]], first_box: int
) -> list[float]:
    """The same as `track_iou_batch_plain` in one call of the compiled module, which must be there."""
    _check_lengths(predicted, truth)
    p_rows, p_offsets = ragged(predicted, width=4)
    t_rows, t_offsets = ragged(truth, width=4)
    out = np.empty(len(predicted), np.float64)
    native.compute("track_overlap", (p_rows, p_offsets, t_rows, t_offsets, first_box), out)
    return out.tolist()


_INTERVAL_OVERLAPS = {"set": set_iou, "hull": hull_iou, "iop": set_iop}
# compiled or plain is decided here, once; which half of the compiled module, when a run starts
interval_iou_batch = interval_iou_batch_native if native.is_available() else interval_iou_batch_plain
track_iou_batch = track_iou_batch_native if native.is_available() else track_iou_batch_plain


def _check_lengths(predicted: Sequence[object], truth: Sequence[object]) -> None:
    if len(predicted) != len(truth):
        raise ValueError(f"got {len(predicted)} answers and {len(truth)} truths, wanted one truth per answer")


def ragged(lists: Sequence[Sequence[tuple[float, ...]]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """N lists of tuples of `width` numbers -> rows [sum of lengths, width] float64 and offsets [N + 1] int64."""
    lengths = [len(rows) for rows in lists]
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    numbers = chain.from_iterable(chain.from_iterable(lists))
    return np.fromiter(numbers, np.float64, count=width * sum(lengths)).reshape(-1, width), offsets
