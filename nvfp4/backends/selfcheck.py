"""What a backend has to show the first time it is used on a device: the reference's bits on a small fixed input.

A kernel built for another architecture may return zeros or what was in memory, without any error.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from nvfp4.backends.base import Backend, Operation
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.qtensor import QTensor
from nvfp4.quantizers.base import Quantizer
from nvfp4.quantizers.registry import get_quantizer

_REFERENCE = ReferenceBackend()
_ROWS, _COLUMNS = 16, 128  # one tile high, one rotation group of any quantiser wide


def find_fault(backend: Backend, operation: Operation, device: torch.device, quantizer: Quantizer | None) -> str | None:
    """None if ``backend`` reproduces the reference bit for bit on ``device``, otherwise what went wrong.

    Compares codes and scales of ``quantizer`` (rtn if None), also from codes; decoded elements; or a product that is
    exact in float32 in every order of summation. Waits for the device; draws no random number.
    """
    probe = {"quantize": _quantized, "dequantize": _dequantized, "matmul": _multiplied}[operation]
    chosen = quantizer or get_quantizer("rtn")
    # the first use may lie under anything: a dispatch mode that counts or replays operators must not see these
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        want = probe(_REFERENCE, torch.device("cpu"), chosen)
        try:
            got = [tensor.cpu() for tensor in probe(backend, device, chosen)]
        except Exception as error:  # whatever a kernel raises here, the backend is of no use
            return f"its first {operation} failed: {error}"
        same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return None if same else f"its first {operation} differs from the reference"


def _quantized(backend: Backend, device: torch.device, quantizer: Quantizer) -> list[torch.Tensor]:
    options = quantizer.check(seed=1)
    x = _matrix().to(device)
    fresh = backend.quantize(x, quantizer, options)
    rows, columns = backend.quantize_both(x, (quantizer, options), (quantizer, options))
    again = backend.requantize(_stored(_matrix(_COLUMNS, _ROWS), device), quantizer, options)
    return [tensor for q in (fresh, rows, columns, again) for tensor in q.tensors]


def _dequantized(backend: Backend, device: torch.device, quantizer: Quantizer) -> list[torch.Tensor]:
    return [backend.dequantize(_stored(_matrix(), device), torch.float32)]


def _multiplied(backend: Backend, device: torch.device, quantizer: Quantizer) -> list[torch.Tensor]:
    # at most 128 products of multiples of 1/4 below 36, times equal scales: 15 bits
    grid = torch.tensor([-6, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 6], device="cpu")
    a, b = (grid[_noise(_ROWS, _COLUMNS, multiplier) % len(grid)] for multiplier in (40503, 48271))
    a[:, ::16] = b[:, ::16] = 6
    return [backend.matmul(_stored(a, device), _stored(b, device), torch.float32)]


def _stored(x: torch.Tensor, device: torch.device) -> QTensor:
    """The reference's quantisation of x, on ``device``."""
    rtn = get_quantizer("rtn")
    q = _REFERENCE.quantize(x, rtn, rtn.check())
    codes, block_scale, global_scale = (tensor.to(device) for tensor in q.tensors)
    return QTensor(codes, block_scale, global_scale, *q.record)


def _matrix(rows: int = _ROWS, columns: int = _COLUMNS) -> torch.Tensor:
    """Both signs, many magnitudes, rows that differ in size: float32 [rows, columns]."""
    size = torch.arange(1, rows + 1, device="cpu").to(torch.float32)[:, None]
    return (_noise(rows, columns, 40503) - 32768) / 8192 * size


def _noise(rows: int, columns: int, multiplier: int) -> torch.Tensor:
    """Integers in [0, 65536) without any generator's help."""
    return (torch.arange(1, rows * columns + 1, device="cpu") * multiplier % 65536).view(rows, columns)
