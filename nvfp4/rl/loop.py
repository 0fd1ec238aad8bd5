"""The loop of reinforcement learning: each step is a function of the state; around it, what watches, saves, reports."""

from __future__ import annotations

import time
from typing import Any

import torch

from nvfp4.rl.collect import Collected, collect
from nvfp4.rl.config import RLConfig, remarks, resolve
from nvfp4.rl.evaluate import evaluate
from nvfp4.rl.finish import finish, summary
from nvfp4.rl.folder import RLFolder
from nvfp4.rl.learn import learn
from nvfp4.rl.meter import codes_changed, weight_codes
from nvfp4.rl.metrics import step_row
from nvfp4.rl.objectives.base import RESET_REFERENCE
from nvfp4.rl.setup import Run, open_folder, prepare
from nvfp4.run import checkpoint, state
from nvfp4.run.checkpoint import Snapshot
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import saved_fields, to_yaml
from nvfp4.run.log import Log, Row
from nvfp4.run.optim import learning_rates
from nvfp4.run.processes import agreed
from nvfp4.run.progress import memory_gib
from nvfp4.run.signals import StopWish
from nvfp4.train.loop import deterministic, machine, other_machine, process_group


def rl(config: RLConfig) -> dict[str, Any]:
    """Train as the config says and return what result.json holds; under torchrun, one process of several.

    With ``resume`` a finished run of the same config is returned as it is. Raises ``TrainError`` for what the user can
    put right, and ``Interrupted`` after a SIGINT or SIGTERM was obeyed.
    """
    config = resolve(config)
    done = RLFolder(config.out).read_result() if config.resume else None
    if done is not None and done["config"] == saved_fields(config):
        print(f"{config.out} is finished: {summary(done)}")
        return done
    with deterministic(config.deterministic), process_group():
        run = prepare(config)
        try:
            return Loop(run).run()
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"out of memory: {str(error).splitlines()[0]}; lower --micro-batch or --rollout-rows; "
                f"to go on from a checkpoint: --resume --allow-changes micro_batch"
            ) from error
        finally:
            run.folder.release()


