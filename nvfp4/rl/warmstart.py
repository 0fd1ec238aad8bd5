"""The warm start: supervised learning from a teacher that is often wrong.

    problems of the task -> answers, a share of them corrupted
      -> loss = -mean over the answers' tokens of log p(token | those before it) -> AdamW

Without demonstrations a new model never finds a reward; with clean ones a small task is saturated,
and nothing is left to learn. So a share --warm-noise of the answers is corrupted: the model
learns their form, and their content only in part.

It is a training of the same loop as the run that follows, in full precision, on the CPU, in the
main process alone. base.unfinished/ holds its newest checkpoint until base/ is complete, and the
same command goes on from it to the last bit: after a signal, which saves, and after kill -9.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from nvfp4.numerics.rng import WARM_START_BRANCH, fold_in
from nvfp4.rl.config import RLConfig, make_task, model_source
from nvfp4.rl.rollout import check_fits
from nvfp4.rl.samples import Samples, demonstrations
from nvfp4.rl.score import score
from nvfp4.rl.tasks.base import Task
from nvfp4.rl.vocabulary import Text, load_vocabulary
from nvfp4.run import checkpoint
from nvfp4.run.checkpoint import DamagedCheckpoint
from nvfp4.run.errors import Interrupted
from nvfp4.run.files import write_json
from nvfp4.run.folder import ResumePoint, RunFolder
from nvfp4.run.log import Row
from nvfp4.run.loop import Loop, Training
from nvfp4.run.model import build_model, export
from nvfp4.run.optim import adamw, learning_rates
from nvfp4.run.options import ResumableConfig
from nvfp4.run.parts import RunParts
from nvfp4.run.processes import Alone
from nvfp4.run.progress import Reporter
from nvfp4.run.signals import StopWish
from nvfp4.run.update import apply_gradients

MARK = "warm_start.json"
CLIP = 1.0  # largest norm of the gradient

# Fields that the result depends on: a base/ of the same ones is used again.
RELEVANT = (
    *("task", "task_options", "tokenizer", "architecture", "depth", "width", "heads", "context"),
    *("warm_steps", "warm_batch", "warm_lr", "warm_noise", "seed"),
)


def warm_start(config: RLConfig, folder: Path) -> Path:
    """Train a new model on demonstrations and export it to ``folder``; returns that.

    In full precision on the CPU. A folder that an equal config has filled before is used again. The
    end of a text is learnt with the answer. Raises ``Interrupted`` after a signal; ``save_every``
    updates lie between two checkpoints.
    """
    fields = {name: getattr(config, name) for name in RELEVANT}
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }
    mark = folder / MARK
    if mark.is_file() and mark.read_bytes() == _as_json(fields).encode():
        return folder

    # The run's own options but for what the warm start has of its own; one checkpoint is enough.
    assert config.warm_steps is not None
    own: dict[str, Any] = {
        "steps": config.warm_steps,
        "lr": config.warm_lr,
        "warmup": config.warm_steps // 10,
    }
    training = WarmStart(dataclasses.replace(config, **own, decay=0.5, keep=1), folder, fields)
    with StopWish() as wish:
        received = Loop(training).run()
        training.finish()
        write_json(mark, fields)  # last: it says that the folder is complete
    shutil.rmtree(training.run.folder.checkpoints, ignore_errors=True)

    # A signal during the last update or the export: the work is kept, the run does not begin.
    if received or wish.received:
        kept = "stopped after the warm start, which is kept; the same command goes on from it"
        raise Interrupted(received or wish.received, kept)
    return folder


class WarmStart(Training):
    """The answers of demonstrations; an update is a function of weights, moments, seed, number."""

    def __init__(self, config: RLConfig, folder: Path, fields: dict[str, Any]) -> None:
        assert config.tokenizer is not None
        self.config, self.fields = config, fields
        self.text, self.task = Text(load_vocabulary(config.tokenizer)), make_task(config)
        self.learning_rate = learning_rates(config)
        model = build_model(model_source(config), self.text, config.seed).eval()
        report, base = Reporter("warm start", config.steps, 100), WarmFolder(folder, fields)
        super().__init__(
            RunParts(config, Alone(), report, base, model, model, adamw(model, config))
        )

    def step(self, step: int) -> Row:
        """One update; the loss before it, in nats per token."""
        run, config = self.run, self.config
        began = time.perf_counter()
        # by the number of the step alone, so a resumed run draws the same demonstrations
        seed = fold_in(config.seed, WARM_START_BRANCH, step)
        batch = draw_demonstrations(
            self.task, self.text, config.warm_batch, config.warm_noise, seed
        )
        check_fits(run.model, batch.ids.shape[1])

        # The same road as in reinforcement learning: ``score``, backward, clip, AdamW.
        loss = supervised_loss(run.model, batch)
        loss.backward()
        value = float(loss.detach())
        norm, done = apply_gradients(
            run.model, run.optimizer, self.learning_rate(step), CLIP, value
        )
        return {
            "loss": value,
            "grad_norm": norm,
            "skipped": not done,
            "seconds": time.perf_counter() - began,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint must be of to be gone on from."""
        return {"fields": self.fields}

    def finish(self) -> dict[str, Any]:
        """The export, which the run begins with."""
        export(self.run.model, self.text, self.run.folder.export, "fp32")
        return {}

    def stop_message(self, step: int) -> str:
        """What ``Interrupted`` says after a signal."""
        return (
            f"stopped at update {step} of the warm start, checkpoint saved; the same command "
            "goes on from there"
        )

    def cure(self) -> str:
        """What helps where losses are no numbers."""
        return "lower --warm-lr"


class WarmFolder(RunFolder):
    """base/ and base.unfinished/ below a run's folder, whose lock the run holds."""

    def __init__(self, base: Path, fields: dict[str, Any]) -> None:
        super().__init__(str(base.parent))
        self.export, self.checkpoints = base, base.with_name(f"{base.name}.unfinished")
        self.logs, self.fields = (), fields

    def open(
        self, config: ResumableConfig, data_sha256: str, bound: frozenset[str] = frozenset()
    ) -> tuple[ResumePoint, list[str]]:
        """The newest checkpoint that an equal warm start has saved, if there is one."""
        notes = []
        for path in checkpoint.newest_first(self.checkpoints):
            try:
                snapshot = checkpoint.load(path)
            except DamagedCheckpoint as error:
                notes.append(f"{error}; the warm start begins again")
                continue
            if snapshot.state["fields"] == self.fields:
                return (path, snapshot), [*notes, f"warm start: resuming from {path}"]
        return None, notes


def draw_demonstrations(task: Task, text: Text, count: int, noise: float, seed: int) -> Samples:
    """``count`` problems with an answer each, of which a share ``noise`` is corrupted.

    Each is corrupted or not by a draw of its own, so the share holds on average.
    """
    rng = np.random.default_rng(fold_in(seed, 1))
    problems = task.problems(count, fold_in(seed, 0), held_out=False)
    shown = [
        task.corrupt(problem, rng) if rng.random() < noise else problem.answer
        for problem in problems
    ]
    prompts = [text.prompt(problem.prompt) for problem in problems]
    return demonstrations(
        prompts, [text.answer(answer) for answer in shown], text.vocabulary.pad_id
    )


def supervised_loss(model: PreTrainedModel, samples: Samples) -> torch.Tensor:
    """Mean negative log-likelihood of the tokens of the answers, in nats."""
    return -score(model, samples, 1.0).logprobs.sum() / samples.mask.sum()


def _as_json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, allow_nan=False) + "\n"
