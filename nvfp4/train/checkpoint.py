"""Checkpoints: folders that appear whole or not at all, and that notice when a byte has changed.

checkpoints/step-00000300/
    manifest.json       format version; size and SHA-256 of every other file
    state.json          plain values: step, config, corpus, counters
    <name>.safetensors  one file for each group of tensors
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nvfp4.train.errors import TrainError
from nvfp4.train.files import sha256, sync, write_json

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_TEMPORARY = ".unfinished-"


@dataclass(frozen=True)
class Snapshot:
    """state: plain values for JSON, with ``step``; tensors: groups of named tensors, each name at most once."""

    state: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]


def save(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint under ``folder`` and delete all but the ``keep`` newest; returns its path.

    Everything is written under a temporary name, flushed to the disk and renamed last. ``TrainError`` if it cannot be
    written (a full disk, say): what was half-written is removed and the earlier checkpoints are as they were.
    """
    path = folder / f"step-{snapshot.state['step']:08d}"
    temporary = folder / f"{_TEMPORARY}{path.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(rest)
        temporary.mkdir()
        _write(temporary, snapshot)
        if path.exists():  # the same step again, after going back to an earlier checkpoint
            path.rename(folder / f"{_TEMPORARY}replaced")
        temporary.rename(path)
        sync(folder)
    except (OSError, SafetensorError, TrainError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        left = newest_first(folder)
        intact = f"the last good checkpoint is {left[0]}" if left else "no earlier checkpoint exists"
        raise TrainError(
            f"cannot write checkpoint {path}: {error}; {intact}; make room and go on with --resume"
        ) from error
    for old in [*folder.glob(f"{_TEMPORARY}*"), *newest_first(folder)[keep:]]:
        shutil.rmtree(old)
    return path


def load(path: Path) -> Snapshot:
    """Read a checkpoint and check every size and hash; ``TrainError`` names a file that is missing or changed."""
    manifest = _read_json(path, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise TrainError(
            f"checkpoint {path} has format {manifest.get('format')!r}, this version reads {FORMAT}; "
            f"use the version of nvfp4 that wrote it"
        )
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise _damaged(path, f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}")
        if sha256(file) != expected["sha256"]:
            raise _damaged(path, f"the content of {name} does not match its SHA-256")
    groups = [name for name in manifest["files"] if name.endswith(".safetensors")]
    return Snapshot(_read_json(path, STATE), {Path(name).stem: load_file(path / name) for name in groups})


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first; unfinished ones are not among them."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _write(folder: Path, snapshot: Snapshot) -> None:
    write_json(folder / STATE, snapshot.state)
    for group, tensors in snapshot.tensors.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{group}.safetensors")
        sync(folder / f"{group}.safetensors")
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not path.is_dir():
        raise TrainError(f"no checkpoint at {path}; expected a folder like checkpoints/step-00000300")
    try:
        return json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "is cut off or not readable"
        raise _damaged(path, f"{name} {reason}") from error


def _damaged(path: Path, reason: str) -> TrainError:
    others = [p for p in newest_first(path.parent) if p != path]
    advice = (
        f"go on from another with --resume-from, e.g. {others[0]}"
        if others
        else "no other checkpoint is left; start again"
    )
    return DamagedCheckpoint(f"checkpoint {path} is damaged: {reason}; {advice}")


class DamagedCheckpoint(TrainError):
    """A checkpoint whose files are not what was written; ``--resume`` then goes back to the one before."""
