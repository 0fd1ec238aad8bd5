"""What an objective is: what it asks of the loop, and what the loop calls when.

**A new objective is one file in this folder and one line in registry.py**: a dataclass with a
``name``, and the formula with its source in words. Most are a ``PolicyGradient`` with other
defaults (see grpo.py, dapo.py: twenty lines), those with rewards but another loss a
``RewardedObjective`` (rover.py), those that imitate completions an ``Imitation`` (ssd.py). The
command line, configuration files and the tests of all objectives find it by the registry; its
options are its dataclass fields, each with a line of help beneath:

    nvfp4 rl --objective NAME --objective-options clip_high=0.28 kl_coef=0.01

One step, and who is asked for what:

    before the run    idle, acts_like            refuse options that cannot act here
                      connect                    how to sum over processes, if there are several
    rollout           temperature, max_new_tokens
                      keep                       groups to replace, by raw rewards
                      shape_rewards              penalties
    scoring           remember                   of each scored micro-batch
    no gradient       prepare                    advantages, over whole groups; describe
    each update       loss                       of each micro-batch: its share of the loss
    after the step    observe                    rules that change with training; wishes

What an objective learns is in ``state_dict``, as plain data: a run that resumes goes on bit for
bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from nvfp4.rl.samples import Samples, Scores, Totals

Metrics = dict[str, torch.Tensor]
"""Sums over the tokens or samples of a micro-batch, divided by ``Totals`` like the loss: they add
up to the mean."""

AllSum = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a tensor over all processes, which each of them receives."""

Gather = Callable[[torch.Tensor], torch.Tensor]
"""The rows of all processes, each with as many; in an order that must not matter."""

ScoredBy = Literal["old", "reference"]
"""Whose scores: those of the policy before the updates, or those of the reference model."""

REFERENCE_LOGITS, REFERENCE_PROMPT_LOGITS = "reference_logits", "reference_prompt_logits"
"""Keys of ``Samples.extra`` in ``loss`` alone, of one micro-batch: log-probabilities by the
reference, [S, T, V] and [S, P - 1, V]."""

RESET_REFERENCE = "reset_reference"
"""Wish of ``observe``: copy the policy into the reference model, and make the optimiser anew
(arXiv 2505.24864)."""


def one_process(tensor: torch.Tensor) -> torch.Tensor:
    """The ``AllSum``, and the ``Gather``, of a single process: what is given."""
    return tensor


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a run does where its configuration is open: the settings of the authors.

    group: completions of a prompt. updates: optimiser updates on the completions of one step,
    before it is reduced to what divides the prompts. lr: for all weights of a language model.
    micro_batch, rollout_rows: None for all at once.
    """

    group: int = 8
    updates: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    lr: float = 1e-6
    weight_decay: float = 0.0
    micro_batch: int | None = None
    rollout_rows: int | None = None


@dataclass(frozen=True)
class StepPlan:
    """What the loop is going to do with an objective.

    updates: on the completions of one step. evaluates: between the beginning and the end.
    """

    updates: int
    evaluates: bool


@dataclass(kw_only=True)
class Objective(ABC):
    """A loss over completions; the file's head says what is called when."""

    name: ClassVar[str]
    defaults: ClassVar[Defaults] = Defaults()
    """What the configuration leaves open."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Options of earlier versions, and what to give instead."""

    # What it reads, so that the loop makes no more than that

    @property
    def needs_logits(self) -> bool:
        """Whether ``Scores.logits`` are read.

        Those of the old policy and of the reference in ``remember`` alone, which can shrink them.
        """
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
    def needs_reference_logits(self) -> bool:
        """Whether ``loss`` reads ``REFERENCE_LOGITS`` of its micro-batch.

        The loop makes them anew each time, as those of a whole rollout would not fit.
        """
        return False

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether ``Scores.prompt_logits`` are read, of the reference too if its logits are."""
        return False

    @property
    def reads_evaluations(self) -> bool:
        """Whether ``observe`` learns from the figures of evaluations."""
        return False

    # Before the run

    def connect(self, all_sum: AllSum, gather: Gather = one_process) -> None:
        """Several processes share a rollout, whole groups each.

        Statistics of the whole batch go through ``all_sum``, what needs more than a sum through
        ``gather``.
        """
        self._all_sum, self._gather = all_sum, gather

    @property
    def all_sum(self) -> AllSum:
        """Sum over the processes; what ``connect`` was given."""
        return getattr(self, "_all_sum", one_process)

    @property
    def gather(self) -> Gather:
        """The rows of all processes; what ``connect`` was given."""
        return getattr(self, "_gather", one_process)

    def idle(self, plan: StepPlan) -> dict[str, str]:
        """Options that cannot act beside the others, and why: to set one is an error."""
        return {}

    def acts_like(self, plan: StepPlan) -> str | None:
        """What this objective turns into under this plan, in words, if it is not itself."""
        return None

    # Before a rollout

    def temperature(self, configured: float) -> float:
        """Sampling temperature of the next rollout."""
        return configured

    def max_new_tokens(self, configured: int) -> int:
        """Length limit of the next rollout, in tokens."""
        return configured

    def length_limits(self) -> tuple[int, ...]:
        """Every limit that ``max_new_tokens`` may set in place of the configured one, in tokens."""
        return ()

    def longest_completion(self, configured: int) -> int:
        """The largest limit of any stage, in tokens."""
        return max(configured, *self.length_limits(), 0)

    # On a rollout, without gradient

    def keep(self, samples: Samples) -> torch.Tensor:
        """bool [S]: False for samples that are to be replaced (dynamic sampling), by whole groups.

        Reads raw rewards: a penalty for length is no reason to keep a group in which every answer
        is wrong.
        """
        return torch.ones(len(samples), dtype=torch.bool, device=samples.ids.device)

    def shape_rewards(self, samples: Samples) -> torch.Tensor:
        """Rewards [S] after penalties, of the raw ones in ``samples``."""
        return samples.rewards

    def loss_temperature(self, sampling: float) -> float:
        """Temperature of the log-probabilities, entropies and logits of ``Scores``."""
        return sampling

    def remember(
        self,
        samples: Samples,
        scores: Scores,
        source: ScoredBy,
    ) -> dict[str, torch.Tensor]:
        """What ``Samples.extra`` keeps of a micro-batch's scores, each [S, ...].

        In place of logits [S, T, V] for a whole rollout, the few numbers per token that are needed.
        """
        return {}

    @abstractmethod
    def prepare(self, samples: Samples, old: Scores) -> Samples:
        """Samples with advantages, and whatever else ``loss`` needs, in ``extra``.

        old: the scores before the updates. The mask may come back smaller (completions left out of
        the loss): ``Totals`` are counted after this.
        """

    def describe(self, samples: Samples) -> dict[str, float]:
        """Statistics of this process's prepared rollout, under TRL's names where it has them."""
        return {}

    # The updates, and after them

    @abstractmethod
    def loss(
        self,
        samples: Samples,
        scores: Scores,
        totals: Totals,
    ) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's share of the loss, to be minimised, and metrics; shares add up."""

    def observe(self, metrics: Mapping[str, float]) -> frozenset[str]:
        """Take note of a step's metrics (TRL's names); returns wishes, e.g. ``RESET_REFERENCE``."""
        return frozenset()

    def state_dict(self) -> dict[str, Any]:
        """What ``observe`` and ``prepare`` have changed, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have no state
        """Restore ``state_dict``."""
