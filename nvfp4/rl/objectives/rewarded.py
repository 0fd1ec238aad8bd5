"""What most objectives do with a rollout before their loss.

    rewards    penalties for length, or a factor on what the length limit cut        shape_rewards
    groups     under dynamic sampling those whose rewards are all equal are replaced     keep
    prepare    completions that were cut may leave the loss, advantages are made,
               importance weights for a sampler that is not the trainer

A kind says how advantages are made (``advantages``) and what the loss is (``loss``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from nvfp4.rl.objectives.advantages import has_spread
from nvfp4.rl.objectives.base import Objective, StepPlan
from nvfp4.rl.objectives.corrections import Correction, importance_weights, out_of_bounds
from nvfp4.rl.objectives.lengths import overlong_penalty
from nvfp4.rl.samples import Samples, Scores

IMPORTANCE = "importance"
"""Key of ``Samples.extra``: weights [S, T] of the correction, where there is one."""


_Mismatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Correction, float, float]
"""Arguments of ``importance_weights``, in its order."""


@dataclass(kw_only=True)
class RewardedObjective(Objective):
    """An objective over rewarded groups of completions."""

    truncated: Literal["keep", "mask", "scale"] = "keep"
    """Completions cut by the limit: keep them; mask them out of the loss; scale their reward."""
    truncated_scale: float = 0.0
    """Factor on the reward of a cut completion with truncated=scale ("stop properly")."""
    overlong_share: float = 0.0
    """Last share of the length limit, over which a penalty falls from 0 to -overlong_penalty; 0: no
    penalty."""
    overlong_penalty: float = 0.5
    """That penalty at the limit: half of what a right answer is ahead of a wrong one, if rewards
    are 0 and 1."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by others."""
    correction: Correction = "none"
    """Importance weights for a sampler that is not the trainer: TIS is token_truncate, MIS and
    IcePop token_mask."""
    correction_low: float = 0.5
    """Lower bound of the kinds of correction that mask."""
    correction_high: float = 2.0
    """Upper bound of the kinds of correction that truncate or mask."""

    def shape_rewards(self, samples: Samples) -> torch.Tensor:
        """Scale the rewards of cut completions, as in NeMo RL; else add the overlong penalty."""
        rewards = samples.rewards
        if self.truncated == "scale":
            return torch.where(samples.truncated, rewards * self.truncated_scale, rewards)
        if not self.overlong_share:
            return rewards
        penalty = overlong_penalty(samples.lengths, samples.limit, self.overlong_share)
        return rewards + self.overlong_penalty * penalty

    def idle(self, plan: StepPlan) -> dict[str, str]:
        """Scales, penalties and bounds whose part is switched off."""
        reasons = {}

        # rewards of completions that are cut or long
        if self.truncated != "scale":
            reasons["truncated_scale"] = f"truncated is {self.truncated}, not scale"
        if self.truncated == "scale":
            names = ("overlong_share", "overlong_penalty")
            reasons |= dict.fromkeys(names, "truncated is scale, which takes its place")
        elif not self.overlong_share:
            reasons["overlong_penalty"] = "overlong_share is 0"

        # bounds of importance weights, where the kind has none
        if not self.correction.endswith(("_mask", "_mask_token")):
            reasons["correction_low"] = f"correction {self.correction} drops nothing"
        if not self.correction.endswith(("_truncate", "_mask", "_mask_token")):
            reasons["correction_high"] = f"correction {self.correction} has no bound"
        return reasons

    def keep(self, samples: Samples) -> torch.Tensor:
        """Groups with at least two different rewards, if sampling is dynamic."""
        if not self.dynamic_sampling:
            return super().keep(samples)
        return has_spread(samples.rewards, samples.groups)

    def advantages(self, samples: Samples) -> torch.Tensor:
        """float32 [S, T], 0 outside the mask."""
        raise NotImplementedError

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Add old log-probabilities, advantages and importance weights, over whole groups."""
        if samples.old_logprobs is None:
            samples = replace(samples, old_logprobs=old.logprobs.detach())
        if self.truncated == "mask":
            samples = samples.within(~samples.truncated[:, None])

        # after that: some advantages are means over the tokens that are left
        samples = replace(samples, advantages=self.advantages(samples))
        if self.correction == "none":
            return samples
        weights = importance_weights(*self._mismatch(samples))
        return replace(samples, extra={**samples.extra, IMPORTANCE: weights})

    def corrected(self, token_loss: torch.Tensor, samples: Samples) -> torch.Tensor:
        """token_loss [S, T] times the importance weights, if there are any."""
        weights = samples.extra.get(IMPORTANCE)
        return token_loss if weights is None else token_loss * weights

    def describe(self, samples: Samples) -> dict[str, float]:
        """Share of samples in groups without spread, and the importance weights if there are any:
        mean, extremes, share out of bounds (NeMo RL's is_oob_ratio)."""
        spread = has_spread(samples.rewards, samples.groups).float().mean().item()
        figures = {"frac_reward_zero_std": 1.0 - spread}
        if IMPORTANCE not in samples.extra or not samples.mask.any():
            return figures

        # of the tokens that the loss reads
        weights = samples.extra[IMPORTANCE][samples.mask]
        outside = out_of_bounds(*self._mismatch(samples))[samples.mask]
        name = "sampling/importance_sampling_ratio"
        return {
            **figures,
            f"{name}/mean": weights.mean().item(),
            f"{name}/min": weights.min().item(),
            f"{name}/max": weights.max().item(),
            "is_oob_ratio": outside.float().mean().item(),
        }

    def _mismatch(self, samples: Samples) -> _Mismatch:
        """The arguments of ``importance_weights`` and ``out_of_bounds``."""
        assert samples.old_logprobs is not None, "prepare puts them there"
        bounds = (self.correction, self.correction_low, self.correction_high)
        return samples.old_logprobs, samples.sampler_logprobs, samples.mask, *bounds
