"""Tables whose heads `python -m bench NAME --help` explains: a benchmark's COLUMN_HEADS, head -> meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from string import Formatter
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH, WRAPPED = 200, 40  # characters of a line, and of the longest text that is not wrapped
Columns = Mapping[str, tuple[str, str]]  # key of a row -> (head, meaning)


Row = Mapping[str, Any]
# head -> (meaning, cell: its text, or a format string over the row, where a value that is None or absent is left blank)
Cells = Mapping[str, tuple[str, str | Callable[[Row], str]]]


class _Blank(Formatter):
    def get_value(self, key: int | str, args: Any, kwargs: Row) -> Any:
        return kwargs.get(str(key))

    def format_field(self, value: Any, format_spec: str) -> str:
        return "" if value is None else format(value, format_spec)


def cell_heads(cells: Cells) -> dict[str, str]:
    return {head: meaning for head, (meaning, _) in cells.items()}


def cell_table(title: str, cells: Cells, rows: Iterable[Row], left: Iterable[str] = ("way",)) -> Table:
    """One line for each row; the columns in `left` to the left, all others to the right."""
    table = Table(title=title)
    for head in cells:
        table.add_column(head, justify="left" if head in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) if callable(cell) else _Blank().vformat(cell, (), row) for _, cell in cells.values()))
    return table


def heads_of(*tables: Columns) -> dict[str, str]:
    return {head: meaning for columns in tables for head, meaning in columns.values()}


def explain(heads: Mapping[str, str]) -> str:
    """One line for each head, for the end of a help text."""
    width = max(map(len, heads), default=0)
    return "\n".join(["columns:", *(f"  {head:<{width}}  {meaning}" for head, meaning in heads.items())])


def split_at(text: str, begin: str, end: str) -> tuple[str, str, str]:
    """Up to `begin`, what stands between, and from `end` on. Raises ValueError where one of the two is missing."""
    if begin not in text or end not in text:
        raise ValueError(f"the page has no section between {begin.strip()!r} and {end.strip()!r}")
    before, rest = text.split(begin, 1)
    inside, after = rest.split(end, 1)
    return before + begin, inside, end + after


def print_rows(rows: Iterable[Mapping[str, Any]], columns: Columns, title: str) -> None:
    """A column for each key; text to the left, numbers to the right, what a row lacks left blank."""
    table = Table(title=title)
    rows = list(rows)
    for key, (head, _) in columns.items():
        texts = [row[key] for row in rows if isinstance(row.get(key), str)]
        is_long = any(len(text) > WRAPPED for text in texts)
        table.add_column(head, justify="left" if texts else "right", overflow="fold", no_wrap=not is_long)
    for row in rows:
        table.add_row(*(shown(row.get(key)) for key in columns))
    Console(width=WIDTH).print(table)


def shown(value: Any) -> str:
    """Numbers with separators of thousands, fractions to three digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
