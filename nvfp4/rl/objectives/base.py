"""What an objective is: what it asks of the loop, and what the loop calls when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from nvfp4.rl.samples import Samples, Scores, Totals

Metrics = dict[str, torch.Tensor]
"""Sums over the tokens or samples of a micro-batch, divided by ``Totals`` like the loss: they add up to the mean."""

AllSum = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a tensor over all processes, which each of them receives."""

Source = Literal["old", "reference"]
"""Whose scores: those of the policy before the updates, or those of the reference model."""

RESET_REFERENCE = "reset_reference"
"""Wish of ``observe``: copy the policy into the reference model, and make the optimiser anew (arXiv 2505.24864)."""


def one_process(tensor: torch.Tensor) -> torch.Tensor:
    """The ``AllSum`` of a single process: what is given."""
    return tensor


@dataclass(kw_only=True)
class Objective(ABC):
    """A loss over completions. Options are dataclass fields, so that configuration files and ``--help`` know them.

    The loop calls ``connect`` once if there are several processes; ``temperature`` and ``max_new_tokens`` before a
    rollout; on the rollout, without gradient, ``shape_rewards``, ``keep``, ``remember`` for each micro-batch that it
    scores, ``prepare`` and ``describe``; ``loss`` for each micro-batch of each update; ``observe`` after each step.
    What an objective learns is in ``state_dict``, as plain data: a run that resumes goes on bit for bit.
    """

    name: ClassVar[str]
    default_group: ClassVar[int | None] = None
    """Completions per prompt where the configuration leaves them open; None: the loop's own default."""
    default_temperature: ClassVar[float | None] = None
    """Sampling temperature where the configuration leaves it open; None: the loop's own default."""

    @property
    def needs_logits(self) -> bool:
        """Whether ``Scores.logits`` are read; ``remember`` can shrink those of the old policy and the reference."""
        return False

    @property
    def needs_hidden(self) -> bool:
        """Whether ``Scores.hidden`` of the old policy are read."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether ``Samples.ref_logprobs`` are read."""
        return False

    @property
    def all_sum(self) -> AllSum:
        """Sum over the processes; what ``connect`` was given."""
        return getattr(self, "_all_sum", one_process)

    def connect(self, all_sum: AllSum) -> None:
        """Several processes share a rollout, whole groups each: statistics of the whole batch go through all_sum."""
        self._all_sum = all_sum

    def temperature(self, configured: float) -> float:
        """Sampling temperature of the next rollout."""
        return configured

    def max_new_tokens(self, configured: int) -> int:
        """Length limit of the next rollout, in tokens."""
        return configured

    def shape_rewards(self, samples: Samples) -> torch.Tensor:
        """Rewards [S] after penalties, of the raw ones in ``samples``."""
        return samples.rewards

    def keep(self, samples: Samples) -> torch.Tensor:
        """bool [S]: False for samples that are to be replaced by others (dynamic sampling), whole groups at a time.
        Reads raw rewards: a penalty for length is no reason to keep a group in which every answer is wrong."""
        return torch.ones(len(samples), dtype=torch.bool, device=samples.ids.device)

    def remember(
        self, samples: Samples, scores: Scores, source: Literal["old", "reference"]
    ) -> dict[str, torch.Tensor]:
        """What ``Samples.extra`` keeps of a micro-batch's scores by the old policy or the reference, each [S, ...]:
        in place of logits [S, T, V] for a whole rollout, the few numbers per token that are needed of them."""
        return {}

    @abstractmethod
    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Samples with advantages, and whatever else ``loss`` needs, in ``extra``; old: the scores before updates.

        The mask may come back smaller (completions left out of the loss): ``Totals`` are counted after this."""

    def describe(self, samples: Samples) -> dict[str, float]:
        """Statistics of a prepared rollout, TRL's names where TRL has them; of this process alone."""
        return {}

    @abstractmethod
    def loss(self, samples: Samples, scores: Scores, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's share of the loss, to be minimised: shares of one batch add up to its loss."""

    def observe(self, metrics: Mapping[str, float]) -> frozenset[str]:
        """Take note of a step's metrics (TRL's names); returns the wishes among {"reset_reference"}."""
        return frozenset()

    def state_dict(self) -> dict[str, Any]:
        """What ``observe`` and ``prepare`` have changed, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - an objective without state ignores it
        """Restore ``state_dict``."""
