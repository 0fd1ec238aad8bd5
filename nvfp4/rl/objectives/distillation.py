"""Self-distillation: imitate one's own answers that a verifier accepted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from nvfp4.rl.objectives.advantages import on_tokens
from nvfp4.rl.objectives.aggregation import token_mean
from nvfp4.rl.objectives.base import Metrics, Objective
from nvfp4.rl.samples import Samples, Scores, Totals


@dataclass(kw_only=True)
class SelfDistillation(Objective):
    """Maximum likelihood of one's own completions that earned enough: sample hot, filter, fine-tune (rejection
    sampling, arXiv 2203.14465).

    The loss is the mean of -log policy over the tokens of the accepted completions; wrong ones contribute nothing, so
    nothing can diverge. With ``entropy_gate`` only positions at which the sampling policy hesitated are learned
    (after ReasonMaxxer, arXiv 2605.06241, without its negative examples).
    """

    name: ClassVar[str] = "self_distillation"

    accept: float = 1.0
    """Least reward of a completion that is imitated."""
    entropy_gate: float | None = None
    """Learn only tokens whose entropy, in nats, exceeds this; None: all."""

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """With all but the accepted tokens left out, and advantages of 1 on these."""
        if samples.old_logprobs is None:
            samples = replace(samples, old_logprobs=old.logprobs.detach())
        samples = samples.within((samples.rewards >= self.accept)[:, None])
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
