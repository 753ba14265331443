"""The tables of docs/performance.md that are made from results: between two comments that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench import predict, rollouts, scaling, select
from bench.columns import Columns, shown, split_at

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
STEP = (
    "name", "num_gpus", "gpu", "prompt", "longest", "recompute", "peak_gb", "rollout_s", "predicted_s", "network_s",
    "tokens_per_s", "mfu", "completions_per_s",
)  # fmt: skip
SECTIONS: dict[str, tuple[str, str, Columns]] = {  # name -> result it is made of, its list of rows, columns
    "step": ("predict", "rows", {key: predict.COLUMNS[key] for key in STEP}),
    "others": ("predict", "public", predict.PUBLIC_COLUMNS),
    "errors": ("predict", "errors", {key: predict.ERROR_COLUMNS[key] for key in list(predict.ERROR_COLUMNS)[1:]}),
    "rollouts": ("rollouts", "cases", rollouts.COLUMNS),
    "growth": ("scaling", "fits", scaling.FIT_COLUMNS),
    "select": ("select", "rows", select.COLUMNS),
}


def sections_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of all results that are there: {section: Markdown}. `results`: by benchmark, {} for one that was not run."""
    return {
        name: markdown(columns, results[source][rows])
        for name, (source, rows, columns) in SECTIONS.items()
        if results.get(source)
    }


def markdown(columns: Columns, rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    sides = ["---" if any(isinstance(row.get(key), str) for row in rows) else "--:" for key in columns]
    lines = [[head for head, _ in columns.values()], sides, *([shown(row.get(key)) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def between(name: str) -> tuple[str, str]:
    return f"<!-- python -m bench figures: {name} -->\n", f"<!-- {name}: end -->"


def section(text: str, name: str) -> str:
    """What stands in `text` under that name. Raises ValueError when nothing does."""
    return split_at(text, *between(name))[1].rstrip("\n")


def write(path: Path, sections: Mapping[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for name, table in sections.items():
        before, _, after = split_at(text, *between(name))
        text = f"{before}{table}\n{after}"
    path.write_text(text, encoding="utf-8")
