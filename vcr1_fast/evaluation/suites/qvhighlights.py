"""QVHighlights (arXiv 2107.09609): moment retrieval, queries with one or more true windows.

highlight_val_release.jsonl: qid, query, duration, vid (YouTube id, start, end), relevant_windows [[start, end], ...],
and clips with their saliency, which moment retrieval does not need. Rank 1 recall takes the true window that fits the
answer best. The benchmark's mAP wants a list of windows with scores, which an answer here does not give.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vcr1_fast.evaluation.suites.suite import Found, Suite, find_video, read_rows
from vcr1_fast.prompts.schemas.schema import Entry, Row, read_field, read_text


def _read(files: Sequence[Path], videos: Path) -> Found:
    return read_rows(files, lambda file, where, entry: _row(entry, videos))


def _row(entry: Entry, videos: Path) -> Row:
    return {
        "id": f"qvhighlights:{read_field(entry, 'qid')}",
        "task": "temporal_grounding",
        "video": find_video(videos, read_text(entry, "vid")),
        "query": read_text(entry, "query").strip(),
        "duration_s": read_field(entry, "duration"),
        "intervals": read_field(entry, "relevant_windows"),
    }


SUITE = Suite(
    name="qvhighlights",
    title="QVHighlights (moment retrieval)",
    tasks=("temporal_grounding",),
    files="highlight_val_release.jsonl",
    metric="r@0.5, r@0.7 (R1), miou, with the best of the true windows; no mAP",
    format_source="jayleicn/moment_detr, data/README.md",
    rule_source="jayleicn/moment_detr, standalone_eval/eval.py (compute_mr_r1)",
    checked="the validation split, 1,550 queries, and the test split with its truths, 1,542",
    read=_read,
)
