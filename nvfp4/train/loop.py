"""The training loop: each step is a function of the state; what is around it watches, saves and reports."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from nvfp4.run import checkpoint, state
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import saved_fields, to_yaml
from nvfp4.run.folder import RunFolder
from nvfp4.run.log import Log, Row
from nvfp4.run.optim import learning_rates
from nvfp4.run.processes import agreed
from nvfp4.run.progress import memory_gib
from nvfp4.run.signals import StopWish
from nvfp4.train.config import PretrainConfig, resolve
from nvfp4.train.evaluate import evaluate
from nvfp4.train.finish import finish, summary
from nvfp4.train.setup import Run, open_folder, prepare
from nvfp4.train.step import update


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train as the config says and return what result.json holds; under torchrun, one process of several.

    With ``resume`` a finished run of the same config is returned as it is. Raises ``TrainError`` for what the user can
    put right, and ``Interrupted`` after a SIGINT or SIGTERM was obeyed.
    """
    config = resolve(config)
    done = RunFolder(config.out).read_result() if config.resume else None
    if done is not None and done["config"] == saved_fields(config):
        print(f"{config.out} is finished: {summary(done)}")
        return done
    with deterministic(config.deterministic), process_group():
        run = None
        try:
            run = prepare(config)
            return Loop(run).run()
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"out of memory: {str(error).splitlines()[0]}; lower --micro-batch or --seq-len, or give --recompute; "
                f"to go on from a checkpoint: --resume --allow-changes micro_batch recompute"
            ) from error
        except Exception as error:
            if config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = str(error).strip().splitlines()[0]
                raise TrainError(f"compile: torch.compile failed here ({reason}); run with --no-compile") from error
            raise
        finally:
            if run is not None:
                run.folder.release()  # a traceback, which a notebook keeps, keeps the run


class Loop:
    """Counts the steps of a run and does between them what is due."""

    def __init__(self, run: Run) -> None:
        self.prepared, self.config = run, run.config
        self.learning_rate = learning_rates(run.config)
        self.step = self.bad_in_a_row = 0
        run.report.say(to_yaml(run.config).rstrip())
        run.report.say(str(run.corpus))
        snapshot = open_folder(run)
        if snapshot is not None:
            state.restore(snapshot, run.model, run.optimizer, run.accelerator)
            self.step, self.bad_in_a_row = snapshot.state["step"], snapshot.state["bad_in_a_row"]
            for note in other_machine(snapshot.state["machine"], machine(run.accelerator)):
                run.report.say(note)
        parameters = sum(p.numel() for p in run.model.parameters())
        run.report.say(
            f"model: {parameters:,} parameters on {run.accelerator.device}, {run.accelerator.num_processes} process(es)"
        )
        self.log = Log(run.folder.log) if run.accelerator.is_main_process else None

    def run(self) -> dict[str, Any]:
        """Do the steps that are left and finish; ``Interrupted`` if a signal came first."""
        report = self.prepared.report
        report.start(self.step)
        try:
            with StopWish() as wish:
                if self.step == 0:
                    self._write({"step": 0, **self._validation()})
                while self.step < self.config.steps:
                    self._one_step()
                    signal_number = agreed(self.prepared.accelerator, wish.received)
                    if signal_number or self._due(self.config.save_every):
                        self._save()
                    if signal_number and self.step < self.config.steps:
                        raise Interrupted(
                            signal_number, f"stopped at step {self.step}, checkpoint saved; {self._how_to_resume()}"
                        )
        finally:
            report.close()
            if self.log is not None:
                self.log.close()
        return finish(self.prepared)

    def _one_step(self) -> None:
        run, config = self.prepared, self.config
        began = time.perf_counter()
        row: Row = {"step": self.step + 1, **update(run, self.step, self.learning_rate(self.step))}
        seconds = time.perf_counter() - began
        self.step += 1
        self.bad_in_a_row = self.bad_in_a_row + 1 if row["skipped"] else 0
        tokens = config.batch * config.seq_len
        row |= {"tokens": self.step * tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
        row["memory_gib"] = memory_gib(run.accelerator.device)
        if self._due(config.eval_every):
            row |= self._validation()
        self._write(row)
        run.report.step(row)
        if self.bad_in_a_row >= config.max_bad_steps:
            raise TrainError(
                f"loss or gradient was NaN or Inf in {self.bad_in_a_row} updates in a row, up to step {self.step}; "
                f"lower --lr or --clip and go on from a checkpoint in {run.folder.checkpoints}: "
                f"--resume-from ... --allow-changes lr clip"
            )

    def _validation(self) -> Row:
        run = self.prepared
        score = evaluate(run.model, run.held_out, run.eval_rows, run.autocast, run.accelerator)
        figures = {"val_loss": score.loss, "val_bpb": score.bits_per_byte}
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _write(self, row: Row) -> None:
        if self.log is not None:
            self.log.write(row)

    def _save(self) -> None:
        run = self.prepared
        plain = {
            "step": self.step,
            "bad_in_a_row": self.bad_in_a_row,
            "config": saved_fields(self.config),
            "corpus_sha256": run.corpus.sha256,
            "machine": machine(run.accelerator),
        }
        snapshot = state.capture(run.model, run.optimizer, run.accelerator, plain)
        if self.log is not None:
            self.log.flush()  # no checkpoint is ahead of the log
            checkpoint.save(run.folder.checkpoints, snapshot, self.config.keep)
        run.accelerator.wait_for_everyone()

    def _how_to_resume(self) -> str:
        return f"go on with: nvfp4 pretrain --config {self.prepared.folder.config} --resume"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic kernels within; a kernel that has no such form warns. The settings before come back afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to repeat itself
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, we never read it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


@contextmanager
def process_group() -> Iterator[None]:
    """Leave a process group that the run made itself, once all are done: its threads must end before Python does."""
    ours = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    yield
    if ours and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # else a later run in this process finds a dead group


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """What the last bits of a sum may depend on."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def other_machine(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """A note for the user if these differ, or nothing."""
    changed = [f"{key} {saved[key]}, now {present[key]}" for key in present if saved.get(key) != present[key]]
    if not changed:
        return []
    return [f"note: the checkpoint was written with {'; '.join(changed)}: the losses go on, but not to the last bit"]
