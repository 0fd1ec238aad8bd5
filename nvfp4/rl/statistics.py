"""What sampling says about a model: pass@k without bias, its interval, distinct answers.

``mismatch`` says how far the sampler of a step is from the trainer.

pass@k is the chance that at least one of k completions of a problem is correct. From n >= k samples
of which c are correct, the unbiased estimator is

    1 - C(n - c, k) / C(n, k)                                   (Chen et al., arXiv 2107.03374)

The plain 1 - (1 - c / n)^k is too low. Intervals are the percentile bootstrap over problems, 2000
draws: they say what other problems would give, not what another training run would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

_CONFIDENCE = 0.95
_RESAMPLES = 2000

NOTICEABLE = 0.05
"""|d| in nats from which a token is counted."""

PER_TENSOR = "rl, but one scale for all rows"
"""Name of the ablation whose mismatch every comparison is seen against."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % bootstrap interval over problems."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that k of ``samples`` completions, drawn without replacement, hold a correct one.

    Raises ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be from 0 to samples, got {correct} of {samples}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to samples, got {k} of {samples}; draw more")
    if samples - correct < k:
        return 1.0

    # the quotient of the two binomials, factor by factor: neither of them overflows
    missed = 1.0
    for i in range(k):
        missed *= (samples - correct - i) / (samples - i)
    return 1.0 - missed


def pass_rates(correct: np.ndarray, ks: Sequence[int], seed: int = 0) -> dict[int, Estimate]:
    """pass@k for each k, with one set of bootstrap draws for all; bool [problems, samples]."""
    correct = _checked(correct)
    samples = correct.shape[1]
    counts = correct.sum(axis=1)
    values = np.array([[pass_at_k(samples, int(c), k) for k in ks] for c in counts])
    return {k: _estimate(values[:, i], seed) for i, k in enumerate(ks)}


def pass_keys(figures: Iterable[str]) -> list[str]:
    """The names of pass@k among those of an evaluation, by rising k; not the ends of intervals."""
    keys = [key for key in figures if "@" in key and key.count("/") == 1]
    return sorted(keys, key=lambda key: int(key.split("@")[1]))


def average(rewards: np.ndarray, seed: int = 0) -> Estimate:
    """avg@n: the mean reward of n samples, float [problems, n]; of 0/1 rewards it is pass@1."""
    rewards = _checked(rewards)
    return _estimate(rewards.mean(axis=1, dtype=np.float64), seed)


def distinct_correct(
    completions: Sequence[Sequence[str]],
    correct: np.ndarray,
    seed: int = 0,
) -> Estimate:
    """Different correct completions among the n samples of a problem.

    completions: [problems][n]. correct: bool [problems, n].
    """
    correct = _checked(correct)
    problems, samples = correct.shape
    if [len(texts) for texts in completions] != [samples] * problems:
        raise ValueError(f"completions must be {problems} lists of {samples} texts, as correct is")
    counts = []
    for texts, row in zip(completions, correct, strict=True):
        counts.append(len({text for text, right in zip(texts, row, strict=True) if right}))
    return _estimate(np.array(counts, np.float64), seed)


def mismatch(
    trainer: torch.Tensor,
    sampler: torch.Tensor,
    mask: torch.Tensor,
) -> dict[str, float]:
    """The gap between log-probabilities [S, T] of the same tokens, over ``mask``.

    token_mult_prob_error: mean exp |d|, 1 for none. gen_kl_error: mean of exp(d) - 1 - d, an
    unbiased estimate of KL(sampler || trainer), whose draws these are; no term is below 0. max,
    quantile_999: of |d|. share: of tokens with |d| > .05. exact: share of tokens with d = 0.
    """
    # without a token there is no difference, and no mean of nothing
    d = (trainer.detach() - sampler)[mask].double()
    if d.numel() == 0:
        d = d.new_zeros(1)

    # The 99.9 % quantile by rank: a gap that only a few tokens have shows in ``max`` alone.
    size = d.abs()
    rank = min(len(size) - 1, int(0.999 * len(size)))
    return {
        "token_mult_prob_error": float(size.exp().mean()),
        "gen_kl_error": float((torch.expm1(d) - d).mean()),
        "max": float(size.max()),
        "quantile_999": float(size.sort().values[rank]),
        "share": float((size > NOTICEABLE).double().mean()),
        "exact": float((d == 0).double().mean()),
    }


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.size == 0:
        expected = "an array [problems, samples] with at least one of each"
        raise ValueError(f"expected {expected}, got {values.shape}")
    return values


def _estimate(values: np.ndarray, seed: int) -> Estimate:
    """The mean of one number per problem, and the bootstrap: whole problems drawn anew."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(values), (_RESAMPLES, len(values)))  # [2000, problems]
    means = values[draws].mean(axis=1)  # [2000]
    tail = 100 * (1 - _CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))
