"""What a verifier says of a completion: a reward, and why it is 0 where it is not a proper one.

A reward is a number in [0, 1]. What a reward function returns is foreign: it may be a text, NaN or
7. All of that is a verdict of 0 with a reason (``to_verdict``), counted and logged, and the
training goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Verdict:
    """reward: in [0, 1]. reason: why it is 0 for want of a proper one, else None."""

    reward: float
    reason: str | None = None


def to_verdict(value: object) -> Verdict:
    """The verdict of what a reward function returned: 0 with the reason if it is no reward."""
    wanted = "the reward must be a number in [0, 1]"
    if not isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        return Verdict(0.0, f"{wanted}, got a {type(value).__name__}")
    reward = float(value)
    if not 0.0 <= reward <= 1.0:  # NaN neither
        return Verdict(0.0, f"{wanted}, got {reward:g}")
    return Verdict(reward)
