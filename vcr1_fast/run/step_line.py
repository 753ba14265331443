"""One step as a person reads it: half a line while all is well, and what is unusual beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

WINDOW = 10  # steps, of which a trend and the time left are means
MAX_TRUNCATED, MAX_ZERO_VARIANCE = 0.1, 0.5  # shares that are nothing unusual
HEADLINES = ("reward", "nll", "loss")  # the first that is there
COUNTS = {  # shown when they are not 0
    "skipped_updates": "skipped updates",
    "reward_failures": "reward failures",
    "groups_too_large": "groups too large",
}
COUNTS_SINCE_START = {"bad_samples": "bad samples", "engine/restarts": "engine restarts"}  # shown when they grow
SHARES = {
    "completions/clipped_ratio": ("truncated", MAX_TRUNCATED),
    "frac_reward_zero_std": ("zero-variance", MAX_ZERO_VARIANCE),
}


class StepLines:
    """Keeps what trend and time left are made of. Example: `StepLines().line(1, 100, {"reward": 0.5})`."""

    def __init__(self) -> None:
        self._headline: deque[float] = deque(maxlen=2 * WINDOW)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._before: dict[str, float] = {}

    def line(self, step: int, num_steps: int, record: Mapping[str, float]) -> str:
        """`step  12/150 | reward 0.624 (+0.031) | 0.55 s, 1:16 left | truncated 12%`; what is not known is left out.

        In brackets: the mean of the last WINDOW steps less that of the WINDOW before (early on: of half the steps).
        """
        width = len(str(num_steps))
        parts = [f"step {step:{width}d}/{num_steps}", self._learned(record), self._clock(num_steps - step, record)]
        parts.append(", ".join(self._unusual(record)))
        self._before = {name: record.get(name, 0.0) for name in COUNTS_SINCE_START}
        return " | ".join(filter(None, parts))

    def _learned(self, record: Mapping[str, float]) -> str:
        name = next((name for name in HEADLINES if name in record), None)
        if name is None:
            return ""
        self._headline.append(record[name])
        change = trend(self._headline)
        return f"{name} {record[name]:.3f}" + (f" ({change:+.3f})" if change is not None else "")

    def _clock(self, num_left: int, record: Mapping[str, float]) -> str:
        if "step_time" not in record:
            return ""
        self._seconds.append(record["step_time"])
        left_s = num_left * sum(self._seconds) / len(self._seconds)
        return f"{record['step_time']:.2f} s" + (f", {clock(left_s)} left" if num_left else "")

    def _unusual(self, record: Mapping[str, float]) -> Iterator[str]:
        for name, label in COUNTS.items():
            if record.get(name):
                yield f"{label} {record[name]:.0f}"
        for name, label in COUNTS_SINCE_START.items():
            if record.get(name, 0.0) > self._before.get(name, 0.0):
                yield f"{label} {record[name]:.0f}"
        for name, (label, usual) in SHARES.items():
            if record.get(name, 0.0) > usual:
                yield f"{label} {record[name]:.0%}"


def trend(values: deque[float]) -> float | None:
    """Mean of the later half of the values less that of the earlier; None for fewer than two."""
    half = len(values) // 2
    if not half:
        return None
    listed = list(values)
    return sum(listed[-half:]) / half - sum(listed[-2 * half : -half]) / half


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def number(value: float) -> str:
    """Four digits, thousands with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value.is_integer() else f"{value:.4g}"
