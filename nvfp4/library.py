"""The operations as torch operators ``nvfp4::quantize``, ``requantize``, ``dequantize`` and ``matmul``.

Importing this module registers them with shapes for fake tensors, so that ``torch.compile`` and ``torch.export`` can
see through them. Codes and scales travel as plain tensors; seeds, which are unsigned, as int64 of the same bits. An
empty ``seed`` or ``sign_seed`` means none was given. Tested with ``torch.library.opcheck``.
"""

from __future__ import annotations

import torch

from nvfp4 import ops
from nvfp4.numerics.formats import NVFP4
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import get_quantizer

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _options(
    name: str,
    block_rows: int,
    row_scaled: bool,
    metric: str,
    group: int,
    rounds: int,
    fixed: bool,
    search: bool,
    seed: int | None,
    sign_seed: int | None,
) -> tuple[Quantizer, Options]:
    quantizer = get_quantizer(name)
    seeds = (None if s is None else s % 2**64 for s in (seed, sign_seed))
    unsigned, unsigned_sign = seeds
    if quantizer.rotates:
        turn: dict[str, object] = {"group": group, "rounds": rounds, "search": search, "sign_seed": unsigned_sign}
    else:
        rotation = Rotation(group, rounds, None if fixed else unsigned_sign, fixed) if group else None
        turn = {"rotation": rotation}
    if "metric" in quantizer.options:
        turn["metric"] = metric
    block = (block_rows, NVFP4.block_size)
    return quantizer, quantizer.check(block=block, row_scaled=row_scaled, seed=unsigned, **turn)


@torch.library.custom_op("nvfp4::quantize", mutates_args=())
def quantize(
    x: torch.Tensor,
    quantizer: str,
    backend: str = "auto",
    block_rows: int = 1,
    row_scaled: bool = False,
    metric: str = "mse",
    group: int = 0,
    rounds: int = 1,
    fixed: bool = False,
    search: bool = False,
    seed: int | None = None,
    sign_seed: int | None = None,
) -> Codes:
    """Codes, block scale and global scale of matrix x [M, K] along its last axis; see ``nvfp4.quantize``."""
    chosen, options = _options(quantizer, block_rows, row_scaled, metric, group, rounds, fixed, search, seed, sign_seed)
    return ops.quantize_with(x, chosen, options, backend=backend).tensors


@quantize.register_fake
def _(
    x, quantizer, backend="auto", block_rows=1, row_scaled=False, metric="mse", group=0, rounds=1, fixed=False,
    search=False, seed=None, sign_seed=None,
):  # fmt: skip
    _, options = _options(quantizer, block_rows, row_scaled, metric, group, rounds, fixed, search, seed, sign_seed)
    return QTensor.empty(tuple(x.shape), options.block, options.row_scaled, options.rotation, x.device).tensors


@torch.library.custom_op("nvfp4::requantize", mutates_args=())
def requantize(
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    columns: int,
    quantizer: str,
    backend: str = "auto",
    block_rows: int = 1,
    row_scaled: bool = False,
    metric: str = "mse",
    group: int = 0,
    rounds: int = 1,
    fixed: bool = False,
    search: bool = False,
    seed: int | None = None,
    sign_seed: int | None = None,
) -> Codes:
    """The transpose [columns, M] of what unrotated codes stand for, quantised along M; see ``ops.requantize_with``."""
    chosen, options = _options(quantizer, block_rows, row_scaled, metric, group, rounds, fixed, search, seed, sign_seed)
    q = _record(codes, block_scale, global_scale, columns)
    return ops.requantize_with(q, chosen, options, backend=backend).tensors


@requantize.register_fake
def _(
    codes, block_scale, global_scale, columns, quantizer, backend="auto", block_rows=1, row_scaled=False, metric="mse",
    group=0, rounds=1, fixed=False, search=False, seed=None, sign_seed=None,
):  # fmt: skip
    _, options = _options(quantizer, block_rows, row_scaled, metric, group, rounds, fixed, search, seed, sign_seed)
    shape = (columns, codes.shape[0])
    return QTensor.empty(shape, options.block, options.row_scaled, options.rotation, codes.device).tensors


def _record(codes: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, columns: int) -> QTensor:
    rows = codes.shape[0]
    block = NVFP4.block_size if block_scale.shape[0] != rows else 1
    return QTensor(codes, block_scale, global_scale, (block, NVFP4.block_size), (rows, columns))


@torch.library.custom_op("nvfp4::dequantize", mutates_args=())
def dequantize(
    codes: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The unrotated matrix [M, columns] that codes and scales stand for."""
    return ops.dequantize(_record(codes, block_scale, global_scale, columns), dtype).contiguous()


@dequantize.register_fake
def _(codes, block_scale, global_scale, columns, dtype):
    return codes.new_empty(codes.shape[0], columns, dtype=dtype)


@torch.library.custom_op("nvfp4::matmul", mutates_args=())
def matmul(
    a_codes: torch.Tensor,
    a_block_scale: torch.Tensor,
    a_global_scale: torch.Tensor,
    b_codes: torch.Tensor,
    b_block_scale: torch.Tensor,
    b_global_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """a b^T [M, N] of operands with equal contraction and rotation, which the caller vouches for."""
    columns = a_codes.shape[1] * 2
    a = _record(a_codes, a_block_scale, a_global_scale, columns)
    b = _record(b_codes, b_block_scale, b_global_scale, columns)
    return ops.matmul(a, b, out_dtype, bias=bias, backend=backend)


@matmul.register_fake
def _(
    a_codes, a_block_scale, a_global_scale, b_codes, b_block_scale, b_global_scale, out_dtype, bias=None, backend="auto"
):
    return a_codes.new_empty(a_codes.shape[0], b_codes.shape[0], dtype=out_dtype)
