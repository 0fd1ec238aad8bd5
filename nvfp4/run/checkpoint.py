"""Checkpoints: folders that appear whole or not at all, and that notice when a byte has changed.

    checkpoints/step-00000300/
        manifest.json       format version; size and SHA-256 of every other file
        state.json          plain values: step, config, corpus, counters
        <name>.safetensors  one file per group of tensors

Saving: write under a hidden name, flush every file, rename, flush the folder, delete the old ones.
A run that is killed in between leaves a hidden folder that the next save removes. A checkpoint of
the same step steps aside before that rename; whatever ends the save then, the next look at the
folder puts it back. Loading: compare every size and every hash with the manifest, then map the
tensors. What is damaged is named, and ``folder.py`` goes back to the checkpoint before it.

This file knows folders and bytes. What must be remembered is the matter of ``state.py``.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nvfp4.run.errors import TrainError
from nvfp4.run.files import sha256, sync, write_json

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_TEMPORARY, _ASIDE = ".unfinished-", ".aside-"


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds.

    state: plain values for JSON, with ``step``. tensors: groups of named tensors, each name at most
    once.
    """

    state: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]


def save(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint under ``folder`` and delete all but the ``keep`` newest; returns its path.

    Everything is written under a temporary name, flushed to the disk and renamed last.
    ``TrainError`` if it cannot be written (a full disk, say): what was half-written is removed and
    the checkpoints that were there, one of the same step too, are as they were.
    """
    path = folder / f"step-{snapshot.state['step']:08d}"
    temporary, aside = folder / f"{_TEMPORARY}{path.name}", folder / f"{_ASIDE}{path.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rest in [*folder.glob(f"{_TEMPORARY}*"), *_put_back(folder)]:
            shutil.rmtree(rest)

        temporary.mkdir()
        _write(temporary, snapshot)

        # A folder cannot be renamed over another one, so the old one steps aside first.
        if path.exists():  # the same step again, after going back to an earlier checkpoint
            path.rename(aside)
        temporary.rename(path)
        sync(folder)
    except (OSError, SafetensorError, TrainError) as error:
        shutil.rmtree(temporary, ignore_errors=True)

        # The message says what the user still has.
        left = newest_first(folder)
        intact = (
            f"the last good checkpoint is {left[0]}" if left else "no earlier checkpoint exists"
        )
        raise TrainError(
            f"cannot write checkpoint {path}: {error}; {intact}; make room and go on with --resume"
        ) from error

    for old in [*_put_back(folder), *newest_first(folder)[keep:]]:
        # a folder that cannot be deleted now is tried again after the next checkpoint
        shutil.rmtree(old, ignore_errors=True)
    return path


def load(path: Path, verify: bool = True) -> Snapshot:
    """Read a checkpoint; check every size and hash.

    ``TrainError`` names a file that is missing or changed. The tensors are views of the mapped
    files: they cost memory of the page cache, which processes share. verify: False for all but one
    of several processes, since that one has read every byte.
    """
    manifest = _read_json(path, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise TrainError(
            f"checkpoint {path} has format {manifest.get('format')!r}, this version reads "
            f"{FORMAT}; "
            f"use the version of nvfp4 that wrote it"
        )

    # Sizes and hashes first: a tensor file that is cut off could still be mapped.
    try:
        for name, expected in manifest["files"].items():
            _check_file(path, name, expected, verify)
        groups = [name for name in manifest["files"] if name.endswith(".safetensors")]
        return Snapshot(
            _read_json(path, STATE), {Path(name).stem: load_file(path / name) for name in groups}
        )
    except (OSError, SafetensorError) as error:
        raise _damage(
            path, f"it cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error

    # A manifest that is JSON and of another shape fails in one of these ways.
    except (AttributeError, KeyError, TypeError) as error:
        raise _damage(
            path, f"{MANIFEST} does not list files with their sizes and hashes"
        ) from error


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first; unfinished ones are not among them.

    One that had stepped aside when a save ended is put back first. ``TrainError`` for a folder that
    cannot be listed, which would pass for a run without checkpoints.
    """
    try:
        _put_back(folder)
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise TrainError(
            f"cannot look for checkpoints in {folder}: {error.strerror}; make it readable"
        ) from error
    return sorted(
        (p for p in (folder / name for name in names if name.startswith("step-")) if p.is_dir()),
        reverse=True,
    )


def _put_back(folder: Path) -> list[Path]:
    """Give checkpoints that stepped aside their names again; returns those whose name is taken."""
    replaced = []
    for aside in folder.glob(f"{_ASIDE}*"):
        path = folder / aside.name.removeprefix(_ASIDE)
        if path.exists():
            replaced.append(aside)
        else:
            with suppress(OSError):  # the disk takes no change now: it stays aside, and whole
                aside.rename(path)
    return replaced


def _write(folder: Path, snapshot: Snapshot) -> None:
    write_json(folder / STATE, snapshot.state)
    for group, tensors in snapshot.tensors.items():
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / f"{group}.safetensors",
        )
        sync(folder / f"{group}.safetensors")

    # Last, since it lists all the others.
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())
    }
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def _check_file(path: Path, name: str, expected: dict[str, Any], verify: bool) -> None:
    """``DamagedCheckpoint`` if a file is not there as it was written.

    Its size is always compared, its hash only under ``verify``.
    """
    file = path / name
    if not file.is_file():
        raise _damage(path, f"{name} is missing")
    if file.stat().st_size != expected["bytes"]:
        raise _damage(path, f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}")
    if verify and sha256(file) != expected["sha256"]:
        raise _damage(path, f"the content of {name} does not match its SHA-256")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not os.path.isdir(path):
        raise TrainError(
            f"no checkpoint at {path}; expected a folder like checkpoints/step-00000300"
        )
    try:
        value = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (
            "is missing" if isinstance(error, FileNotFoundError) else "is cut off or not readable"
        )
        raise _damage(path, f"{name} {reason}") from error

    # Valid JSON of another shape is as damaged as none.
    if not isinstance(value, dict):
        raise _damage(path, f"{name} is not what was written")
    return value


def _damage(path: Path, reason: str) -> TrainError:
    others = [p for p in newest_first(path.parent) if p != path]
    advice = (
        f"go on from another with --resume-from, e.g. {others[0]}"
        if others
        else "no other checkpoint is left; start again"
    )
    return DamagedCheckpoint(f"checkpoint {path} is damaged: {reason}; {advice}")


class DamagedCheckpoint(TrainError):
    """Files of a checkpoint are not what was written; ``--resume`` then takes the one before it."""
