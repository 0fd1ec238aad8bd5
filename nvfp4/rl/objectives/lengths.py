"""Long completions: penalties, which cut ones are excused, loops, diversity, limits that grow.

    overlong_penalty   DAPO     0 until the last share of the limit, then linear to -1
    cosine_penalty     ProRL    -(1 - cos(pi length / limit)) / 2
    value_at_stage     ProRL    a length limit that changes at given steps
    ends_in_loop       MicroCoder: the last tokens repeat those before them
    excused            MicroCoder: cut completions that are not to blame
    distinct_grams     how different the completions of a group are

Lengths and limits are in tokens, the end-of-text token included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nvfp4.rl.samples import in_float64


def overlong_penalty(lengths: torch.Tensor, limit: int, share: float) -> torch.Tensor:
    """DAPO's soft punishment (arXiv 2503.14476), float32 [S] in [-1, 0].

    0 up to limit - cache tokens, from there linear to -1 at the limit, -1 beyond. cache: share *
    limit in whole tokens, rounded down, since a limit with hardly any room to spare is not to
    punish right answers; no penalty below one token. The paper's 4096 of 20480 are 0.2. lengths:
    int64 [S].
    """
    cache = math.floor(share * limit + 1e-9)  # 0.29 * 100 is 28.999...
    if not cache:
        return torch.zeros(lengths.shape, device=lengths.device)
    room = limit - cache - in_float64(lengths)
    return (room / cache).clamp(-1.0, 0.0).float().to(lengths.device)


def cosine_penalty(lengths: torch.Tensor, limit: int) -> torch.Tensor:
    """-(1 - cos(pi * length / limit)) / 2, float32 [S] in [-1, 0]; -1 at the limit and beyond."""
    share = (lengths.float() / limit).clamp(max=1.0)
    return (torch.cos(torch.pi * share) - 1) / 2


def ends_in_loop(completions: torch.Tensor, lengths: torch.Tensor, window: int) -> torch.Tensor:
    """bool [S]: the last ``window`` tokens equal the ``window`` before them.

    completions: int64 [S, T]. A completion shorter than twice the window does not loop.
    """
    # clamped so that short completions index something; the last line drops them
    offsets = torch.arange(window, device=completions.device)
    last = (lengths[:, None] - window + offsets).clamp(min=0)  # [S, window]
    before = (last - window).clamp(min=0)
    same = (completions.gather(1, last) == completions.gather(1, before)).all(dim=1)
    return same & (lengths >= 2 * window)


def excused(
    truncated: torch.Tensor,
    incorrect: torch.Tensor,
    looping: torch.Tensor,
    draws: torch.Tensor,
    share: float,
) -> torch.Tensor:
    """MicroCoder's M (arXiv 2603.07777), bool [S].

    Cut by the limit, not incorrect for another reason, not looping, and drawn: draws, uniform in
    (0, 1), below share. share 0 excuses none, share 1 all that pass the other three. All arguments:
    [S].
    """
    return truncated & ~incorrect & ~looping & (draws < share).to(truncated.device)


def distinct_grams(
    completions: torch.Tensor,
    mask: torch.Tensor,
    groups: torch.Tensor,
    window: int,
) -> torch.Tensor:
    """Share of distinct runs of ``window`` tokens in the sample's group, float32 [S] in (0, 1].

    distinct-n (arXiv 1510.03055). completions: int64 [S, T], mask: bool [S, T], groups: int64 [S].
    A shorter completion is one run. Long answers that begin alike and then part are less than 1
    here, where the share of distinct completions is not.
    """
    window = min(window, completions.shape[1])

    # all runs that lie in a completion; where none does, what there is counts as one
    rows = torch.where(mask, completions, -1).unfold(1, window, 1)  # [S, T - window + 1, window]
    whole = mask.unfold(1, window, 1).all(dim=2)
    whole[:, 0] |= mask[:, 0]
    sample = torch.arange(len(rows), device=rows.device)[:, None].expand(whole.shape)[whole]

    # a run counts once per group
    _, member = torch.unique(groups, return_inverse=True)
    grams = torch.cat((member[sample][:, None], rows[whole]), dim=1)
    distinct = torch.unique(grams, dim=0)[:, 0]
    size = int(member.max()) + 1
    counts = torch.bincount(member[sample], minlength=size).clamp(min=1)
    share = torch.bincount(distinct, minlength=size) / counts
    return torch.where(share > 0, share, 1.0)[member].float()


def value_at_stage(step: int, starts: Sequence[int], values: Sequence[int], before: int) -> int:
    """The value of the latest stage that has begun; ``before`` ahead of the first."""
    reached = [value for start, value in zip(starts, values, strict=True) if start <= step]
    return reached[-1] if reached else before
