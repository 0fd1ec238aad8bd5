"""A part of a matrix has, given the amax of the whole, the codes that it has in the whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from assertions import assert_qtensor_equal
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import nvfp4
from nvfp4.layer.call import quantize_with_amax
from nvfp4.layer.noise import gemm_seeds
from nvfp4.layer.sharding import CONTRACTION, ROWS, GatheredWeight, Shards
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import quantize_with
from nvfp4.quantizers.registry import QUANTIZERS

CASES = [
    (name, {**block, **rows})
    for name, quantizer in QUANTIZERS.items()
    for block in ({"block": (1, 16)}, {"block": (16, 16)})
    for rows in ({}, {"row_scaled": True})
    if not quantizer.rotates
    and quantizer.name not in ("sr", "sr_te")
    and (block["block"] == quantizer.block or "block" in quantizer.options)
    and not (rows and (block["block"] == (16, 16) or "row_scaled" not in quantizer.options))
]

ALL = slice(0, 52)
PARTS = [
    (slice(0, 41), ALL),
    (slice(0, 32), ALL),
    (slice(32, 41), ALL),
    (slice(0, 41), slice(0, 48)),
    (slice(16, 41), slice(48, 52)),
]


def cut(q: QTensor, rows: slice, columns: slice) -> QTensor:
    """Part of a matrix in its codes; the slices must not cut a block."""
    high = q.block[0]
    row_blocks = slice(rows.start // high, -(-rows.stop // high))
    codes = q.codes[rows, columns.start // 2 : -(-columns.stop // 16) * 8]
    scales = q.block_scale[row_blocks, columns.start // 16 : -(-columns.stop // 16)]
    global_scale = q.global_scale[rows] if q.row_scaled else q.global_scale
    return QTensor(
        codes, scales, global_scale, q.block, (rows.stop - rows.start, columns.stop - columns.start)
    )


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_have_the_codes_of_the_whole(backend, device, name, options, dtype):
    """Cut by rows, by columns and both, at the last ragged block too, read through any strides."""
    quantizer = QUANTIZERS[name]
    checked = quantizer.check(**options)
    x = (torch.randn(41, 52) * torch.logspace(-3, 2, 41)[:, None]).to(dtype).to(device)
    whole = quantize_with(x, quantizer, checked, backend=backend)
    row_amax = x.float().abs().amax(dim=1)
    for rows, columns in PARTS:
        amax = row_amax[rows] if checked.row_scaled else row_amax.max().view(1)
        for part in (x[rows, columns], x[rows, columns].t().contiguous().t()):
            q = quantize_with_amax(part, quantizer, checked, amax, backend=backend)
            assert_qtensor_equal(q, cut(whole, rows, columns))
            assert all(t.is_contiguous() for t in q.tensors)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(1, 2.0**100, width=32))
def test_any_shape_and_any_larger_maximum(rows, columns, amax):
    """The global scale is that of ``amax``, also where it dwarfs the part."""
    quantizer = QUANTIZERS["scale_search"]
    x = torch.linspace(-1, 1, rows * columns).view(rows, columns)
    larger = torch.zeros(rows + 1, columns)
    larger[:rows], larger[rows, 0] = x, amax
    q = quantize_with_amax(x, quantizer, quantizer.check(), torch.tensor([amax]))
    assert_qtensor_equal(
        q,
        cut(quantize_with(larger, quantizer, quantizer.check()), slice(0, rows), slice(0, columns)),
    )


@pytest.mark.parametrize("amax", [float("nan"), float("inf")])
def test_a_whole_that_is_not_finite_makes_every_part_nan(amax):
    """The part itself may be finite: all of it decodes to NaN."""
    quantizer = QUANTIZERS["rtn"]
    q = quantize_with_amax(torch.ones(3, 16), quantizer, quantizer.check(), torch.tensor([amax]))
    assert q.dequantize().isnan().all()


def test_empty_parts_and_what_is_refused():
    """A process may hold no row at all; rotated and stochastic operands depend on more than x and
    amax."""
    quantizer = QUANTIZERS["rtn"]
    q = quantize_with_amax(torch.zeros(0, 32), quantizer, quantizer.check(), torch.ones(1))
    assert q.codes.shape == (0, 16)
    for name, options in (("rtn", {"rotation": Rotation(16, fixed=True)}), ("sr", {"seed": 1})):
        with pytest.raises(ValueError, match="not a function of x and amax"):
            quantize_with_amax(
                torch.ones(3, 16),
                QUANTIZERS[name],
                QUANTIZERS[name].check(**options),
                torch.ones(1),
            )


def test_which_operands_need_the_amax_of_the_whole():
    """Cut, unrotated, and not scaled by whole rows."""
    shards = Shards(None, {("fprop", 0): CONTRACTION, ("fprop", 1): ROWS})
    check = QUANTIZERS["rtn"].check
    assert shards.needs_amax("fprop", 0, check())
    assert shards.needs_amax("fprop", 1, check())
    assert shards.needs_amax("fprop", 0, check(row_scaled=True))
    assert not shards.needs_amax("fprop", 1, check(row_scaled=True))
    assert not shards.needs_amax("dgrad", 0, check())
    assert not shards.needs_amax("fprop", 0, check(rotation=Rotation(16, fixed=True)))


def test_a_gathered_weight_has_a_shape_and_no_values():
    """It takes no memory, and what would read it is told what to do instead."""
    quantizer = QUANTIZERS["rtn"]
    codes = quantize_with(torch.ones(4, 32), quantizer, quantizer.check())
    weight = torch.nn.Parameter(GatheredWeight(codes, torch.bfloat16))
    assert (weight.shape, weight.dtype, weight.requires_grad) == ((4, 32), torch.bfloat16, True)
    assert repr(weight) == "GatheredWeight((4, 32), dtype=torch.bfloat16)"
    assert weight.codes is codes
    assert type(torch.zeros_like(weight)) is torch.Tensor
    for read in (lambda: weight + 1, lambda: torch.nn.functional.linear(torch.ones(1, 32), weight)):
        with pytest.raises(RuntimeError, match="gathered in FP4"):
            read()


def test_a_part_is_refused_where_operators_are_watched():
    """In the backward as in the forward: an operator knows of no other process, and would scale by
    its part alone."""
    layer = nvfp4.convert(torch.nn.Linear(16, 16), "rtn", verbose=False)
    layer.nvfp4.shards = Shards(None, {})
    x = torch.randn(4, 16, requires_grad=True)
    y = layer(x)
    for step in (lambda: layer(x), lambda: y.sum().backward()):
        with (
            FlopCounterMode(display=False),
            pytest.raises(RuntimeError, match="run such layers eagerly"),
        ):
            step()
    y.sum().backward()
    assert x.grad is not None


def test_a_layer_keeps_its_noise_rank_when_copied():
    """It survives copies and pickles, as the seed does, and changes the rounding but not the
    signs."""
    layer = nvfp4.convert(torch.nn.Sequential(torch.nn.Linear(16, 16)), "rtn", verbose=False)[0]
    layer.nvfp4.noise.rank = 3
    noise = layer.nvfp4.noise

    def seeds(noise):
        seed, index, _, rank = noise.state.tolist()
        return gemm_seeds((seed, index, 1, rank), "dgrad")

    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert seeds(other.nvfp4.noise) == seeds(noise)
    own = copy.deepcopy(noise)
    own.rank = None
    assert seeds(own)[0] == seeds(noise)[0]
    assert not set(seeds(own)[1]) & set(seeds(noise)[1])
