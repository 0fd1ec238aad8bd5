"""The search for the best of few scales, held to a search written another way."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from benchmarks import bench_searches as searches
from nvfp4.bench.issue import counted
from nvfp4.numerics.scaling import BYTE_STEPS, SEARCH_FACTORS
from nvfp4.ops import quantize
from nvfp4.quantizers import ms_eden, scale_search
from nvfp4.recipes import RECIPES


def test_best_sets_are_the_best_of_all(generator: torch.Generator) -> None:
    """Against every combination; ties cannot happen among random numbers."""
    errors = torch.rand(7, 50, generator=generator)
    for size, chosen in enumerate(searches.best_sets(errors, 4), start=1):
        sums = {
            rows: errors[list(rows)].amin(0).sum().item() for rows in combinations(range(7), size)
        }
        assert chosen == min(sums, key=lambda rows: sums[rows])


def test_errors_of_the_sample_are_those_of_a_search(generator: torch.Generator) -> None:
    """The least errors of two steps are what scale_search of the two leaves; of ms_eden up to the
    rounding of scales, which moves each by 1/16 at most and adds about a fifth."""
    x = torch.randn(64, 128, generator=generator)
    errors = searches.step_errors(x)
    rows = [searches.STEPS.index(step) for step in (0, 5)]
    searched = quantize(x, "scale_search", candidates=(0, 5)).dequantize().sub(x).square().sum()
    torch.testing.assert_close(errors[rows].amin(0).sum(), searched, rtol=1e-5, atol=0)

    errors = searches.factor_errors(x)
    rows = [searches.FACTORS.index(factor) for factor in (1.0, 1.5)]
    q = quantize(x, "ms_eden", rounds=2, search=True, factors=(1.0, 1.5), seed=1)
    searched = q.dequantize().sub(x).square().sum()
    assert 1 < searched / errors[rows].amin(0).sum() < 1.5


@pytest.mark.parametrize("capability", searches.CARDS.values())
def test_claimed_sets_are_counted(capability: int) -> None:
    """The table has cycles for every set that a claim, and with it a recipe, is made of."""
    claimed = [("scale_search", tried) for tried in scale_search.RELATIVE_MSE]
    claimed += [("ms_eden", tried) for tried in ms_eden.RELATIVE_MSE]
    for name, tried in claimed:
        assert (searches.kernel(name, tried), capability) in counted()


def test_the_recipe_of_three_takes_claimed_sets() -> None:
    """Fewer than the default of either quantiser."""
    recipe = RECIPES["search_eden_3"]
    forward, backward = recipe.fprop.left.static_options, recipe.wgrad.right.static_options
    assert forward.candidates in scale_search.RELATIVE_MSE.keys() - {BYTE_STEPS}
    assert backward.factors in ms_eden.RELATIVE_MSE.keys() - {SEARCH_FACTORS}
