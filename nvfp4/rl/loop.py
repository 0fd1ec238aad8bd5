"""Reinforcement learning as a training: a step is a rollout, its rewards and the updates on them.

    collect   prompts -> completions by the sampler -> rewards           (collect.py)
    learn     scores by the policy -> advantages -> minibatch updates    (learn.py)
    figures   rewards, lengths, entropy, mismatch, codes that changed    (metrics.py)
    observe   the objective sees them, and an evaluation where one is due

An objective may ask for a reset after a step: the policy then becomes its own reference, and the
optimiser forgets. What the loop cannot know of is saved here: tokens, the objective, the reference.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from nvfp4.rl.collect import Collected, collect
from nvfp4.rl.config import EVALUATION, RLConfig, remarks, resolve
from nvfp4.rl.evaluate import evaluate
from nvfp4.rl.finish import finish, summary
from nvfp4.rl.learn import learn
from nvfp4.rl.metrics import codes_changed, step_row, weight_codes
from nvfp4.rl.objectives.base import RESET_REFERENCE
from nvfp4.rl.parts import RLRun
from nvfp4.rl.setup import prepare
from nvfp4.run.checkpoint import Snapshot
from nvfp4.run.errors import TrainError
from nvfp4.run.log import Row
from nvfp4.run.loop import Training, finite, train
from nvfp4.run.optim import learning_rates
from nvfp4.run.progress import memory_gib
from nvfp4.run.state import Tensors

OUT_OF_MEMORY = (
    "lower --micro-batch or --rollout-rows; to go on from a checkpoint: --resume --allow-changes "
    "micro_batch"
)


def rl(config: RLConfig) -> dict[str, Any]:
    """Train as the config says and return what result.json holds.

    Under torchrun, one process of several. With ``resume`` a finished run of the same config is
    returned as it is. Raises ``TrainError`` for what the user can put right, and ``Interrupted``
    after a SIGINT, SIGTERM or SIGHUP was obeyed.
    """
    return train(
        resolve(config), lambda config: Reinforcement(prepare(config)), summary, OUT_OF_MEMORY
    )


class Reinforcement(Training):
    """Rewards of a task. Its own state: tokens drawn, the objective's, the reference model."""

    command = "rl"
    unit = "steps"
    run: RLRun

    def __init__(self, run: RLRun) -> None:
        super().__init__(run)
        self.data_sha256 = getattr(run.task, "sha256", "")
        self.bound = frozenset(EVALUATION if run.objective.reads_evaluations else ())
        self.learning_rate = learning_rates(run.config)
        self.tokens = 0
        self.codes: Any = None

    def remarks(self) -> list[str]:
        """What a user should know about the config."""
        return [f"note: {remark}" for remark in remarks(self.run.config)]

    def first_row(self) -> Row:
        """What the model can do before the first step."""
        return self._evaluation(0)

    def step(self, step: int) -> Row:
        """A rollout and the updates on it.

        step_time is that of both, with the figures, without an evaluation.
        """
        run, config = self.run, self.run.config
        if self.codes is None:
            self.codes = weight_codes(run.model)

        # Draw and reward, then learn.
        began = time.perf_counter()
        collected = collect(run, step)
        drawn = time.perf_counter()
        check = config.check_every > 0 and step % config.check_every == 0
        lr = self.learning_rate(step)
        learned = learn(run, collected.samples, collected.sampling.scale, lr, check)

        # The figures, and what the step has cost.
        row: Row = {**step_row(run, collected, learned), "lr": lr}
        after = weight_codes(run.model)
        row["fp4/codes_changed"], self.codes = codes_changed(self.codes, after), after
        seconds = time.perf_counter() - began
        self.tokens += row["num_tokens"]
        row |= {"total_tokens": self.tokens, "tokens_per_s": row["num_tokens"] / seconds}
        row |= {
            "step_time": seconds,
            "rollout_time": drawn - began,
            "memory_gib": memory_gib(run.accelerator.device),
        }

        # The objective learns from them, those of an evaluation included.
        if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < config.steps:
            row |= self._evaluation(step + 1)
        if RESET_REFERENCE in run.objective.observe(
            {k: v for k, v in row.items() if isinstance(v, float)}
        ):
            self._reset_reference()
            row["reference_reset"] = True
        self._keep_texts(collected, step + 1)
        return row

    def finish(self) -> dict[str, Any]:
        """Held-out score, picture, export, result.json."""
        return finish(self.run)

    def close(self) -> None:
        """No reward is wanted any more."""
        self.run.task.close()

    def state(self) -> dict[str, Any]:
        """What the loop does not know of."""
        return {"tokens": self.tokens, "objective": self.run.objective.state_dict()}

    def tensors(self) -> dict[str, Tensors]:
        """The reference model, which a reset makes another than that of the beginning."""
        reference = self.run.reference
        if reference is None:
            return {}
        return {
            "reference": {
                name: tensor.detach().cpu() for name, tensor in reference.named_parameters()
            }
        }

    def load(self, snapshot: Snapshot) -> None:
        """Put ``state`` and ``tensors`` back."""
        run = self.run
        self.tokens = snapshot.state["tokens"]
        run.objective.load_state_dict(snapshot.state["objective"])
        if run.reference is None:
            return
        if "reference" not in snapshot.tensors:
            raise TrainError(
                "track_kl: the checkpoint has no reference model; start again with --overwrite"
            )
        with torch.no_grad():
            for name, parameter in run.reference.named_parameters():
                parameter.copy_(snapshot.tensors["reference"][name])

    def _reset_reference(self) -> None:
        """The policy becomes the reference, and the optimiser forgets (arXiv 2505.24864)."""
        run = self.run
        if run.reference is not None:
            run.reference.load_state_dict(run.model.state_dict())
        run.optimizer.state.clear()

    def _evaluation(self, step: int) -> Row:
        row, shown = evaluate(self.run)
        self._write_texts({"step": step, "evaluation": True, **each} for each in shown)
        return dict(row)

    def _keep_texts(self, collected: Collected, step: int) -> None:
        """Completions of the step for people: the first ones, and the first of each failure."""
        samples, reasons = collected.samples, collected.reasons
        first = {
            reason: i for i, reason in reversed(list(enumerate(reasons))) if reason is not None
        }

        # A reason is worth a text even if its completion is not among the first.
        count = min(self.run.config.log_completions, len(samples))
        kept = sorted({*range(count), *(first.values() if count else ())})
        self._write_texts(
            {
                "step": step,
                "prompt": collected.problems[i].prompt,
                "answer": collected.problems[i].answer,
                "completion": collected.texts[i],
                "reward": finite(float(samples.rewards[i])),
                **({"reason": reasons[i]} if reasons[i] else {}),
            }
            for i in kept
        )

    def _write_texts(self, rows: Iterable[Row]) -> None:
        """Append rows to completions.jsonl, in the main process."""
        for row in rows if self.run.logs else ():
            self.run.logs[1].write(row)
