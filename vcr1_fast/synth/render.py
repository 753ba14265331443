"""Scene -> pixels: a textured landscape, antialiased shapes, sensor noise. Plain numpy.

Shapes are drawn from signed distances: coverage = clip(0.5 - distance in pixels, 0, 1), which costs one evaluation per
pixel where 4 x 4 supersampling costs sixteen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vcr1_fast.synth.config import COLOURS
from vcr1_fast.synth.scene import Scene

Pixels = NDArray[np.uint8]
_Array = NDArray[np.floating[Any]]  # float32 throughout; numpy's stubs widen it
DAMAGE_NOISE = 36.0  # grey levels of noise that full damage adds
DAMAGE_FADING = 0.5  # how far full damage draws every colour towards mid grey
_MARGIN_PX = 8  # the background is painted larger than the frame, so that the camera can sway


class Renderer:
    """Draws the frames of one scene; the background is painted once."""

    def __init__(self, scene: Scene, noise: float) -> None:
        """noise: standard deviation in grey levels of 255."""
        self.scene = scene
        self.noise = noise
        self._background = _paint_background(scene)

    def frame(self, t_s: float) -> Pixels:
        """Picture at t_s seconds: [H, W, 3] uint8. The same scene and t_s give the same bytes, in any order."""
        scene = self.scene
        camera_x, camera_y = scene.camera_xy(t_s)
        canvas = _shifted(self._background, camera_x, camera_y, scene.width_px, scene.height_px)
        for actor in scene.actors:
            if actor.is_visible(t_s):
                _draw(canvas, scene.disc(actor, t_s), actor.shape, COLOURS[actor.colour])
        noise = self.noise + DAMAGE_NOISE * scene.damage
        if scene.damage > 0:
            canvas += np.float32(DAMAGE_FADING * scene.damage) * (np.float32(128.0) - canvas)
        if noise > 0:
            rng = np.random.default_rng([scene.texture_seed, round(t_s * 1000)])
            canvas += np.float32(noise) * rng.standard_normal(canvas.shape, dtype=np.float32)
        return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def signed_distance(shape: str, x: _Array, y: _Array, radius: float) -> _Array:
    """Distance in pixels from the outline, negative inside; every shape fills the box of half side `radius`.

    x, y: pixels from the centre, y down, broadcast against each other. `shape`: one of SHAPES.
    """
    ax, ay = np.abs(x), np.abs(y)
    match shape:
        case "circle":
            return np.hypot(x, y) - radius
        case "square":
            return np.maximum(ax, ay) - radius
        case "diamond":
            return (ax + ay - radius) / np.float32(np.sqrt(2))
        case "triangle":  # corners (0, -r), (-r, r), (r, r)
            return np.maximum((2 * ax - y - radius) / np.float32(np.sqrt(5)), y - radius)
        case _:  # cross
            arm = 0.36 * radius
            return np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ay - radius, ax - arm))


def _draw(canvas: _Array, disc: tuple[float, float, float], shape: str, colour: tuple[int, int, int]) -> None:
    """Blend one shape with a dark rim into the canvas [H, W, 3], touching only its own window."""
    centre_x, centre_y, radius = disc
    height, width, _ = canvas.shape
    left, right = max(0, int(centre_x - radius) - 2), min(width, int(centre_x + radius) + 3)
    top, bottom = max(0, int(centre_y - radius) - 2), min(height, int(centre_y + radius) + 3)
    if left >= right or top >= bottom:
        return
    x = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - centre_x))[None, :]
    y = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - centre_y))[:, None]
    distance = signed_distance(shape, x, y, radius)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    rim = np.clip(distance + max(1.0, 0.12 * radius), 0, 1)[..., None]  # 1 at the outline, 0 inside
    paint = np.asarray(colour, np.float32) * (1 - 0.45 * rim)
    window = canvas[top:bottom, left:right]
    window += cover * (paint - window)


def _paint_background(scene: Scene) -> _Array:
    """Muted landscape [H + 2 margin, W + 2 margin, 3]: light above, dark below, cool left, warm right, soft blotches.

    The fixed direction of both gradients lets a small vision tower read absolute positions off the pixels.
    """
    rng = np.random.default_rng(scene.texture_seed)
    height, width = scene.height_px + 2 * _MARGIN_PX, scene.width_px + 2 * _MARGIN_PX
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    across = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    base = np.array([128.0, 130.0, 128.0], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
    light = np.float32(rng.uniform(36, 50)) * (0.5 - down)
    warmth = np.float32(rng.uniform(36, 50)) * (across - 0.5) * np.array([1.0, 0.0, -1.0], np.float32)
    blotches = sum(
        np.float32(strength) * _smooth_noise(rng, height, width, cells)[..., None]
        for cells, strength in ((5, 8.0), (17, 5.0))
    )
    return (base + light + warmth + blotches).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> _Array:
    """Bilinear value noise [height, width] in [-1, 1]."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    y, x = np.linspace(0, cells - 1e-3, height), np.linspace(0, cells - 1e-3, width)
    row, column = y.astype(int), x.astype(int)
    down, across = (y - row).astype(np.float32)[:, None], (x - column).astype(np.float32)[None, :]
    upper = grid[row][:, column] * (1 - across) + grid[row][:, column + 1] * across
    lower = grid[row + 1][:, column] * (1 - across) + grid[row + 1][:, column + 1] * across
    return upper * (1 - down) + lower * down


def _shifted(background: _Array, dx: float, dy: float, width: int, height: int) -> _Array:
    """The frame-sized part of the background, moved right by dx and down by dy pixels (bilinear)."""
    x, y = np.clip(_MARGIN_PX - dx, 0, 2 * _MARGIN_PX - 1), np.clip(_MARGIN_PX - dy, 0, 2 * _MARGIN_PX - 1)
    left, top = int(x), int(y)
    fx, fy = np.float32(x - left), np.float32(y - top)
    rows = background[top : top + height + 1, left : left + width + 1]
    rows = rows[:-1] * (1 - fy) + rows[1:] * fy
    return rows[:, :-1] * (1 - fx) + rows[:, 1:] * fx
