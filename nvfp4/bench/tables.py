"""Rows as tables, for a terminal and for a page: the one place that decides how a number looks.

    [{"layer": "up", "ms": 1.2345}, {"layer": "down", "ms": 120.4, "peak MB": 3}]
      -> layer  ms    peak MB
         up     1.23
         down   120   3

A row is a dict from columns to values. Rows of one table may lack columns; a table has those of all
its rows, in the order in which they first occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def shown(value: Any) -> str:
    """A cell: three digits of a float, without an exponent for what is large."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every column of the rows, each once."""
    return list(dict.fromkeys(column for row in rows for column in row))


def markdown(rows: Sequence[Row]) -> list[str]:
    """The lines of a table in Markdown; numbers are set to the right."""
    if not rows:
        return ["(nothing measured)"]
    columns = columns_of(rows)
    first = [next(row[column] for row in rows if column in row) for column in columns]
    rules = ["---:" if isinstance(value, (int, float)) else "---" for value in first]
    body = [[_escaped(row.get(column, "")) for column in columns] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rules, *body)]


def _escaped(value: Any) -> str:
    return shown(value).replace("|", "\\|").replace("\n", " ")


def terminal(title: str, rows: Sequence[Row], labels: int = 1, red: Sequence[bool] = ()) -> Table:
    """A table for rich. labels: how many columns are set to the left; red: rows that are faulty."""
    table = Table(title=title, title_justify="left")
    columns = columns_of(rows)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < labels else "right", overflow="fold")
    for i, row in enumerate(rows):
        style = "red" if i < len(red) and red[i] else None
        table.add_row(*(shown(row.get(column, "")) for column in columns), style=style)
    return table
