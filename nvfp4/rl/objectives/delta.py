"""DelTA: weight the tokens that tell good completions from bad ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from nvfp4.rl.objectives.base import AllSum, Defaults, one_process
from nvfp4.rl.objectives.dapo import DAPO
from nvfp4.rl.samples import Samples, Scores
from nvfp4.run.processes import float64_device

HIDDEN = "hidden"
LOWEST, SPAN = 0.8, 0.4
"""Weights before normalisation lie in [LOWEST, LOWEST + SPAN] (the authors' code)."""
VARIANCE_FLOOR = 1e-8
"""Least variance of margins (the authors' code): equal ones give the sigmoid 0, so all weights of a side are equal."""


def token_weights(
    vectors: torch.Tensor, advantages: torch.Tensor, refinements: int, all_sum: AllSum = one_process
) -> torch.Tensor:
    """float32 [N], of mean 1 over the batch: tokens nearer to the mean of their own side than to that of the other
    weigh more. vectors: [N, D]; advantages: [N]. All 1 where one side is empty."""
    exact = float64_device(vectors.device)
    if exact != vectors.device:
        return token_weights(vectors.to(exact), advantages.to(exact), refinements, all_sum).to(vectors.device)
    sides = (advantages > 0, advantages < 0)
    counts = all_sum(torch.stack([side.sum() for side in (*sides, torch.ones_like(sides[0]))]).double())
    if (counts[:2] == 0).any():
        return torch.ones_like(advantages, dtype=torch.float32)
    share = torch.ones_like(advantages, dtype=torch.float64)
    gammas: list[torch.Tensor] = []
    for _ in range(1 + refinements):
        distances = [_distances(vectors, side * advantages.abs() * share, all_sum) for side in sides]
        margin = torch.where(sides[0], distances[1] - distances[0], distances[0] - distances[1])
        spreads = [_spread(margin, side, count, all_sum) for side, count in zip(sides, counts[:2], strict=True)]
        # As in the authors' code, margins to new means are divided by the spread of the margins to the means before.
        lagging, gammas = gammas or spreads, spreads
        share = torch.zeros_like(share)
        for side, gamma in zip(sides, lagging, strict=True):
            share = torch.where(side, torch.sigmoid(margin / gamma), share)
    weights = LOWEST + SPAN * share
    return (weights * (counts[2] / all_sum(weights.sum()))).float()


def _distances(vectors: torch.Tensor, weights: torch.Tensor, all_sum: AllSum) -> torch.Tensor:
    """Squared distances, float64 [N], to the weighted mean of the vectors."""
    centre = all_sum(weights.to(vectors.dtype) @ vectors) / all_sum(weights.sum()).to(vectors.dtype)
    return (vectors - centre).square().sum(dim=1).double()


def _spread(margin: torch.Tensor, side: torch.Tensor, count: torch.Tensor, all_sum: AllSum) -> torch.Tensor:
    """Standard deviation of the margins of one side, of the population of the whole batch."""
    mean = all_sum((margin * side).sum()) / count
    variance = all_sum(((margin - mean).square() * side).sum()) / count
    return variance.clamp(min=VARIANCE_FLOOR).sqrt()


@dataclass(kw_only=True)
class DelTA(DAPO):
    """DAPO with discriminative token weights on the advantages (arXiv 2605.21467; details from the authors' code).

    Of the old policy, for each token: v = (1 - its probability) * the input of the output embedding. mu+ and mu-: means
    of v over the tokens of completions with positive and negative advantage, weighted by |A|. The margin of a token is
    its squared distance to the other side's mean minus that to its own; gamma is the standard deviation of the margins
    of its side. Once more with means weighted by |A| * sigmoid(margin / gamma), but the old gamma; then weight = 0.8 +
    0.4 sigmoid(margin / gamma), and 0.8 where A = 0, scaled to a mean of 1. Dual clip 10, 4 updates per rollout (32 of
    128 prompts). Ours: weights of 1 where a side is empty.
    """

    name: ClassVar[str] = "delta"
    defaults: ClassVar[Defaults] = Defaults(group=16, updates=4, weight_decay=0.1)

    dual_clip: float | None = 10.0
    dynamic_sampling: bool = False
    refinements: int = 1
    """Rounds in which the means are weighted by the last round's result."""

    @property
    def needs_hidden(self) -> bool:
        """For the token vectors."""
        return True

    def remember(
        self, samples: Samples, scores: Scores, source: Literal["old", "reference"]
    ) -> dict[str, torch.Tensor]:
        """The old policy's hidden states, all of them: the means need two passes over the batch."""
        if source == "reference":
            return {}
        if scores.hidden is None:
            raise ValueError("delta needs the hidden states of the old policy")
        return {HIDDEN: scores.hidden.detach()}

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """With weighted advantages; the hidden states are let go."""
        kept = samples.extra if HIDDEN in samples.extra else self.remember(samples, old, "old")
        rest = {name: value for name, value in samples.extra.items() if name != HIDDEN}
        samples = super().prepare(replace(samples, extra=rest), old)
        assert samples.old_logprobs is not None, "prepare puts them there"
        assert samples.advantages is not None, "prepare puts them there"
        at = samples.mask
        vectors = (1 - samples.old_logprobs[at].exp())[:, None] * kept[HIDDEN][at]
        advantages = samples.advantages.clone()
        advantages[at] *= token_weights(vectors, advantages[at], self.refinements, self.all_sum)
        return replace(samples, advantages=advantages)
