"""Learning from one's own completions by likelihood: the loss of ssd and of rejection sampling.

    loss = mean over the tokens of accepted completions of -log policy,   at temperature ``loss_at``

No gradient here lowers the probability of anything, so neither can diverge the way a signed policy
gradient can. What is learnt depends on how the completions were drawn: hot and truncated sampling
leaves out the tail of a distribution, and fine-tuning at temperature 1 makes the model one that has
no such tail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nvfp4.rl.objectives.advantages import on_tokens
from nvfp4.rl.objectives.base import Metrics, Objective
from nvfp4.rl.objectives.token_loss import token_mean
from nvfp4.rl.samples import Samples, Scores, Totals


@dataclass(kw_only=True)
class Imitation(Objective):
    """Mean of -log policy over the tokens of the completions that ``accepted`` says."""

    entropy_gate: float | None = None
    """Learn only tokens whose entropy, in nats, exceeds this; None: all."""
    loss_at: float = 1.0
    """Temperature of the likelihood, whatever that of sampling; at the same one and without
    truncation, the likelihood of all completions has no gradient on average."""

    def __post_init__(self) -> None:
        if not self.loss_at > 0:
            raise ValueError(f"loss_at must be above 0, got {self.loss_at}")

    def loss_temperature(self, sampling: float) -> float:
        """The temperature of the likelihood, whatever that of sampling."""
        return self.loss_at

    def accepted(self, samples: Samples) -> torch.Tensor:
        """bool [S]: completions that are imitated."""
        raise NotImplementedError

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Leave out all but the accepted tokens, and put advantages of 1 on these."""
        if samples.old_logprobs is None:
            samples = replace(samples, old_logprobs=old.logprobs.detach())

        # what is left out is no token: the mean is over what is imitated
        samples = samples.within(self.accepted(samples)[:, None])
        if self.entropy_gate is not None:
            samples = samples.within(old.entropy > self.entropy_gate)
        ones = torch.ones_like(samples.rewards)
        return replace(samples, advantages=on_tokens(ones, samples.mask))

    def describe(self, samples: Samples) -> dict[str, float]:
        """Share of completions that are imitated, at least in one token."""
        return {"accepted_share": samples.mask.any(dim=1).float().mean().item()}

    def loss(
        self,
        samples: Samples,
        scores: Scores,
        totals: Totals,
    ) -> tuple[torch.Tensor, Metrics]:
        """The share of this micro-batch in the mean."""
        loss = token_mean(-scores.logprobs, samples.mask, totals)
        entropy = token_mean(scores.entropy, samples.mask, totals)
        return loss, {"policy_loss": loss.detach(), "entropy": entropy}
