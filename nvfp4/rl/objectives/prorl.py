"""ProRL: reinforcement learning that goes on for thousands of steps, in its three versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from nvfp4.rl.objectives.aggregation import Aggregation
from nvfp4.rl.objectives.base import RESET_REFERENCE, Defaults, Plan
from nvfp4.rl.objectives.controllers import EntropyClip, ResetCriterion
from nvfp4.rl.objectives.corrections import Correction
from nvfp4.rl.objectives.divergence import Estimator, Importance
from nvfp4.rl.objectives.lengths import cosine_penalty, staged
from nvfp4.rl.objectives.policy_gradient import Advantage, PolicyGradient
from nvfp4.rl.objectives.surrogate import Ratio
from nvfp4.rl.samples import Samples


@dataclass(kw_only=True)
class ProRL(PolicyGradient):
    """Prolonged reinforcement learning (arXiv 2505.24864): GRPO with clips 0.2 and 0.4, dynamic sampling, sampling
    temperature 1.2, a small KL term that stays, and resets: when the KL term dominates or validation stalls, the policy
    becomes the reference and the optimiser starts anew. The length limit is short for most of the run. 4 updates per
    rollout (64 of 256 prompts), learning rate 2e-6.

    Ours, as nothing was published: the numbers of the reset criterion, the rule of the entropy-controlled clip, the
    shape of the scheduled length penalty. The KL is compared with the mean magnitude of the token loss: the mean itself
    vanishes on-policy, where advantages add up to 0.
    """

    name: ClassVar[str] = "prorl"
    defaults: ClassVar[Defaults] = Defaults(group=16, updates=4, temperature=1.2, lr=2e-6)

    clip_high: float = 0.4
    dynamic_sampling: bool = True
    kl_coef: float = 1e-4
    entropy_target: float | None = None
    """Mean token entropy in nats that --clip-high is steered to, in steps of 0.01; None: --clip-high is constant."""
    clip_high_max: float = 0.4
    """Upper end of the controlled --clip-high; the lower one is --clip-low."""
    reset_kl_share: float = 0.5
    """Reset the reference when the KL term exceeds this share of the token loss --reset-patience times; 0: never."""
    reset_patience: int = 5
    """Steps in a row that the KL term must dominate."""
    reset_every: int = 0
    """Reset the reference every so many steps; 0: never."""
    reset_stall: int = 0
    """Reset the reference after so many evaluations without improvement; 0: never."""
    reset_delta: float = 0.0
    """What counts as an improvement of the validation score."""
    validation_metric: str = "eval/pass@1"
    """The validation score among the metrics of a step."""
    length_stages: tuple[int, ...] = ()
    """Length limits of the later stages of a run, in tokens."""
    length_stage_steps: tuple[int, ...] = ()
    """Steps at which they begin, ascending."""
    length_penalty: float = 0.0
    """Weight of a cosine penalty on the length of a completion; 0: none."""
    length_penalty_period: int = 200
    """Steps from one phase with the length penalty to the next."""
    length_penalty_steps: int = 50
    """Steps at the end of each period in which the length penalty applies."""

    def __post_init__(self) -> None:
        if len(self.length_stages) != len(self.length_stage_steps):
            raise ValueError(
                f"length_stages and length_stage_steps must be of equal length, got {self.length_stages} and "
                f"{self.length_stage_steps}"
            )
        if list(self.length_stage_steps) != sorted(self.length_stage_steps):
            raise ValueError(f"length_stage_steps must ascend, got {self.length_stage_steps}")
        self._steps = 0
        target = float("nan") if self.entropy_target is None else self.entropy_target
        self._clip = EntropyClip(self.clip_high, target, self.clip_low, max(self.clip_high, self.clip_high_max))
        criteria = (self.reset_kl_share, self.reset_patience, self.reset_every, self.reset_stall, self.reset_delta)
        self._reset = ResetCriterion(*criteria)

    def idle(self, plan: Plan) -> dict[str, str]:
        """Also the control of a clip that does not act, and resets of a reference that is not there."""
        found = super().idle(plan)
        if self.entropy_target is None:
            found["clip_high_max"] = "entropy_target is not given"
        if "clip_high" in found:
            found |= dict.fromkeys(("entropy_target", "clip_high_max"), found["clip_high"])
        resets = ("reset_kl_share", "reset_patience", "reset_every", "reset_stall", "reset_delta", "validation_metric")
        if not self.kl_coef:
            found |= dict.fromkeys(resets, "kl_coef is 0, so there is no reference")
        elif not plan.evaluates:
            found |= dict.fromkeys(("reset_stall", "reset_delta", "validation_metric"), "eval_every is 0")
        if not self.length_penalty:
            found |= dict.fromkeys(("length_penalty_period", "length_penalty_steps"), "length_penalty is 0")
        return found

    @property
    def upper_clip(self) -> float:
        """What the entropy has made of --clip-high."""
        return self._clip.value

    def max_new_tokens(self, configured: int) -> int:
        """The limit of the present stage."""
        return staged(self._steps, self.length_stage_steps, self.length_stages, configured)

    @property
    def reads_evaluations(self) -> bool:
        """Those that may say that the run has stalled."""
        return self.reset_stall > 0

    def length_limits(self) -> tuple[int, ...]:
        """Those of the later stages."""
        return self.length_stages

    def shape_rewards(self, samples: Samples) -> torch.Tensor:
        """As ever, and in its phases the cosine penalty."""
        rewards = super().shape_rewards(samples)
        phase = self._steps % self.length_penalty_period
        if not self.length_penalty or phase < self.length_penalty_period - self.length_penalty_steps:
            return rewards
        return rewards + self.length_penalty * cosine_penalty(samples.lengths, samples.limit)

    def observe(self, metrics: Mapping[str, float]) -> frozenset[str]:
        """Steers the clip by "entropy"; weighs "kl_loss" against "policy_loss/magnitude"; reads --validation-metric."""
        self._steps += 1
        if self.entropy_target is not None:
            self._clip.update(metrics["entropy"])
        kl_cost, policy_cost = abs(metrics.get("kl_loss", 0.0)), metrics["policy_loss/magnitude"]
        due = self._reset.update(kl_cost, policy_cost, metrics.get(self.validation_metric))
        return frozenset({RESET_REFERENCE}) if due and self.needs_reference else frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Steps, clip and reset criterion."""
        return {"steps": self._steps, "clip": self._clip.state_dict(), "reset": self._reset.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._steps = state["steps"]
        self._clip.load_state_dict(state["clip"])
        self._reset.load_state_dict(state["reset"])


@dataclass(kw_only=True)
class ProRLv2(ProRL):
    """ProRL v2, by NeMo RL's guide and configuration: REINFORCE++ (r - mean of the group, normalised over the tokens of
    the batch), clips 0.2 and 0.27, mean over tokens, "stop properly" (truncated completions earn nothing), k2 with
    clamps 20 and 10 and the score function's gradient, IcePop weights inside [0.5, 5]. Temperature 1, one update per
    rollout (all 512 completions), learning rate 5e-6, and no resets of the reference."""

    name: ClassVar[str] = "prorl_v2"
    defaults: ClassVar[Defaults] = Defaults(group=16, lr=5e-6, weight_decay=0.01)

    advantage: Advantage = "reinforce_plus_plus"
    aggregation: Aggregation = "dapo"
    clip_high: float = 0.27
    truncated: Literal["keep", "mask", "scale"] = "scale"
    kl: Estimator = "k2"
    kl_importance: Importance = "score"
    kl_log_ratio_clamp: float | None = 20.0
    kl_value_clamp: float | None = 10.0
    correction: Correction = "token_mask"
    correction_high: float = 5.0
    reset_kl_share: float = 0.0


@dataclass(kw_only=True)
class ProRLv21(ProRLv2):
    """ProRL v2.1, for mixtures of experts, by NeMo RL's guide: ratio one (forced on-policy), completions dropped whose
    geometric mean weight is outside [0.999, 1.002], no dynamic sampling."""

    name: ClassVar[str] = "prorl_v2.1"

    ratio: Ratio = "one"
    dynamic_sampling: bool = False
    correction: Correction = "geometric_mask_token"
    correction_low: float = 0.999
    correction_high: float = 1.002
