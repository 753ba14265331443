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
    """Temporal grounding: when is the event visible? Slack widens the interval, never the reasoning."""
    return {
        "id": clip_id,
        "task": "temporal_grounding",
        "video": video,
        "query": f"a {scene.target.name} appears",
        "duration_s": scene.duration_s,
        "intervals": [list(_loose_interval(config, scene.target.visible_s, rng))],
        "reasoning": _read_colours(scene),
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


def _read_colours(scene: Scene) -> str:
    """One word per second: the colour of what is visible, `no` for nothing. Example: `0 no 1 red 2 red 3 blue`.

    It does not depend on the question, so every second gives a strong signal: a tiny model reads without an error after
    200 supervised steps, where a yes or no to the question was not learned in 400. Two tokens a second keep step with
    M-RoPE's two temporal ids a second: from the word that reads second k to the frames of second k it is always as far.
    """
    words = []
    for second in range(int(np.ceil(scene.duration_s))):
        visible = [actor.colour for actor in scene.actors if actor.is_visible(second)]
        words.append(f"{second} {visible[-1] if visible else 'no'}")
    return " ".join(words)


def _cell(scene: Scene, t_s: float) -> str:
    """Column letter and row digit of the object's centre. Example: `b3`."""
    x0, y0, x1, y1 = scene.box(scene.target, t_s)
    column, row = (min(_NUM_CELLS - 1, int((low + high) / 2 * _NUM_CELLS)) for low, high in ((x0, x1), (y0, y1)))
    return f"{'abcdefghijklmnopqrstuvwxyz'[column]}{row + 1}"


def _loose_interval(config: SynthConfig, interval: Interval, rng: np.random.Generator) -> Interval:
    """Begins and ends up to label_slack_s too early and too late, inside the clip; rounded to 0.1 s; exact without."""
    early_s, late_s = (rng.uniform(0, 1, 2) * config.label_slack_s).tolist()
    start_s, end_s = interval
    return max(0.0, round(start_s - early_s, 1)), min(config.duration_s, round(end_s + late_s, 1))


def _loose_box(config: SynthConfig, box: Box, rng: np.random.Generator) -> Box:
    """Every side up to label_slack_frac too far out; what leaves the frame is cut by the caller."""
    left, top, right, bottom = (rng.uniform(0, 1, 4) * config.label_slack_frac).tolist()
    return box[0] - left, box[1] - top, box[2] + right, box[3] + bottom
