"""What every script here does alike: stop at a wrong result, print a table, keep the rows as data.

A kept file grows call by call: a row replaces the one with the same labels and processor, and says
itself on what machine, at what commit and beside how much other work it was measured. So a table of
many rows may be measured in short calls, each of which has a machine to itself, and on several
machines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nvfp4.bench.tables import Row, terminal
from nvfp4.bench.timing import machine

RESULTS = Path(__file__).parent / "results"

OF_A_ROW = ("processor", "threads", "torch", "commit", "load", "date")
"""What a kept row says of where it was measured."""


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all scripts take; a script adds its own."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--keep", metavar="NAME", help="keep the rows in results/NAME.json")
    return parser


def gate(ok: bool, what: str) -> None:
    """Stop before any figure is printed if the thing to be timed gives wrong answers."""
    if not ok:
        sys.exit(f"not timed, because it is wrong: {what}")


def show(title: str, rows: Sequence[Row], name: str | None = None, labels: int = 1) -> None:
    """Print rows as a table under the machine line.

    name: also keep them in results/<name>.json. labels: how many columns name a row.
    """
    facts = machine()
    console = Console()
    line = ", ".join(f"{key} {value}" for key, value in facts.items())
    console.print(line, style="dim", highlight=False)
    console.print(terminal(title, rows, labels))
    if name:
        path = keep(RESULTS / f"{name}.json", title, rows, facts, labels)
        console.print(f"kept as {path.name} under benchmarks/results/", style="dim")


def keep(path: Path, title: str, rows: Sequence[Row], facts: Row, labels: int = 1) -> Path:
    """Merge rows into a file: each replaces its like, measured on the same kind of processor.

    labels: how many first columns name a row. Where all rows of a file were measured at once, the
    machine stands beside them; it moves into them.
    """
    kept: dict[tuple[Any, ...], Row] = {}
    older = json.loads(path.read_text()) if path.exists() else {"rows": []}
    for each, where in ((older["rows"], older.get("machine", {})), (rows, facts)):
        about = {key: where[key] for key in OF_A_ROW if key in where}
        for row in each:
            machine = row.get("machine", about)
            label = (machine.get("processor", ""), *list(row.values())[:labels])
            kept[label] = {**row, "machine": machine}

    # Replaced in one step, so that a call that is ended leaves the old file.
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"title": title, "rows": list(kept.values())}, indent=1)
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)
    return path
