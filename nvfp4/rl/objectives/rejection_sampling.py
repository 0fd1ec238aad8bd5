"""Rejection sampling: imitate the completions that earned enough.

    accepted   r >= accept                        the others lose their mask, and count as no token
    loss       mean over the tokens that are left of -log policy        imitation.py

The gradient is that of a policy gradient with A = 1 for right and 0 for wrong completions. It
raises what is right and pushes nothing down, so it cannot diverge as a signed one can; it also
learns nothing from a wrong answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from nvfp4.rl.objectives.imitation import Imitation
from nvfp4.rl.samples import Samples


@dataclass(kw_only=True)
class RejectionSampling(Imitation):
    """Maximum likelihood of one's own completions that earned enough (STaR, arXiv 2203.14465).

        loss = mean over the tokens of completions with r >= accept of -log policy

    Sample, filter, fine-tune. With ``entropy_gate`` only positions at which the policy hesitated
    are learned (after ReasonMaxxer, arXiv 2605.06241, without its negative examples).
    """

    name: ClassVar[str] = "rejection_sampling"

    accept: float = 1.0
    """Least reward of a completion that is imitated."""

    def accepted(self, samples: Samples) -> torch.Tensor:
        """bool [S]: completions whose reward is at least ``accept``."""
        return samples.rewards >= self.accept
