"""What an update adds up over its rows, kept on the device until it has ended.

Reading a number as soon as a row has made it would have the host wait for the GPU once per number and row; here it
waits once per update.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vcr1_fast.learner.objective import Largest


class Totals:
    """Sums by name, in float64, and the largest gap."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._largest = self._zero

    def add(
        self, sums: Mapping[str, Tensor], counts: Mapping[str, int], is_real: bool, largest: Largest | None
    ) -> None:
        """Take in one row's scalars. Every rank must have the same names, so a placeholder adds its zeros."""
        for name, value in sums.items():
            total = self._sums.setdefault(name, self._zero)
            self._sums[name] = total + value if is_real else total
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + (count if is_real else 0)
        if is_real and largest is not None and largest.value is not None:
            self._largest = torch.maximum(self._largest, largest.value.double())

    def read(self) -> tuple[dict[str, float], float]:
        """(sums and counts, largest gap). The only place where an update waits for its rows."""
        numbers = torch.stack([*self._sums.values(), self._largest]).cpu().tolist()
        sums = dict(zip(self._sums, numbers[:-1], strict=True))
        return {"loss": 0.0} | sums | {name: float(count) for name, count in self._counts.items()}, numbers[-1]
