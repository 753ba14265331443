"""What is logged is explained, once: tests/logged.py compares the names of real runs, this file the docs."""

from pathlib import Path

import pytest

from vcr1_fast.run.metric_names import METRICS, metric_of

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_docs_have_a_row_for_each():
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert rows == [f"| `{metric.name}` | {metric.meaning} |" for metric in METRICS]


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("reward", "reward"),
        ("rewards/temporal_grounding/iou/mean", "rewards/{task}/{part}/mean"),
        ("bad_samples/too_large", "bad_samples/{reason}"),
        ("eval/object_tracking/r@0.5_with_first", "eval/{task}/{metric}"),
        ("epoch/grounded_qa", "epoch/{task}"),
        ("rewards/iou", None),
        ("rewardx", None),
        ("time/nap_s", None),
    ],
)
def test_a_name_is_found_by_its_form(name: str, listed: str | None):
    metric = metric_of(name)
    assert (metric and metric.name) == listed
    assert sum(metric.pattern.fullmatch(name) is not None for metric in METRICS) == (listed is not None)
