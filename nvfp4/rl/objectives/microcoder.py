"""MicroCoder-GRPO: small models whose answers hit the length limit.

To punish every completion that was cut teaches a small model to think less; to excuse all of them
makes training collapse. So some are excused: those that were not wrong and not going round in
circles, with a probability. And the sampling temperature rises when the completions of a group
become alike.

    advantages    GRPO's, and 0 for the excused              lengths.excused, ends_in_loop
    loss          GRPO's with clip-higher; diversity among the metrics
    observe       diversity -> TemperatureStages -> temperature of the next rollouts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from nvfp4.numerics.rng import ELEMENT_STREAM, fold_in, philox
from nvfp4.rl.objectives.advantages import place_in_group
from nvfp4.rl.objectives.base import Defaults, Metrics, StepPlan
from nvfp4.rl.objectives.controllers import TemperatureStages
from nvfp4.rl.objectives.lengths import distinct_grams, ends_in_loop, excused
from nvfp4.rl.objectives.policy_gradient import PolicyGradient
from nvfp4.rl.samples import RAW_REWARD, Samples, Scores, Totals, in_float64

DISTINCT = "distinctness"
"""Key of ``Samples.extra``: the diversity of a sample's group, [S]."""

_PLACE_BITS = 20  # of a counter, for the place in a group; the others are the group


@dataclass(kw_only=True)
class MicroCoder(PolicyGradient):
    """GRPO with excuses for cut completions, and a temperature by diversity (arXiv 2603.07777).

        A    = (r - mean) / std of the group x (1 - M)
        M    = cut by the limit, not incorrect, not ending in a loop, and drawn (``excused_share``)
        loss = GRPO's with clip(rho, 0.8, 1.28)

    Not incorrect is, in the authors' Insights, to produce a correct answer; here a reward of 1. No
    KL, temperature 1.2. Ours: clip_high (DAPO's), mean over a completion then over samples, 2
    updates per rollout (they found some off-policyness best), and how diversity is measured and
    used.
    """

    name: ClassVar[str] = "microcoder"
    defaults: ClassVar[Defaults] = Defaults(updates=2, temperature=1.2)

    clip_high: float = 0.28
    excused_share: float = 0.3
    """Probability with which a truncated completion that passes the conditions is excused."""
    loop_window: int = 128
    """A completion loops if its last so many tokens equal those before them; 0: not tested."""
    seed: int = 0
    """Seed of the draws."""
    temperature_stages: tuple[float, ...] = ()
    """Sampling temperatures from low to high; empty: the configured one."""
    diversity_window: int = 4
    """Diversity is the share of distinct runs of so many tokens among all of a group."""
    diversity_floor: float = 0.5
    """Diversity below which the next temperature is due."""
    diversity_patience: int = 20
    """Steps in a row below the floor before the temperature rises."""

    def __post_init__(self) -> None:
        if list(self.temperature_stages) != sorted(self.temperature_stages):
            given = self.temperature_stages
            raise ValueError(f"temperature_stages must go from low to high, got {given}")
        if self.diversity_window < 1:
            raise ValueError(f"diversity_window must be at least 1, got {self.diversity_window}")
        self._rollouts = 0
        self._stages = TemperatureStages(
            temperatures=self.temperature_stages,
            floor=self.diversity_floor,
            patience=self.diversity_patience,
        )

    def idle(self, plan: StepPlan) -> dict[str, str]:
        """Those of the policy gradient, and options of stages or excuses that are switched off."""
        reasons = super().idle(plan)
        if not self.temperature_stages:
            names = ("diversity_window", "diversity_floor", "diversity_patience")
            reasons |= dict.fromkeys(names, "there are no temperature_stages")
        if not self.excused_share:
            reasons |= dict.fromkeys(("loop_window", "seed"), "excused_share is 0")
        return reasons

    def temperature(self, configured: float) -> float:
        """The temperature of the present stage."""
        return self._stages.value if self.temperature_stages else configured

    def excused(self, samples: Samples) -> torch.Tensor:
        """M of each sample, bool [S], with the draws of this rollout."""
        looping = torch.zeros_like(samples.truncated)
        if self.loop_window:
            looping = ends_in_loop(samples.completions, samples.lengths, self.loop_window)

        # by the raw reward: a penalty for length does not make an answer wrong
        incorrect = samples.extra.get(RAW_REWARD, samples.rewards) < 1
        draws = self._draws(samples.groups)
        return excused(samples.truncated, incorrect, looping, draws, self.excused_share)

    def _draws(self, groups: torch.Tensor) -> torch.Tensor:
        """Uniform in (0, 1), float64 [S], by seed, rollout, group and place: on any process."""
        counters = (groups << _PLACE_BITS) + place_in_group(groups)
        words = philox(fold_in(self.seed, self._rollouts), counters, ELEMENT_STREAM)
        return (in_float64(words[0]) + 0.5) * 2.0**-32

    def advantages(self, samples: Samples) -> torch.Tensor:
        """GRPO's advantages times (1 - M): 0 for the excused, float32 [S, T]."""
        excused_samples = self.excused(samples)[:, None]
        return torch.where(excused_samples, 0.0, super().advantages(samples))

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Measure diversity, then prepare; the next rollout draws other excuses."""
        distinct = distinct_grams(
            samples.completions,
            samples.mask,
            samples.groups,
            self.diversity_window,
        )
        samples = replace(samples, extra={**samples.extra, DISTINCT: distinct})
        prepared = super().prepare(samples, old)
        self._rollouts += 1
        return prepared

    def loss(
        self,
        samples: Samples,
        scores: Scores,
        totals: Totals,
    ) -> tuple[torch.Tensor, Metrics]:
        """The policy gradient's, and the diversity among its metrics."""
        loss, metrics = super().loss(samples, scores, totals)
        metrics["completions/diversity"] = samples.extra[DISTINCT].sum() / totals.samples
        return loss, metrics

    def observe(self, metrics: Mapping[str, float]) -> frozenset[str]:
        """Raises the temperature when "completions/diversity" stays low."""
        if self.temperature_stages:
            self._stages.update(metrics["completions/diversity"])
        return frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Rollouts so far and the stage of the temperature."""
        return {"rollouts": self._rollouts, "stages": self._stages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._rollouts = state["rollouts"]
        self._stages.load_state_dict(state["stages"])
