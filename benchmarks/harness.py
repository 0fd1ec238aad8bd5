"""One way to report: gate on correctness, keep the result as data. How things are timed: ``nvfp4.bench.timing``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nvfp4.bench.timing import machine

RESULTS = Path(__file__).parent / "results"


def gate(ok: bool, what: str) -> None:
    """Stop before any figure is printed if the thing to be timed gives wrong answers."""
    if not ok:
        sys.exit(f"not timed, because it is wrong: {what}")


def show(title: str, rows: list[dict[str, Any]], name: str | None = None) -> None:
    """Print rows as a table under the machine line; with ``name`` also keep them as results/<name>.json."""
    facts = machine()
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), style="dim", highlight=False)
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    if name:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps({"title": title, "machine": facts, "rows": rows}, indent=1) + "\n")
        console.print(f"kept as {path.name} under benchmarks/results/", style="dim")
