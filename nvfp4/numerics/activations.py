"""RMSNorm and SwiGLU to the last bit, for quantisers whose input is never written to memory.

    RMSNorm   x [M, K], w [K]      rstd = 1 / sqrt(row_sum(x^2) / K + eps)
                                   y = round_out(round_x(x rstd) w)
    SwiGLU    gate, up [M, K]      silu(g) = (g if g >= 0 else g e) / (1 + e), e = exp(-|g|)
                                   y = round_out(round_gate(silu(gate)) up)

All of it is float32 with every operation rounded by itself (no FMA), true division and correctly
rounded square roots; round_t is one rounding, to nearest even, to the dtype t. Sums have one order,
and exp is a series of eight terms. So a kernel that computes the activation in registers and
quantises it there makes the same codes as a backend that writes it first.

They round where transformers' ``LlamaRMSNorm`` and ``LlamaMLP`` do (``out``: the dtype that torch
promotes to), and differ from them in the order of a sum, which torch leaves open, and in the last
bits of ``rsqrt`` and ``exp``. The backward is float32 throughout and rounds once, each gradient to
the dtype of its input. NaN and Inf stay visible: one in x makes its row NaN or Inf; a gate of -Inf
makes NaN, as in torch. A row of zeros gives zeros if eps > 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nvfp4.numerics.scaling import tree_sum

LANES = 256
"""Columns that ``row_sum`` adds side by side: what a GPU program holds of a row at once."""

STRETCH = 2**16
"""Elements that a core of a CPU takes at a time, so that each pass finds them in its cache.

In such stretches, in place and without ``where``, a step of a fused model on a CPU takes 1.15 to
1.32 times as long as with the model's own modules; over whole matrices it took 1.9 times.
"""

SLAB = 16
"""Rows whose part of a weight's gradient is summed first."""


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


LOG2_E = _float32(1 / math.log(2))
LN2_HIGH = round(math.log(2) * 512) / 512
"""ln 2 to 9 bits, so that its product with an exponent is exact (Cody and Waite, 1980)."""
LN2_LOW = _float32(math.log(2) - LN2_HIGH)
EXP_TERMS = tuple(_float32(1 / math.factorial(k)) for k in range(8))
"""1/k!: the series up to r^7 is within 2^-27 of e^r where |r| <= ln(2) / 2."""
EXP_FLOOR = -104.0
"""Below it e^t rounds to 0: half the smallest float32 is 2^-150 = e^-103.97."""
ROUNDER = 1.5 * 2.0**23
"""Added and taken away, it rounds a float32 below 2^22 to the nearest integer, ties to even."""


class RMSNorm(NamedTuple):
    """Matrix x [M, K] normalised by rows and multiplied by weight [K]."""

    x: torch.Tensor
    weight: torch.Tensor
    eps: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: what torch promotes the two dtypes to."""
        return torch.promote_types(self.x.dtype, self.weight.dtype)

    def values(self) -> torch.Tensor:
        """The activation [M, K]."""
        normal = self._normal(inverse_rms(self.x, self.eps))
        return (normal * self.weight.to(torch.float32)).to(self.dtype)

    def gradients(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(dx [M, K], dweight [K]) of dy [M, K].

        dx = rstd (g - x (row_sum(g x) / K) rstd^2) with g = dy w,
        dweight = slab_sum(dy round_x(x rstd)).
        """
        x, dy, rstd = self.x.to(torch.float32), dy.to(torch.float32), inverse_rms(self.x, self.eps)
        g = dy * self.weight.to(torch.float32)
        slope = _over(row_sum(g * x), x.shape[1]) * (rstd * rstd)
        dx = rstd[:, None] * (g - x * slope[:, None])
        return dx.to(self.x.dtype), slab_sum(dy * self._normal(rstd)).to(self.weight.dtype)

    def _normal(self, rstd: torch.Tensor) -> torch.Tensor:
        return (self.x.to(torch.float32) * rstd[:, None]).to(self.x.dtype).to(torch.float32)


