"""Quantising by a held amax, on every backend that does, against the oracle: bit for bit.

Held ones that the matrix stays below, exceeds and dwarfs; none at all; NaN and Inf in one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import torch
from interpreting import interpreted

from nvfp4.backends.native.cpu import instruction_sets
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import BACKENDS, find_fault, why_not
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import HeldAmax, Options
from nvfp4.quantizers.registry import QUANTIZERS

CPU = torch.device("cpu")
RULES = [
    ("rtn", {}),
    ("rtn_2d", {}),
    ("sr", {}),
    ("sr_te", {}),
    ("four_over_six", {}),
    ("four_over_six", {"block": (16, 16)}),
    ("four_over_six", {"metric": "abs_max"}),
    ("scale_search", {}),
]
HELD = [2000.0, 3.0, 0.0, 1e-44, 3e38]
SHAPE = (18, 40)
SEED = 2**63 + 11
rules = pytest.mark.parametrize(("name", "options"), RULES, ids=str)


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """The interpreter is numpy, which warns of the infinities that the rules clamp."""
    with np.errstate(all="ignore"):
        yield


def matrix(kind: str = "", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Magnitudes around 3, a few hundredfold, a block of zeros, and what ``kind`` names in one."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SHAPE, generator=generator)
    x[::5, ::7] *= 300
    x[2, 16:32] = 0
    if kind:
        x[17, 33] = float(kind)
    return x.to(dtype)


def checked(name: str, options: dict, held: float, seen: float = 0.0) -> tuple[Options, HeldAmax]:
    """Options that hold an amax, and what they note."""
    table = torch.tensor([held, seen])
    amax = HeldAmax(table[:1], table[1:])
    return QUANTIZERS[name].check(seed=SEED, **options).holding(amax), amax


def assert_codes(q: QTensor, want: oracle.Quantized, note: str) -> None:
    assert np.array_equal(q.codes.numpy(), want.codes), note
    assert np.array_equal(q.block_scale.numpy(), want.block_scale), note
    assert np.array_equal(q.global_scale.numpy(), want.global_scale, equal_nan=True), note


def check_against_oracle(
    backend: str, name: str, options: dict, dtype: torch.dtype, many: bool = True
) -> None:
    """Rows and columns, every held amax, finite and not; three where kernels are interpreted."""
    cases = [(3.0, "nan"), (2000.0, ""), (1e-44, "-inf")]
    if many:
        cases += [(held, "") for held in HELD]
    for held, kind in cases:
        x = matrix(kind, dtype)
        want = oracle.quantize(x.float().numpy(), name, seed=SEED, held=held, **options)
        for down in (False, True):
            given, amax = checked(name, options, held)
            y = x.t().contiguous().t() if down else x
            q = BACKENDS[backend].quantize(y, QUANTIZERS[name], given)
            assert_codes(q, want, f"{name} {options} {held} {kind} {down}")
            own = x.float().abs().max()
            assert amax.seen is not None
            assert amax.seen.isfinite() == own.isfinite()
            assert not own.isfinite() or amax.seen == own


@rules
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_codes_are_the_oracles(backend: str, name: str, options: dict) -> None:
    """Whatever is held, each block scale and code is that of the definition, and x's own amax is
    noted."""
    if reason := BACKENDS[backend].unavailable(CPU):
        pytest.skip(reason)
    check_against_oracle(backend, name, options, torch.float32)


@interpreted
@rules
def test_tritons_codes_are_the_oracles(name: str, options: dict) -> None:
    """The same of the kernels, on BF16."""
    check_against_oracle("triton", name, options, torch.bfloat16, many=False)


def check_both(backend: str) -> None:
    """Both orientations, one of them rotated, and a mixed pair with ms_eden, against one by one."""
    x, nvidia = matrix(dtype=torch.bfloat16), Rotation(16, fixed=True)
    for columns in (("sr_te", {"rotation": nvidia}), ("ms_eden", {})):
        given, amax = checked("rtn", {}, 20.0)
        if columns[0] == "ms_eden":
            other, noted = QUANTIZERS["ms_eden"].check(seed=SEED), None
        else:
            other, noted = checked(*columns, 40.0)
        pair = BACKENDS[backend].quantize_both(
            x, (QUANTIZERS["rtn"], given), (QUANTIZERS[columns[0]], other)
        )

        one, first = checked("rtn", {}, 20.0)
        wants = [ReferenceBackend().quantize(x, QUANTIZERS["rtn"], one)]
        if noted is None:
            wants.append(ReferenceBackend().quantize(x.t(), QUANTIZERS["ms_eden"], other))
        else:
            two, second = checked(*columns, 40.0)
            wants.append(ReferenceBackend().quantize(x.t(), QUANTIZERS[columns[0]], two))
            assert torch.equal(noted.seen, second.seen)  # type: ignore[arg-type]
        assert torch.equal(amax.seen, first.seen)  # type: ignore[arg-type]
        for got, want in zip(pair, wants, strict=True):
            for a, b in zip(got.tensors, want.tensors, strict=True):
                assert torch.equal(a, b), columns


def test_both_orientations() -> None:
    """On the CPU, whose kernels are told one amax at a time."""
    check_both("cpu" if instruction_sets() else "reference")


@interpreted
def test_both_orientations_in_one_read() -> None:
    """In one launch of Triton's."""
    check_both("triton")


