"""What changes in a long run by a rule: clip_high after the entropy, resets, stages of temperature.

    EntropyClip          entropy of a step           ->  clip_high          ProRL
    ResetCriterion       KL, policy loss, score      ->  reset the reference, or not    ProRL
    TemperatureStages    diversity of a step         ->  temperature        MicroCoder

Each is fed once per step, has a state of plain data, and no clock but the calls it gets. Their
papers name the occasions; where a number or a rule is ours, its class says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COUNTED = ("steps", "dominated", "stalled")
"""What ``ResetCriterion`` counts since the last reset, each for one of its rules."""


@dataclass
class EntropyClip:
    """clip_high that follows the entropy: below the target up by a step, else down by one.

    Within bounds. ProRL's authors adjust it after the trend of the entropy without publishing a
    rule, so this one is ours; it has the shape of the adaptive entropy bonus of Skywork-OR1 (arXiv
    2505.22312). The entropy is smoothed exponentially.
    """

    value: float
    target: float
    lowest: float
    highest: float
    step: float = 0.01
    smoothing: float = 0.9
    smoothed: float | None = None

    def update(self, entropy: float) -> None:
        """Take note of a step's mean token entropy in nats; NaN (a skipped step) is ignored."""
        if not math.isfinite(entropy):
            return
        # smoothing begins at the first entropy, not at 0
        past = entropy if self.smoothed is None else self.smoothed
        self.smoothed = self.smoothing * past + (1 - self.smoothing) * entropy
        unbounded = self.value + (self.step if self.smoothed < self.target else -self.step)
        self.value = min(max(unbounded, self.lowest), self.highest)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data."""
        return {"value": self.value, "smoothed": self.smoothed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.value, self.smoothed = state["value"], state["smoothed"]


@dataclass
class ResetCriterion:
    """When the reference is to become the present policy: any of three rules, each off at 0.

    The KL term exceeds share times the policy loss for patience steps in a row; the validation
    score has not risen by delta in stall evaluations; every so many steps. ProRL (arXiv 2505.24864)
    names the occasions, the numbers are ours.
    """

    share: float
    patience: int
    every: int
    stall: int
    delta: float
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    best: float | None = None

    def update(self, kl_cost: float, policy_cost: float, validation: float | None) -> bool:
        """Take note of a step; True: reset now.

        kl_cost, policy_cost: magnitudes of the two parts of the loss. validation: a score, where
        there was an evaluation at this step.
        """
        # "dominated" and "stalled" count in a row: one good step or evaluation begins anew.
        counts = self.counts
        counts["steps"] += 1
        dominated = self.share > 0 and kl_cost > self.share * policy_cost
        counts["dominated"] = counts["dominated"] + 1 if dominated else 0
        if validation is not None:
            improved = self.best is None or validation >= self.best + self.delta
            counts["stalled"] = 0 if improved else counts["stalled"] + 1
            self.best = validation if improved else self.best

        # any of them, and then all begin again
        due = (
            (self.share > 0 and counts["dominated"] >= self.patience)
            or (self.stall > 0 and counts["stalled"] >= self.stall)
            or (self.every > 0 and counts["steps"] >= self.every)
        )
        if due:
            self.counts = dict.fromkeys(counts, 0)
        return due

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data."""
        return {"counts": dict(self.counts), "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.counts, self.best = dict(state["counts"]), state["best"]


@dataclass
class TemperatureStages:
    """A ladder of sampling temperatures: one up after patience steps of low diversity, never down.

    MicroCoder (arXiv 2603.07777) chooses the temperature by the diversity of the outputs and finds
    that stages from low to high work and continuous change does not; measure, floor and patience
    are ours.
    """

    temperatures: Sequence[float]
    floor: float
    patience: int
    stage: int = 0
    below: int = 0

    @property
    def value(self) -> float:
        """The temperature of the present stage."""
        return self.temperatures[self.stage]

    def update(self, diversity: float) -> None:
        """Take note of one step's diversity, in [0, 1]."""
        self.below = self.below + 1 if diversity < self.floor else 0
        if self.below >= self.patience and self.stage + 1 < len(self.temperatures):
            self.stage, self.below = self.stage + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data."""
        return {"stage": self.stage, "below": self.below}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.stage, self.below = state["stage"], state["below"]
