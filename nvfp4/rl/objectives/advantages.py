"""From rewards to advantages: the baseline of a group, and what it is divided by.

With r the reward of a sample, mean and std those of its group of G:

    group_advantages            r - mean                             Dr. GRPO
                                (r - mean) / (sample std + 1e-4)     GRPO
    population_advantages       (r - mean) / population std          ReasonMaxxer
    leave_one_out_advantages    r - mean of the other G - 1          RLOO
    normalise_over_batch        (A - mean) / std over all tokens     REINFORCE++

A baseline changes the variance of the gradient and not its mean, as long as it does not depend on
the completion itself. The group's mean holds its own reward, which shrinks the mean gradient to
(G - 1) / G of it; leaving the sample out does not. Dividing by std is no baseline: it weighs
prompts.

Groups may come in any order. Sums are made in float64 over a table [groups, largest group], in an
order that depends on nothing but the samples. A group of equal rewards gives exact zeros, although
its mean may round.
"""

from __future__ import annotations

import torch

from nvfp4.rl.objectives.base import AllSum, one_process
from nvfp4.rl.samples import in_float64

STD_EPSILON = 1e-4
"""Added to a group's standard deviation (TRL)."""

VARIANCE_FLOOR = 1e-8
"""Least variance that REINFORCE++ divides by (NeMo RL)."""


class _Groups:
    """Values of samples as a table, float64 [groups, largest group].

    Sums along its rows do not depend on the order of atomic additions, so they are the same on
    every run of every device. It lies where float64 is; ``samples`` brings its entries back.
    """

    def __init__(self, values: torch.Tensor, groups: torch.Tensor) -> None:
        # a row for each group, in it a place for each sample
        _, row, counts = torch.unique(groups, return_inverse=True, return_counts=True)

        # Scattered into a table by (row, place); empty places are not ``filled``.
        shape = (len(counts), int(counts.max()))
        exact = in_float64(values)
        self.device = values.device
        self.where = (row.to(exact.device), place_in_group(groups).to(exact.device))
        self.counts = in_float64(counts[:, None])
        self.filled = torch.zeros(shape, dtype=torch.bool, device=exact.device)
        self.filled[self.where] = True
        self.values = torch.zeros(shape, dtype=torch.float64, device=exact.device)
        self.values[self.where] = exact

    def sum(self, table: torch.Tensor) -> torch.Tensor:
        """The sum over each group, [groups, 1]."""
        return torch.where(self.filled, table, 0.0).sum(dim=1, keepdim=True)

    def spread(self) -> torch.Tensor:
        """Whether a group has two different values, bool [groups, 1]."""
        different = self.values != self.values[:, :1]
        return (different & self.filled).any(dim=1, keepdim=True)

    def deviations(self) -> torch.Tensor:
        """value - mean of the group, [groups, largest group]; exactly 0 where all are equal."""
        mean = self.sum(self.values) / self.counts
        return torch.where(self.spread(), self.values - mean, 0.0)

    def std(self, deviations: torch.Tensor, correction: int) -> torch.Tensor:
        """Standard deviation [groups, 1], the squares divided by (size - correction)."""
        return (self.sum(deviations**2) / (self.counts - correction).clamp(min=1)).sqrt()

    def samples(self, table: torch.Tensor) -> torch.Tensor:
        """The table's entries in the order of the samples [S], float32 or bool, on their device."""
        entries = table.expand_as(self.filled)[self.where]
        return (entries.float() if entries.is_floating_point() else entries).to(self.device)


def group_advantages(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    *,
    divide_by_std: bool,
) -> torch.Tensor:
    """r - mean of its group, float32 [S] (Dr. GRPO, arXiv 2503.20783).

    divide_by_std: by (sample standard deviation + 1e-4) (GRPO, arXiv 2402.03300; the constant is
    TRL's). A group of equal rewards gives exact zeros.
    """
    table = _Groups(rewards, groups)
    deviations = table.deviations()
    if divide_by_std:
        deviations = deviations / (table.std(deviations, correction=1) + STD_EPSILON)
    return table.samples(deviations)


def population_advantages(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(r - mean) / population std of its group, float32 [S]; zeros where all are equal."""
    table = _Groups(rewards, groups)
    deviations = table.deviations()
    std = torch.where(table.spread(), table.std(deviations, correction=0), 1.0)
    return table.samples(deviations / std)


def leave_one_out_advantages(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """r - mean of the others = G / (G - 1) * (r - mean), float32 [S] (RLOO, arXiv 2402.14740).

    A baseline that does not depend on the sample, so the gradient is unbiased. A group of one has
    no others and gives 0.
    """
    table = _Groups(rewards, groups)
    return table.samples(table.deviations() * table.counts / (table.counts - 1).clamp(min=1))


def normalise_over_batch(
    advantages: torch.Tensor,
    mask: torch.Tensor,
    all_sum: AllSum = one_process,
) -> torch.Tensor:
    """(A - mean) / sqrt(max(variance, 1e-8)), float32 [S, T] (REINFORCE++, arXiv 2501.03262).

    advantages: [S], each on all tokens of mask [S, T]; mean and variance are over the tokens of the
    whole batch. 0 outside mask. A group of equal rewards comes out at minus the mean of the batch,
    not at 0: dynamic sampling removes it before.
    """
    # a completion's advantage counts once for each of its tokens
    tokens, exact = in_float64(mask.sum(dim=1)), in_float64(advantages)
    count, total = all_sum(torch.stack((tokens.sum(), (tokens * exact).sum()))).unbind()
    centred = exact - total / count.clamp(min=1)
    variance = all_sum((tokens * centred**2).sum()) / count.clamp(min=1)
    normalised = (centred / variance.clamp(min=VARIANCE_FLOOR).sqrt()).float()
    return on_tokens(normalised.to(mask.device), mask)


def on_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """values [S] on every token of mask [S, T], 0 outside."""
    return torch.where(mask, values[:, None], 0.0)


def has_spread(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """bool [S]: not all rewards of the sample's group are equal, so it says something."""
    table = _Groups(rewards, groups)
    return table.samples(table.spread())


def place_in_group(groups: torch.Tensor) -> torch.Tensor:
    """How many samples of the same group come before, int64 [S]."""
    # sorted by group, a sample's place is its distance from the first of the group
    _, row, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    order = torch.argsort(row, stable=True)
    first = (counts.cumsum(0) - counts)[row[order]]
    place = torch.zeros_like(row)
    place[order] = torch.arange(len(row), device=row.device) - first
    return place
