"""The updates on the completions of one step; their sum does not depend on micro-batches or processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from nvfp4.model.weights import fixed_weights
from nvfp4.rl.objectives.base import REFERENCE_LOGITS, REFERENCE_PROMPT_LOGITS, Metrics
from nvfp4.rl.samples import Samples, Scores, Totals
from nvfp4.rl.score import score
from nvfp4.rl.setup import Run
from nvfp4.run.errors import TrainError
from nvfp4.run.processes import float64_device
from nvfp4.run.update import apply_gradients


@dataclass
class Learned:
    """samples: this process's, as the objective prepared them. old, entropy: of the policy before the updates, [S, T],
    at the sampling temperature.

    to_reference: log-probabilities by the reference model, if there is one, minus the policy's, at the objective's
    temperature. metrics: means over the updates and processes;
    grad_norm before clipping. skipped: an update had NaN or Inf. shape_gap: largest difference between sampler and
    trainer on equal shapes, None if it was not looked at.
    """

    samples: Samples
    old: torch.Tensor
    entropy: torch.Tensor
    to_reference: torch.Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: bool = False
    shape_gap: float | None = None


def learn(run: Run, samples: Samples, temperature: float, lr: float, check: bool) -> Learned:
    """Do the updates that the config asks for on this process's ``samples``; check: compare sampler and trainer."""
    config, sampling = run.config, temperature
    temperature = run.objective.loss_temperature(sampling)
    rows = config.micro_batch or len(samples)
    alone = config.minibatches == config.epochs == 1 and rows >= len(samples)
    gap, live = None, None
    with fixed_weights(run.model):
        if alone:  # a single forward makes a single update: it is the policy before the update too
            live = run.score(run.forward, samples, temperature)
            extra = run.objective.remember(samples, _detached(live), "old")
            samples = replace(samples, extra={**samples.extra, **extra})
            old = replace(_detached(live), logits=None, prompt_logits=None)  # as ``scored`` has them
        else:
            samples, old = scored(run, run.model, samples, temperature, rows, "old")
        if check:
            gap = _checked_gap(run, samples.select(slice(0, rows)), temperature, live)
    drawn = old if temperature == sampling else scored(run, run.model, samples, sampling, rows, None)[1]
    samples = replace(samples, old_logprobs=old.logprobs)
    to_reference = None
    if run.reference is not None:
        samples, scores = scored(run, run.reference, samples, temperature, rows, "reference")
        to_reference = scores.logprobs - old.logprobs
        samples = replace(samples, ref_logprobs=scores.logprobs)
    with torch.no_grad():
        samples = run.objective.prepare(samples, old)
    learned = Learned(samples, drawn.logprobs, drawn.entropy, to_reference, shape_gap=gap)
    parts = list(_minibatches(run, samples))
    norms = []
    for part in parts:
        handed_over, live = [live], None  # the update lets go of it after its backward
        metrics, norm = _update(run, part, handed_over, rows, temperature, lr)
        learned.skipped |= norm is None
        norms.append(norm)
        for name, value in metrics.items():
            learned.metrics[name] = learned.metrics.get(name, 0.0) + value / len(parts)
    finite = [norm for norm in norms if norm is not None]
    learned.metrics["grad_norm"] = sum(finite) / len(finite) if finite else math.nan
    return learned


def scored(
    run: Run,
    model: torch.nn.Module,
    samples: Samples,
    temperature: float,
    rows: int,
    source: Literal["old", "reference"] | None,
) -> tuple[Samples, Scores]:
    """Scores by ``model`` without gradient, ``rows`` samples at a time, and the samples with what the objective wants
    to remember of each part, if a source is named; logits are not kept."""
    found: list[Scores] = []
    extras: list[dict[str, torch.Tensor]] = []
    with torch.no_grad(), fixed_weights(model):
        for start in range(0, len(samples), rows):
            part = samples.select(slice(start, start + rows))
            scores = run.score(model, part, temperature)
            extras.append({} if source is None else run.objective.remember(part, scores, source))
            found.append(replace(scores, logits=None, prompt_logits=None))
    joined = {name: torch.cat([extra[name] for extra in extras]) for name in extras[0]}
    names = [name for name, value in vars(found[0]).items() if value is not None]
    whole: dict[str, torch.Tensor] = {name: torch.cat([getattr(part, name) for part in found]) for name in names}
    scores = Scores(**whole)
    return replace(samples, extra={**samples.extra, **joined}), scores


