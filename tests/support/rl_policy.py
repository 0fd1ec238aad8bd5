"""A policy as a table of logits, in float64, and the smallest loop over an objective: exact where a
network is not.

Prompts are integers, tokens too; token 0 ends a completion. The next-token distribution depends on
the prompt, the position and the previous token. Hidden states are rows of a fixed random table, so
that DelTA has something to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from nvfp4.rl.objectives.base import REFERENCE_LOGITS, REFERENCE_PROMPT_LOGITS, Objective
from nvfp4.rl.samples import Samples, Scores, Totals

END = 0
WIDTH = 6
"""Size of the hidden states."""

Reward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(prompts [S], completions [S, T], 0 beyond their end) -> rewards [S]."""


@dataclass
class TablePolicy:
    """logits[prompt, position, previous token, token], float64."""

    logits: torch.Tensor
    hidden: torch.Tensor
    temperature: float = 1.0

    @classmethod
    def random(
        cls, prompts: int, length: int, symbols: int, generator: torch.Generator, scale: float = 1.0
    ):
        shape = (prompts, length, symbols)
        logits = scale * torch.randn(*shape, symbols, generator=generator, dtype=torch.float64)
        return cls(logits, torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64))

    def at(self, logits: torch.Tensor) -> TablePolicy:
        """The same policy with other logits."""
        return replace(self, logits=logits)

    def _contexts(self, samples: Samples) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        completions = samples.ids[:, 1:]
        previous = torch.cat((torch.zeros_like(completions[:, :1]), completions[:, :-1]), dim=1)
        positions = torch.arange(completions.shape[1]).expand_as(completions)
        return samples.ids[:, :1].expand_as(completions), positions, previous

    def score(self, samples: Samples) -> Scores:
        """What the loop's scoring yields: 0 outside the mask, no gradient in the entropy."""
        contexts = self._contexts(samples)
        logits = self.logits[contexts] / self.temperature
        logprobs = logits.log_softmax(dim=-1)
        drawn = logprobs.gather(-1, samples.ids[:, 1:, None]).squeeze(-1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(dim=-1)
        outside = ~samples.mask
        drawn, entropy = drawn.masked_fill(outside, 0.0), entropy.masked_fill(outside, 0.0)
        return Scores(drawn, entropy, logits, logits[:, :0], self.hidden[contexts])

    @torch.no_grad()
    def sample(self, prompts: torch.Tensor, generator: torch.Generator) -> Samples:
        """One completion for each entry of prompts, int64 [S]; each distinct prompt is a group."""
        length = self.logits.shape[1]
        ids, alive = [prompts], torch.ones_like(prompts, dtype=torch.bool)
        mask, previous = [], torch.zeros_like(prompts)
        for position in range(length):
            probabilities = (self.logits[prompts, position, previous] / self.temperature).softmax(
                dim=-1
            )
            previous = torch.multinomial(probabilities, 1, generator=generator).squeeze(1) * alive
            ids.append(previous)
            mask.append(alive)
            alive = alive & (previous != END)
        return self.samples(torch.stack(ids, dim=1), torch.stack(mask, dim=1), truncated=alive)

    @torch.no_grad()
    def samples(self, ids: torch.Tensor, mask: torch.Tensor, truncated: torch.Tensor) -> Samples:
        """Given completions, as if this policy had drawn them; rewards are not known yet."""
        rewards = torch.full((len(ids),), torch.nan)
        attention = torch.cat((torch.ones_like(mask[:, :1]), mask), dim=1)
        empty = Samples(
            ids, attention, mask, ids[:, 0], rewards, truncated, torch.zeros(mask.shape)
        )
        return replace(empty, sampler_logprobs=self.score(empty).logprobs)


def totals_of(samples: Samples) -> Totals:
    """The counts of one process and one update."""
    return Totals(float(samples.mask.sum()), float(len(samples)), samples.limit)


def prepared(
    objective: Objective,
    policy: TablePolicy,
    samples: Samples,
    reference: TablePolicy | None = None,
):
    """Samples as the loop hands them to ``loss``; dynamic sampling drops groups instead of
    replacing them."""
    with torch.no_grad():
        samples = samples.select(objective.keep(samples))
        if not len(samples):
            return samples
        samples = replace(samples, rewards=objective.shape_rewards(samples))
        scores = policy.score(samples)
        extra = objective.remember(samples, scores, "old")
        if objective.needs_reference:
            base = (reference or policy).score(samples)
            samples = replace(samples, ref_logprobs=base.logprobs)
            extra = {**extra, **objective.remember(samples, base, "reference")}
        # Only what was remembered may be needed: logits and hidden states of a whole rollout are
        # not kept.
        return objective.prepare(
            replace(samples, extra={**samples.extra, **extra}),
            Scores(scores.logprobs, scores.entropy),
        )


def beside(objective: Objective, samples: Samples, reference: TablePolicy) -> Samples:
    """A micro-batch as the loop hands it to ``loss``: with the reference's logits, if they are
    asked for."""
    if not objective.needs_reference_logits:
        return samples
    scores = reference.score(samples)
    logits = {REFERENCE_LOGITS: scores.logits, REFERENCE_PROMPT_LOGITS: scores.prompt_logits}
    return replace(samples, extra={**samples.extra, **logits})


def gradient(
    objective: Objective,
    policy: TablePolicy,
    samples: Samples,
    parts: int = 1,
    reference: TablePolicy | None = None,
):
    """(loss, gradient with respect to the logits, metrics) of prepared samples, in so many
    micro-batches."""
    logits = policy.logits.clone().requires_grad_()
    totals, loss, metrics = totals_of(samples), 0.0, {}
    for index in torch.arange(len(samples)).chunk(parts):
        part = beside(objective, samples.select(index), reference or policy)
        share, found = objective.loss(part, policy.at(logits).score(part), totals)
        share.backward()
        loss += share.item()
        metrics = {name: metrics.get(name, 0.0) + value.item() for name, value in found.items()}
    assert logits.grad is not None
    return loss, logits.grad, metrics


def train(
    objective: Objective,
    policy: TablePolicy,
    reward: Reward,
    steps: int,
    generator: torch.Generator,
):
    """The smallest loop: 8 completions for each prompt, two updates a rollout, two micro-batches
    each."""
    logits = policy.logits.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.1)
    prompts = torch.arange(len(logits)).repeat_interleave(8)
    reference = policy.logits.clone()
    for _ in range(steps):
        present = policy.at(logits.detach().clone())
        samples = replace(present, temperature=objective.temperature(1.0)).sample(
            prompts, generator
        )
        samples = replace(samples, rewards=reward(prompts, samples.ids[:, 1:]).float())
        samples = prepared(objective, present, samples, policy.at(reference))
        if not len(samples):
            continue
        for _ in range(2):
            _, grad, metrics = gradient(
                objective,
                policy.at(logits.detach()),
                samples,
                parts=2,
                reference=policy.at(reference),
            )
            adam.zero_grad()
            logits.grad = grad
            adam.step()
        if "reset_reference" in objective.observe(metrics):
            reference = logits.detach().clone()
            adam = torch.optim.Adam([logits], lr=0.1)
    return policy.at(logits.detach())


def shuffled(policy: TablePolicy, size: int, generator: torch.Generator) -> Samples:
    """``size`` completions of each prompt, those of a group not beside each other."""
    prompts = torch.arange(len(policy.logits)).repeat_interleave(size)
    return policy.sample(prompts[torch.randperm(len(prompts), generator=generator)], generator)


def moved(policy: TablePolicy, generator: torch.Generator, scale: float = 0.5) -> TablePolicy:
    """Another policy nearby."""
    noise = torch.randn(policy.logits.shape, generator=generator, dtype=torch.float64)
    return policy.at(policy.logits + scale * noise)


def sequences(length: int, symbols: int) -> Iterator[tuple[int, ...]]:
    """Every sequence of that length over range(symbols)."""
    return iter(torch.cartesian_prod(*[torch.arange(symbols)] * length).tolist())
