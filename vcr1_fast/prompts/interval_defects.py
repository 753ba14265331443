"""Known defects of the intervals in an annotation row, counted by kind. Called by `dataset` for the summary of a file.

What happens to them is the task's to decide: recipe fixed cuts an interval to the video and refuses what is reversed or
then empty (of the four reversed intervals in Charades-STA three lie after the end of the video even when turned round:
turning would be a guess); recipe paper keeps all as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TypeGuard

REVERSED = "reversed"
EMPTY = "of no length"
EARLY_START = "starting before 0 s"
LATE_START = "starting after the video"
LATE_END = "ending after the video"
# Kinds for which recipe fixed refuses a row, the one that is named first where a row has several.
REFUSING = (REVERSED, EMPTY, EARLY_START, LATE_START)


def find_interval_defects(row: Mapping[str, object]) -> Counter[str]:
    """Kind -> intervals of the row's "intervals" that have it; one interval may have several.

    Malformed intervals have none, since the task names them; neither have those in a row without a usable duration_s
    where the kind depends on it.
    """
    defects: Counter[str] = Counter()
    intervals = row.get("intervals")
    if not isinstance(intervals, list | tuple):
        return defects
    duration = row.get("duration_s")
    duration_s = duration if _is_number(duration) and duration > 0 else math.inf
    for interval in intervals:
        if not isinstance(interval, list | tuple) or len(interval) != 2 or not all(map(_is_number, interval)):
            continue
        start_s, end_s = interval
        found = {
            REVERSED: end_s < start_s,
            EMPTY: end_s == start_s,
            EARLY_START: start_s < 0,
            LATE_START: start_s >= duration_s,
            LATE_END: end_s > duration_s,
        }
        defects.update(kind for kind, is_found in found.items() if is_found)
    return defects


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
