"""Which frames of a video the model sees: a fixed rate, equally spaced in presentation time.

The rule is that of the original Qwen2.5-VL recipe. With N frames at a native rate r and a wanted rate f:
n = N / r * f, held between min_frames and max_frames, at most N, rounded down to an even number; then n indices
equally spaced from 0 to N - 1 inclusive, rounded. The model is told that it sees n / N * r frames per second.

Two things differ. Rates are exact fractions, because the model's temporal position is trunc(i * 2 / sampled_fps *
2): one rounding error of 1e-16 the wrong way moves every position by one. And a file of variable rate is sampled at
equally spaced times instead of equally spaced indices; at a constant rate the two are the same thing.

With evidence, periods that matter more, the frames still cover the whole video but lie closer there (`focus_indices`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vcr1_fast.settings.config import VideoConfig
from vcr1_fast.types import Interval

# Matroska rounds times to 1 ms, a 3 % error of the interval at 60 fps; a dropped frame is an error of 100 %.
CONSTANT_RATE_TOLERANCE_FRAC = 0.1
MAX_CLOCK_ROUNDING_S = 1e-3
MIN_CLOCK_ROUNDING_S = 1e-7  # float32 and float64 seconds carry some noise of their own
FOCUS_RATIO = 1.5  # how much closer frames lie inside the evidence than outside of it


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """Which of the N frames to decode, and what rate that is."""

    indices: tuple[int, ...]  # ascending, even count, in 0..N-1; a frame may be named twice
    sampled_fps: float  # n / N * native rate: frames per second of what the model sees


def choose_frames(
    times_s: np.ndarray, duration_s: float, config: VideoConfig, evidence_s: Sequence[Interval] = ()
) -> FrameChoice:
    """Frames to decode of a video whose N >= 1 frames are shown at `times_s` ([N] float64, seconds, no two the same).

    sampled_fps is n / D, where D = N / native rate is the time the N frames are shown (the last one for an average
    interval). Clips of fewer than min_frames frames give as many as they have, rounded down to even. A clip of one
    frame gives that frame twice, because the vision tower takes frames in pairs; its D is `duration_s`, or
    n / config.fps where that is not known (0).

    With `evidence_s`, periods in seconds, the n frames are those of `focus_indices`; where some of them fall together
    there are fewer, and sampled_fps is still that of n, as if they were equally spaced: so the model is told in
    VideoChat-R1.5. Evidence that no frame shows changes nothing.
    """
    num_native = len(times_s)
    wanted_fps = Fraction(repr(config.fps))  # repr: 0.1 means 1/10, not the binary number next to it
    if num_native == 1:
        return FrameChoice((0, 0), 2.0 / duration_s if duration_s > 0 else config.fps)
    rate, is_constant = native_rate(times_s)
    shown_s = num_native / rate
    num_frames = min(max(shown_s * wanted_fps, config.min_frames), config.max_frames, num_native)
    num_frames = max(2, math.floor(num_frames / 2) * 2)
    if indices := focus_indices(evidence_s, num_native, num_frames, rate):
        if len(indices) > config.max_frames:  # many periods, each with a frame at least
            indices = tuple(indices[i] for i in even_indices(len(indices), config.max_frames))
        wanted_s = times_s[0] + np.array(indices) * ((times_s[-1] - times_s[0]) / (num_native - 1))
    else:
        indices = even_indices(num_native, num_frames)
        wanted_s = np.linspace(times_s[0], times_s[-1], num_frames)
    return FrameChoice(indices if is_constant else nearest_in_time(times_s, wanted_s), float(num_frames / shown_s))


def focus_indices(
    evidence_s: Sequence[Interval], num_native: int, num_frames: int, fps: Fraction | float
) -> tuple[int, ...]:
    """About `num_frames` of `num_native` >= 2 frames, ascending, an even count, closer together in `evidence_s`.

    The sampler of VideoChat-R1.5 (sample_frames in Videochat-R1.5/src_eval/my_vision_process.py of
    OpenGVLab/VideoChat-R1). It is handed N - 1 frames, and so never shows the last one. A period [s, e] has the frames
    trunc(s * fps) to trunc(e * fps). With k frames in all periods and u in none, round(n * 1.5 k / (1.5 k + u)) of the
    n go to the periods by their length, to each at least one, equally spaced from its first frame to its last; the
    others are equally spaced over the u. What is chosen twice is shown once. 60 s at 30 fps, evidence 10 to 20 s,
    n = 120: 28 of 120 lie inside.

    Periods that share frames count as one here; there, each counts by itself. An odd count is made even with the last
    frame once more, as the Hugging Face processor does. () where no period has a frame.
    """
    last = num_native - 2
    spans: list[tuple[int, int]] = []
    for start_s, end_s in sorted(evidence_s):
        first, end = max(0, int(min(start_s * fps, num_native))), int(min(end_s * fps, last))
        if spans and first <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        elif first <= end:
            spans.append((first, end))
    num_inside = sum(end - first + 1 for first, end in spans)
    if not num_inside:
        return ()
    others = np.setdiff1d(np.arange(last + 1), np.concatenate([np.arange(first, end + 1) for first, end in spans]))
    weight = FOCUS_RATIO * num_inside
    num_shown = round(num_frames * weight / (weight + len(others)))
    chosen: list[int] = []
    if len(others):
        chosen += others[np.linspace(0, len(others) - 1, num_frames - num_shown, dtype=int)].tolist()
    for first, end in spans:
        share = max(1, round(num_shown * (end - first + 1) / num_inside))
        chosen += np.linspace(first, end, share, dtype=int).tolist()  # in float64 and cut, as there
    indices = sorted(set(chosen))
    return (*indices, *indices[-1:]) if len(indices) % 2 else tuple(indices)


def native_rate(times_s: np.ndarray) -> tuple[Fraction, bool]:
    """Frames per second of N >= 2 frames shown at `times_s` ([N] float64, seconds), and whether it is constant.

    Constant: every frame is within a tenth of the average interval of its place on a regular grid. The rate is then
    the whole number, the NTSC number (k * 1000/1001) or the simplest fraction that explains the times within their
    own rounding error, so 24 fps in a file that counts milliseconds is 24 and not 23.9994.
    """
    num_intervals = len(times_s) - 1
    span_s = float(times_s[-1] - times_s[0])
    grid_s = times_s[0] + np.arange(len(times_s)) * (span_s / num_intervals)
    error_s = float(np.abs(times_s - grid_s).max())
    is_constant = error_s <= CONSTANT_RATE_TOLERANCE_FRAC * span_s / num_intervals
    clock_s = min(max(error_s, MIN_CLOCK_ROUNDING_S), MAX_CLOCK_ROUNDING_S) if is_constant else MIN_CLOCK_ROUNDING_S
    lowest = num_intervals / Fraction(span_s + clock_s)
    highest = num_intervals / Fraction(max(span_s - clock_s, span_s / 2))
    middle = num_intervals / span_s
    for familiar in (Fraction(round(middle)), Fraction(round(middle * 1.001) * 1000, 1001)):
        if lowest <= familiar <= highest:
            return familiar, is_constant
    return simplest_between(lowest, highest), is_constant


def simplest_between(lowest: Fraction, highest: Fraction) -> Fraction:
    """The fraction of smallest denominator in [lowest, highest], 0 < lowest <= highest (continued fractions)."""
    whole = math.ceil(lowest)
    if whole <= highest:
        return Fraction(whole)
    whole -= 1
    return whole + 1 / simplest_between(1 / (highest - whole), 1 / (lowest - whole))


def even_indices(num_native: int, num_frames: int) -> tuple[int, ...]:
    """`num_frames` >= 2 indices equally spaced from 0 to num_native - 1 inclusive, rounded half to even, exactly."""
    return tuple(round(Fraction(i * (num_native - 1), num_frames - 1)) for i in range(num_frames))


def nearest_in_time(times_s: np.ndarray, wanted_s: np.ndarray) -> tuple[int, ...]:
    """Frames, of those at `times_s` ([N], N >= 2), nearest to the instants `wanted_s` ([F], seconds).

    Half-way between two frames the earlier one is taken. A frame that stays on screen for long is named repeatedly.
    """
    after = np.searchsorted(times_s, wanted_s).clip(1, len(times_s) - 1)
    before_is_nearer = wanted_s - times_s[after - 1] <= times_s[after] - wanted_s
    return tuple(int(i) for i in np.where(before_is_nearer, after - 1, after))
