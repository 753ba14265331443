"""Shapes fill their boxes, pixels are reproducible, and the box of the annotation is the box of the pixels."""

import numpy as np
import pytest

from vcr1_fast.synth.config import COLOURS, SHAPES, SynthConfig
from vcr1_fast.synth.dataset import make_clip
from vcr1_fast.synth.render import Renderer, signed_distance

RADIUS = 10.0


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fills_its_box(shape: str) -> None:
    centre = np.arange(-15, 15, dtype=np.float32) + 0.5  # pixel centres
    inside = signed_distance(shape, centre[None, :], centre[:, None], RADIUS) < 0
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    for first, last in ((rows[0], rows[-1]), (columns[0], columns[-1])):
        assert centre[first] == pytest.approx(-RADIUS, abs=1.5)  # a corner may miss the outermost pixel centre
        assert centre[last] == pytest.approx(RADIUS, abs=1.5)


def test_frames_do_not_depend_on_the_order_they_are_drawn_in() -> None:
    scene, _ = make_clip(SynthConfig(), "train", "tracking", 0)
    forward, backward = Renderer(scene, 4.0), Renderer(scene, 4.0)
    later = backward.frame(5.0)
    np.testing.assert_array_equal(forward.frame(1.0), backward.frame(1.0))
    np.testing.assert_array_equal(forward.frame(5.0), later)


@pytest.mark.parametrize("index", range(6))
def test_the_tracked_object_is_where_its_box_is(index: int) -> None:
    config = SynthConfig(noise=0.0, num_distractors=0)
    scene, row = make_clip(config, "eval", "tracking", index)
    times_s, boxes = row["times_s"], row["boxes"]
    assert isinstance(times_s, list) and isinstance(boxes, list)
    renderer = Renderer(scene, 0.0)
    for t_s, box in zip(times_s, boxes, strict=True):
        pixels = renderer.frame(t_s).astype(int)
        distance = np.abs(pixels - np.array(COLOURS[scene.target.colour])).max(-1)
        rows, columns = np.nonzero(distance < 8)  # the unshaded interior
        assert len(rows) > 20
        x0, y0, x1, y1 = np.array(box) * config.width_px
        assert columns.min() >= x0 - 1 and columns.max() <= x1 + 1
        assert rows.min() >= y0 - 1 and rows.max() <= y1 + 1
        assert columns.max() - columns.min() > 0.55 * (x1 - x0)  # the rim, 12 % of the radius, is darker


def test_the_event_is_visible_exactly_during_its_interval() -> None:
    scene, row = make_clip(SynthConfig(noise=0.0), "eval", "grounding", 1)
    intervals = row["intervals"]
    assert isinstance(intervals, list)
    (start_s, end_s) = intervals[0]
    renderer = Renderer(scene, 0.0)
    for t_s in np.arange(0, 8, 0.25).tolist():
        x, y, _ = scene.disc(scene.target, t_s)
        is_event_colour = (
            np.abs(renderer.frame(t_s)[int(y), int(x)].astype(int) - COLOURS[scene.target.colour]).max() < 8
        )
        assert is_event_colour == (start_s <= t_s < end_s)
