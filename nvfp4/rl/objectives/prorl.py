"""ProRL: reinforcement learning that goes on for thousands of steps, in its three versions.

    prorl        the paper: GRPO, clip-higher, a small KL that stays, resets of the reference
    prorl_v2     NeMo RL's recipe: REINFORCE++, "stop properly", k2, IcePop weights
    prorl_v2.1   the same for mixtures of experts: forced on-policy, whole completions dropped

A long run stops learning in two ways: the entropy collapses, or the KL to a reference that is far
behind holds the policy back. Against the first stand clip-higher and a high temperature, against
the second resets.

    each step   observe(entropy, KL, loss, score) -> EntropyClip, ResetCriterion   controllers.py
    next step   upper_clip, max_new_tokens        <- what these have made of it

What changes with training is kept by these rules, and goes into checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from nvfp4.rl.objectives.base import RESET_REFERENCE, Defaults, StepPlan
from nvfp4.rl.objectives.controllers import EntropyClip, ResetCriterion
from nvfp4.rl.objectives.corrections import Correction
from nvfp4.rl.objectives.divergence import Estimator, Importance
from nvfp4.rl.objectives.lengths import cosine_penalty, value_at_stage
from nvfp4.rl.objectives.policy_gradient import Advantage, PolicyGradient
from nvfp4.rl.objectives.token_loss import Aggregation, Ratio
from nvfp4.rl.samples import Samples


@dataclass(kw_only=True)
class ProRL(PolicyGradient):
    """Prolonged reinforcement learning (arXiv 2505.24864).

        loss = GRPO's with clip(rho, 0.8, 1.4) + 1e-4 k3 to the reference

    Dynamic sampling, sampling temperature 1.2, and resets: when the KL term dominates or validation
    stalls, the policy becomes the reference and the optimiser starts anew. The length limit is
    short for most of the run. 4 updates per rollout (64 of 256 prompts), learning rate 2e-6.

    Ours, as nothing was published: the numbers of the reset criterion, the rule of the
    entropy-controlled clip, the shape of the scheduled length penalty. The KL is compared with the
    mean magnitude of the token loss: the mean itself vanishes on-policy, where advantages add up to
    0.
    """

    name: ClassVar[str] = "prorl"
    defaults: ClassVar[Defaults] = Defaults(group=16, updates=4, temperature=1.2, lr=2e-6)

    clip_high: float = 0.4
    dynamic_sampling: bool = True
    kl_coef: float = 1e-4
    entropy_target: float | None = None
    """Mean token entropy in nats that clip_high is steered to, by 0.01 per step; None: constant."""
    clip_high_max: float = 0.4
    """Upper end of the controlled clip_high; the lower one is clip_low."""
    reset_kl_share: float = 0.5
    """Reset the reference when the KL term exceeds this share of the token loss reset_patience
    times; 0: never."""
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
                f"length_stages and length_stage_steps must be of equal length, got "
                f"{self.length_stages} and {self.length_stage_steps}"
            )
        if list(self.length_stage_steps) != sorted(self.length_stage_steps):
            raise ValueError(f"length_stage_steps must ascend, got {self.length_stage_steps}")

        # NaN as target: it is never compared, since ``observe`` steers only where there is one.
        self._steps = 0
        self._clip = EntropyClip(
            value=self.clip_high,
            target=math.nan if self.entropy_target is None else self.entropy_target,
            lowest=self.clip_low,
            highest=max(self.clip_high, self.clip_high_max),
        )
        self._reset = ResetCriterion(
            share=self.reset_kl_share,
            patience=self.reset_patience,
            every=self.reset_every,
            stall=self.reset_stall,
            delta=self.reset_delta,
        )

    def idle(self, plan: StepPlan) -> dict[str, str]:
        """Those of the policy gradient, the control of an idle clip, resets without a reference."""
        reasons = super().idle(plan)

        # A clip that cannot act need not be steered either.
        if self.entropy_target is None:
            reasons["clip_high_max"] = "entropy_target is not given"
        if "clip_high" in reasons:
            names = ("entropy_target", "clip_high_max")
            reasons |= dict.fromkeys(names, reasons["clip_high"])

        # Without a KL term there is no reference to reset; a stall is seen by evaluations alone.
        of_evaluations = ("reset_stall", "reset_delta", "validation_metric")
        resets = ("reset_kl_share", "reset_patience", "reset_every", *of_evaluations)
        if not self.kl_coef:
            reasons |= dict.fromkeys(resets, "kl_coef is 0, so there is no reference")
        elif not plan.evaluates:
            reasons |= dict.fromkeys(of_evaluations, "eval_every is 0")

        if not self.length_penalty:
            names = ("length_penalty_period", "length_penalty_steps")
            reasons |= dict.fromkeys(names, "length_penalty is 0")
        return reasons

    @property
    def upper_clip(self) -> float:
        """clip_high as the entropy has moved it."""
        return self._clip.value

    def max_new_tokens(self, configured: int) -> int:
        """The limit of the present stage."""
        return value_at_stage(self._steps, self.length_stage_steps, self.length_stages, configured)

    @property
    def reads_evaluations(self) -> bool:
        """Whether evaluations may say that the run has stalled."""
        return self.reset_stall > 0

    def length_limits(self) -> tuple[int, ...]:
        """The limits of the later stages."""
        return self.length_stages

    def shape_rewards(self, samples: Samples) -> torch.Tensor:
        """The usual penalties; at the end of each period the cosine penalty as well."""
        rewards = super().shape_rewards(samples)
        phase = self._steps % self.length_penalty_period
        begins = self.length_penalty_period - self.length_penalty_steps
        if not self.length_penalty or phase < begins:
            return rewards
        return rewards + self.length_penalty * cosine_penalty(samples.lengths, samples.limit)

    def observe(self, metrics: Mapping[str, float]) -> frozenset[str]:
        """Steer the clip by the entropy, and say whether the reference is due for a reset.

        Reads "entropy"; "kl_loss" against "policy_loss/magnitude"; the score of
        ``validation_metric``.
        """
        self._steps += 1
        if self.entropy_target is not None:
            self._clip.update(metrics["entropy"])
        kl_cost = abs(metrics.get("kl_loss", 0.0))
        policy_cost = metrics["policy_loss/magnitude"]
        score = metrics.get(self.validation_metric)
        due = self._reset.update(kl_cost, policy_cost, score)
        return frozenset({RESET_REFERENCE}) if due and self.needs_reference else frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Steps, clip and reset criterion."""
        clip, reset = self._clip.state_dict(), self._reset.state_dict()
        return {"steps": self._steps, "clip": clip, "reset": reset}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._steps = state["steps"]
        self._clip.load_state_dict(state["clip"])
        self._reset.load_state_dict(state["reset"])