class SwiGLU(NamedTuple):
    """silu(gate) * up of two matrices [M, K]."""

    gate: torch.Tensor
    up: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: what torch promotes the two dtypes to."""
        return torch.promote_types(self.gate.dtype, self.up.dtype)

    def values(self) -> torch.Tensor:
        """The activation [M, K]."""
        made = torch.empty(self.gate.shape, dtype=self.dtype, device=self.gate.device)
        for out, gate, up in _stretches(made, self.gate, self.up):
            wide = gate.to(torch.float32)
            out.copy_(_silu(gate.dtype, wide, _sigmoid(wide)).mul_(up))
        return made

    def gradients(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(dgate, dup) of dy, all [M, K].

        dgate = (dy up) (s (1 + gate (1 - s))) with s = sigmoid(gate),
        dup = dy round_gate(silu(gate)).
        """
        dgate, dup = torch.empty_like(self.gate), torch.empty_like(self.up)
        for d_gate, d_up, gate, up, g in _stretches(dgate, dup, self.gate, self.up, dy):
            wide, g = gate.to(torch.float32), g.to(torch.float32)
            top, bottom = _sigmoid(wide)
            s = top / bottom
            d_gate.copy_((g * up.to(torch.float32)).mul_((1 - s).mul_(wide).add_(1).mul_(s)))
            d_up.copy_(_silu(gate.dtype, wide, (top, bottom)).mul_(g))
        return dgate, dup


def _sigmoid(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of the sigmoid of float32 x: (1 or e) / (1 + e), e = exp(-|x|)."""
    e = exp_negative(x)
    # as torch.where, which is slow on CPUs: e <= 1
    return torch.maximum(e, (x >= 0).to(torch.float32)), 1 + e


def _silu(
    dtype: torch.dtype, gate: torch.Tensor, sigmoid: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """silu(gate) of float32 gate, rounded to ``dtype``, in float32."""
    top, bottom = sigmoid
    return (gate * top).div_(bottom).to(dtype).to(torch.float32)


def _stretches(*matrices: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Rows [m, K] of all matrices [M, K] at a time: as many as stay in a CPU's caches.

    On other devices all rows at once.
    """
    rows, columns = matrices[0].shape
    if matrices[0].device.type != "cpu":
        return (matrices,)
    few = max(STRETCH * torch.get_num_threads() // max(columns, 1), 1)
    return zip(*(matrix.split(few) for matrix in matrices), strict=True) if rows else ()


Activation = RMSNorm | SwiGLU


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(row_sum(x^2) / K + eps) of each row of x [M, K], float32 [M]."""
    x = x.to(torch.float32)
    root = _root(_over(row_sum(x * x), x.shape[1]) + eps)
    return torch.ones_like(root) / root


def _root(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded square root of float32 x, which torch's own is not on every CPU.

    (4 of 32 random inputs came out wrong on one.) In float64 even a root that is wrong by a unit
    rounds rightly: a float32 root is always farther than that from the middle of two float32
    numbers. MPS has no float64.
    """
    wide = x.cpu() if x.device.type == "mps" else x
    return wide.to(torch.float64).sqrt().to(torch.float32).to(x.device)


def exp_negative(x: torch.Tensor) -> torch.Tensor:
    """e^-|x| of float32 x, within two units in the last place: 2^n e^r, e^r by its series.

    A subnormal result is rounded once more.
    """
    # n: the nearest integer to t / ln 2; r: what is left, |r| <= ln(2) / 2
    t = x.abs().neg_().clamp_(min=EXP_FLOOR)
    n = (t * LOG2_E).add_(ROUNDER).sub_(ROUNDER)
    r = t.sub_(n * LN2_HIGH).sub_(n * LN2_LOW)

    # the series, from its last term
    total = torch.full_like(r, EXP_TERMS[-1])
    for term in reversed(EXP_TERMS[:-1]):
        total.mul_(r).add_(term)

    # 2^n in two factors, since 2^-150 is below every float32
    exponent = n.nan_to_num_().to(torch.int32)
    half = exponent >> 1
    return total.mul_(_power(half)).mul_(_power(exponent - half))


def _power(exponent: torch.Tensor) -> torch.Tensor:
    return (exponent + 127).bitwise_left_shift_(23).view(torch.float32)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of each row of float32 x [M, K], [M].

    ``LANES`` columns side by side, one stretch of them after the other, zeros beyond the last; then
    ``tree_sum`` over the lanes.
    """
    padded = F.pad(x, (0, -x.shape[1] % LANES))
    lanes = torch.zeros(x.shape[0], LANES, dtype=torch.float32, device=x.device)
    for start in range(0, padded.shape[1], LANES):
        lanes = lanes + padded[:, start : start + LANES]
    return tree_sum(lanes)


def slab_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of each column of float32 x [M, K], [K].

    ``tree_sum`` over each ``SLAB`` rows, then ``row_sum`` over these partial sums.
    """
    slabs = F.pad(x, (0, 0, 0, -x.shape[0] % SLAB)).view(-1, SLAB, x.shape[1])
    return row_sum(tree_sum(slabs.transpose(1, 2)).t())


def _over(x: torch.Tensor, count: int) -> torch.Tensor:
    """x / count; by a tensor, since torch on CUDA multiplies by the reciprocal of a number."""
    return x / torch.full_like(x, count)
