"""The clipped policy gradient over groups, of which GRPO and its relatives are settings.

    A     = advantage of the completion within its group                            advantages.py
    rho   = policy / policy before the updates, of the token or of the completion   token_loss.py
    w     = policy before the updates / sampler, if that is not the trainer         corrections.py
    KL    = an estimate of KL(policy || reference) from the drawn token             divergence.py

    loss  = aggregate(-w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A))
            + kl_coef aggregate(KL)

A relative is a subclass with other defaults: ``advantage``, ``aggregation``, ``ratio``, clips, KL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from nvfp4.rl.objectives.advantages import (
    group_advantages,
    leave_one_out_advantages,
    normalise_over_batch,
    on_tokens,
)
from nvfp4.rl.objectives.base import Metrics, StepPlan
from nvfp4.rl.objectives.divergence import Estimator, Importance, kl_estimate
from nvfp4.rl.objectives.rewarded import RewardedObjective
from nvfp4.rl.objectives.token_loss import (
    Aggregation,
    Ratio,
    aggregate,
    clip_metrics,
    clipped_loss,
    log_ratio,
    token_mean,
)
from nvfp4.rl.samples import Samples, Scores, Totals

Advantage = Literal["group_std", "group_mean", "leave_one_out", "reinforce_plus_plus"]


@dataclass(kw_only=True)
class PolicyGradient(RewardedObjective):
    """The loss at the head of the file."""

    advantage: Advantage = "group_std"
    """(r - mean) / std of the group; r - mean; r - mean of the others; r - mean, then normalised
    over the batch."""
    aggregation: Aggregation = "grpo"
    """Mean over a completion then over samples (grpo); over all tokens (dapo); by the length limit
    (dr_grpo)."""
    ratio: Ratio = "token"
    """Ratio to the old policy: of each token; its geometric mean over the completion; one (forced
    on-policy)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - this."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + this; larger than clip_low ("clip-higher") keeps rare
    tokens alive."""
    dual_clip: float | None = None
    """Bound on the ratio of tokens with a negative advantage; None: no bound."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference model; 0: no reference is needed."""
    kl: Estimator = "k3"
    """Estimator of the KL from the drawn tokens."""
    kl_importance: Importance = "none"
    """Multiply the estimate by the ratio (TRL's use_bias_correction_kl), which makes the gradient
    of k1 and k3 that of the KL; or by 1 with the gradient of the log-probability (score, NeMo RL):
    the same where the ratio is 1."""
    kl_log_ratio_clamp: float | None = None
    """Clamp of the log-ratio to the reference; None: none."""
    kl_value_clamp: float | None = None
    """Clamp of the estimate; None: none."""

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL term, which alone reads it."""
        return self.kl_coef != 0

    @property
    def upper_clip(self) -> float:
        """clip_high at this moment; kinds that control it say otherwise."""
        return self.clip_high

    def idle(self, plan: StepPlan) -> dict[str, str]:
        """Clips where every ratio is exactly 1, and what belongs to a KL that is not there."""
        reasons = super().idle(plan)
        clips = ("clip_low", "clip_high", "dual_clip")
        if self.ratio == "one":
            reasons |= dict.fromkeys(clips, "ratio is one")
        elif plan.updates == 1:  # then most objectives of this kind are one
            why = "one update per rollout leaves every ratio at exactly 1"
            reasons |= dict.fromkeys(clips, why)
        if not self.kl_coef:
            names = ("kl", "kl_importance", "kl_log_ratio_clamp", "kl_value_clamp")
            reasons |= dict.fromkeys(names, "kl_coef is 0")
        return reasons

    def advantages(self, samples: Samples) -> torch.Tensor:
        """The advantages that the option names, float32 [S, T]."""
        rewards, groups, mask = samples.rewards, samples.groups, samples.mask
        if self.advantage == "leave_one_out":
            return on_tokens(leave_one_out_advantages(rewards, groups), mask)
        by_std = self.advantage == "group_std"
        advantages = group_advantages(rewards, groups, divide_by_std=by_std)
        if self.advantage == "reinforce_plus_plus":
            return normalise_over_batch(advantages, mask, self.all_sum)
        return on_tokens(advantages, mask)

    def loss(
        self,
        samples: Samples,
        scores: Scores,
        totals: Totals,
    ) -> tuple[torch.Tensor, Metrics]:
        """The share of this micro-batch in the formula."""
        assert samples.old_logprobs is not None, "prepare puts them there"
        assert samples.advantages is not None, "prepare puts them there"
        mask, advantages = samples.mask, samples.advantages
        logprobs = torch.where(mask, scores.logprobs, 0.0)  # the mask may have shrunk since
        ratios = log_ratio(logprobs, samples.old_logprobs, mask, self.ratio)

        # -w min(rho A, clip(rho) A)
        clips = (self.clip_low, self.upper_clip)
        surrogate = clipped_loss(ratios, advantages, *clips, self.dual_clip)
        token_loss = self.corrected(surrogate, samples)
        loss = aggregate(token_loss, mask, totals, self.aggregation)
        metrics = {
            **clip_metrics(ratios, advantages, mask, *clips, totals),
            "entropy": token_mean(scores.entropy, mask, totals),
            "policy_loss": loss.detach(),
            "policy_loss/magnitude": aggregate(
                token_loss.detach().abs(),
                mask,
                totals,
                self.aggregation,
            ),
        }

        # + kl_coef KL
        if self.kl_coef:
            kl = self._kl(samples, logprobs, ratios)
            kl_loss = self.kl_coef * aggregate(kl, mask, totals, self.aggregation)
            loss = loss + kl_loss
            metrics["kl"] = token_mean(kl.detach(), mask, totals)
            metrics["kl_loss"] = kl_loss.detach()
        return loss, metrics

    def _kl(
        self,
        samples: Samples,
        logprobs: torch.Tensor,
        ratios: torch.Tensor,
    ) -> torch.Tensor:
        """The estimate for each token, [S, T], with the weights that ``kl_importance`` says."""
        if samples.ref_logprobs is None:
            given = f"{self.name} with kl_coef {self.kl_coef}"
            raise ValueError(f"{given} needs ref_logprobs of a reference model")

        # in logarithms; score is 0 with the gradient of the log-probability
        log_weights = {
            "none": None,
            "score": logprobs - logprobs.detach(),
            "ratio": ratios,
        }[self.kl_importance]
        return kl_estimate(
            logprobs,
            samples.ref_logprobs,
            self.kl,
            weights=None if log_weights is None else log_weights.exp(),
            log_ratio_clamp=self.kl_log_ratio_clamp,
            value_clamp=self.kl_value_clamp,
        )
