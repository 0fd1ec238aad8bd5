"""BroRL: when more steps no longer help, more rollouts for each prompt.

    P(a group of G says nothing) = p^G + (1 - p)^G

for a prompt that is solved with chance p. With p = .01, 85 % of the groups of 16 are all wrong and
teach nothing, of the groups of 512 .6 %. So prompts that were too hard or too easy come back, and
the variance of the gradient falls with 1 / G.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from nvfp4.rl.objectives.base import Defaults
from nvfp4.rl.objectives.prorl import ProRLv2


@dataclass(kw_only=True)
class BroRL(ProRLv2):
    """Broadened reinforcement learning (arXiv 2510.01180): ProRL v2 in groups of 512, not 16.

    Advantages are made over whole groups before the loss, so a group may be larger than a
    micro-batch: 64 completions here, with 1,024 drawn at a time, so that a step of 32 times 512
    fits one device.
    """

    name: ClassVar[str] = "brorl"
    defaults: ClassVar[Defaults] = replace(
        ProRLv2.defaults,
        group=512,
        micro_batch=64,
        rollout_rows=1024,
    )
