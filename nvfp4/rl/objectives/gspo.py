"""GSPO: the ratio of a whole completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nvfp4.rl.objectives.policy_gradient import PolicyGradient
from nvfp4.rl.objectives.surrogate import Ratio


@dataclass(kw_only=True)
class GSPO(PolicyGradient):
    """Group sequence policy optimisation (arXiv 2507.18071): GRPO with the geometric mean of the token ratios of a
    completion as its one ratio, which is clipped at 3e-4 below and 4e-4 above (section 5.1)."""

    name: ClassVar[str] = "gspo"

    ratio: Ratio = "sequence"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
