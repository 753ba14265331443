"""The page itself: what was read, drawn and chosen, put into the template. Every text in it is escaped by jinja2.

The page has no script, and a policy in its head that forbids any, and whatever else would be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vcr1_fast import __version__
from vcr1_fast.report import curves
from vcr1_fast.report.clips import Clip, ClipMaker, choose
from vcr1_fast.report.data import RunData

TEMPLATE = "page.html.jinja"


def render(runs: Sequence[RunData]) -> str:
    """The HTML of one run, or of two beside each other. Reads frames of the clips that it shows."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        runs=runs,
        labels=_labels(runs),
        settings=settings_table(runs),
        sections=curves.sections([run.series for run in runs]),
        splits=[curves.time_split(run.series) for run in runs],
        galleries=[gallery(run) for run in runs],
        box=curves,
        score=score_text,
        version=__version__,
    )


def score_text(value: float | None, interval: Sequence[float] | None) -> str:
    """`0.512 [0.431, 0.590]`; "" for a value that is not known."""
    if value is None:
        return ""
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def settings_table(runs: Sequence[RunData]) -> list[tuple[str, list[str], bool]]:
    """(setting, its value in each run, whether these differ)."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [run.settings.get(name, "") for run in runs]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def gallery(run: RunData) -> list[tuple[str, list[Clip]]]:
    """Title -> clips."""
    try:
        maker = ClipMaker(float(run.settings["video.image_folder_fps"]))
    except (KeyError, ValueError):
        maker = ClipMaker()
    return [
        (title, [maker.clip(said, before) for said, before in pairs])
        for title, pairs in choose(run.evaluations, run.trained_on)
    ]


def _labels(runs: Sequence[RunData]) -> list[str]:
    """Names of the runs; their paths where the names are the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
