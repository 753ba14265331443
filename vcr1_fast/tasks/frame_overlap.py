"""GOT-10k's scores of tracks, box by box: average overlap and success rates. Called by object tracking.

The source is the benchmark's toolkit (got-10k/toolkit, got10k/experiments/got10k.py and got10k/utils/metrics.py). Box
0, which is given, is left out; the boxes of all sequences are pooled, so that a long sequence weighs more than a short
one.
"""

from __future__ import annotations

from collections.abc import Sequence

from vcr1_fast.tasks.annotations import mean
from vcr1_fast.tasks.overlap import box_iou
from vcr1_fast.types import Box

SUCCESS_THRESHOLDS = (0.5, 0.75)


def success_metrics(tracks: Sequence[Sequence[Box]], truths: Sequence[Sequence[Box]]) -> dict[str, float]:
    """ao: mean overlap of a box; sr@0.5, sr@0.75: the share of boxes whose overlap exceeds that. In [0, 1].

    A track that cannot be read, or of another number of boxes, counts as 0 at every instant of its truth. Raises
    ValueError when there is no box to score.
    """
    overlaps = [value for track, truth in zip(tracks, truths, strict=True) for value in _overlaps(track, truth)]
    rates = {f"sr@{bound}": mean([float(value > bound) for value in overlaps]) for bound in SUCCESS_THRESHOLDS}
    return {"ao": mean(overlaps), **rates}


def _overlaps(track: Sequence[Box], truth: Sequence[Box]) -> list[float]:
    if len(track) != len(truth):
        return [0.0] * (len(truth) - 1)
    pairs = zip(track[1:], truth[1:], strict=True)
    return [box_iou(inside_picture(box), inside_picture(true)) for box, true in pairs]


def inside_picture(box: Box) -> Box:
    """The box as the toolkit puts it inside the picture, corners as fractions: a box that starts left of the picture
    or above it is moved in at its full size, and what then reaches over the other edge is cut off."""
    x0, y0, x1, y1 = box
    left, top = _clamp(x0, 1.0), _clamp(y0, 1.0)
    return left, top, left + _clamp(x1 - x0, 1.0 - left), top + _clamp(y1 - y0, 1.0 - top)


def _clamp(value: float, high: float) -> float:
    return min(max(value, 0.0), high)
