"""The rotation as tensor cores sum it, in numpy: what others found of NVIDIA's, for any operand.

    sums of sixteen     of all terms the bits are kept that are not more than ``fraction_bits``
                        below the leading bit of the largest; they are added exactly, and the sum is
                        cut off to float32. ``length`` products at a time, the first sum being a
                        term of the second (arXiv 2511.10909, 2512.07004)
    the rest            butterflies in float32, and the scale, as docs/numerics.md has them

It shares no line with csrc/cuda/simt_mma.h, which does the same lane by lane in C++.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from nvfp4.numerics.hadamard import Rotation, rotation_signs, round_scale
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options
from nvfp4.quantizers.ms_eden import MS_EDEN


class TensorCore(NamedTuple):
    """fraction_bits: kept below the leading bit of the largest term. length: products at a time."""

    fraction_bits: int
    length: int


CARDS = {
    "Volta": TensorCore(23, 4),
    "Ampere, Ada": TensorCore(24, 8),
    "Hopper, Blackwell": TensorCore(25, 16),
}
"""By the two papers above; Volta has no BF16, and stands for less care than any card takes."""

FACTOR = np.array([[(-1) ** (k & j).bit_count() for k in range(16)] for j in range(16)])
"""H16: output j is the sum over k of FACTOR[j, k] x[k]."""


def cut(sums: np.ndarray) -> np.ndarray:
    """float64 to float32 towards zero; finite."""
    nearest = sums.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(sums)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def sums_of_sixteen(terms: np.ndarray, core: TensorCore) -> np.ndarray:
    """float64 terms [..., 16], finite, to float32 [...]."""
    result = np.zeros(terms.shape[:-1], np.float32)
    for k in range(0, 16, core.length):
        now = np.concatenate(
            [terms[..., k : k + core.length], result[..., None].astype(np.float64)], axis=-1
        )
        top = np.where(now == 0, -2000, np.frexp(now)[1] - 1).max(axis=-1)
        unit = np.ldexp(1.0, np.maximum(top, -1000) - core.fraction_bits)
        result = cut(np.trunc(now / unit[..., None]).sum(axis=-1) * unit)
    return result


def rotate(x: np.ndarray, signs: np.ndarray, core: TensorCore) -> np.ndarray:
    """float32 x [M, K], K a multiple of the 128 signs: one round in groups of 128."""
    rows, columns = x.shape
    signed = (x.reshape(rows, columns // 128, 128) * signs).astype(np.float64)
    y = np.empty((rows, columns // 128, 8, 16), np.float32)
    for j in range(16):  # an output at a time: sixteen of all would be sixteen times x
        y[..., j] = sums_of_sixteen(signed.reshape(*y.shape) * FACTOR[j], core)
    for stride in (1, 2, 4):
        for block in range(8):
            if not block & stride:
                low, high = y[:, :, block].copy(), y[:, :, block + stride].copy()
                y[:, :, block], y[:, :, block + stride] = low + high, low - high
    return (y * np.float32(round_scale(0, 1, 128))).reshape(rows, columns)


@dataclass(frozen=True)
class EmulatedRotation(Rotation):
    """A rotation of one round in groups of 128 whose sums are those of ``core``."""

    core: TensorCore = CARDS["Hopper, Blackwell"]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Of float32 x [M, K] that holds BF16."""
        signs = rotation_signs(self._seed(), 0, self.group).numpy()
        return torch.from_numpy(rotate(x.numpy(), signs, self.core))


def emulated(x: torch.Tensor, options: Options, core: TensorCore) -> QTensor:
    """BF16 x [M, K] by ms_eden, rotated by tensor cores; ``options``: of one round, group 128."""
    assert options.rotation is not None
    rotation = EmulatedRotation(sign_seed=options.rotation.sign_seed, core=core)
    q = MS_EDEN.quantize(x, replace(options, rotation=rotation))
    return replace(q, rotation=options.rotation)
