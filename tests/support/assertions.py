"""The words the tests speak. Each says in its docstring what it allows; a failure names coordinate
and both values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import oracle
import torch

Array = npt.NDArray[Any] | torch.Tensor
SHOWN = 5
"""Mismatches printed before the rest is only counted."""


class Stored(Protocol):
    """What a QTensor and the oracle's Quantized have in common."""

    @property
    def codes(self) -> Any: ...
    @property
    def block_scale(self) -> Any: ...
    @property
    def global_scale(self) -> Any: ...


def _numpy(a: Array) -> npt.NDArray[Any]:
    return a.detach().cpu().numpy() if isinstance(a, torch.Tensor) else np.asarray(a)


def _same_kind(got: npt.NDArray[Any], want: npt.NDArray[Any], what: str) -> None:
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"


def _fail(what: str, total: int, where: npt.NDArray[Any], lines: Iterable[str]) -> None:
    raise AssertionError("\n  ".join([f"{what}: {len(where)} of {total} differ, first:", *lines]))


def assert_bytes_equal(got: Array, want: Array, what: str) -> None:
    """Same dtype, same shape, same integers."""
    g, w = _numpy(got), _numpy(want)
    _same_kind(g, w, what)
    where = np.argwhere(g != w)
    if len(where):
        at = [tuple(i) for i in where[:SHOWN].tolist()]
        _fail(what, g.size, where, (f"{i}: got {g[i]:#x}, expected {w[i]:#x}" for i in at))


def assert_codes_bitwise(got: Array, want: Array, what: str = "codes") -> None:
    """Packed E2M1 codes equal nibble by nibble; -0 is not 0."""
    g, w = _numpy(got), _numpy(want)
    _same_kind(g, w, what)
    codes_got, codes_want = oracle.unpack(g), oracle.unpack(w)
    where = np.argwhere(codes_got != codes_want)
    if len(where):
        at = [tuple(i) for i in where[:SHOWN].tolist()]
        lines = (
            f"row {r} column {c} (byte {c // 2}, {'high' if c % 2 else 'low'} nibble): "
            f"got byte {g[r, c // 2]:#04x} = {_value(codes_got[r, c])}, "
            f"expected byte {w[r, c // 2]:#04x} = {_value(codes_want[r, c])}"
            for r, c in at
        )
        _fail(what, codes_got.size, where, lines)


def _value(code: np.uint8) -> str:
    return f"{float(oracle.e2m1_value(np.asarray(code))):+g}"


def assert_floats_bitwise(got: Array, want: Array, what: str) -> None:
    """The same float32 bits: -0 is not 0. Any NaN equals any NaN, because IEEE 754 leaves its
    payload open."""
    g, w = _numpy(got), _numpy(want)
    _same_kind(g, w, what)
    assert g.dtype == np.float32, f"{what}: expected float32, got {g.dtype}"
    bits_got, bits_want = (
        np.ascontiguousarray(g).view(np.uint32),
        np.ascontiguousarray(w).view(np.uint32),
    )
    where = np.argwhere((bits_got != bits_want) & ~(np.isnan(g) & np.isnan(w)))
    if len(where):
        at = [tuple(i) for i in where[:SHOWN].tolist()]
        lines = (
            f"{i}: got {float(g[i])!r} = {float(g[i]).hex()}, expected {float(w[i])!r} = "
            f"{float(w[i]).hex()}"
            for i in at
        )
        _fail(what, g.size, where, lines)


def assert_qtensor_equal(got: Stored, want: Stored, what: str = "") -> None:
    """Codes, block scales and global scales bit for bit; the scales first, since a wrong one
    explains wrong codes."""
    prefix = f"{what} " if what else ""
    assert_floats_bitwise(got.global_scale, want.global_scale, f"{prefix}global_scale")
    assert_bytes_equal(got.block_scale, want.block_scale, f"{prefix}block_scale")
    assert_codes_bitwise(got.codes, want.codes, f"{prefix}codes")


def assert_well_formed(q: Stored, what: str = "") -> None:
    """What no input may break: no E4M3 NaN byte or sign bit, and NaN globals only over zero codes
    and scales."""
    scales, globals_ = _numpy(q.block_scale), _numpy(q.global_scale)
    assert (scales <= 126).all(), (
        f"{what}: block scale byte {scales.max():#x} is not a finite unsigned E4M3 number"
    )
    assert not np.isinf(globals_).any(), f"{what}: global scale {globals_}"
    assert not (globals_ <= 0).any(), f"{what}: global scale {globals_}"
    if np.isnan(globals_).all():
        assert not scales.any(), f"{what}: block scales under a NaN global scale"
        assert not _numpy(q.codes).any(), f"{what}: codes under a NaN global scale"


def assert_unbiased_by_counting(ups: Array, fraction: Array, what: str) -> None:
    """Of all 2^16 noise values, as many round up as the fraction of the step says.

    A draw k rounds up iff fraction + (k + 1/2) / 2^16 >= 1, so the count is the fraction times 2^16
    rounded to an
    integer: off by at most half a count, that is 2^-17 of a step. The sum is rounded to float32,
    which for a result below 16 moves a threshold by at most 2^-20, 1/16 of a count; hence 0.5 +
    1/16.
    """
    error = np.abs(_numpy(ups).astype(np.float64) - _numpy(fraction).astype(np.float64) * 2**16)
    worst = np.unravel_index(int(error.argmax()), error.shape)
    assert error.max() <= 0.5 + 1 / 16, (
        f"{what}: at {worst} {error.max()} counts of 65536 away from unbiased"
    )


def assert_within(got: float, want: float, tolerance: float, what: str) -> None:
    """|got - want| <= tolerance, the tolerance explained where it is written."""
    assert abs(got - want) <= tolerance, (
        f"{what}: {got:.6g}, expected {want:.6g} +- {tolerance:.2g}"
    )
