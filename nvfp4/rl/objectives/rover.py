"""ROVER: evaluate the uniform policy instead of improving one.

In a tree of tokens whose leaves have rewards, the value of the uniform policy already says which
branch leads to right answers; sampling by it keeps more ways than improving a policy does. Q-values
are read off the model's own log-probabilities, so no second network is needed.

    remember   the old policy's mean log-probability over the vocabulary, [S, T] of [S, T, V]
    prepare    r - mean of the group, on every token
    loss       Q of the drawn tokens against reward + value of the next token, squared
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from nvfp4.rl.objectives.advantages import group_advantages, on_tokens
from nvfp4.rl.objectives.base import Defaults, Metrics, ScoredBy, StepPlan
from nvfp4.rl.objectives.rewarded import RewardedObjective
from nvfp4.rl.objectives.token_loss import token_mean
from nvfp4.rl.samples import Samples, Scores, Totals, in_float64

OLD_MEAN = "mean_logprob"
"""Key of ``Samples.extra``: the old policy's mean log-probability over the vocabulary, [S, T]."""

RIGHT, WRONG = 5.0, 2.0
"""What a right completion earns in a batch of wrong ones, and a wrong one costs among right ones
(batch_rates; the authors' code)."""


def vocabulary_mean_logprob(logits: torch.Tensor) -> torch.Tensor:
    """Mean over the vocabulary of log-softmax(logits), not stored: [..., V] -> [...]."""
    return logits.mean(dim=-1) - logits.logsumexp(dim=-1)


@dataclass(kw_only=True)
class Rover(RewardedObjective):
    """Random policy valuation (arXiv 2509.24981; details from the authors' code).

        Q_t  = q_scale (log policy - log old policy) of the drawn token
        V_t  = q_scale (the same difference, in the mean over the whole vocabulary) one token on;
               0 after the last, without gradient
        loss = mean over tokens of (Q_t - (r - mean of the group) - V_t)^2

    At the first update of a rollout Q and V are 0, and the gradient is 2 q_scale times that of
    REINFORCE. No reference, no KL. The authors do 4 updates per rollout (32 of 128 prompts), for
    mathematics with 8 completions at temperature 0.6, and there divide by the standard deviation;
    for countdown with 5 completions and without.
    """

    name: ClassVar[str] = "rover"
    defaults: ClassVar[Defaults] = Defaults(updates=4, temperature=0.6, weight_decay=0.01)
    renamed: ClassVar[Mapping[str, str]] = {"divide_by_std": "advantage=group_std"}

    q_scale: float = 1.0
    """What log-ratios are multiplied by to be Q-values (the code's rover_t)."""
    advantage: Literal["group_mean", "group_std", "batch_rates"] = "group_mean"
    """r - mean of the group (the paper); divided by its standard deviation (the script for
    mathematics); or 5 (1 - share of right ones in the batch) for a right completion and -2 (1 -
    share of wrong ones) for a wrong one (the code's rover estimator)."""
    value_scale: float = 1.0
    """What the value of the next token is multiplied by (the code's next_q_scale_factor); 0: only
    the reward counts."""
    q_clip: float | None = None
    """Q stays at log(1 + this), without gradient, where it is above and below its target, and at
    log(1 - this) where it is below and above (the code's use_rover_clip with clip_ratio 0.2); None:
    no clip."""

    @property
    def needs_logits(self) -> bool:
        """True: values are means over the vocabulary."""
        return True

    def acts_like(self, plan: StepPlan) -> str | None:
        """Without a second update there is neither Q nor value."""
        if plan.updates > 1:
            return None
        return "REINFORCE with a centred reward, since Q and V are still 0"

    def idle(self, plan: StepPlan) -> dict[str, str]:
        """Those of rewarded objectives, and what scales or clips a Q that is 0."""
        reasons = super().idle(plan)
        if plan.updates == 1:
            why = "one update per rollout leaves Q and V at exactly 0"
            reasons |= dict.fromkeys(("value_scale", "q_clip"), why)
        return reasons

    def advantages(self, samples: Samples) -> torch.Tensor:
        """What Q is to be, but for the value of what follows, on every token."""
        if self.advantage == "batch_rates":
            return on_tokens(self._batch_rates(samples.rewards), samples.mask)
        divide = self.advantage == "group_std"
        centred = group_advantages(samples.rewards, samples.groups, divide_by_std=divide)
        return on_tokens(centred, samples.mask)

    def _batch_rates(self, rewards: torch.Tensor) -> torch.Tensor:
        """5 (1 - share of right) for what earns anything, -2 (1 - share of wrong) otherwise."""
        # the shares are of the batch of all processes
        right = rewards > 0
        counts = torch.stack((right.sum(), (~right).sum()))
        counts = self.all_sum(in_float64(counts))
        values = torch.tensor((RIGHT, -WRONG), device=counts.device) * (1 - counts / counts.sum())
        values = values.float().to(rewards.device)
        return torch.where(right, values[0], values[1])

    def remember(
        self,
        samples: Samples,
        scores: Scores,
        source: ScoredBy,
    ) -> dict[str, torch.Tensor]:
        """One mean per token of the old policy's logits."""
        if source == "reference":
            return {}
        if scores.logits is None:
            raise ValueError("rover needs the logits of the old policy")
        return {OLD_MEAN: vocabulary_mean_logprob(scores.logits.detach())}

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Add the old policy's mean log-probabilities, unless they have been remembered."""
        if OLD_MEAN not in samples.extra:
            extra = self.remember(samples, old, "old")
            samples = replace(samples, extra={**samples.extra, **extra})
        return super().prepare(samples, old)

    def loss(
        self,
        samples: Samples,
        scores: Scores,
        totals: Totals,
    ) -> tuple[torch.Tensor, Metrics]:
        """The share of this micro-batch in the squared error."""
        assert samples.old_logprobs is not None, "prepare puts them there"
        assert samples.advantages is not None, "prepare puts them there"
        if scores.logits is None:
            raise ValueError("rover needs Scores.logits")
        mask = samples.mask
        logprobs = torch.where(mask, scores.logprobs, 0.0)
        q = self.q_scale * (logprobs - samples.old_logprobs)  # [S, T]

        # the value of what follows: how far the mean over the vocabulary has risen, one token on
        mean = vocabulary_mean_logprob(scores.logits.detach())  # [S, T] of [S, T, V]
        rise = self.q_scale * (mean - samples.extra[OLD_MEAN])
        value = torch.zeros_like(rise)
        value[:, :-1] = torch.where(mask[:, 1:], rise[:, 1:], 0.0)

        # Q is drawn to its target, which has no gradient
        target = samples.advantages + self.value_scale * value
        error = self._clipped(q, target) - target
        loss = token_mean(self.corrected(error**2, samples), mask, totals)
        return loss, {
            "entropy": token_mean(scores.entropy, mask, totals),
            "policy_loss": loss.detach(),
            "q": token_mean(q.detach(), mask, totals),
            "next_value": token_mean(value, mask, totals),
        }

    def _clipped(self, q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Q [S, T] without gradient where it is beyond a bound and its target is farther still."""
        if self.q_clip is None:
            return q
        high, low = math.log1p(self.q_clip), math.log1p(-self.q_clip)
        q = torch.where((target > q) & (q > high), high, q)
        return torch.where((target < q) & (q < low), low, q)
