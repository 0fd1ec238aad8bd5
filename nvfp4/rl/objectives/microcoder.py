"""MicroCoder-GRPO: small models whose answers hit the length limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from nvfp4.numerics.rng import ELEMENT_STREAM, fold_in, philox
from nvfp4.rl.objectives.advantages import place_in_group
from nvfp4.rl.objectives.base import Defaults, Metrics, Plan
from nvfp4.rl.objectives.controllers import TemperatureStages
from nvfp4.rl.objectives.lengths import distinct_grams, ends_in_loop, excused
from nvfp4.rl.objectives.policy_gradient import PolicyGradient
from nvfp4.rl.samples import RAW_REWARD, Samples, Scores, Totals
from nvfp4.run.processes import float64_device

DISTINCT = "distinctness"
_PLACE_BITS = 20  # of a counter, for the place in a group; the others are the group


@dataclass(kw_only=True)
class MicroCoder(PolicyGradient):
    """GRPO with a conditional truncation mask and a temperature chosen by diversity (arXiv 2603.07777).

    A = (r - mean) / std * (1 - M): M excuses a completion that was cut by the length limit, is not incorrect (the
    authors' Insights: produces a correct answer; here a reward of 1), does not end in a loop, and is drawn with
    probability ``excused_share``. To excuse all of them makes training collapse, to excuse none punishes thought.
    Clip-higher, no KL, temperature 1.2. Ours: clip_high (DAPO's), mean over a completion then over samples, 2 updates
    per rollout (they found some off-policyness best), and how diversity is measured and used.
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
    """Sampling temperatures from low to high, starting with the first; empty: the configured one."""
    diversity_window: int = 4
    """Diversity is the share of distinct runs of so many tokens among all of a group."""
    diversity_floor: float = 0.5
    """Diversity below which the next temperature is due."""
    diversity_patience: int = 20
    """Steps in a row below the floor before the temperature rises."""

    def __post_init__(self) -> None:
        if list(self.temperature_stages) != sorted(self.temperature_stages):
            raise ValueError(f"temperature_stages must go from low to high, got {self.temperature_stages}")
        if self.diversity_window < 1:
            raise ValueError(f"diversity_window must be at least 1, got {self.diversity_window}")
        self._rollouts = 0
        self._stages = TemperatureStages(self.temperature_stages, self.diversity_floor, self.diversity_patience)

    def idle(self, plan: Plan) -> dict[str, str]:
        """Also what belongs to stages or to excuses that there are none of."""
        found = super().idle(plan)
        if not self.temperature_stages:
            names = ("diversity_window", "diversity_floor", "diversity_patience")
            found |= dict.fromkeys(names, "there are no temperature_stages")
        if not self.excused_share:
            found |= dict.fromkeys(("loop_window", "seed"), "excused_share is 0")
        return found

    def temperature(self, configured: float) -> float:
        """That of the present stage."""
        return self._stages.value if self.temperature_stages else configured

    def excused(self, samples: Samples) -> torch.Tensor:
        """M of each sample, bool [S], with the draws of this rollout."""
        completions = samples.ids[:, samples.prompt_length :]
        never = torch.zeros_like(samples.truncated)
        looping = ends_in_loop(completions, samples.lengths, self.loop_window) if self.loop_window else never
        incorrect = samples.extra.get(RAW_REWARD, samples.rewards) < 1
        return excused(samples.truncated, incorrect, looping, self._draws(samples.groups), self.excused_share)

    def _draws(self, groups: torch.Tensor) -> torch.Tensor:
        """Uniform in (0, 1), float64 [S]: a function of seed, rollout, group and place, whoever holds the group."""
        counters = (groups << _PLACE_BITS) + place_in_group(groups)
        words = philox(fold_in(self.seed, self._rollouts), counters, ELEMENT_STREAM)
        return (words[0].to(float64_device(groups.device)).double() + 0.5) * 2.0**-32

    def advantages(self, samples: Samples) -> torch.Tensor:
        """A (1 - M)."""
        return torch.where(self.excused(samples)[:, None], 0.0, super().advantages(samples))

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Draws anew for every rollout."""
        completions = samples.ids[:, samples.prompt_length :]
        distinct = distinct_grams(completions, samples.mask, samples.groups, self.diversity_window)
        prepared = super().prepare(replace(samples, extra={**samples.extra, DISTINCT: distinct}), old)
        self._rollouts += 1
        return prepared

    def loss(self, samples: Samples, scores: Scores, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The policy gradient's, and the diversity among its metrics."""
        loss, metrics = super().loss(samples, scores, totals)
        return loss, {**metrics, "completions/diversity": samples.extra[DISTINCT].sum() / totals.samples}

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