@dataclass(kw_only=True)
class ProRLv2(ProRL):
    """ProRL v2, by NeMo RL's guide and configuration (prorlv2.v2.yaml).

        A    = r - mean of the group, then normalised over the tokens of the batch (REINFORCE++)
        w    = old policy / sampler where that is inside [0.5, 5], else 0 (IcePop)
        loss = mean over tokens of -w min(rho A, clip(rho, 0.8, 1.27) A)
               + 1e-4 k2 with clamps 20 and 10

    The k2 has the score function's gradient. "Stop properly": completions that were cut earn
    nothing. Temperature 1, one update per rollout (all 512 completions), learning rate 5e-6, and no
    resets of the reference.
    """

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
    """ProRL v2.1, for mixtures of experts, by NeMo RL's guide (prorlv2_1_moe.v2.yaml).

    As v2 with ratio one (forced on-policy) and completions dropped whose geometric mean weight is
    outside [0.999, 1.002]; no dynamic sampling. Measured on sort, it differs most of all objectives
    between seeds (pass@1 .47, .70, .74): no group is replaced, and nothing clips.
    """

    name: ClassVar[str] = "prorl_v2.1"

    ratio: Ratio = "one"
    dynamic_sampling: bool = False
    correction: Correction = "geometric_mask_token"
    correction_low: float = 0.999
    correction_high: float = 1.002
