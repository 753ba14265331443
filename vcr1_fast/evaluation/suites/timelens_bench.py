"""TimeLens-Bench (arXiv 2512.14698): Charades, ActivityNet and QVHighlights annotated anew, as temporal grounding.

charades-timelens.json, activitynet-timelens.json, qvhighlights-timelens.json: {"VIDEO": {"duration": 30.96, "spans":
[[24.3, 30.4], ...], "queries": ["...", ...]}, ...}, seconds. Blanks in a query are folded and full stops at its ends
dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.evaluation.suites.grounding import read_sentences
from vcr1_fast.evaluation.suites.suite import Found, Suite
from vcr1_fast.prompts.schemas.timelens import clean_query


def _read(files: Sequence[Path], videos: Path) -> Found:
    for file in files:  # the three files may share names of videos
        yield from read_sentences(f"timelens_bench:{file.stem}", [file], videos, ("spans", "queries"), clean_query)


SUITE = Suite(
    name="timelens_bench",
    title="TimeLens-Bench",
    tasks=("temporal_grounding",),
    files="one of the three *-timelens.json, with --videos: the folder of its videos",
    metric="r@0.3, r@0.5, r@0.7, miou",
    format_source="TencentARC/TimeLens, timelens/dataset/timelens_data.py",
    rule_source="TencentARC/TimeLens, evaluation/compute_metrics.py",
    checked="the published description only",
    read=_read,
)
