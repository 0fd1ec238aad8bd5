"""What sampling says about a model: pass@k without bias, its interval over problems, and how many answers differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CONFIDENCE = 0.95
_RESAMPLES = 2000


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

    1 - C(n - c, k) / C(n, k), the unbiased estimator of the chance for k fresh ones (Chen et al., arXiv 2107.03374).
    Raises ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be from 0 to samples, got {correct} of {samples}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to samples, got {k} of {samples}; draw more")
    if samples - correct < k:
        return 1.0
    missed = 1.0
    for i in range(k):  # the quotient of the two binomials, factor by factor
        missed *= (samples - correct - i) / (samples - i)
    return 1.0 - missed


def pass_rates(correct: np.ndarray, ks: Sequence[int], seed: int = 0) -> dict[int, Estimate]:
    """pass@k for each k, with one set of bootstrap draws for all; correct: bool [problems, samples]."""
    correct = _checked(correct)
    counts = correct.sum(axis=1)
    values = np.array([[pass_at_k(correct.shape[1], int(c), k) for k in ks] for c in counts])
    return {k: _estimate(values[:, i], seed) for i, k in enumerate(ks)}


def average(rewards: np.ndarray, seed: int = 0) -> Estimate:
    """avg@n: the mean reward of n samples per problem, float [problems, samples]; of 0/1 rewards it is pass@1."""
    rewards = _checked(rewards)
    return _estimate(rewards.mean(axis=1, dtype=np.float64), seed)


def distinct_correct(completions: Sequence[Sequence[str]], correct: np.ndarray, seed: int = 0) -> Estimate:
    """Different correct completions among the n samples of a problem; completions [problems][samples], correct too."""
    correct = _checked(correct)
    if [len(texts) for texts in completions] != [correct.shape[1]] * len(correct):
        raise ValueError(f"completions must be {correct.shape[0]} lists of {correct.shape[1]} texts, as correct is")
    counts = [
        len({t for t, right in zip(texts, row, strict=True) if right})
        for texts, row in zip(completions, correct, strict=True)
    ]
    return _estimate(np.array(counts, np.float64), seed)


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"expected an array [problems, samples] with at least one of each, got {values.shape}")
    return values


def _estimate(values: np.ndarray, seed: int) -> Estimate:
    """The mean of one number per problem, and the percentile bootstrap: whole problems are drawn anew."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(values), (_RESAMPLES, len(values)))
    tail = 100 * (1 - _CONFIDENCE) / 2
    low, high = np.percentile(values[draws].mean(axis=1), [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))
