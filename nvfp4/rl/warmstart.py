"""The warm start: supervised learning from a teacher that is often wrong, so that there is something left to learn.

Clean demonstrations would saturate a small task, and without any a new model never finds a reward.

Each update is a function of (weights, moments, seed, number of the update), so weights and moments are all that a
checkpoint needs: base.unfinished/ holds the newest until base/ is complete, and the same command goes on from it to
the last bit, after a signal, which saves, and after kill -9.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from nvfp4.numerics.rng import WARM_START_BRANCH, fold_in
from nvfp4.rl.batches import demonstrations
from nvfp4.rl.config import RLConfig, make_task, model_source
from nvfp4.rl.rollout import check_fits
from nvfp4.rl.samples import Samples
from nvfp4.rl.score import score
from nvfp4.rl.tasks.base import Task
from nvfp4.rl.text import Text
from nvfp4.rl.tokens import load_vocabulary
from nvfp4.run import checkpoint, state
from nvfp4.run.errors import Interrupted
from nvfp4.run.files import write_json
from nvfp4.run.model import build_model, export
from nvfp4.run.optim import adamw, learning_rates
from nvfp4.run.progress import Reporter
from nvfp4.run.signals import StopWish

MARK = "warm_start.json"

RELEVANT = (
    *("task", "task_options", "tokenizer", "architecture", "depth", "width", "heads", "context"),
    *("warm_steps", "warm_batch", "warm_lr", "warm_noise", "seed"),
)


def warm_start(config: RLConfig, folder: Path, report: Reporter) -> Path:
    """Train a new model on demonstrations, in full precision on the CPU, and export it to ``folder``; returns that.

    A folder that an equal config has filled before is used again. The end of a text is learnt with the answer. Raises
    ``Interrupted`` after a signal; ``save_every`` updates lie between two checkpoints.
    """
    fields = {name: getattr(config, name) for name in RELEVANT}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    mark = folder / MARK
    if mark.is_file() and mark.read_bytes() == _as_json(fields).encode():
        return folder
    assert config.warm_steps is not None
    assert config.tokenizer is not None
    shared = dataclasses.replace(
        config, steps=config.warm_steps, lr=config.warm_lr, warmup=config.warm_steps // 10, decay=0.5
    )
    text, task = Text(load_vocabulary(config.tokenizer)), make_task(config)
    model = build_model(model_source(config), text, config.seed).eval()
    optimizer, rates = adamw(model, shared), learning_rates(shared)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    step = _go_on(unfinished, fields, model, optimizer, report)

    # The updates, each a function of the state and of its number; a signal is obeyed between two.
    with StopWish() as wish:
        while step < config.warm_steps:
            seed = fold_in(config.seed, WARM_START_BRANCH, step)
            batch = demonstrated(task, text, config.warm_batch, config.warm_noise, seed)
            check_fits(model, batch.ids.shape[1])
            loss = _update(model, optimizer, batch, rates(step))
            step += 1
            if step % 100 == 0 or step == config.warm_steps:
                report.say(f"warm start {step}/{config.warm_steps}  loss {loss:.4f}")
            due = config.save_every > 0 and step % config.save_every == 0
            if (wish.received or due) and step < config.warm_steps:
                checkpoint.save(unfinished, state.local_snapshot(model, optimizer, {"step": step, "fields": fields}), 1)
            if wish.received and step < config.warm_steps:
                saved = f"stopped at update {step} of the warm start, checkpoint saved"
                raise Interrupted(wish.received, f"{saved}; the same command goes on from there")
        export(model, text, folder, "fp32")
        write_json(mark, fields)  # last: it says that the folder is complete
    shutil.rmtree(unfinished, ignore_errors=True)
    if wish.received:
        raise Interrupted(
            wish.received, "stopped after the warm start, which is kept; the same command goes on from it"
        )
    return folder


def _go_on(
    unfinished: Path,
    fields: dict[str, Any],
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    report: Reporter,
) -> int:
    """The number of updates that an equal warm start has saved, which model and optimiser then have behind them."""
    for path in checkpoint.newest_first(unfinished):
        try:
            snapshot = checkpoint.load(path)
        except checkpoint.DamagedCheckpoint as error:
            report.say(f"{error}; the warm start begins again")
            continue
        if snapshot.state["fields"] == fields:
            state.restore_local(snapshot, model, optimizer)
            report.say(f"warm start: resuming from {path}")
            return int(snapshot.state["step"])
    return 0


def _update(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Samples, rate: float) -> float:
    """One supervised update with learning rate ``rate``; the loss before it, in nats per token."""
    loss = supervised_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def demonstrated(task: Task, text: Text, count: int, noise: float, seed: int) -> Samples:
    """``count`` problems with an answer each, of which a share ``noise`` on average is corrupted."""
    rng = np.random.default_rng(fold_in(seed, 1))
    problems = task.problems(count, fold_in(seed, 0), held_out=False)
    shown = [task.corrupt(problem, rng) if rng.random() < noise else problem.answer for problem in problems]
    prompts = [text.prompt(problem.prompt) for problem in problems]
    return demonstrations(prompts, [text.answer(answer) for answer in shown], text.vocabulary.pad_id)


def supervised_loss(model: PreTrainedModel, samples: Samples) -> torch.Tensor:
    """Mean negative log-likelihood of the tokens of the answers, in nats."""
    return -score(model, samples, 1.0).logprobs.sum() / samples.mask.sum()


def _as_json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, allow_nan=False) + "\n"
