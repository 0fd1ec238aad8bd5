"""The objectives: one line each. A new one is a class with a name; the command line and the tests find it here."""

from __future__ import annotations

from nvfp4.rl.objectives.base import Objective
from nvfp4.rl.objectives.brorl import BroRL
from nvfp4.rl.objectives.dapo import DAPO
from nvfp4.rl.objectives.delta import DelTA
from nvfp4.rl.objectives.distillation import SSD, RejectionSampling
from nvfp4.rl.objectives.dr_grpo import DrGRPO
from nvfp4.rl.objectives.grpo import GRPO
from nvfp4.rl.objectives.gspo import GSPO
from nvfp4.rl.objectives.microcoder import MicroCoder
from nvfp4.rl.objectives.prorl import ProRL, ProRLv2, ProRLv21
from nvfp4.rl.objectives.reasonmaxxer import ReasonMaxxer
from nvfp4.rl.objectives.rover import Rover

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
    "self_distillation": "rejection_sampling, which learns what a verifier accepts, or ssd, which needs no verifier "
    "(arXiv 2604.01193)"
}
"""Names of earlier versions, and what to give instead."""


def get_objective(name: str) -> type[Objective]:
    """The objective of that name; ValueError lists the known names."""
    if name in RENAMED:
        raise ValueError(f"{name} is no longer a name: give {RENAMED[name]}")
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
