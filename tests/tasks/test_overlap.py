"""Overlap formulas against numbers computed by hand."""

import pytest

from vcr1_fast.tasks.overlap import (
    box_iou,
    connected_pieces,
    hull_iou,
    interval_iou_batch,
    mean_track_iou,
    set_iop,
    set_iou,
    track_iou_batch,
)

UNIT = (0.0, 0.0, 1.0, 1.0)
LEFT_HALF = (0.0, 0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("predicted", "truth", "hull", "as_set"),
    [
        ([(2.0, 6.0)], [(4.0, 10.0)], 2 / 8, 2 / 8),  # overlapping: the hull is the union
        ([(0.0, 2.0)], [(8.0, 10.0)], 0.0, 0.0),  # apart
        ([(2.0, 4.0)], [(2.0, 4.0)], 1.0, 1.0),
        ([(0.0, 8.0)], [(2.0, 4.0)], 2 / 8, 2 / 8),  # inside
        ([(0.0, 2.0)], [(2.0, 4.0)], 0.0, 0.0),  # touching
        ([(3.0, 3.0)], [(2.0, 4.0)], 0.0, 0.0),  # an instant has no length
        ([], [(2.0, 4.0)], 0.0, 0.0),
        ([(15.0, 16.0)], [(20.9, 12.0)], 0.0, 0.0),  # reversed truth
        ([(15.0, 15.0)], [(20.9, 12.0)], 1.0, 0.0),  # reversed truth and hull of length 15 - 15 = 0: the original's 1.0
        ([(0.0, 2.0), (8.0, 10.0)], [(1.0, 9.0)], 8 / 10, 2 / 10),  # the gap counts for the hull only
        ([(0.0, 3.0), (2.0, 4.0)], [(0.0, 4.0)], 1.0, 1.0),  # overlapping predictions count once
        ([(0.0, 10.0)], [(1.0, 2.0), (4.0, 6.0)], 5 / 10, 3 / 10),
        ([(5.0, 1.0)], [(0.0, 10.0)], 0.0, 0.0),  # reversed prediction
    ],
)
def test_interval_iou(predicted, truth, hull, as_set):
    assert hull_iou(predicted, truth) == hull
    assert set_iou(predicted, truth) == as_set


def test_connected_pieces_merges_what_touches_and_drops_what_is_empty():
    assert connected_pieces([(5, 6), (0, 1), (1, 2), (3, 3), (9, 8), (0.5, 1.5)]) == [(0, 2), (5, 6)]


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        (UNIT, UNIT, 1.0),
        (UNIT, LEFT_HALF, 0.5),
        (LEFT_HALF, (0.25, 0.0, 0.75, 1.0), 0.25 / 0.75),
        (LEFT_HALF, (0.5, 0.0, 1.0, 1.0), 0.0),  # touching
        (UNIT, (0.5, 0.0, 0.0, 1.0), 0.0),  # reversed in x
        (UNIT, (1.0, 1.0, 0.0, 0.0), 0.0),  # reversed in both: a positive product of two negative sides
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 0.0),  # union 0
        (UNIT, (0.0, 0.0, 2.0, 1.0), 0.5),  # beyond the picture is allowed
        (UNIT, (0.0, 0.0, float("inf"), 1.0), 0.0),
        ((0.0, 0.0, float("inf"), 1.0), (0.0, 0.0, float("inf"), 1.0), 0.0),  # infinity / infinity
    ],
)
def test_box_iou(a, b, iou):
    assert box_iou(a, b) == iou
    assert box_iou(b, a) == iou


@pytest.mark.parametrize(
    ("predicted", "truth", "iop"),
    [
        ([(2.0, 6.0)], [(4.0, 10.0)], 2 / 4),  # over the prediction's own length
        ([(4.0, 10.0)], [(2.0, 6.0)], 2 / 6),
        ([(3.0, 4.0)], [(0.0, 10.0)], 1.0),
        ([(0.0, 2.0), (8.0, 10.0)], [(1.0, 9.0)], 2 / 4),
        ([(0.0, 3.0), (2.0, 4.0)], [(0.0, 2.0), (3.0, 9.0)], 3 / 4),  # overlapping predictions count once
        ([(0.0, 2.0)], [(2.0, 4.0)], 0.0),
        ([(3.0, 3.0)], [(2.0, 4.0)], 1.0),  # an instant inside
        ([(4.0, 4.0), (5.0, 5.0)], [(2.0, 4.0)], 1 / 2),  # one on the border, one outside
        ([(3.0, 3.0), (4.0, 6.0)], [(2.0, 4.0)], 0.0),  # beside an interval an instant has no weight
        ([], [(2.0, 4.0)], 0.0),
        ([(1.0, 2.0)], [], 0.0),
    ],
)
def test_interval_iop(predicted, truth, iop):
    assert set_iop(predicted, truth) == iop
    assert interval_iou_batch([predicted], [truth], "iop") == [iop]


def test_track_iou_with_and_without_the_given_box():
    truth = [UNIT, UNIT, UNIT]
    predicted = [UNIT, LEFT_HALF, (2.0, 2.0, 3.0, 3.0)]
    assert mean_track_iou(predicted, truth, first_box=0) == 1.5 / 3
    assert mean_track_iou(predicted, truth, first_box=1) == 0.5 / 2
    assert mean_track_iou(predicted[:2], truth, first_box=0) == 0.0
    assert mean_track_iou([UNIT], [UNIT], first_box=1) == 0.0
    assert mean_track_iou([], [], first_box=0) == 0.0


def test_batches_want_one_truth_per_answer():
    with pytest.raises(ValueError, match="got 2 answers and 1 truths"):
        interval_iou_batch([[(0.0, 1.0)], []], [[(0.0, 1.0)]], "set")
    with pytest.raises(ValueError, match="got 0 answers and 1 truths"):
        track_iou_batch([], [[UNIT]], 0)
    assert interval_iou_batch([], [], "hull") == []
    assert track_iou_batch([], [], 1) == []
