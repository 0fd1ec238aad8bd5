"""Stand-ins for torch.nn.functional.scaled_mm and scaled_grouped_mm: their rules, checked strictly,
on any device.

Rules as torch 2.13 states them: ``_check_scaled_mm_sizes_v2`` (torch/_meta_registrations.py) and
ScaledBlas.cpp, GroupedBlas.cpp. What is multiplied is worked out from the bytes by the oracle,
whose swizzle is the formula of the
definition. Where a library would be silently wrong, these can be told to be: see ``Mistake``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import oracle
import torch
from torch.nn.functional import ScalingType, SwizzleType

Mistake = Literal[
    "row-major scales",
    "transposed scales",
    "scales over all groups",
    "zeros",
    "leftovers",
    "no global scale",
    "one global scale",
    "nibbles of a exchanged",
]


def up(size: int, unit: int) -> int:
    """size rounded up to a multiple of unit."""
    return -(-size // unit) * unit


class ScaledMm:
    """``scaled_mm``; mistake: what to get wrong. calls: how often it ran."""

    def __init__(self, mistake: Mistake | None = None) -> None:
        self.mistake = mistake
        self.calls = 0

    def __call__(
        self,
        mat_a: torch.Tensor,
        mat_b: torch.Tensor,
        scale_a: list[torch.Tensor],
        scale_recipe_a: list[ScalingType],
        scale_b: list[torch.Tensor],
        scale_recipe_b: list[ScalingType],
        swizzle_a: list[SwizzleType],
        swizzle_b: list[SwizzleType],
        bias: torch.Tensor | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
        contraction_dim: Sequence[int] = (),
        use_fast_accum: bool = False,
    ) -> torch.Tensor:
        self.calls += 1
        assert mat_a.dtype == mat_b.dtype == torch.float4_e2m1fn_x2
        (m, k), n = mat_a.shape, mat_b.shape[1]
        assert mat_b.shape[0] == k
        assert mat_a.stride() == (k, 1), "mat_a must be row-major"
        assert mat_b.stride() == (1, k), "mat_b must be column-major"
        assert k % 16 == 0, "a row of codes must be a multiple of 16 bytes"
        assert n % 16 == 0
        assert not use_fast_accum
        levels = len(scale_a)
        for rows, scales, recipe, swizzles in (
            (m, scale_a, scale_recipe_a, swizzle_a),
            (n, scale_b, scale_recipe_b, swizzle_b),
        ):
            assert recipe == [ScalingType.BlockWise1x16, ScalingType.TensorWise][:levels]
            assert swizzles == [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE][:levels]
            assert len(scales) == levels
            assert scales[0].dtype == torch.float8_e4m3fn
            assert scales[0].is_contiguous()
            assert scales[0].numel() == up(rows, 128) * up(k // 8, 4)
            assert levels == 1 or (scales[1].dtype == torch.float32 and scales[1].numel() == 1)
        if bias is not None:
            assert output_dtype != torch.float32, (
                "Bias is not supported when out_dtype is set to Float32"
            )
            assert bias.dtype == output_dtype
            assert bias.shape == (n,)
        # of both operands they would only reorder the sum
        if self.mistake == "nibbles of a exchanged":
            mat_a = (mat_a.view(torch.uint8) >> 4 | mat_a.view(torch.uint8) << 4).view(
                torch.float4_e2m1fn_x2
            )
        y = self._decoded(mat_a, scale_a[0]) @ self._decoded(mat_b.t(), scale_b[0]).T
        y = torch.from_numpy(y).to(torch.float32)
        if levels == 2 and self.mistake != "no global scale":
            y = y * (scale_a[1] if self.mistake == "one global scale" else scale_a[1] * scale_b[1])
        if bias is not None:
            y = y + bias
        if self.mistake == "zeros":
            y = torch.zeros_like(y)
        if self.mistake == "leftovers":
            y = torch.full_like(y, math.nan)
        return y.to(output_dtype)

    def _decoded(self, codes: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
        """Element by element from the bytes, float64 [rows, K]."""
        packed, swizzled = (
            codes.view(torch.uint8).numpy(),
            scale.reshape(-1).view(torch.uint8).numpy(),
        )
        rows, blocks = packed.shape[0], packed.shape[1] // 8
        at = [[self._place(r, c, rows, blocks) for c in range(blocks)] for r in range(rows)]
        scales = oracle.E4M3.values[swizzled[np.array(at)]].astype(np.float64)
        values = oracle.e2m1_value(oracle.unpack(packed)).astype(np.float64)
        return values * np.repeat(scales, 16, axis=1)

    def _place(self, row: int, column: int, rows: int, columns: int) -> int:
        if self.mistake == "row-major scales":
            return row * columns + column
        if self.mistake == "transposed scales":
            return column * rows + row
        return oracle.swizzle_offset(row, column, columns)


class ScaledGroupedMm:
    """``scaled_grouped_mm`` of a ragged mat_a [M, K] and stacked mat_b [E, K, N]."""

    def __init__(self, mistake: Mistake | None = None) -> None:
        self.one = ScaledMm(mistake)
        self.calls = 0

    def __call__(
        self,
        mat_a: torch.Tensor,
        mat_b: torch.Tensor,
        scale_a: list[torch.Tensor],
        scale_recipe_a: list[ScalingType],
        scale_b: list[torch.Tensor],
        scale_recipe_b: list[ScalingType],
        swizzle_a: list[SwizzleType],
        swizzle_b: list[SwizzleType],
        bias: torch.Tensor | None = None,
        offs: torch.Tensor | None = None,
        output_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        self.calls += 1
        assert bias is None, "Bias not supported yet"
        assert output_dtype == torch.bfloat16, (
            "Only bf16 high precision output types are supported for grouped gemm"
        )
        assert offs is not None
        assert offs.dtype == torch.int32
        groups, k, n = mat_b.shape
        assert offs.shape == (groups,)
        assert mat_a.shape[1] == k
        assert mat_b.stride() == (n * k, 1, k), "Expected mat2 to be transposed"
        assert scale_a[0].dim() == 2, "scale must have same number of dimensions as parent tensor"
        assert scale_a[0].shape[0] >= mat_a.shape[0]
        assert scale_b[0].shape == (groups, up(k // 8, 4) * up(n, 128))
        assert scale_a[1].shape == scale_b[1].shape == (groups,)
        made, start, row = [], 0, 0
        together = scale_a[0].reshape(-1)
        for e, end in enumerate(offs.tolist()):
            rows = end - start
            if rows == 0:
                continue
            scale = together[row * up(k // 8, 4) :][: up(rows, 128) * up(k // 8, 4)]
            if self.one.mistake == "scales over all groups":
                scale = together[: up(rows, 128) * up(k // 8, 4)]
            first, second = [scale, scale_a[1][e : e + 1]], [scale_b[0][e], scale_b[1][e : e + 1]]
            recipes, swizzles = (scale_recipe_a, scale_recipe_b), (swizzle_a, swizzle_b)
            made.append(
                self.one(
                    mat_a[start:end], mat_b[e], first, recipes[0], second, recipes[1], *swizzles
                )
            )
            start, row = end, row + up(rows, 128)
        return torch.cat(made)
