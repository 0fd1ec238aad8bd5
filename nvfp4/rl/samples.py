"""What a rollout yields and an objective reads: completions, their log-probabilities, rewards and groups."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

RAW_REWARD = "raw_reward"
"""Key of ``Samples.extra``: rewards [S] before the objective's penalties."""


@dataclass(frozen=True)
class Samples:
    """S completions of at most T tokens, drawn for the prompts of one step.

    ids: int64 [S, P + T], prompts on the left (padded on their left), completions on the right (padded on theirs).
    attention: bool [S, P + T], False on padding. mask: bool [S, T], True on tokens of the completion, its end-of-text
    token included. groups: int64 [S], equal for completions of one prompt. rewards: float32 [S], NaN before they are
    known. truncated: bool [S], cut by the length limit.
    sampler_logprobs: float32 [S, T], of the drawn tokens as the sampler saw them. old_logprobs: the trainer's, before
    the first update on these samples. ref_logprobs: the reference model's. All at the sampling temperature, 0 outside
    mask. advantages: float32 [S, T], made by the objective. extra: whatever else an objective computed once, each
    [S, ...]. max_new_tokens: the length limit they were drawn under; None: T.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    mask: torch.Tensor
    groups: torch.Tensor
    rewards: torch.Tensor
    truncated: torch.Tensor
    sampler_logprobs: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    max_new_tokens: int | None = None

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.ids.shape[1] - self.mask.shape[1]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each completion, int64 [S]."""
        return self.mask.sum(dim=1)

    @property
    def limit(self) -> int:
        """The length limit in tokens."""
        return self.mask.shape[1] if self.max_new_tokens is None else self.max_new_tokens

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: torch.Tensor | slice) -> Samples:
        """Some of the samples: a micro-batch, or those that a filter keeps."""
        chosen: dict[str, Any] = {name: value[index] for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **chosen, extra={name: value[index] for name, value in self.extra.items()})

    def within(self, mask: torch.Tensor) -> Samples:
        """The same samples with a smaller mask, bool [S, T]: what falls out of it counts as no token, and its
        log-probabilities become 0 like all outside the mask."""
        mask = self.mask & mask
        logprobs = {name: getattr(self, name) for name in ("sampler_logprobs", "old_logprobs", "ref_logprobs")}
        cleared: dict[str, Any] = {name: torch.where(mask, v, 0.0) for name, v in logprobs.items() if v is not None}
        return replace(self, mask=mask, **cleared)


@dataclass(frozen=True)
class Scores:
    """What the trainer's forward says about completions, with gradient: logprobs float32 [S, T], 0 outside the mask;
    entropy float32 [S, T] of the next-token distributions, without gradient. logits [S, T, V] (as log-probabilities),
    prompt_logits [S, P - 1, V] (of the prompt's tokens but the first) and hidden [S, T, D] (input of the output
    embedding) only for objectives that ask for them. All at the temperature that the objective asks for."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    logits: torch.Tensor | None = None
    prompt_logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class Totals:
    """What a loss is divided by: counts over the whole batch of one optimiser update, over all micro-batches and
    processes, so that the sum of their losses does not depend on how the batch was split."""

    tokens: float
    samples: float
    max_new_tokens: int
