"""Links of a page of the site, as docs/site/hooks.py mends them."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
assert SPEC and SPEC.loader
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)


def page(name: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=name))


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("[data](data.md)", "[data](data.md)"),
        ("[data](data.md#rows)", "[data](data.md#rows)"),
        ("[the kernels](../kernels/README.md#install)", "[the kernels](kernels.md#install)"),
        ("[home](../README.md)", "[home](index.md)"),
        ("[`task.py`](../vcr1_fast/tasks/task.py)", "`task.py`"),
        ("[the job](../configs/slurm.sh)", "`the job`"),
        ("[arXiv](https://arxiv.org/abs/2504.06958)", "[arXiv](https://arxiv.org/abs/2504.06958)"),
        ("[below](#rows)", "[below](#rows)"),
    ],
)
def test_a_link_leads_to_a_page_or_becomes_a_name(written: str, wanted: str):
    assert hooks.on_page_markdown(f"See {written}.", page("tasks.md")) == f"See {wanted}."


def test_pipes_in_the_code_of_a_table_are_written_as_mkdocs_wants_them():
    rows = "| `a \\| b` | c \\| d |\n\nbash: `a \\| b`"
    assert hooks.on_page_markdown(rows, page("tasks.md")) == "| `a | b` | c \\| d |\n\nbash: `a \\| b`"


def test_pages_from_elsewhere_are_put_in_with_their_links():
    text = hooks.on_page_markdown("<!-- include: ../README.md -->\n\nfor readers of the repository", page("index.md"))
    assert text.startswith("# vcr1-fast\n") and "for readers" not in text
    assert "(images/shared_row.svg)" in text and "(data.md)" in text and "(kernels.md)" in text
    assert "](docs/" not in text
