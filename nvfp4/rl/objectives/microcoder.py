"""MicroCoder-GRPO: small models whose answers hit the length limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from nvfp4.rl.objectives.advantages import distinctness
from nvfp4.rl.objectives.base import Metrics
from nvfp4.rl.objectives.controllers import TemperatureStages
from nvfp4.rl.objectives.lengths import ends_in_loop, excused
from nvfp4.rl.objectives.policy_gradient import PolicyGradient
from nvfp4.rl.samples import Samples, Scores, Totals
from nvfp4.rng import ELEMENT_STREAM, fold_in, uniform

DISTINCT = "distinctness"
INCORRECT = "incorrect"
"""Key of ``Samples.extra``, optional: bool [S], wrong for another reason than being cut off."""


@dataclass(kw_only=True)
class MicroCoder(PolicyGradient):
    """GRPO with a conditional truncation mask and a temperature chosen by diversity (arXiv 2603.07777).

    A = (r - mean) / std * (1 - M): M excuses a completion that was cut by the length limit, is not incorrect for
    another reason, does not end in a loop, and is drawn with probability ``excused_share``. To excuse all of them
    makes training collapse, to excuse none punishes thought. Clip-higher, no KL. Ours: clip_high (DAPO's), mean over a
    completion then over samples, and how diversity is measured (share of distinct completions in a group) and used.
    """

    name: ClassVar[str] = "microcoder"

    clip_high: float = 0.28
    excused_share: float = 0.3
    """Probability with which a truncated completion that passes the conditions is excused."""
    loop_window: int = 128
    """A completion loops if its last so many tokens equal those before them; 0: not tested."""
    seed: int = 0
    """Seed of the draws."""
    temperature_stages: tuple[float, ...] = ()
    """Sampling temperatures from low to high, starting with the first; empty: the configured one."""
    diversity_floor: float = 0.5
    """Share of distinct completions in a group below which the next temperature is due."""
    diversity_patience: int = 20
    """Steps in a row below the floor before the temperature rises."""

    def __post_init__(self) -> None:
        if list(self.temperature_stages) != sorted(self.temperature_stages):
            raise ValueError(f"temperature_stages must go from low to high, got {self.temperature_stages}")
        self._rollouts = 0
        self._stages = TemperatureStages(self.temperature_stages, self.diversity_floor, self.diversity_patience)

    def temperature(self, configured: float) -> float:
        """That of the present stage."""
        return self._stages.value if self.temperature_stages else configured

    def excused(self, samples: Samples) -> torch.Tensor:
        """M of each sample, bool [S], with the draws of this rollout."""
        completions = samples.ids[:, samples.prompt_length :]
        never = torch.zeros_like(samples.truncated)
        looping = ends_in_loop(completions, samples.lengths, self.loop_window) if self.loop_window else never
        incorrect = samples.extra.get(INCORRECT, never)
        seed = fold_in(self.seed, self._rollouts)
        draws = uniform(seed, ELEMENT_STREAM, (len(samples),), samples.ids.device)
        return excused(samples.truncated, incorrect, looping, draws, self.excused_share)

    def advantages(self, samples: Samples) -> torch.Tensor:
        """A (1 - M)."""
        return torch.where(self.excused(samples)[:, None], 0.0, super().advantages(samples))

    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Draws anew for every rollout."""
        completions = samples.ids[:, samples.prompt_length :]
        distinct = distinctness(completions, samples.mask, samples.groups)
        prepared = super().prepare(replace(samples, extra={**samples.extra, DISTINCT: distinct}), old)
        self._rollouts += 1
        return prepared

    def loss(self, samples: Samples, scores: Scores, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The policy gradient's, and the diversity among its metrics."""
        loss, metrics = super().loss(samples, scores, totals)
        return loss, {**metrics, "completions/distinct_share": samples.extra[DISTINCT].sum() / totals.samples}

    def observe(self, metrics: Mapping[str, float]) -> frozenset[str]:
        """Raises the temperature when "completions/distinct_share" stays low."""
        if self.temperature_stages:
            self._stages.update(metrics["completions/distinct_share"])
        return frozenset()

    def state_dict(self) -> dict[str, Any]:
        """Rollouts so far and the stage of the temperature."""
        return {"rollouts": self._rollouts, "stages": self._stages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._rollouts = state["rollouts"]
        self._stages.load_state_dict(state["stages"])
