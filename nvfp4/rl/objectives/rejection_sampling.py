"""Rejection sampling: imitate the completions that earned enough."""

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
        """Those with enough of a reward."""
        return samples.rewards >= self.accept
