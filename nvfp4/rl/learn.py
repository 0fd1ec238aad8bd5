"""The updates on the completions of one step.

    samples [S]  ->  score by the policy as it is           old_logprobs, entropy; ``remember``
                 ->  score by the reference, if asked       ref_logprobs
                 ->  objective.prepare                      advantages, once and over whole groups
    epochs x minibatches times:
        minibatch  ->  micro-batches of ``micro_batch`` samples
                       score with gradient -> objective.loss -> backward
                   ->  clip the gradient, step unless it is NaN or Inf

The gradient of an update does not depend on how micro-batches or processes split it, but for
rounding and under the aggregation bnpo: every micro-batch divides its loss by the ``Totals`` of the
whole update. With one update and one micro-batch, the policy before the update and the policy in
the update are one forward, which then is made once.

What lives when, since logits [S, T, V] are the largest thing in memory: the scores of one
micro-batch with gradient, and nothing of the one before. ``score_by`` drops logits as soon as the
objective has remembered of them what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from nvfp4.model.weights import fixed_weights
from nvfp4.rl.objectives.base import REFERENCE_LOGITS, REFERENCE_PROMPT_LOGITS, Metrics, ScoredBy
from nvfp4.rl.parts import RLRun
from nvfp4.rl.samples import Samples, Scores, Totals, in_float64
from nvfp4.rl.score import score
from nvfp4.run.errors import TrainError
from nvfp4.run.update import apply_gradients


@dataclass
class Learned:
    """What the updates of one step leave behind.

    samples: this process's, as the objective prepared them. old, entropy: of the policy before the
    updates, [S, T], at the sampling temperature. to_reference: log-probabilities by the reference
    model, if there is one, minus the policy's, at the objective's temperature.

    metrics: means over the updates and processes; grad_norm is before clipping. skipped: an update
    had NaN or Inf. shape_gap: largest difference between sampler and trainer on equal shapes, None
    if it was not looked at.
    """

    samples: Samples
    old: torch.Tensor
    entropy: torch.Tensor
    to_reference: torch.Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: bool = False
    shape_gap: float | None = None


def learn(run: RLRun, samples: Samples, sampled_at: float, lr: float, check: bool) -> Learned:
    """Do the updates that the config asks for on this process's ``samples``.

    sampled_at: temperature of sampling. lr: learning rate of these updates. check: also compare
    sampler and trainer, see ``shape_gap``.
    """
    config = run.config
    temperature = run.objective.loss_temperature(sampled_at)
    rows = config.micro_batch or len(samples)
    only_forward = config.minibatches == config.epochs == 1 and rows >= len(samples)

    # Who drew: the policy as it is before any update, whose log-probabilities all ratios are to.
    gap: float | None = None
    live: Scores | None = None
    with fixed_weights(run.model):
        if only_forward:  # a single forward makes a single update: it is the old policy too
            live = run.score(run.forward, samples, temperature)
            extra = run.objective.remember(samples, _detached(live), "old")
            samples = replace(samples, extra={**samples.extra, **extra})
            # logits [S, T, V] are dropped, as ``score_by`` drops them
            old = replace(_detached(live), logits=None, prompt_logits=None)
        else:
            samples, old = score_by(run, run.model, samples, temperature, rows, "old")
        if check:
            gap = _checked_gap(run, samples.select(slice(0, rows)), temperature, live)

    # The figures are at the temperature of sampling, the loss at its own.
    drawn = old
    if temperature != sampled_at:
        drawn = score_by(run, run.model, samples, sampled_at, rows, None)[1]
    samples = replace(samples, old_logprobs=old.logprobs)

    # The reference, once per rollout: it does not change within it.
    to_reference = None
    if run.reference is not None:
        samples, scores = score_by(run, run.reference, samples, temperature, rows, "reference")
        to_reference = scores.logprobs - old.logprobs
        samples = replace(samples, ref_logprobs=scores.logprobs)

    # Advantages are means over groups, so they are made before groups are split.
    with torch.no_grad():
        samples = run.objective.prepare(samples, old)

    # Epochs x minibatches. Metrics are means over the updates, skipped ones left out of the norm.
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


def score_by(
    run: RLRun,
    model: torch.nn.Module,
    samples: Samples,
    temperature: float,
    rows: int,
    by: ScoredBy | None,
) -> tuple[Samples, Scores]:
    """Scores by ``model`` without gradient, ``rows`` samples at a time; logits are not kept.

    by: whose scores they are; the samples then come back with what the objective wants to remember
    of each part. None: the samples come back as they are.
    """
    # part by part, and of each no more than is needed later
    score_parts: list[Scores] = []
    extras: list[dict[str, torch.Tensor]] = []
    with torch.no_grad(), fixed_weights(model):
        for start in range(0, len(samples), rows):
            part = samples.select(slice(start, start + rows))
            scores = run.score(model, part, temperature)
            extras.append({} if by is None else run.objective.remember(part, scores, by))
            score_parts.append(replace(scores, logits=None, prompt_logits=None))

    # Micro-batches are rows of one table again; what ``remember`` kept is part of it.
    extra = {name: torch.cat([each[name] for each in extras]) for name in extras[0]}
    names = [name for name, value in vars(score_parts[0]).items() if value is not None]
    whole = {name: torch.cat([getattr(part, name) for part in score_parts]) for name in names}
    return replace(samples, extra={**samples.extra, **extra}), Scores(**whole)


def _detached(scores: Scores) -> Scores:
    present = {name: value for name, value in vars(scores).items() if value is not None}
    return Scores(**{name: value.detach() for name, value in present.items()})


def shape_gap(run: RLRun, samples: Samples, temperature: float, trained: Scores) -> float:
    """Largest |difference| of log-probabilities of the trainer's forward and the sampler's model.

    Both at equal shapes, of all products and of the output embedding's too, so it is 0 or a defect:
    ``TrainError`` under ``strict``.
    """
    prompt = run.objective.needs_prompt_logits
    with torch.no_grad(), run.autocast():
        sampled = score(run.model, samples, temperature, prompt=prompt)
    gap = float((sampled.logprobs - trained.logprobs.detach()).abs().max())
    if gap != 0 and run.config.strict:
        raise TrainError(
            f"sampler and trainer differ by up to {gap:.3g} in the log-probabilities of the same "
            f"tokens in the same shapes: the forward is not deterministic here; look at the "
            f"recipe, or go on with --no-strict"
        )
    return gap


def _checked_gap(run: RLRun, samples: Samples, temperature: float, live: Scores | None) -> float:
    """``shape_gap`` of the trainer's forward; a function of its own, so nothing keeps its graph."""
    trained = live if live is not None else run.score(run.forward, samples, temperature)
    return shape_gap(run, samples, temperature, trained)


