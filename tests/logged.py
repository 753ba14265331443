"""What a run logged."""

import json
from pathlib import Path

from vcr1_fast.run.metric_names import metric_of


def logged(run: Path) -> list[dict[str, float]]:
    """The lines of its metrics.jsonl. Each name in them must be explained."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for record in records for name in record} - {"step"}
    unknown = sorted(name for name in names if metric_of(name) is None)
    assert not unknown, f"not in vcr1_fast/run/metric_names.py: {unknown}"
    return records