class Loop:
    """Counts the steps of a run and does between them what is due."""

    def __init__(self, run: Run) -> None:
        self.prepared, self.config = run, run.config
        self.learning_rate = learning_rates(run.config)
        self.step = self.bad_in_a_row = self.tokens = 0
        self.before: dict[str, Any] | None = None
        run.report.say(to_yaml(run.config).rstrip())
        for remark in remarks(run.config):
            run.report.say(f"note: {remark}")
        snapshot = open_folder(run)
        if snapshot is not None:
            self._restore(snapshot)
        parameters = sum(p.numel() for p in run.model.parameters())
        device, processes = run.accelerator.device, run.accelerator.num_processes
        run.report.say(f"model: {parameters:,} parameters on {device}, {processes} process(es)")
        main = run.accelerator.is_main_process
        self.log = Log(run.folder.log) if main else None
        self.texts = Log(run.folder.completions) if main else None
        self.codes = weight_codes(run.model)

    def run(self) -> dict[str, Any]:
        """Do the steps that are left and finish; ``Interrupted`` if a signal came first."""
        report, config = self.prepared.report, self.config
        report.start(self.step)
        try:
            with StopWish() as wish:
                if self.step == 0:
                    self._write({"step": 0, **self._evaluation()})
                while self.step < config.steps:
                    self._one_step()
                    signal_number = agreed(self.prepared.accelerator, wish.received)
                    if signal_number or self._due(config.save_every):
                        self._save()
                    if signal_number and self.step < config.steps:
                        how = f"go on with: nvfp4 rl --config {self.prepared.folder.config} --resume"
                        raise Interrupted(signal_number, f"stopped at step {self.step}, checkpoint saved; {how}")
        finally:
            report.close()
            self.prepared.task.close()
            for file in (self.log, self.texts):
                if file is not None:
                    file.close()
        return finish(self.prepared)

    def _one_step(self) -> None:
        run, config = self.prepared, self.config
        began = time.perf_counter()
        collected = collect(run, self.step)
        drawn = time.perf_counter()
        check = config.check_every > 0 and self.step % config.check_every == 0
        lr = self.learning_rate(self.step)
        learned = learn(run, collected.samples, collected.sampling.scale, lr, check)
        row: Row = {"step": self.step + 1, **step_row(run, collected, learned), "lr": lr}
        after = weight_codes(run.model)
        row["fp4/codes_changed"], self.codes = codes_changed(self.codes, after), after
        seconds = time.perf_counter() - began
        self.step += 1
        self.tokens += row["num_tokens"]
        row |= {"total_tokens": self.tokens, "tokens_per_s": row["num_tokens"] / seconds}
        row |= {"step_time": seconds, "rollout_time": drawn - began, "memory_gib": memory_gib(run.accelerator.device)}
        if config.eval_every and self.step % config.eval_every == 0 and self.step < config.steps:
            row |= self._evaluation()
        if RESET_REFERENCE in run.objective.observe({k: v for k, v in row.items() if isinstance(v, float)}):
            self._reset_reference()
            row["reference_reset"] = True
        row = {name: _finite(value) for name, value in row.items()}
        self._write(row)
        self._show(collected)
        run.report.step(row)
        self.bad_in_a_row = self.bad_in_a_row + 1 if row["skipped"] else 0
        if self.bad_in_a_row >= config.max_bad_steps:
            raise TrainError(
                f"loss or gradient was NaN or Inf in {self.bad_in_a_row} steps in a row, up to step {self.step}; "
                f"lower --lr or --clip and go on from a checkpoint in {run.folder.checkpoints}: "
                f"--resume-from ... --allow-changes lr clip"
            )

    def _reset_reference(self) -> None:
        """The policy becomes the reference, and the optimiser forgets (arXiv 2505.24864)."""
        run = self.prepared
        if run.reference is not None:
            run.reference.load_state_dict(run.model.state_dict())
        run.optimizer.state.clear()

    def _evaluation(self) -> Row:
        row, shown = evaluate(self.prepared)
        if self.before is None:
            self.before = row
        if self.texts is not None:
            for each in shown:
                self.texts.write({"step": self.step, "evaluation": True, **each})
        return dict(row)

    def _show(self, collected: Collected) -> None:
        """The first completions of the step, and the first for each reason why a reward failed, for people."""
        if self.texts is None:
            return
        samples, reasons = collected.samples, collected.reasons
        first = {reason: i for i, reason in reversed(list(enumerate(reasons))) if reason is not None}
        count = min(self.config.log_completions, len(samples))
        for i in sorted({*range(count), *(first.values() if count else ())}):
            problem = collected.problems[i]
            row = {"prompt": problem.prompt, "answer": problem.answer, "completion": collected.texts[i]}
            row |= {"reward": _finite(float(samples.rewards[i]))} | ({"reason": reasons[i]} if reasons[i] else {})
            self.texts.write({"step": self.step, **row})

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
            "tokens": self.tokens,
            "objective": run.objective.state_dict(),
            "config": saved_fields(self.config),
            "corpus_sha256": getattr(run.task, "sha256", ""),
            "machine": machine(run.accelerator),
        }
        snapshot = state.capture(run.model, run.optimizer, run.accelerator, plain)
        if run.reference is not None and run.accelerator.is_main_process:
            weights = {name: tensor.detach().cpu() for name, tensor in run.reference.named_parameters()}
            snapshot.tensors["reference"] = weights
        for file in (self.log, self.texts):
            if file is not None:
                file.flush()  # no checkpoint is ahead of the logs
        if run.accelerator.is_main_process:
            checkpoint.save(run.folder.checkpoints, snapshot, self.config.keep)
        run.accelerator.wait_for_everyone()

    def _restore(self, snapshot: Snapshot) -> None:
        run = self.prepared
        state.restore(snapshot, run.model, run.optimizer, run.accelerator)
        saved = snapshot.state
        self.step, self.bad_in_a_row, self.tokens = saved["step"], saved["bad_in_a_row"], saved["tokens"]
        run.objective.load_state_dict(saved["objective"])
        if run.reference is not None:
            if "reference" not in snapshot.tensors:
                raise TrainError("track_kl: the checkpoint has no reference model; start again with --overwrite")
            with torch.no_grad():
                for name, parameter in run.reference.named_parameters():
                    parameter.copy_(snapshot.tensors["reference"][name])
        for note in other_machine(saved["machine"], machine(run.accelerator)):
            run.report.say(note)


def _finite(value: Any) -> Any:
    """NaN and Inf as None, which JSON has."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