def _minibatches(run: RLRun, samples: Samples) -> Iterator[Samples]:
    """The samples of each update: as many groups in each, whatever the number of processes."""
    assert run.config.minibatches is not None
    size = len(samples) // run.config.minibatches
    for _ in range(run.config.epochs):
        for start in range(0, len(samples), size):
            yield samples.select(slice(start, start + size))


def _beside_reference(run: RLRun, part: Samples, temperature: float) -> Samples:
    """A micro-batch with the reference's distributions, if the objective reads whole ones."""
    if not run.objective.needs_reference_logits:
        return part
    assert run.reference is not None, "an objective that reads it asks for one"
    with torch.no_grad(), fixed_weights(run.reference):
        scores = run.score(run.reference, part, temperature)
    logits = {REFERENCE_LOGITS: scores.logits, REFERENCE_PROMPT_LOGITS: scores.prompt_logits}
    reference_logits = {name: value for name, value in logits.items() if value is not None}
    return replace(part, extra={**part.extra, **reference_logits})


def _update(
    run: RLRun,
    samples: Samples,
    live: list[Scores | None],
    rows: int,
    temperature: float,
    lr: float,
) -> tuple[dict[str, float], float | None]:
    """One optimiser update: the metrics over all processes, and the norm of the gradient.

    live: scores of all samples with their graph, if they were made before; taken out of the list.
    The norm is None if the update was skipped, for a loss or a norm that is NaN or Inf.
    """
    accelerator = run.accelerator

    # what every micro-batch divides by
    mine = [float(samples.mask.sum()), float(len(samples))]
    counts = accelerator.reduce(torch.tensor(mine, device=accelerator.device), reduction="sum")
    tokens, count = counts.tolist()
    totals = Totals(max(tokens, 1.0), count, samples.limit)

    # gradients of all micro-batches; processes average theirs with the last
    starts = range(0, len(samples), rows)
    sums: Metrics = {}
    with fixed_weights(run.model):
        for start in starts:
            part = samples.select(slice(start, start + rows))
            last = start == starts[-1]
            with nullcontext() if last else accelerator.no_sync(run.forward):
                metrics = _backward(run, part, live, temperature, totals)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + in_float64(value)

    # One reduction for all metrics, in an order that every process has.
    names = sorted(sums)
    values = torch.stack([sums[name].reshape(()) for name in names])
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="sum")
    metrics_over_all = dict(zip(names, values.tolist(), strict=True))

    # The loss over all processes decides whether to step, so that all decide alike.
    loss = metrics_over_all["loss"]
    norm, done = apply_gradients(run.model, run.optimizer, lr, run.config.clip, loss)
    return metrics_over_all, norm if done else None


def _backward(
    run: RLRun,
    part: Samples,
    live: list[Scores | None],
    temperature: float,
    totals: Totals,
) -> Metrics:
    """Gradients of one micro-batch, added to those there are; its loss and metrics.

    A function of its own: a variable of the loop would keep these logits while the next are made.
    """
    scores = live.pop() if live else None
    scores = scores if scores is not None else run.score(run.forward, part, temperature)
    part = _beside_reference(run, part, temperature)
    loss, metrics = run.objective.loss(part, scores, totals)

    # processes average their gradients, and ours are to be added
    (loss * run.accelerator.num_processes).backward()
    return {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}
