"""DelTA: weight the tokens that tell good completions from bad ones.

    v      = (1 - probability of the token) x hidden state       [N, D], of the old policy
    mu+    = mean of v over tokens with A > 0, by |A|;  mu- the same with A < 0
    margin = |v - mu of the other side|^2 - |v - mu of its own|^2
    gamma  = standard deviation of the margins of its side
    weight = 0.8 + 0.4 sigmoid(margin / gamma), 0.8 where A = 0;  scaled to a mean of 1

and once more (``refinements``) with means weighted by |A| sigmoid(margin / gamma).

v is the gradient of the token's log-probability by its own row of the output embedding, so the two
means are what the good and the bad completions would teach; a token that is nearer to its own
side's mean than to the other's weighs more. ``prepare`` multiplies the advantages by these weights,
over the tokens of all processes; the loss is DAPO's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from nvfp4.numerics.torch_state import float64_device
from nvfp4.rl.objectives.base import AllSum, Defaults, ScoredBy, one_process
from nvfp4.rl.objectives.dapo import DAPO
from nvfp4.rl.samples import Samples, Scores

HIDDEN = "hidden"
"""Key of ``Samples.extra``: hidden states of the old policy, [S, T, D]."""

LOWEST, SPAN = 0.8, 0.4
"""Weights before normalisation lie in [LOWEST, LOWEST + SPAN] (the authors' code)."""

LEAST_VARIANCE = 1e-8
"""Of margins (the authors' code): if all are equal, so are the weights of a side."""


def token_weights(
    vectors: torch.Tensor,
    advantages: torch.Tensor,
    refinements: int,
    all_sum: AllSum = one_process,
) -> torch.Tensor:
    """float32 [N], of mean 1: tokens nearer to the mean of their own side weigh more.

    vectors: [N, D]; advantages: [N]; refinements: rounds after the first. All 1 where one side is
    empty.
    """
    exact = float64_device(vectors.device)
    if exact != vectors.device:
        there = token_weights(vectors.to(exact), advantages.to(exact), refinements, all_sum)
        return there.to(vectors.device)

    # tokens of the two sides and of the batch
    sides = (advantages > 0, advantages < 0)
    everyone = torch.ones_like(sides[0])
    counts = all_sum(torch.stack([side.sum() for side in (*sides, everyone)]).double())
    if (counts[:2] == 0).any():
        return torch.ones_like(advantages, dtype=torch.float32)

    share = torch.ones_like(advantages, dtype=torch.float64)  # [N]
    gammas: list[torch.Tensor] = []
    for _ in range(1 + refinements):
        magnitude = advantages.abs()
        up, down = (_distances(vectors, side * magnitude * share, all_sum) for side in sides)
        margin = torch.where(sides[0], down - up, up - down)  # [N], above 0: nearer to its own side
        pairs = zip(sides, counts[:2], strict=True)
        spreads = [_spread(margin, side, count, all_sum) for side, count in pairs]

        # As in the authors' code, margins to the present means are divided by the spread of the
        # margins to the means before; it moves a weight by up to .05 of the .4 that it can have.
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


def _spread(
    margin: torch.Tensor,
    side: torch.Tensor,
    count: torch.Tensor,
    all_sum: AllSum,
) -> torch.Tensor:
    """Standard deviation of the margins of one side, of the population of the whole batch."""
    mean = all_sum((margin * side).sum()) / count
    variance = all_sum(((margin - mean).square() * side).sum()) / count
    return variance.clamp(min=LEAST_VARIANCE).sqrt()


@dataclass(kw_only=True)
class DelTA(DAPO):
    """DAPO with discriminative token weights (arXiv 2605.21467; details from the authors' code).

        loss = DAPO's with A times the weight at the head of the file, dual clip 10

    4 updates per rollout (32 of 128 prompts). Ours: weights of 1 where a side is empty.
    """

    name: ClassVar[str] = "delta"
    defaults: ClassVar[Defaults] = Defaults(group=16, updates=4, weight_decay=0.1)

    dual_clip: float | None = 10.0
    dynamic_sampling: bool = False
    refinements: int = 1
    """Rounds in which the means are weighted by the last round's result."""

    @property
    def needs_hidden(self) -> bool:
        """True: the token vectors are made of them."""
        return True

    def remember(
        self,
        samples: Samples,
        scores: Scores,
        source: ScoredBy,
    ) -> dict[str, torch.Tensor]:
        """The old policy's hidden states, all of them: the means need two passes over the batch."""
        if source == "reference":
            return {}
        if scores.hidden is None:
            raise ValueError("delta needs the hidden states of the old policy")
        return {HIDDEN: scores.hidden.detach()}

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Weigh the advantages; the hidden states are let go."""
        kept = samples.extra if HIDDEN in samples.extra else self.remember(samples, old, "old")
        rest = {name: value for name, value in samples.extra.items() if name != HIDDEN}
        samples = super().prepare(replace(samples, extra=rest), old)
        assert samples.old_logprobs is not None, "prepare puts them there"
        assert samples.advantages is not None, "prepare puts them there"

        # The N tokens of this process, and their v; after this no hidden state is needed.
        at = samples.mask
        surprise = 1 - samples.old_logprobs[at].exp()  # [N]
        vectors = surprise[:, None] * kept[HIDDEN][at]  # [N, D]
        advantages = samples.advantages.clone()
        advantages[at] *= token_weights(vectors, advantages[at], self.refinements, self.all_sum)
        return replace(samples, advantages=advantages)
