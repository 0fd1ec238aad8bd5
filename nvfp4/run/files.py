"""Files that are either old or new, never half.

    write .name.PID in the same folder -> fsync it -> rename over the old one -> fsync the folder

A rename within a file system is atomic, so a reader, a full disk or a power cut sees the old
content or the new one. The two fsyncs make it durable: without the first the new name may point to
empty blocks after a power cut, without the second the rename itself may be lost. If anything fails,
the old file stays and the user gets one sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvfp4.run.errors import TrainError


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk (``fsync``); a rename is durable once its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path, verb: str, remedy: str) -> Iterator[Path]:
    """A temporary file to write, which then takes the place of ``path`` at once, safe on the disk.

    If that fails the old file stays and ``TrainError`` says so: what could not be done (verb), why,
    the remedy. The process number in the name keeps two writers apart.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainError(f"cannot {verb} {path}: {error.strerror or error}; {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) at once; if it fails the old one stays."""
    with _replacing(path, "write", "make room or choose another --out") as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_picture(figure: Any, path: Path) -> None:
    """Replace the PNG at ``path`` by a matplotlib figure at once.

    If that fails the old picture stays and ``TrainError`` says why.
    """
    with _replacing(path, "draw", "make room and run again with --resume") as temporary:
        figure.savefig(temporary, format="png")


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON.

    ``ValueError`` for NaN and Inf, which JSON lacks: a caller that expects them writes None.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