def _detached(scores: Scores) -> Scores:
    detached: dict[str, Any] = {k: value if value is None else value.detach() for k, value in vars(scores).items()}
    return Scores(**detached)


def shape_gap(run: Run, samples: Samples, temperature: float, trained: Scores) -> float:
    """Largest |difference| of log-probabilities between the trainer's forward and the sampler's model, equal shapes.

    0 or a defect: ``TrainError`` under ``strict``.
    """
    with torch.no_grad(), run.autocast():
        # equal shapes of all products, that of the output embedding included
        sampled = score(run.model, samples, temperature, prompt=run.objective.needs_prompt_logits)
    gap = float((sampled.logprobs - trained.logprobs.detach()).abs().max())
    if gap != 0 and run.config.strict:
        raise TrainError(
            f"sampler and trainer differ by up to {gap:.3g} in the log-probabilities of the same tokens in the same "
            f"shapes: the forward is not deterministic here; look at the recipe, or go on with --no-strict"
        )
    return gap


def _checked_gap(run: Run, samples: Samples, temperature: float, live: Scores | None) -> float:
    """``shape_gap`` of the trainer's forward; a function of its own, so that nothing holds its graph afterwards."""
    trained = live if live is not None else run.score(run.forward, samples, temperature)
    return shape_gap(run, samples, temperature, trained)


def _minibatches(run: Run, samples: Samples) -> Iterator[Samples]:
    """The samples of each update: as many groups in each, the same groups whatever the number of processes."""
    assert run.config.minibatches is not None
    size = len(samples) // run.config.minibatches
    for _ in range(run.config.epochs):
        for start in range(0, len(samples), size):
            yield samples.select(slice(start, start + size))


def _beside_reference(run: Run, part: Samples, temperature: float) -> Samples:
    """A micro-batch with what the reference says about it, if the objective reads whole distributions of it."""
    if not run.objective.needs_reference_logits:
        return part
    assert run.reference is not None, "an objective that reads it asks for one"
    with torch.no_grad(), fixed_weights(run.reference):
        scores = run.score(run.reference, part, temperature)
    logits = {REFERENCE_LOGITS: scores.logits, REFERENCE_PROMPT_LOGITS: scores.prompt_logits}
    return replace(part, extra={**part.extra, **{name: v for name, v in logits.items() if v is not None}})


def _update(
    run: Run, samples: Samples, live: list[Scores | None], rows: int, temperature: float, lr: float
) -> tuple[dict[str, float], float | None]:
    """One optimiser update; the metrics over all processes, and the norm of the gradient or None if it was skipped.

    live: scores of all samples with their graph, if they were made before; taken out of the list.
    """
    accelerator, world = run.accelerator, run.accelerator.num_processes
    exact = float64_device(accelerator.device)
    counts = torch.tensor([float(samples.mask.sum()), float(len(samples))], device=accelerator.device)
    tokens, count = accelerator.reduce(counts, reduction="sum").tolist()
    totals = Totals(max(tokens, 1.0), count, samples.limit)
    starts = range(0, len(samples), rows)
    sums: Metrics = {}
    with fixed_weights(run.model):
        for start in starts:
            part = samples.select(slice(start, start + rows))
            with nullcontext() if start == starts[-1] else accelerator.no_sync(run.forward):
                metrics = _backward(run, part, live, temperature, totals)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.to(exact).double()
    names = sorted(sums)
    values = torch.stack([sums[name].reshape(()) for name in names])
    if world > 1:
        values = accelerator.reduce(values, reduction="sum")
    found = dict(zip(names, values.tolist(), strict=True))
    norm, done = apply_gradients(run.model, run.optimizer, lr, run.config.clip, found["loss"])
    return found, norm if done else None


def _backward(run: Run, part: Samples, live: list[Scores | None], temperature: float, totals: Totals) -> Metrics:
    """Gradients of one micro-batch, added to those there are; its loss and metrics.

    A function of its own: a variable of the loop would keep these logits while the next are made.
    """
    scores = live.pop() if live else None
    scores = scores if scores is not None else run.score(run.forward, part, temperature)
    part = _beside_reference(run, part, temperature)
    loss, metrics = run.objective.loss(part, scores, totals)
    (loss * run.accelerator.num_processes).backward()  # processes average their gradients, and ours are to be added
    return {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}
