"""DAPO: four repairs of GRPO for long chains of thought."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nvfp4.rl.objectives.aggregation import Aggregation
from nvfp4.rl.objectives.base import Defaults
from nvfp4.rl.objectives.policy_gradient import PolicyGradient


@dataclass(kw_only=True)
class DAPO(PolicyGradient):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476).

    Clip 0.2 below and 0.28 above; groups of equal rewards replaced; mean over the tokens of the whole batch; a penalty
    over the last fifth of the length limit (4096 of 20480 tokens), or ``--truncated mask`` for the paper's filter. No
    KL. The paper's rewards are +1 and -1 with a penalty of up to 1, so that here, where they are 1 and 0, it is half of
    that. Groups of 16, 16 updates per rollout (32 of 512 prompts), weight decay 0.1.
    """

    name: ClassVar[str] = "dapo"
    defaults: ClassVar[Defaults] = Defaults(group=16, updates=16, weight_decay=0.1)

    clip_high: float = 0.28
    aggregation: Aggregation = "dapo"
    dynamic_sampling: bool = True
    overlong_share: float = 0.2
