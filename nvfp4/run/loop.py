"""The loop of every training: steps are counted, logged, saved, stopped and resumed.

    begin      refuse what cannot be; build the run; open its folder; put the checkpoint back
    row 0      the figures before the first step
    each step  training.step -> log.jsonl -> a line for people -> checkpoint, if due or signalled
    end        training.finish scores, exports and writes result.json

A ``Training`` says what a step is. A step is a function of (weights, optimiser, random states, the
training's own state, number of the step), and a checkpoint holds all of these: a run that was
stopped, killed or moved repeats the uninterrupted one to the last bit. Hence no step may ask the
clock or a global counter for anything but a figure in the log.

Pretraining (``train/``), reinforcement learning and its supervised warm start (``rl/``) are
trainings; a new one is a subclass with ``step`` and ``finish``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from nvfp4.run import checkpoint, state
from nvfp4.run.checkpoint import Snapshot
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import saved_fields, to_yaml
from nvfp4.run.folder import RunFolder
from nvfp4.run.log import Log, Row
from nvfp4.run.options import ResumableConfig
from nvfp4.run.parts import RunParts
from nvfp4.run.processes import (
    deterministic,
    machine,
    other_machine,
    process_group,
    signal_of_any,
    stop_together,
)
from nvfp4.run.signals import StopWish
from nvfp4.run.state import Tensors

Config = TypeVar("Config", bound=ResumableConfig)


class Training(ABC):
    """What is trained: a step, and what it remembers beside weights, optimiser and random states.

    command: of ``nvfp4``, for advice. unit: what messages call several steps. data_sha256: of the
    text or the problems; a checkpoint of others is refused. bound: fields of the config that are
    free on resume as a rule and not here.
    """

    command: ClassVar[str]
    unit: ClassVar[str] = "updates"
    data_sha256 = ""
    bound: frozenset[str] = frozenset()

    def __init__(self, run: RunParts) -> None:
        self.run = run

    @abstractmethod
    def step(self, step: int) -> Row:
        """Train; step: 0 for the first. Returns the figures of the step, a row of log.jsonl.

        ``skipped`` is required: whether a loss or a gradient was not finite.
        """

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """What is done after the last step: score, export, result.json.

        Returns the content of result.json; {} in other processes than the main one.
        """

    def first_row(self) -> Row:
        """Figures before the first step."""
        return {}

    def remarks(self) -> list[str]:
        """Lines for people at the start, after the config."""
        return []

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {}

    def tensors(self) -> dict[str, Tensors]:
        """Groups of tensors for the checkpoint; asked in the main process only."""
        return {}

    def load(self, snapshot: Snapshot) -> None:  # noqa: B027 - a training without a state ignores it
        """Put ``state`` and ``tensors`` back; the rest of the snapshot is where it belongs."""

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Called once after the last step, however that ended."""

    def stop_message(self, step: int) -> str:
        """What ``Interrupted`` says after a signal."""
        return (
            f"stopped at step {step}, checkpoint saved; go on with: nvfp4 {self.command} --config "
            f"{self.run.folder.config} --resume"
        )

    def cure(self) -> str:
        """What helps where losses are no numbers."""
        return (
            f"lower --lr or --clip and go on from a checkpoint in {self.run.folder.checkpoints}: "
            f"--resume-from ... --allow-changes lr clip"
        )


def train(
    config: Config,
    begin: Callable[[Config], Training],
    summary: Callable[[dict[str, Any]], str],
    out_of_memory: str,
) -> dict[str, Any]:
    """Train as the resolved config says and return what result.json holds.

    Under torchrun, one process of several. begin: builds the training and what it needs; touches no
    file of an earlier run. summary: one line of a result. out_of_memory: what to lower then. With
    ``resume`` a finished run of the same config is returned as it is. Raises ``TrainError`` for
    what the user can put right, and ``Interrupted`` after a SIGINT, SIGTERM or SIGHUP was obeyed.
    """
    done = RunFolder(config.out).read_result() if config.resume else None
    if done is not None and done["config"] == saved_fields(config):
        print(f"{config.out} is finished: {summary(done)}")
        return done

    # ``begin`` refuses what it can before any file is touched; ``Loop`` then opens the folder.
    with deterministic(config.deterministic), process_group():
        training = None
        try:
            training = begin(config)
            for line in (to_yaml(config).rstrip(), *training.remarks()):
                training.run.report.say(line)
            loop = Loop(training)
            training.run.report.say(_size(training.run))
            loop.run()
            return training.finish()
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"out of memory: {str(error).splitlines()[0]}; {out_of_memory}"
            ) from error
        finally:
            if training is not None:
                # not left to the end of the process: a notebook keeps the last traceback, that
                # keeps the run, and the run its lock
                training.run.folder.release()


