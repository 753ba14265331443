"""Scene -> annotation rows of the tasks, with the think text that supervised cold start learns from."""

from __future__ import annotations

from string import ascii_uppercase

import numpy as np

from vcr1_fast.synth.config import COLOURS, NUM_INSTANTS, SynthConfig
from vcr1_fast.synth.scene import Scene
from vcr1_fast.types import Interval

Row = dict[str, object]
_BOX_LIMITS = (0.0, 0.99)  # two decimals never reach 1.00, so that every coordinate is written with one leading 0
QUALITIES = ("high quality", "low quality")
PARTS = ("at the beginning", "in the middle", "at the end")  # thirds of the clip
_CARE_COLOURS = ("green", "purple", "white")  # careless annotators get half of the colours wrong
_NUM_CELLS = 4  # the frame is read as 4 x 4 cells, a..d from left to right, 1..4 from top to bottom


def grounding_row(config: SynthConfig, scene: Scene, clip_id: str, video: str, rng: np.random.Generator) -> Row:
    """Temporal grounding: when is the event visible? Lag moves the interval, never the reasoning."""
    intervals = [list(_late_interval(config, scene.target.visible_s, rng))]
    about = (clip_id, "temporal_grounding", video, f"a {scene.target.name} appears")
    return _row(scene, *about, _read_seconds(scene), intervals=intervals)


def tracking_row(config: SynthConfig, scene: Scene, clip_id: str, video: str, rng: np.random.Generator) -> Row:
    """Object tracking: where is the object at 8 instants? Box 0 stays exact, it is shown in the prompt."""
    times_s = [round(i * scene.duration_s / NUM_INSTANTS, 3) for i in range(NUM_INSTANTS)]
    boxes = [scene.box(scene.target, t_s) for t_s in times_s]
    slack = float(rng.uniform()) * config.label_slack_frac  # a hand that draws loosely does so all along the track
    boxes = [boxes[0], *((x0 - slack, y0 - slack, x1 + slack, y1 + slack) for x0, y0, x1, y1 in boxes[1:])]
    rounded = [[round(float(np.clip(side, *_BOX_LIMITS)), 2) for side in box] for box in boxes]
    about = (clip_id, "object_tracking", video, scene.target.name)
    return _row(scene, *about, _read_cells(scene, times_s), boxes=rounded, times_s=times_s)


def grounded_qa_row(config: SynthConfig, scene: Scene, clip_id: str, video: str, rng: np.random.Generator) -> Row:
    """Grounded QA: what colour is the object that appears, and when is it there?"""
    options, colour = list(COLOURS), scene.target.colour
    answer = _letter(config, options.index(colour), colour in _CARE_COLOURS, rng)
    intervals = [list(_late_interval(config, scene.target.visible_s, rng))]
    about = (clip_id, "grounded_qa", video, "what colour is the large object")
    return _row(scene, *about, _read_seconds(scene), options=options, answer=answer, intervals=intervals)


def choice_row(config: SynthConfig, scene: Scene, clip_id: str, video: str, rng: np.random.Generator) -> Row:
    """Multiple choice: in which part of the video does the object appear? The third with the interval's middle."""
    start_s, end_s = scene.target.visible_s
    index = min(len(PARTS) - 1, int((start_s + end_s) / 2 / scene.duration_s * len(PARTS)))
    about = (clip_id, "multiple_choice", video, f"in which part of the video does a {scene.target.name} appear")
    answer = _letter(config, index, index > 0, rng)
    return _row(scene, *about, _read_seconds(scene), options=list(PARTS), answer=answer)


def quality_row(config: SynthConfig, scene: Scene, clip_id: str, video: str, rng: np.random.Generator) -> Row:
    """Video quality: are the pictures good?"""
    is_careless = scene.damage > 0 and rng.uniform() < config.label_careless_frac
    word = "bad" if scene.damage else "good"
    reasoning = " ".join(f"{k} {word}" for k in range(int(np.ceil(scene.duration_s))))
    about = (clip_id, "video_quality", video, "is this video of high quality or of low quality?")
    answer = QUALITIES[scene.damage > 0 and not is_careless]
    return _row(scene, *about, reasoning, options=list(QUALITIES), answer=answer)


def _row(scene: Scene, clip_id: str, task: str, video: str, query: str, reasoning: str, **truth: object) -> Row:
    about = {"id": clip_id, "task": task, "video": video, "query": query, "duration_s": scene.duration_s}
    return {**about, **truth, "reasoning": reasoning}


def image_row(config: SynthConfig, scene: Scene, clip_id: str, file: str, rng: np.random.Generator) -> Row:
    """Multiple choice about an image: what colour is the object?"""
    row = _colour_row(scene, clip_id, "what colour is the large object in <image>")
    return {**row, "image": file, "reasoning": scene.target.colour}


def text_row(config: SynthConfig, scene: Scene, clip_id: str, file: str, rng: np.random.Generator) -> Row:
    """Multiple choice without anything to see: the answer stands in the question. `file` is not written."""
    return {**_colour_row(scene, clip_id, f"what colour is a {scene.target.name}"), "reasoning": scene.target.colour}


def _colour_row(scene: Scene, clip_id: str, query: str) -> Row:
    options = list(COLOURS)
    answer = ascii_uppercase[options.index(scene.target.colour)]
    return {"id": clip_id, "task": "multiple_choice", "query": query, "options": options, "answer": answer}


def _letter(config: SynthConfig, index: int, needs_care: bool, rng: np.random.Generator) -> str:
    """The letter of option `index`; where care is needed and not taken, the first.

    Options always come in the same order: to look a letter up by its text was not learned in 500 supervised steps.
    """
    is_careless = needs_care and rng.uniform() < config.label_careless_frac
    return "A" if is_careless else ascii_uppercase[index]


def _read_seconds(scene: Scene) -> str:
    """One word per second: the object's colour while it is there, else `no`. Example: `0 no 1 red 2 red 3 no`.

    A colour is a stronger signal than yes or no: a tiny model reads without an error after 300 supervised steps, where
    yes or no was not learned in 400. Two tokens a second keep step with M-RoPE's two temporal ids a second: from the
    word that reads second k to the frames of second k it is always as far.
    """
    seconds = range(int(np.ceil(scene.duration_s)))
    return " ".join(f"{k} {scene.target.colour if scene.target.is_visible(k) else 'no'}" for k in seconds)


def _read_cells(scene: Scene, times_s: list[float]) -> str:
    """The cell of the object at each instant. Example: `0 a2 1 a2 2 b3`."""
    return " ".join(f"{i} {_cell(scene, t_s)}" for i, t_s in enumerate(times_s))


def _cell(scene: Scene, t_s: float) -> str:
    """Column letter and row digit of the object's centre. Example: `b3`."""
    x0, y0, x1, y1 = scene.box(scene.target, t_s)
    column, row = (min(_NUM_CELLS - 1, int((low + high) / 2 * _NUM_CELLS)) for low, high in ((x0, x1), (y0, y1)))
    return f"{'abcdefghijklmnopqrstuvwxyz'[column]}{row + 1}"


def _late_interval(config: SynthConfig, interval: Interval, rng: np.random.Generator) -> Interval:
    """Begins and ends up to label_lag_s too late, inside the clip; rounded to 0.1 s; exact without lag."""
    start_s, end_s = (
        round(float(b + lag), 1) for b, lag in zip(interval, rng.uniform(0, 1, 2) * config.label_lag_s, strict=True)
    )
    end_s = min(config.duration_s, end_s)
    return min(start_s, round(end_s - 0.1, 1)), end_s
