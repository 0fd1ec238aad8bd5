"""The objectives by name: one line each, and command line, config files and tests know it.

The name is the class's ``name``; base.py says how to write one. ``nvfp4 rl --objective NAME`` takes
it, and an unknown name lists them all.
"""

from __future__ import annotations

from nvfp4.rl.objectives.base import Objective
from nvfp4.rl.objectives.brorl import BroRL
from nvfp4.rl.objectives.dapo import DAPO
from nvfp4.rl.objectives.delta import DelTA
from nvfp4.rl.objectives.dr_grpo import DrGRPO
from nvfp4.rl.objectives.grpo import GRPO
from nvfp4.rl.objectives.gspo import GSPO
from nvfp4.rl.objectives.microcoder import MicroCoder
from nvfp4.rl.objectives.prorl import ProRL, ProRLv2, ProRLv21
from nvfp4.rl.objectives.reasonmaxxer import ReasonMaxxer
from nvfp4.rl.objectives.rejection_sampling import RejectionSampling
from nvfp4.rl.objectives.rover import Rover
from nvfp4.rl.objectives.ssd import SSD

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        GRPO,
        DrGRPO,
        GSPO,
        DAPO,
        ProRL,
        ProRLv2,
        ProRLv21,
        BroRL,
        Rover,
        DelTA,
        MicroCoder,
        ReasonMaxxer,
        SSD,
        RejectionSampling,
    )
}

RENAMED = {
    "self_distillation": "rejection_sampling, which learns what a verifier accepts, or ssd, which "
    "needs no verifier (arXiv 2604.01193)"
}
"""Names of earlier versions, and what to give instead."""
