"""What happens in a synthetic clip: which objects there are, where each is at any time, and when it is visible."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vcr1_fast.synth.config import COLOURS, SHAPES, SynthConfig
from vcr1_fast.types import Box, Interval

DAMAGE_RANGE = (0.3, 1.0)  # of a clip of low quality


@dataclass(frozen=True)
class Actor:
    """A coloured shape on a gently curved path, visible during one interval."""

    colour: str
    shape: str
    visible_s: Interval
    from_xy: tuple[float, float]  # centre at 0 s, pixels
    to_xy: tuple[float, float]  # centre at the end of the clip, pixels
    sway_px: float  # how far the path bends to the side
    radius_px: float  # half a side of the bounding box at 0 s
    growth: float  # relative change of the radius over the clip

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def is_visible(self, t_s: float) -> bool:
        return self.visible_s[0] <= t_s < self.visible_s[1]


@dataclass(frozen=True)
class Scene:
    """One clip. `target` is the object asked about, if any is: when it appears, where it is."""

    width_px: int
    height_px: int
    duration_s: float
    target: Actor
    others: tuple[Actor, ...]
    sway_px: float  # of the camera
    sway_phase: tuple[float, float]  # radians
    texture_seed: int
    damage: float = 0.0  # 0: good pictures; up to 1: noisy and washed out

    @property
    def actors(self) -> tuple[Actor, ...]:
        """Back to front."""
        return (*self.others, self.target)

    def camera_xy(self, t_s: float) -> tuple[float, float]:
        """Displacement of the picture at t_s, pixels."""
        phase_x, phase_y = self.sway_phase
        return self.sway_px * float(np.sin(1.7 * t_s + phase_x)), self.sway_px * float(np.sin(2.3 * t_s + phase_y))

    def disc(self, actor: Actor, t_s: float) -> tuple[float, float, float]:
        """Centre x, centre y and radius of an actor at t_s, pixels, camera sway included."""
        done = t_s / self.duration_s
        (x0, y0), (x1, y1) = actor.from_xy, actor.to_xy
        bend = actor.sway_px * float(np.sin(np.pi * done))
        length = max(float(np.hypot(x1 - x0, y1 - y0)), 1e-6)
        radius = actor.radius_px * (1 + actor.growth * done)
        camera_x, camera_y = self.camera_xy(t_s)
        x = x0 + (x1 - x0) * done - bend * (y1 - y0) / length
        y = y0 + (y1 - y0) * done + bend * (x1 - x0) / length
        x = float(np.clip(x, radius, self.width_px - radius)) + camera_x
        y = float(np.clip(y, radius, self.height_px - radius)) + camera_y
        return x, y, radius

    def box(self, actor: Actor, t_s: float) -> Box:
        """Bounding box of an actor at t_s: corners as fractions of width and height, cut at the frame."""
        x, y, radius = self.disc(actor, t_s)
        corners = np.array([x - radius, y - radius, x + radius, y + radius])
        size = np.array([self.width_px, self.height_px, self.width_px, self.height_px])
        x0, y0, x1, y1 = np.clip(corners / size, 0.0, 1.0).tolist()
        return x0, y0, x1, y1


def sample_grounding_scene(config: SynthConfig, rng: np.random.Generator) -> Scene:
    """A large object that appears for a while, nearly at rest, among small passers-by."""
    colours = rng.permutation(list(COLOURS)).tolist()
    radius = float(rng.uniform(0.20, 0.28)) * min(config.width_px, config.height_px)
    start = _place(config, radius, rng)
    drift = rng.uniform(-0.08, 0.08, 2) * (config.width_px, config.height_px)
    end = (start[0] + float(drift[0]), start[1] + float(drift[1]))
    target = Actor(colours[0], str(rng.choice(SHAPES)), _interval(config, rng), start, end, 0.0, radius, 0.0)
    return _scene(config, target, colours[1:], rng)


def sample_quality_scene(config: SynthConfig, rng: np.random.Generator) -> Scene:
    """A grounding scene whose pictures are good in one half of the clips and more or less damaged in the other."""
    damage = float(rng.uniform(*DAMAGE_RANGE)) if rng.integers(2) else 0.0
    return replace(sample_grounding_scene(config, rng), damage=damage)


def sample_tracking_scene(config: SynthConfig, rng: np.random.Generator) -> Scene:
    """One object that is visible all the time and crosses at least 0.4 of the frame, among small passers-by."""
    side = min(config.width_px, config.height_px)
    colours = rng.permutation(list(COLOURS)).tolist()
    radius = float(rng.uniform(0.16, 0.24)) * side
    start, end = _place(config, radius, rng), _place(config, radius, rng)
    while np.hypot((end[0] - start[0]) / config.width_px, (end[1] - start[1]) / config.height_px) < 0.4:
        start, end = _place(config, radius, rng), _place(config, radius, rng)
    sway, growth = float(rng.uniform(-0.12, 0.12)) * side, float(rng.uniform(-0.2, 0.2))
    always = (0.0, config.duration_s)
    target = Actor(colours[0], str(rng.choice(SHAPES)), always, start, end, sway, radius, growth)
    return _scene(config, target, colours[1:], rng)


def _scene(config: SynthConfig, target: Actor, colours: list[str], rng: np.random.Generator) -> Scene:
    """The target, small objects at rest that take the first of `colours`, and a camera."""
    others = []
    for colour in colours[: config.num_distractors]:
        radius = float(rng.uniform(0.06, 0.09)) * min(config.width_px, config.height_px)
        shape, place = str(rng.choice(SHAPES)), _place(config, radius, rng)
        others.append(Actor(colour, shape, _interval(config, rng), place, place, 0.0, radius, 0.0))
    return Scene(
        width_px=config.width_px,
        height_px=config.height_px,
        duration_s=config.duration_s,
        target=target,
        others=tuple(others),
        sway_px=config.camera_jitter_px,
        sway_phase=(float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0, 2 * np.pi))),
        texture_seed=int(rng.integers(2**31)),
    )


def _place(config: SynthConfig, radius: float, rng: np.random.Generator) -> tuple[float, float]:
    x, y = rng.uniform(radius, config.width_px - radius), rng.uniform(radius, config.height_px - radius)
    return float(x), float(y)


def _interval(config: SynthConfig, rng: np.random.Generator) -> Interval:
    """Bounds on the time grid; length between 1/8 and 1/2 of the clip."""
    num_steps = round(config.duration_s / config.time_step_s)
    length = int(rng.integers(max(1, num_steps // 8), num_steps // 2 + 1))
    start = int(rng.integers(0, num_steps - length + 1))
    return round(start * config.time_step_s, 6), round((start + length) * config.time_step_s, 6)