class Loop:
    """Counts the steps of a training and does between them what is due. Opens the run's folder."""

    def __init__(self, training: Training) -> None:
        self.training, self.parts, self.config = training, training.run, training.run.config
        self.step = self.bad_in_a_row = 0
        snapshot = self._open_folder()
        if snapshot is not None:
            self._restore(snapshot)
        if self.parts.accelerator.is_main_process:
            self.parts.logs = [Log(path) for path in self.parts.folder.logs]

    def run(self) -> int:
        """Do the steps that are left; ``Interrupted`` after a signal before the last one.

        Returns the number of a signal that came during the last step, else 0.
        """
        run, config = self.parts, self.config
        run.report.start(self.step)
        try:
            with StopWish() as wish:
                if self.step == 0:
                    self._write({"step": 0, **self.training.first_row()})
                while self.step < config.steps:
                    self.one_step()

                    # A signal may reach one process alone, but saving needs all of them.
                    signal_number = signal_of_any(run.accelerator, wish.received)
                    if signal_number or due(self.step, config.save_every, config.steps):
                        self._save()
                    if signal_number and self.step < config.steps:
                        raise Interrupted(signal_number, self.training.stop_message(self.step))
        finally:
            run.report.close()
            self.training.close()
            for file in run.logs:
                file.close()
        return wish.received

    def one_step(self) -> None:
        """Train, log and show a step; ``TrainError`` after too many in a row that were skipped."""
        row: Row = {"step": self.step + 1, **self.training.step(self.step)}
        self.step += 1
        self._write(row)
        self.parts.report.step(row)

        # One bad step was skipped and does no harm; many in a row mean that the weights are lost.
        self.bad_in_a_row = self.bad_in_a_row + 1 if row["skipped"] else 0
        if self.bad_in_a_row >= self.config.max_bad_steps:
            raise TrainError(
                f"loss or gradient was NaN or Inf in {self.bad_in_a_row} {self.training.unit} in "
                "a row, up to step "
                f"{self.step}; {self.training.cure()}"
            )

    def _open_folder(self) -> Snapshot | None:
        """Make the run folder ready and give every process the snapshot to go on from, or None.

        The main process decides and reads; the others get the path of the checkpoint from it.
        """
        run = self.parts
        path: list[Any] = [None]
        snapshot = None
        with stop_together(run.accelerator):
            if run.accelerator.is_main_process:
                start, notes = run.folder.open(
                    self.config, self.training.data_sha256, self.training.bound
                )
                for note in notes:
                    run.report.say(note)
                if start is not None:
                    path, snapshot = [start[0]], start[1]
        if run.accelerator.num_processes > 1:
            path = broadcast_object_list(path)
            if path[0] is not None and snapshot is None:
                # the main process has read every byte
                snapshot = checkpoint.load(path[0], verify=False)
        return snapshot

    def _restore(self, snapshot: Snapshot) -> None:
        run, saved = self.parts, snapshot.state
        state.restore(snapshot, run.model, run.optimizer, run.accelerator)
        self.step, self.bad_in_a_row = saved["step"], saved.get("bad_in_a_row", 0)
        self.training.load(snapshot)
        for note in other_machine(saved.get("machine", {}), machine(run.accelerator)):
            run.report.say(note)

    def _write(self, row: Row) -> None:
        for name, value in row.items():
            row[name] = finite(value)
        if self.parts.logs:
            self.parts.logs[0].write(row)

    def _save(self) -> None:
        run = self.parts
        plain = {
            "step": self.step,
            "bad_in_a_row": self.bad_in_a_row,
            **self.training.state(),
            "config": saved_fields(self.config),
            "corpus_sha256": self.training.data_sha256,
            "machine": machine(run.accelerator),
        }
        snapshot = state.capture(run.model, run.optimizer, run.accelerator, plain)
        with stop_together(run.accelerator):
            if run.accelerator.is_main_process:
                snapshot.tensors.update(self.training.tensors())
                for file in run.logs:
                    file.flush()  # no checkpoint is ahead of the logs
                checkpoint.save(run.folder.checkpoints, snapshot, self.config.keep)


def due(step: int, every: int, steps: int) -> bool:
    """Whether a thing is due after ``step``: every so many steps (0: never), and at the end."""
    return step == steps or (every > 0 and step % every == 0)


def finite(value: Any) -> Any:
    """NaN and Inf as None, which JSON has."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _size(run: RunParts) -> str:
    parameters, processes = (
        sum(p.numel() for p in run.model.parameters()),
        run.accelerator.num_processes,
    )
    return f"model: {parameters:,} parameters on {run.accelerator.device}, {processes} process(es)"
