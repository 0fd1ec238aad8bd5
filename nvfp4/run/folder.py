"""The run folder: what is in it, whether a run may start there, and the checkpoint it goes on from.

    config.yaml   the resolved config, which --config reads back
    log.jsonl     a row per step
    checkpoints/  the newest ``keep``, see checkpoint.py
    export/       a Hugging Face model
    result.json   written last: its presence says that the run is finished
    .lock         held by the process that trains here

``open`` is the one way in. First it refuses what would mix two runs: another process, another run's
files, a checkpoint of another config, other data, a log that has lost rows. Then the folder is this
run's: config.yaml is written, an old result removed, the logs are cut back to the checkpoint's
step.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from nvfp4.run import checkpoint, log
from nvfp4.run.checkpoint import DamagedCheckpoint, Snapshot
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import differences, read_config_file, saved_config, to_yaml
from nvfp4.run.files import write_json, write_text
from nvfp4.run.options import ResumableConfig

ResumePoint = tuple[Path, Snapshot] | None
"""Where a run begins: the folder of a checkpoint and what it holds; None: at the start."""


class RunFolder:
    """Paths below ``out``.

    logs: JSON lines with a step each, cut back to the checkpoint when a run resumes; the first has
    a row per step. renamed: fields of earlier versions that a run cannot go on with, and what to
    give instead. data_field: the option that names the text or the problems.
    """

    data_field: ClassVar[str] = "data"
    renamed: ClassVar[dict[str, str]] = {}

    def __init__(self, out: str) -> None:
        self.root = Path(out).expanduser()
        self.config = self.root / "config.yaml"
        self.log = self.root / "log.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.export = self.root / "export"
        self.sample = self.root / "sample.txt"
        self.result = self.root / "result.json"
        self.logs: tuple[Path, ...] = (self.log,)
        self.pictures: tuple[Path, ...] = ()

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

        ``TrainError`` if something stays: a checkpoint of the earlier run would be taken for the
        newest of this one.
        """

        # A link goes and its target stays: --out may point to a larger disk.
        try:
            for path in (self.result, self.config, self.sample, *self.pictures, *self.logs):
                path.unlink(missing_ok=True)
            for folder in (self.checkpoints, self.export):
                if folder.is_symlink():
                    folder.unlink()
                elif folder.exists():
                    shutil.rmtree(folder)
        except OSError as error:
            raise TrainError(
                f"overwrite: cannot delete {error.filename}: {error.strerror}; delete it or "
                "choose another --out"
            ) from error

    def lock(self) -> None:
        """Make the folder and keep it to this process; ``TrainError`` if another one trains in it.

        The lock is the kernel's and ends with the process, even by kill -9; what the file says is
        for people. A second call does nothing.
        """
        if "_lock" in vars(self):
            return
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
                    f"out: another process{f' ({who})' if who else ''} is training in "
                    f"{self.root}; wait for it, "
                    f"stop it, or choose another --out"
                ) from None

            # Closing the file would give the lock up, so it is kept open with the folder.
            self._lock = lock
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()}\n")
            lock.flush()
        except OSError as error:
            raise TrainError(
                f"out: cannot write in {self.root}: {error.strerror}; choose another --out"
            ) from error

    def release(self) -> None:
        """Let others train here, before this process ends."""
        lock = vars(self).pop("_lock", None)
        if lock is not None:
            lock.close()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock within this context."""
        self.lock()
        try:
            yield
        finally:
            self.release()

    def open(
        self, config: ResumableConfig, data_sha256: str, bound: frozenset[str] = frozenset()
    ) -> tuple[ResumePoint, list[str]]:
        """Make the folder ready; returns the checkpoint to go on from and notes for the user.

        The checkpoint is None where the run begins at the start. data_sha256: of the text or the
        problems. bound: fields that are free on resume as a rule and not in this run, because it
        learns from what they say. ``TrainError`` if another run's files are in the way, or if the
        checkpoint is damaged, of another config or of other data. Afterwards the logs end at the
        snapshot's step and config.yaml holds ``config``.
        """
        self.lock()

        # Refuse what would mix two runs.
        if config.overwrite:
            self.clear()
        self.refuse_earlier(config)
        self._refuse_renamed(config)

        # -1 cuts row 0 too: a run from the start writes it anew.
        start, notes = self._find(config)
        step = -1 if start is None else start[1].state["step"]
        if start is not None:
            self._check_fits(start[1], config, data_sha256, bound)
            if config.resume_from is not None:
                self._take_over(start[0], config, step)
            self._check_log(self.log, step)

        # From here on it is this run's.
        write_text(self.config, to_yaml(saved_config(config)))
        try:
            self.result.unlink(missing_ok=True)
        except OSError as error:
            raise TrainError(f"out: cannot delete {self.result}: {error.strerror}") from error
        for path in self.logs:
            log.cut(path, step)
        return start, notes

    def refuse_earlier(self, config: ResumableConfig) -> None:
        """``TrainError`` if another run's files are in the way of this config."""
        present = [
            p.name for p in (self.config, self.log, self.checkpoints, self.result) if p.exists()
        ]
        if present and not (config.overwrite or config.resume or config.resume_from is not None):
            raise TrainError(
                f"out: {self.root} holds an earlier run ({', '.join(present)}); give --resume to "
                "go on with it, "
                f"--overwrite to delete it, or another --out"
            )

    def _refuse_renamed(self, config: ResumableConfig) -> None:
        """``TrainError`` for resuming a run of an earlier version by an option that is gone."""
        if not (self.renamed and (config.resume or config.resume_from) and self.config.exists()):
            return
        for name in self.renamed.keys() & read_config_file(self.config).keys():
            raise TrainError(
                f"resume: {self.config} is of an earlier version, whose {name} is no longer an "
                "option: "
                f"{self.renamed[name]}; finish it with that version, or start again with "
                "--overwrite"
            )

    def _check_fits(
        self, snapshot: Snapshot, config: ResumableConfig, data_sha256: str, bound: frozenset[str]
    ) -> None:
        """``TrainError`` for a checkpoint of another config or of other data.

        Either would go on without a word and end as a run that nobody can repeat.
        """
        differing = differences(snapshot.state["config"], config, bound)
        if differing:
            raise TrainError(
                f"the checkpoint is of another config: {'; '.join(differing)}; give the saved "
                "values, choose another "
                f"--out, or name the fields in --allow-changes"
            )

        # --allow-changes data says: the text may have changed.
        saved, field = snapshot.state["corpus_sha256"], self.data_field
        if saved != data_sha256 and field not in config.allow_changes:
            raise TrainError(
                f"{field}: the files have changed since the checkpoint: corpus sha256 {saved}, "
                f"now {data_sha256}; "
                f"restore them, start a new run, or give --allow-changes {field}"
            )

    def _check_log(self, path: Path, step: int) -> None:
        """``TrainError`` if this log lacks the row of the checkpoint's step.

        It had it when the checkpoint was saved, so somebody has cut or replaced the file.
        """
        rows = log.read(path)
        if not any(row["step"] == step for row in rows):
            last = f"ends at step {rows[-1]['step']}" if rows else "is missing or empty"
            raise TrainError(
                f"out: {path} {last}, the checkpoint is of step {step}: the log is damaged; "
                "restore it or start "
                f"again with --overwrite"
            )

    def _find(self, config: ResumableConfig) -> tuple[ResumePoint, list[str]]:
        if config.resume_from is not None:
            path = Path(config.resume_from).expanduser()
            return (path, checkpoint.load(path)), [f"resuming from {path}"]

        # The newest that is whole; a damaged one is named and passed over.
        notes: list[str] = []
        paths = checkpoint.newest_first(self.checkpoints) if config.resume else []
        for path in paths:
            try:
                return (path, checkpoint.load(path)), [*notes, f"resuming from {path}"]
            except DamagedCheckpoint as error:
                notes.append(f"{error}; trying the one before")
        if paths:
            raise TrainError(
                f"{notes[0]}. All {len(paths)} checkpoints are damaged; start again with "
                "--overwrite"
            )
        return None, ["no checkpoint yet: starting from the beginning"] if config.resume else []

    def _take_over(self, path: Path, config: ResumableConfig, step: int) -> None:
        """Go on from a named checkpoint, of this run or of another one.

        Another run's log is copied once it is known to reach ``step``, so that the new folder tells
        the whole story.
        """
        source = path.resolve().parent.parent
        if source != self.root.resolve():
            if self.checkpoints.exists() or self.log.exists():
                raise TrainError(
                    f"out: {self.root} holds another run than {path}; choose a new --out"
                )
            self._check_log(source / self.log.name, step)
            write_text(self.log, (source / self.log.name).read_text(encoding="utf-8"))
        elif config.allow_changes and any(
            p.name > path.name for p in checkpoint.newest_first(self.checkpoints)
        ):
            # a later --resume would find those first, and they are of the config before
            raise TrainError(
                f"allow_changes: {self.root} has checkpoints after {path.name} that would not "
                "fit; choose a new --out"
            )
