"""Scene -> annotation rows of the two tasks, with the think text that supervised cold start learns from."""

from __future__ import annotations

import numpy as np

from vcr1_fast.synth.config import NUM_INSTANTS, SynthConfig
from vcr1_fast.synth.scene import Scene
from vcr1_fast.types import Box, Interval

Row = dict[str, object]
_BOX_LIMITS = (0.0, 0.99)  # two decimals never reach 1.00, so that every coordinate is written with one leading 0
_NUM_CELLS = 4  # the frame is read as 4 x 4 cells, a..d from left to right, 1..4 from top to bottom


def grounding_row(config: SynthConfig, scene: Scene, clip_id: str, video: str, rng: np.random.Generator) -> Row:
    """Temporal grounding: when is the event visible? Lag moves the interval, never the reasoning."""
    return {
        "id": clip_id,
        "task": "temporal_grounding",
        "video": video,
        "query": f"a {scene.target.name} appears",
        "duration_s": scene.duration_s,
        "intervals": [list(_late_interval(config, scene.target.visible_s, rng))],
        "reasoning": _read_seconds(scene),
    }


def tracking_row(config: SynthConfig, scene: Scene, clip_id: str, video: str, rng: np.random.Generator) -> Row:
    """Object tracking: where is the object at 8 instants? Box 0 stays exact, it is shown in the prompt."""
    times_s = [round(i * scene.duration_s / NUM_INSTANTS, 3) for i in range(NUM_INSTANTS)]
    boxes = [scene.box(scene.target, t_s) for t_s in times_s]
    boxes = [boxes[0], *(_loose_box(config, box, rng) for box in boxes[1:])]
    return {
        "id": clip_id,
        "task": "object_tracking",
        "video": video,
        "query": scene.target.name,
        "duration_s": scene.duration_s,
        "boxes": [[round(float(np.clip(side, *_BOX_LIMITS)), 2) for side in box] for box in boxes],
        "times_s": times_s,
        "reasoning": " ".join(f"{i} {_cell(scene, t_s)}" for i, t_s in enumerate(times_s)),
    }


def _read_seconds(scene: Scene) -> str:
    """One word per second: the object's colour while it is there, else `no`. Example: `0 no 1 red 2 red 3 no`.

    A colour is a stronger signal than yes or no: a tiny model reads without an error after 300 supervised steps, where
    yes or no was not learned in 400. Two tokens a second keep step with M-RoPE's two temporal ids a second: from the
    word that reads second k to the frames of second k it is always as far.
    """
    seconds = range(int(np.ceil(scene.duration_s)))
    return " ".join(f"{k} {scene.target.colour if scene.target.is_visible(k) else 'no'}" for k in seconds)


def _cell(scene: Scene, t_s: float) -> str:
    """Column letter and row digit of the object's centre. Example: `b3`."""
    x0, y0, x1, y1 = scene.box(scene.target, t_s)
    column, row = (min(_NUM_CELLS - 1, int((low + high) / 2 * _NUM_CELLS)) for low, high in ((x0, x1), (y0, y1)))
    return f"{'abcdefghijklmnopqrstuvwxyz'[column]}{row + 1}"


def _late_interval(config: SynthConfig, interval: Interval, rng: np.random.Generator) -> Interval:
    """Begins and ends up to label_lag_s too late, inside the clip; rounded to 0.1 s; exact without lag."""
    start_s, end_s = (
        round(b + lag, 1) for b, lag in zip(interval, rng.uniform(0, 1, 2) * config.label_lag_s, strict=True)
    )
    end_s = min(config.duration_s, end_s)
    return min(start_s, round(end_s - 0.1, 1)), end_s


def _loose_box(config: SynthConfig, box: Box, rng: np.random.Generator) -> Box:
    """Every side up to label_slack_frac too far out; what leaves the frame is cut by the caller."""
    left, top, right, bottom = (rng.uniform(0, 1, 4) * config.label_slack_frac).tolist()
    return box[0] - left, box[1] - top, box[2] + right, box[3] + bottom
