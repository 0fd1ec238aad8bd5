"""The losses of reinforcement learning, one number at a time, from their papers. Imports nothing
from nvfp4."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Table = Sequence[Sequence[float]]


def advantages(rewards: Sequence[float], groups: Sequence[int], *, kind: str) -> list[float]:
    """group_std: GRPO; group_mean: Dr. GRPO; leave_one_out: RLOO."""
    found = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        others = [
            r for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if g == group and j != i
        ]
        if kind == "leave_one_out":
            found.append(reward - statistics.fmean(others))
            continue
        centred = reward - statistics.fmean(members)
        found.append(
            centred / (statistics.stdev(members) + 1e-4) if kind == "group_std" else centred
        )
    return found


def token_loss(
    new: float, old: float, advantage: float, low: float, high: float, dual: float | None = None
) -> float:
    """PPO's clipped loss of one token."""
    ratio = math.exp(new - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    gain = min(ratio * advantage, clipped * advantage)
    if dual is not None and advantage < 0:
        gain = max(gain, dual * advantage)
    return -gain


def kl(new: float, ref: float, kind: str) -> float:
    """Schulman's three estimators."""
    ratio = math.exp(ref - new)
    return {
        "k1": -math.log(ratio),
        "k2": 0.5 * math.log(ratio) ** 2,
        "k3": ratio - math.log(ratio) - 1,
    }[kind]


def aggregate(values: Table, lengths: Sequence[int], rule: str, max_new_tokens: int) -> float:
    """One number from a loss per token; each completion is as long as lengths says."""
    sums = [sum(row[:length]) for row, length in zip(values, lengths, strict=True)]
    if rule == "grpo":
        return statistics.fmean(total / length for total, length in zip(sums, lengths, strict=True))
    if rule == "dr_grpo":
        return sum(sums) / (len(sums) * max_new_tokens)
    return sum(sums) / sum(lengths)  # dapo, and bnpo where the batch is one piece


def squared_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Between two points."""
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def delta_weights(vectors: Table, advantage: Sequence[float], rounds: int) -> list[float]:
    """DelTA's token weights, of mean 1; margins to new means are divided by the spread of those to
    the means before."""
    positive = [i for i, a in enumerate(advantage) if a > 0]
    negative = [i for i, a in enumerate(advantage) if a < 0]
    score = [1.0] * len(advantage)

    def mean(members: list[int]) -> list[float]:
        total = sum(abs(advantage[i]) * score[i] for i in members)
        return [
            sum(abs(advantage[i]) * score[i] * vectors[i][d] for i in members) / total
            for d in range(len(vectors[0]))
        ]

    spread: list[float] = []
    for _ in range(1 + rounds):
        centres = mean(positive), mean(negative)
        score = [0.0] * len(advantage)
        margins = {}
        for own, other, members in ((0, 1, positive), (1, 0, negative)):
            for i in members:
                near, far = (
                    sum((v - c) ** 2 for v, c in zip(vectors[i], centres[k], strict=True))
                    for k in (own, other)
                )
                margins[i] = far - near
        present = [
            max(statistics.pvariance([margins[i] for i in side]), 1e-8) ** 0.5
            for side in (positive, negative)
        ]
        spread, before = present, spread or present
        for members, gamma in zip((positive, negative), before, strict=True):
            for i in members:
                score[i] = 1 / (1 + math.exp(-margins[i] / gamma))
    raw = [0.8 + 0.4 * s for s in score]
    return [w * len(raw) / sum(raw) for w in raw]
