"""What a call found, written as it comes: one JSON object per line, so that a kill loses nothing.

The records, by ``kind``:

    call    number, budget, commit, when it began; at its end how it ended
    plan    the names of the units of a stage, before the first of them starts
    stage   its state ("running", then how it ended) and its limit in seconds
    row     one line of a table: what a unit computed or timed
    unit    how a unit ended: done, failed (with the reason), skipped (likewise) or stopped

``CallRecord.of`` reads them back. A unit that is in a plan and has no ``unit`` record was not
reached, and is named so in the report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvfp4.bench.tables import Row

LONGEST_TEXT = 1500
"""Characters of one value.

A record stays below 4096 bytes or little more, so that appends of two processes do not mix.
"""


def append(path: Path, **record: Any) -> None:
    """One record as one write at the end of the file, whoever else writes there."""
    short = {key: _short(value) for key, value in record.items()}
    line = json.dumps(short, default=str) + "\n"
    target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(target, line.encode())
    finally:
        os.close(target)


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return value[:LONGEST_TEXT] + " ..."
    return value


def records(path: Path) -> Iterator[Row]:
    """All records of a file; a line that was cut off by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


@dataclass
class StageRecord:
    """One stage of a call: how it ended, its rows, and how each of its units ended."""

    state: str = "not begun"
    limit: float = 0.0
    seconds: float = 0.0
    planned: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    units: dict[str, Row] = field(default_factory=dict)

    @property
    def not_reached(self) -> list[str]:
        """Units that did not end by themselves: not begun, or stopped when the time was over."""
        ended = {name for name, unit in self.units.items() if unit["state"] != "stopped"}
        return [name for name in self.planned if name not in ended]

    @property
    def cpu_seconds(self) -> float:
        """What its units computed, compilers and other children included."""
        return sum(float(unit.get("cpu s", 0.0)) for unit in self.units.values())

    def with_state(self, state: str) -> dict[str, Row]:
        """The units that ended so."""
        return {name: unit for name, unit in self.units.items() if unit["state"] == state}


@dataclass
class CallRecord:
    """All that a call wrote."""

    call: Row = field(default_factory=dict)
    stages: dict[str, StageRecord] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> CallRecord:
        """What is in a file; an earlier call into the same file is forgotten."""
        read = cls()
        for record in records(path):
            kind = record.pop("kind", None)

            # A file may hold several calls, one after another; the last that began counts.
            if kind == "call":
                if record.get("state") == "began":
                    read = cls()
                read.call |= record
                continue
            stage = read.stages.setdefault(str(record.pop("stage", "?")), StageRecord())
            if kind == "stage":
                stage.state = record["state"]
                stage.limit = record.get("limit", stage.limit)
                stage.seconds = record.get("seconds", stage.seconds)
            elif kind == "plan":
                stage.planned += record["units"]
            elif kind == "unit":
                stage.units[record.pop("unit")] = record
            elif kind == "row":
                stage.rows.append(record)
        return read

    @property
    def wrong(self) -> int:
        """Comparisons that were wrong, tests that failed, and units that failed altogether."""
        rows = [row for stage in self.stages.values() for row in stage.rows]
        failed = sum(len(stage.with_state("failed")) for stage in self.stages.values())
        return failed + sum(int(row.get("wrong", 0)) for row in rows)

    @property
    def compared(self) -> int:
        """Comparisons that were made."""
        rows = (row for stage in self.stages.values() for row in stage.rows)
        return sum(int(row.get("checked", 0)) for row in rows)