@interpreted
def test_triton_gives_the_references_bits() -> None:
    """The self-check: codes of codes, a NaN, the end of a call; of the rules that recipes delay."""
    for name in ("rtn", "sr_te", "four_over_six"):
        assert find_fault(BACKENDS["triton"], "quantize_held", CPU, QUANTIZERS[name]) is None


def test_what_was_seen_is_only_raised() -> None:
    """Two passes of one call, as a recomputed forward makes them, note the larger."""
    given, amax = checked("rtn", {}, 20.0, seen=1e9)
    ReferenceBackend().quantize(matrix(), QUANTIZERS["rtn"], given)
    assert amax.seen == 1e9
    assert ReferenceBackend().quantize(
        matrix(), QUANTIZERS["rtn"], given.holding(HeldAmax(amax.amax))
    )


def test_the_end_of_a_call() -> None:
    """Every row of the table against the oracle; NaN, Inf and zeros change nothing."""
    held = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 6.0])
    seen = torch.tensor([0.0, float("nan"), float("inf"), 3e38, 1e-45, 5.0])
    table = torch.stack([held, seen, torch.zeros(6)])
    BACKENDS["reference"].turn_amax(table)
    want = [oracle.held_after(h, s) for h, s in zip(held.numpy(), seen.numpy(), strict=True)]
    assert np.array_equal(table[0].numpy(), np.array(want))
    assert table[1].tolist() == [0.0] * 6
    assert table[2].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 0.0]


def test_a_backend_that_cannot_is_passed_over() -> None:
    """The CUDA kernels look for the amax themselves: Triton takes over, and nothing is silent."""
    reason = why_not(BACKENDS["cuda"], "quantize_held", CPU, QUANTIZERS["rtn"], None)
    assert reason is not None
    assert BACKENDS["cuda"].refuses("quantize_held") == "it quantises and decodes alone"


def test_the_error_is_that_of_rtn_within_the_headroom() -> None:
    """Scales of blocks stay normal E4M3 numbers: held at 1.75 of N(0, 1)'s maximum, the error is
    rtn's, within what it is promised to vary by."""
    x = torch.randn(512, 2048, generator=torch.Generator().manual_seed(1))
    claims = QUANTIZERS["rtn"].claims(QUANTIZERS["rtn"].check())
    given, _ = checked("rtn", {}, 1.75 * x.abs().max().item())
    q = BACKENDS["cpu" if instruction_sets() else "reference"].quantize(x, QUANTIZERS["rtn"], given)
    error = ((q.dequantize() - x) ** 2).mean() / (x**2).mean()
    # four times the elements of this matrix are in those of the claim: twice the deviation
    assert abs(error.item() - claims.relative_mse) < 2 * claims.relative_mse_tolerance
