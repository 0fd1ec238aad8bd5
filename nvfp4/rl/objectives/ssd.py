"""SSD: sample hot and truncated, then imitate all of it.

    sampling   temperature 1.6, top-k 20, top-p 0.8: the tail is cut off, what is left is flattened
    loss       mean over tokens of -log policy, at temperature 1 and with all tokens

The policy learns the distribution that the sampling rule has made of it. Nobody judges: what such
samples get wrong is learnt as well as what they get right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from nvfp4.rl.objectives.base import Defaults
from nvfp4.rl.objectives.imitation import Imitation
from nvfp4.rl.samples import Samples


@dataclass(kw_only=True)
class SSD(Imitation):
    """Simple self-distillation (arXiv 2604.01193; details from TRL's experimental trainer).

        loss = mean over all tokens of -log policy, at temperature 1

    of completions drawn at temperature 1.6 with top-k 20 and top-p 0.8; these and the learning rate
    5e-6 are those of TRL's example. No verifier, no teacher, no reward: rewards are only looked at
    for the log. Completions that are next to empty are left out (the paper's syntactic filter;
    TRL's is a matter of characters, ours of tokens).

    Measured on sort, 32 symbols: at these settings its samples are right in .28 of the cases, so
    that is what it learns: pass@1 from .61 to .07 in 10 steps, where rejection sampling with the
    same likelihood reaches .77.
    """

    name: ClassVar[str] = "ssd"
    defaults: ClassVar[Defaults] = Defaults(temperature=1.6, top_p=0.8, top_k=20, lr=5e-6)

    least_tokens: int = 2
    """Completions of fewer tokens, the end-of-text token included, are left out."""

    def accepted(self, samples: Samples) -> torch.Tensor:
        """bool [S]: all completions but the next to empty."""
        return samples.lengths >= self.least_tokens
