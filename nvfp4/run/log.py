"""log.jsonl: a JSON object per step, whole lines only, cut back to the checkpoint on resume.

    {"step": 120, "loss": 2.4132, "lr": 0.0039, ..., "skipped": false}

A row is one ``write`` of one line to a file opened for appending, so a process that is killed
leaves no half line; a full disk may, and a reader passes over it. NaN and Inf are null, since JSON
has neither. Every checkpoint is preceded by an ``fsync``: the log may be ahead of it, never behind.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

from nvfp4.run.errors import TrainError
from nvfp4.run.files import write_text

Row = dict[str, Any]

LAST = 20
"""Steps whose mean is called the training loss: the batch of one step is too noisy to name."""


class Log:
    """Appends rows; each is one ``write`` of a whole line, so a killed process leaves no half
    line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, row: Row) -> None:
        """Append a row; NaN and Inf must be given as None. ``TrainError`` if the disk is full."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(None, "no space left for a whole line")
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """Bring all rows to the disk; done before every checkpoint, so that no checkpoint is ahead
        of the log."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:  # some file systems find out here that the disk is full
            raise self._failed(error) from error

    def close(self) -> None:
        os.close(self._descriptor)

    def _failed(self, error: OSError) -> TrainError:
        return TrainError(
            f"cannot write {self.path}: {error.strerror or error}; make room and go on with "
            "--resume"
        )


def read(path: Path) -> list[Row]:
    """All rows of a log, none if there is no file; an unfinished last line (full disk, power cut)
    is passed over."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise TrainError(f"{path}, line {number} is no row of a run's log; move the file away")
        rows.append(row)
    return rows


def costs(rows: list[Row], seconds: str) -> Row:
    """What the steps of a run have cost, also those before a resume; seconds: the figure that says
    how long one took.

    tokens_per_s is the median, memory the peak in GiB.
    """
    return {
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows),
        "seconds": sum(row[seconds] for row in rows),
        "peak_memory_gib": max(row["memory_gib"] for row in rows),
        "skipped_steps": sum(row["skipped"] for row in rows),
    }


def last_row(path: Path) -> Row | None:
    """The last whole row of a log that another process writes, from its last 64 KiB; None if there
    is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().split(b"\n")[:-1]
        return dict(json.loads(lines[-1])) if lines else None
    except (OSError, ValueError, TypeError):
        return None


def cut(path: Path, step: int) -> None:
    """Drop the rows after ``step``: they will be written again by the resumed run."""
    rows = [row for row in read(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
