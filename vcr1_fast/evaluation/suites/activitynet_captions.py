"""ActivityNet Captions (arXiv 1705.00754) as temporal grounding.

val_2.json (the usual test split of grounding; val_1.json for choosing): {"v_uqiMw7tQ1Cc": {"duration": 55.15,
"timestamps": [[0.0, 4.14], ...], "sentences": ["Two men ...", ...]}, ...}, seconds. Videos are named v_....mp4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.evaluation.suites.grounding import read_sentences
from vcr1_fast.evaluation.suites.suite import Found, Suite


def _read(files: Sequence[Path], videos: Path) -> Found:
    return read_sentences("activitynet_captions", files, videos, ("timestamps", "sentences"))


SUITE = Suite(
    name="activitynet_captions",
    title="ActivityNet Captions (grounding)",
    tasks=("temporal_grounding",),
    files="val_2.json",
    metric="r@0.3, r@0.5, r@0.7, miou",
    format_source="microsoft/2D-TAN, data/ActivityNet/test.json (val_2.json under another name)",
    rule_source="microsoft/2D-TAN, README.md and lib/core/eval.py (Rank1 at an IoU)",
    checked="the test split, 17,031 queries",
    read=_read,
)
