"""ROVER: evaluate the uniform policy instead of improving one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from nvfp4.rl.objectives.advantages import group_advantages, on_tokens
from nvfp4.rl.objectives.aggregation import token_mean
from nvfp4.rl.objectives.base import Metrics
from nvfp4.rl.objectives.rewarded import RewardedObjective
from nvfp4.rl.samples import Samples, Scores, Totals

OLD_MEAN = "mean_logprob"


def vocabulary_mean_logprob(logits: torch.Tensor) -> torch.Tensor:
    """Mean over the vocabulary of log-softmax(logits), without storing it: logits [..., V] -> [...]."""
    return logits.mean(dim=-1) - logits.logsumexp(dim=-1)


@dataclass(kw_only=True)
class Rover(RewardedObjective):
    """Random policy valuation for diverse reasoning (arXiv 2509.24981; details from the authors' code).

    Q_t = q_scale (log policy - log old policy) of the drawn token; the value of what follows, V_t, is the same
    difference in the mean over the whole vocabulary one token on, 0 after the last, without gradient; the loss is the
    mean over tokens of (Q_t - (r - mean of the group) - V_t)^2. At the first update of a rollout Q and V are 0, and the
    gradient is 2 * q_scale times that of REINFORCE. No reference, no KL, no clip.
    """

    name: ClassVar[str] = "rover"

    q_scale: float = 1.0
    """What log-ratios are multiplied by to be Q-values (the code's rover_t)."""
    divide_by_std: bool = False
    """Divide the centred reward by the group's standard deviation, as the authors' script for mathematics does."""

    @property
    def needs_logits(self) -> bool:
        """For the mean over the vocabulary."""
        return True

    def advantages(self, samples: Samples) -> torch.Tensor:
        """The centred reward on every token."""
        centred = group_advantages(samples.rewards, samples.groups, divide_by_std=self.divide_by_std)
        return on_tokens(centred, samples.mask)

    def remember(
        self, samples: Samples, scores: Scores, source: Literal["old", "reference"]
    ) -> dict[str, torch.Tensor]:
        """Of the old policy's logits one mean per token."""
        if source == "reference":
            return {}
        if scores.logits is None:
            raise ValueError("rover needs the logits of the old policy")
        return {OLD_MEAN: vocabulary_mean_logprob(scores.logits.detach())}

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """With the old policy's mean log-probabilities, unless they have been remembered."""
        if OLD_MEAN not in samples.extra:
            samples = replace(samples, extra={**samples.extra, **self.remember(samples, old, "old")})
        return super().prepare(samples, old)

    def loss(self, samples: Samples, scores: Scores, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The share of this micro-batch in the squared error."""
        assert samples.old_logprobs is not None, "prepare puts them there"
        assert samples.advantages is not None, "prepare puts them there"
        if scores.logits is None:
            raise ValueError("rover needs Scores.logits")
        mask = samples.mask
        q = self.q_scale * (torch.where(mask, scores.logprobs, 0.0) - samples.old_logprobs)
        rise = self.q_scale * (vocabulary_mean_logprob(scores.logits.detach()) - samples.extra[OLD_MEAN])
        value = torch.zeros_like(rise)
        value[:, :-1] = torch.where(mask[:, 1:], rise[:, 1:], 0.0)
        error = q - (samples.advantages + value)
        loss = token_mean(self.corrected(error**2, samples), mask, totals)
        metrics = {
            "entropy": token_mean(scores.entropy, mask, totals),
            "policy_loss": loss.detach(),
            "q": token_mean(q.detach(), mask, totals),
            "next_value": token_mean(value, mask, totals),
        }
        return loss, metrics
