"""The records that pass through a step: completions, their scores, and what a loss is divided by.

    tasks -> prompts [ids] -> rollout -> Samples -> rewards -> objective.prepare -> objective.loss
                                            |                        |                   |
                                            +---- score -> Scores ---+                 Totals

Shapes, here and everywhere in this folder:

    S   completions of one step in one process, G for each prompt
    P   the longest prompt in tokens; shorter ones are padded on their left
    T   the longest completion in tokens, with its end-of-text; shorter ones padded on their right
    V   the vocabulary,  D  the hidden size

    ids         [S, P + T]   pad pad  p   p   p | c   c   c  end pad
    attention   [S, P + T]    0   0   1   1   1 | 1   1   1   1   0
    mask        [S, T]                            1   1   1   1   0

All records are frozen: a step that adds something (rewards, advantages) makes a new record with
``dataclasses.replace``. Log-probabilities are 0 outside the mask, so that no ratio there is
anything but 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from nvfp4.numerics.torch_state import float64_device

RAW_REWARD = "raw_reward"
"""Key of ``Samples.extra``: rewards [S] before the objective's penalties."""


@dataclass(frozen=True)
class Stops:
    """What ends a completion (``ids``, any of them) and what stands where no token is (``pad``)."""

    ids: tuple[int, ...]
    pad: int


@dataclass(frozen=True)
class Samples:
    """S completions of at most T tokens, drawn for the prompts of one step.

    ids: int64 [S, P + T]. attention: bool [S, P + T], False on padding. mask: bool [S, T], True on
    tokens of the completion, its end-of-text token included. groups: int64 [S], equal for
    completions of one prompt. rewards: float32 [S], NaN before they are known. truncated: bool [S],
    cut by the length limit.

    sampler_logprobs: float32 [S, T], of the drawn tokens as the sampler saw them. old_logprobs: the
    trainer's, before the first update on these samples. ref_logprobs: the reference model's. The
    first is at the sampling temperature, the other two at the objective's; all are 0 outside mask.
    advantages: float32 [S, T], made by the objective. extra: whatever else an objective computed
    once, each [S, ...]. max_new_tokens: the length limit they were drawn under; None: T.
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
        """Width P of the prompts, padding included."""
        return self.ids.shape[1] - self.mask.shape[1]

    @property
    def completions(self) -> torch.Tensor:
        """The ids of the completions alone, int64 [S, T]; padding outside the mask."""
        return self.ids[:, self.prompt_length :]

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
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        rows: dict[str, Any] = {name: value[index] for name, value in tensors.items()}
        extra = {name: value[index] for name, value in self.extra.items()}
        return replace(self, **rows, extra=extra)

    def within(self, mask: torch.Tensor) -> Samples:
        """The same samples with a smaller mask, bool [S, T] or [S, 1].

        What falls out of it counts as no token, and its log-probabilities become 0 like all outside
        the mask.
        """
        mask = self.mask & mask
        cleared: dict[str, Any] = {}
        for name in ("sampler_logprobs", "old_logprobs", "ref_logprobs"):
            logprobs = getattr(self, name)
            if logprobs is not None:
                cleared[name] = torch.where(mask, logprobs, 0.0)
        return replace(self, mask=mask, **cleared)


@dataclass(frozen=True)
class Scores:
    """What a forward of the trainer or the reference says about completions.

    logprobs: float32 [S, T] of the drawn tokens, with gradient, 0 outside the mask. entropy:
    float32 [S, T] of the next-token distributions in nats, without gradient. All at the temperature
    that the objective asks for.

    Only for objectives that ask: logits [S, T, V] (as log-probabilities), prompt_logits
    [S, P - 1, V] (of the prompt's tokens but the first), hidden [S, T, D] (the input of the output
    embedding).
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    logits: torch.Tensor | None = None
    prompt_logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class Totals:
    """What a loss is divided by: tokens and samples of one update, all processes together.

    Every micro-batch divides by these, so the sum of their losses does not depend on the split.
    """

    tokens: float
    samples: float
    max_new_tokens: int


def join(parts: Sequence[Samples], pad: int) -> Samples:
    """One batch of several: all padded to the longest prompt and completion among them."""
    if len(parts) == 1:
        return parts[0]
    left = max(part.prompt_length for part in parts)
    right = max(part.mask.shape[1] for part in parts)
    wide = [_widened(part, left, right, pad) for part in parts]

    # every tensor that is there, and what objectives have added
    names = [f.name for f in fields(Samples) if torch.is_tensor(getattr(wide[0], f.name))]
    rows: dict[str, Any] = {name: torch.cat([getattr(p, name) for p in wide]) for name in names}
    extra = {name: torch.cat([part.extra[name] for part in wide]) for name in wide[0].extra}
    return replace(wide[0], **rows, extra=extra)


def _widened(part: Samples, prompt: int, completion: int, pad: int) -> Samples:
    """``part`` with P = ``prompt`` and T = ``completion``."""
    # prompts grow on their left, completions on their right
    left = prompt - part.prompt_length
    right = completion - part.mask.shape[1]

    # Padding is no token anywhere: not attended to, not in the mask, log-probability 0.
    changed: dict[str, Any] = {
        "ids": F.pad(part.ids, (left, right), value=pad),
        "attention": F.pad(part.attention, (left, right)),
        "mask": F.pad(part.mask, (0, right)),
        "sampler_logprobs": F.pad(part.sampler_logprobs, (0, right)),
    }
    for name in ("old_logprobs", "ref_logprobs", "advantages"):
        value = getattr(part, name)
        if value is not None:
            changed[name] = F.pad(value, (0, right))
    return replace(part, **changed)


def demonstrations(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad: int,
) -> Samples:
    """Given answers as if they had been sampled, for supervised learning by the same ``score``.

    prompts, answers: token ids, one list for each demonstration. Rewards and log-probabilities of
    the sampler are NaN: there was no sampler.
    """
    left, right = max(map(len, prompts)), max(map(len, answers))
    rows = [
        [pad] * (left - len(p)) + list(p) + list(a) + [pad] * (right - len(a))
        for p, a in zip(prompts, answers, strict=True)
    ]

    # a token is between the first of the prompt and the last of the answer
    first = torch.tensor([left - len(p) for p in prompts])
    end = torch.tensor([left + len(a) for a in answers])
    place = torch.arange(left + right)
    attention = (place >= first[:, None]) & (place < end[:, None])

    unknown = torch.full((len(rows), right), float("nan"))
    return Samples(
        ids=torch.tensor(rows),
        attention=attention,
        mask=attention[:, left:],
        groups=torch.arange(len(rows)),
        rewards=unknown[:, 0],
        truncated=torch.zeros(len(rows), dtype=torch.bool),
        sampler_logprobs=unknown,
    )


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """The same values in float64, on their device, or on the CPU where that one has no float64."""
    return values.to(float64_device(values.device)).double()
