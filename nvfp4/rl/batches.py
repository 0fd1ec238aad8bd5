"""Samples of different widths brought together: of several rollouts, or of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from nvfp4.rl.samples import Samples


def join(parts: Sequence[Samples], pad: int) -> Samples:
    """One batch of several: prompts padded on the left, completions on the right, to the longest of all."""
    if len(parts) == 1:
        return parts[0]
    left = max(part.prompt_length for part in parts)
    right = max(part.mask.shape[1] for part in parts)
    wide = [_widened(part, left - part.prompt_length, right - part.mask.shape[1], pad) for part in parts]
    names = [f.name for f in fields(Samples) if isinstance(getattr(wide[0], f.name), torch.Tensor)]
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in wide]) for name in names}
    extra = {name: torch.cat([part.extra[name] for part in wide]) for name in wide[0].extra}
    return replace(wide[0], **joined, extra=extra)


def demonstrations(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int) -> Samples:
    """Given answers as if they had been sampled, for supervised learning by the same ``score``."""
    left, right = max(map(len, prompts)), max(map(len, answers))
    rows = [
        [pad] * (left - len(p)) + list(p) + list(a) + [pad] * (right - len(a))
        for p, a in zip(prompts, answers, strict=True)
    ]
    before = torch.tensor([left - len(p) for p in prompts])
    after = torch.tensor([left + len(a) for a in answers])
    place = torch.arange(left + right)
    attention = (place >= before[:, None]) & (place < after[:, None])
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


def _widened(part: Samples, left: int, right: int, pad: int) -> Samples:
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
