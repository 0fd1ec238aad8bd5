"""pass@k, its interval, avg@n and distinct answers, against enumeration and known distributions."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from nvfp4.rl.statistics import average, distinct_correct, pass_at_k, pass_keys, pass_rates


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_hit(samples: int) -> None:
    """Against all subsets, one by one. A few roundings of the product: 1e-15 is above them."""
    for correct in range(samples + 1):
        right = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            hits = [any(subset) for subset in combinations(right, k)]
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(hits) / len(hits), abs=1e-15)


def test_pass_at_k_is_unbiased() -> None:
    """The mean over all outcomes of 5 draws of chance p, weighted, is the chance 1 - (1-p)^k of k
    fresh draws."""
    p = 0.3
    for k in range(1, 6):
        mean = sum(comb(5, c) * p**c * (1 - p) ** (5 - c) * pass_at_k(5, c, k) for c in range(6))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_of_many_samples() -> None:
    """Binomials of 10,000 do not overflow here; the limit for rare hits is k times the share."""
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, abs=1e-12)
    assert pass_at_k(10_000, 0, 10_000) == 0.0
    assert pass_at_k(10_000, 1, 10_000) == 1.0


@pytest.mark.parametrize(
    ("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)]
)
def test_pass_at_k_refuses(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="must be from"):
        pass_at_k(samples, correct, k)


def test_rates_are_means_over_problems_with_an_interval() -> None:
    """Means to the last digits; the interval is as wide as theory says; the same for the same seed
    only."""
    rng = np.random.default_rng(1)
    correct = rng.random((400, 8)) < rng.random((400, 1))
    rates = pass_rates(correct, [1, 2, 8], seed=3)
    for k, estimate in rates.items():
        values = np.array([pass_at_k(8, int(row.sum()), k) for row in correct])
        assert estimate.mean == values.mean()
        # the bootstrap of 2,000 draws is within 10 % of the normal limit
        width = 2 * 1.96 * values.std() / 400**0.5
        assert estimate.high - estimate.low == pytest.approx(width, rel=0.1)
        assert estimate.low < estimate.mean < estimate.high
    assert rates[1] == average(correct, seed=3)
    assert pass_rates(correct, [1, 2, 8], seed=3) == rates
    assert pass_rates(correct, [1, 2, 8], seed=4) != rates


def test_interval_covers_95_percent() -> None:
    """Of 200 sets of 60 problems, the interval holds the true rate in about 190: below 178 is 4
    standard deviations."""
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        estimate = average(rng.random((60, 4)) < rng.beta(2, 2, (60, 1)), seed=trial)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 178 <= covered < 200


def test_one_problem_has_no_width() -> None:
    estimate = average(np.array([[1.0, 0.0]]))
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, 0.5, 0.5)
    assert str(estimate) == "0.500 [0.500, 0.500]"


def test_distinct_correct_counts_texts_once() -> None:
    """Wrong ones do not count, nor do repetitions."""
    texts = [["1+2", "2+1", "1+2", "9"], ["a", "a", "a", "a"]]
    right = np.array([[True, True, True, False], [False, False, False, False]])
    assert distinct_correct(texts, right).mean == 1.0
    with pytest.raises(ValueError, match="2 lists of 4 texts"):
        distinct_correct(texts[:1], right)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((0, 3)), np.zeros((3, 0))])
def test_empty_is_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        average(values)


def test_keys_of_pass_at_k_rise_with_k() -> None:
    """16 after 2, whatever the order of the row; neither ends of intervals nor other figures."""
    row = [
        "eval/pass@16",
        "eval/greedy",
        "eval/pass@2",
        "eval/pass@2/low",
        "eval/pass@2/high",
        "eval/pass@1",
    ]
    assert pass_keys(row) == ["eval/pass@1", "eval/pass@2", "eval/pass@16"]
    assert pass_keys(["eval/reward"]) == []
