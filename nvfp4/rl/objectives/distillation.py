"""Learning from one's own completions by likelihood: all of them (SSD), or those that a verifier accepts.

Neither has a gradient that lowers the probability of anything, so neither can diverge the way a signed policy gradient
can. What is learnt depends on how the completions were drawn: hot and truncated sampling leaves out the tail of a
distribution, and fine-tuning at temperature 1 makes the model one that has no such tail.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from nvfp4.rl.objectives.advantages import on_tokens
from nvfp4.rl.objectives.aggregation import token_mean
from nvfp4.rl.objectives.base import Defaults, Metrics, Objective
from nvfp4.rl.samples import Samples, Scores, Totals


@dataclass(kw_only=True)
class Imitation(Objective):
    """Mean of -log policy over the tokens of the completions that ``accepted`` says, at a temperature of its own."""

    entropy_gate: float | None = None
    """Learn only tokens whose entropy, in nats, exceeds this; None: all."""
    loss_at: float = 1.0
    """Temperature of the likelihood, whatever that of sampling; at the same one and without truncation, the likelihood
    of all completions has no gradient on average."""

    def __post_init__(self) -> None:
        if not self.loss_at > 0:
            raise ValueError(f"loss_at must be above 0, got {self.loss_at}")

    def loss_temperature(self, sampling: float) -> float:
        """That of the likelihood."""
        return self.loss_at

    def accepted(self, samples: Samples) -> torch.Tensor:
        """bool [S]: completions that are imitated."""
        raise NotImplementedError

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """With all but the accepted tokens left out, and advantages of 1 on these."""
        if samples.old_logprobs is None:
            samples = replace(samples, old_logprobs=old.logprobs.detach())
        samples = samples.within(self.accepted(samples)[:, None])
        if self.entropy_gate is not None:
            samples = samples.within(old.entropy > self.entropy_gate)
        return replace(samples, advantages=on_tokens(torch.ones_like(samples.rewards), samples.mask))

    def describe(self, samples: Samples) -> dict[str, float]:
        """Share of completions that are imitated, at least in one token."""
        return {"accepted_share": samples.mask.any(dim=1).float().mean().item()}

    def loss(self, samples: Samples, scores: Scores, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The share of this micro-batch in the mean."""
        loss = token_mean(-scores.logprobs, samples.mask, totals)
        return loss, {"policy_loss": loss.detach(), "entropy": token_mean(scores.entropy, samples.mask, totals)}


@dataclass(kw_only=True)
class SSD(Imitation):
    """Simple self-distillation (arXiv 2604.01193; details from TRL's experimental trainer): sample hot and truncated,
    fine-tune on everything with cross-entropy at temperature 1. No verifier, no teacher, no reward.

    Temperature 1.6, top-k 20, top-p 0.8 and learning rate 5e-6 are those of TRL's example. Rewards are only looked at
    for the log. Completions that are next to empty are left out (the paper's syntactic filter; TRL's is a matter of
    characters, ours of tokens).
    """

    name: ClassVar[str] = "ssd"
    defaults: ClassVar[Defaults] = Defaults(temperature=1.6, top_p=0.8, top_k=20, lr=5e-6)

    least_tokens: int = 2
    """Completions of fewer tokens, the end-of-text token included, are left out."""

    def accepted(self, samples: Samples) -> torch.Tensor:
        """All but the next to empty."""
        return samples.lengths >= self.least_tokens


@dataclass(kw_only=True)
class RejectionSampling(Imitation):
    """Maximum likelihood of one's own completions that earned enough: sample, filter, fine-tune (STaR, arXiv
    2203.14465). With ``entropy_gate`` only positions at which the policy hesitated are learned (after ReasonMaxxer,
    arXiv 2605.06241, without its negative examples)."""

    name: ClassVar[str] = "rejection_sampling"

    accept: float = 1.0
    """Least reward of a completion that is imitated."""

    def accepted(self, samples: Samples) -> torch.Tensor:
        """Those with enough of a reward."""
        return samples.rewards >= self.accept
