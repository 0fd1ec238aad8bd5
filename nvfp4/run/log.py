"""log.jsonl: a JSON object per step, whole lines only, cut back to the checkpoint on resume.

    {"step": 120, "loss": 2.4132, "lr": 0.0039, ..., "skipped": false}

Each row is one ``write`` of one line to a file opened for appending, so a process that is killed
leaves no half line. A full disk may leave one; a reader stops before it. NaN and Inf are null,
since JSON has neither.

Order against checkpoints: rows -> fsync of the log -> checkpoint. The log may be ahead of the
newest checkpoint, never behind it. On resume ``cut`` drops the rows that are ahead, and the run
writes the same rows again.
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
"""Steps at the end whose mean is called the training loss; that of one batch is mostly noise."""


class Log:
    """Appends rows to a file that stays open while the run lives."""

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
            # A short write is how a disk that fills up within the line shows itself.
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(None, "no space left for a whole line")
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """Bring all rows to the disk, before every checkpoint, so that none is ahead of the log."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:  # some file systems find out here that the disk is full
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file, without the wait of ``flush``."""
        os.close(self._descriptor)

    def _failed(self, error: OSError) -> TrainError:
        return TrainError(
            f"cannot write {self.path}: {error.strerror or error}; make room and go on with "
            "--resume"
        )


def read(path: Path) -> list[Row]:
    """All rows of a log; none if there is no file.

    Reading stops before an unfinished last line (full disk, power cut). ``TrainError`` for a line
    of JSON that is no row: the file is somebody else's.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from error

    # Each row stands alone, so the rows before a broken one are good.
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
    """What the steps of a run have cost, also those before a resume.

    seconds: the figure of a row that says how long its step took. tokens_per_s is the median over
    steps, memory the peak in GiB.
    """
    return {
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in rows),
        "seconds": sum(row[seconds] for row in rows),
        "peak_memory_gib": max(row["memory_gib"] for row in rows),
        "skipped_steps": sum(row["skipped"] for row in rows),
    }


def last_row(path: Path) -> Row | None:
    """The last whole row of a log that another process is writing; None if there is none yet.

    Reads the last 64 KiB only: a bar on a terminal asks several times a second.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            # what follows the last newline is a row in the making
            lines = file.read().split(b"\n")[:-1]
        return dict(json.loads(lines[-1])) if lines else None
    except (OSError, ValueError, TypeError):
        return None


def cut(path: Path, step: int) -> None:
    """Drop the rows after ``step``: they will be written again by the resumed run."""
    rows = [row for row in read(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
