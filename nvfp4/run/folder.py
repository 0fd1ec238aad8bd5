"""The run folder: what is in it, whether a run may start there, and the checkpoint it goes on from."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from nvfp4.run import checkpoint, log
from nvfp4.run.checkpoint import DamagedCheckpoint, Snapshot
from nvfp4.run.errors import TrainError
from nvfp4.run.files import write_json, write_text
from nvfp4.train.config import PretrainConfig, differences, lasting, to_yaml


class RunFolder:
    """Paths below ``out``.

    bound: fields that are free on resume as a rule and not in this run, since it learns from what they say.
    """

    bound: frozenset[str] = frozenset()

    def __init__(self, out: str) -> None:
        self.root = Path(out).expanduser()
        self.config = self.root / "config.yaml"
        self.log = self.root / "log.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.export = self.root / "export"
        self.sample = self.root / "sample.txt"
        self.result = self.root / "result.json"

    def read_result(self) -> dict[str, Any] | None:
        """The result of a finished run, or None."""
        try:
            result = json.loads(self.result.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return result if isinstance(result, dict) and "config" in result else None

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the result; its presence says that the run is finished."""
        write_json(self.result, result)

    def clear(self) -> None:
        """Delete what a run has written, and nothing else that may lie in the folder.

        ``TrainError`` if something stays: a checkpoint of the earlier run would be taken for the newest of this one.
        """
        try:
            for path in (self.result, self.config, self.log, self.sample):
                path.unlink(missing_ok=True)
            for folder in (self.checkpoints, self.export):
                if folder.is_symlink():
                    folder.unlink()
                elif folder.exists():
                    shutil.rmtree(folder)
        except OSError as error:
            raise TrainError(
                f"overwrite: cannot delete {error.filename}: {error.strerror}; delete it or choose another --out"
            ) from error

    def lock(self) -> None:
        """Make the folder and keep it to this process until it ends; ``TrainError`` if another one trains in it.

        The lock is the kernel's and ends with the process, however that ends; what the file says is for people.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = open(self.root / ".lock", "a+")  # noqa: SIM115 - held open as long as the run lives
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                who = lock.read(200).strip()
                lock.close()
                raise TrainError(
                    f"out: another process{f' ({who})' if who else ''} is training in {self.root}; wait for it, "
                    f"stop it, or choose another --out"
                ) from None
            self._lock = lock
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}\n")
            lock.flush()
        except OSError as error:
            raise TrainError(f"out: cannot write in {self.root}: {error.strerror}; choose another --out") from error

    def release(self) -> None:
        """Let others train here, before this process ends."""
        lock = vars(self).pop("_lock", None)
        if lock is not None:
            lock.close()

    def open(self, config: PretrainConfig, corpus_sha256: str) -> tuple[tuple[Path, Snapshot] | None, list[str]]:
        """Make the folder ready; returns the checkpoint to go on from (None: from the start) and notes for the user.

        ``TrainError`` if another run's files are in the way, or if the checkpoint is damaged, of another config or of
        another corpus. Afterwards the log ends at the snapshot's step and config.yaml holds ``config``.
        """
        self.lock()
        if config.overwrite:
            self.clear()
        self.refuse_earlier(config)
        found, notes = self._find(config)
        if found is not None:
            _check_fits(found[1], config, corpus_sha256, self.bound)
            self._check_log(found[1].state["step"])
        write_text(self.config, to_yaml(lasting(config)))
        try:
            self.result.unlink(missing_ok=True)
        except OSError as error:
            raise TrainError(f"out: cannot delete {self.result}: {error.strerror}") from error
        log.cut(self.log, -1 if found is None else found[1].state["step"])
        return found, notes

    def refuse_earlier(self, config: PretrainConfig) -> None:
        """``TrainError`` if another run's files are in the way of this config."""
        present = [p.name for p in (self.config, self.log, self.checkpoints, self.result) if p.exists()]
        if present and not (config.overwrite or config.resume or config.resume_from is not None):
            raise TrainError(
                f"out: {self.root} holds an earlier run ({', '.join(present)}); give --resume to go on with it, "
                f"--overwrite to delete it, or another --out"
            )

    def _check_log(self, step: int) -> None:
        """``TrainError`` if the log has no row of the checkpoint's step, which it had when that was saved."""
        rows = log.read(self.log)
        if not any(row["step"] == step for row in rows):
            last = f"ends at step {rows[-1]['step']}" if rows else "is missing or empty"
            raise TrainError(
                f"out: {self.log} {last}, the checkpoint is of step {step}: the log is damaged; restore it or start "
                f"again with --overwrite"
            )

    def _find(self, config: PretrainConfig) -> tuple[tuple[Path, Snapshot] | None, list[str]]:
        if config.resume_from is not None:
            path = Path(config.resume_from).expanduser()
            snapshot = checkpoint.load(path)
            self._take_over(path, config)
            return (path, snapshot), [f"resuming from {path}"]
        notes: list[str] = []
        paths = checkpoint.newest_first(self.checkpoints) if config.resume else []
        for path in paths:
            try:
                return (path, checkpoint.load(path)), [*notes, f"resuming from {path}"]
            except DamagedCheckpoint as error:
                notes.append(f"{error}; trying the one before")
        if paths:
            raise TrainError(f"{notes[0]}. All {len(paths)} checkpoints are damaged; start again with --overwrite")
        return None, ["no checkpoint yet: starting from the beginning"] if config.resume else []

    def _take_over(self, path: Path, config: PretrainConfig) -> None:
        """Go on from a named checkpoint: of this run, or of another, whose log is then copied to a new folder."""
        source = path.resolve().parent.parent
        if source != self.root.resolve():
            if self.checkpoints.exists() or self.log.exists():
                raise TrainError(f"out: {self.root} holds another run than {path}; choose a new --out")
            if (source / self.log.name).exists():
                write_text(self.log, (source / self.log.name).read_text(encoding="utf-8"))
        elif config.allow_changes and any(p.name > path.name for p in checkpoint.newest_first(self.checkpoints)):
            raise TrainError(
                f"allow_changes: {self.root} has checkpoints after {path.name} that would not fit; choose a new --out"
            )


def _check_fits(snapshot: Snapshot, config: PretrainConfig, corpus_sha256: str, bound: frozenset[str]) -> None:
    differing = differences(snapshot.state["config"], config, bound)
    if differing:
        raise TrainError(
            f"the checkpoint is of another config: {'; '.join(differing)}; give the saved values, choose another "
            f"--out, or name the fields in --allow-changes"
        )
    saved = snapshot.state["corpus_sha256"]
    if saved != corpus_sha256 and "data" not in config.allow_changes:
        raise TrainError(
            f"data: the files have changed since the checkpoint: corpus sha256 {saved}, now {corpus_sha256}; "
            f"restore them, start a new run, or give --allow-changes data"
        )
