"""log.jsonl: one JSON object for every step, whole lines only, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nvfp4.train.errors import TrainError
from nvfp4.train.files import write_text

Row = dict[str, Any]


class Log:
    """Appends rows; each is one ``write`` of a whole line, so a killed process leaves no half line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, row: Row) -> None:
        """Append a row; NaN and Inf must be given as None. ``TrainError`` if the disk is full."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(None, "no space left for a whole line")
        except OSError as error:
            raise TrainError(
                f"cannot write {self.path}: {error.strerror}; make room and go on with --resume"
            ) from error

    def flush(self) -> None:
        """Bring all rows to the disk; done before every checkpoint, so that no checkpoint is ahead of the log."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def read(path: Path) -> list[Row]:
    """All rows of a log, none if there is no file; an unfinished last line (full disk, power cut) is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut(path: Path, step: int) -> None:
    """Drop the rows after ``step``: they will be written again by the resumed run."""
    kept = [row for row in read(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
