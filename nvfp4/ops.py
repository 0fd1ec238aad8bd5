"""quantize, dequantize, matmul: the only door to the backends.

    x [..., K]          --quantize-->    QTensor: codes [M, Kp/2], block scales [M, Kp/16],
                                         global scale [1] or [M]
    QTensor, QTensor    --matmul-->      a b^T [..., N]
    QTensor             --dequantize-->  x again, up to rounding

What happens in each call: arguments are checked here, so that no backend need do it;
``backends.registry`` picks the first backend that can (or the named one); it runs with dispatch
modes off, which must not see what kernels do, and products and activations with autocast off, which
would change them; and the result gets back the shape it is known by. ``explain`` says which backend
runs and why.

The same operations are torch operators, registered when this file is imported:
``torch.ops.nvfp4.quantize``, ``requantize``, ``dequantize`` and ``matmul``, with shapes for fake
tensors, so that ``torch.compile`` and ``torch.export`` see through them. They stand at the end of
the file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from nvfp4.backends.autotune import Road
from nvfp4.backends.base import Operation
from nvfp4.backends.registry import AUTO, can_run, candidates, measured, select, select_both
from nvfp4.numerics.activations import Activation
from nvfp4.numerics.formats import NVFP4
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.torch_state import is_dtensor, without_autocast, without_dispatch_modes
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import get_quantizer

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    x: torch.Tensor,
    quantizer: str = "scale_search",
    *,
    axis: int = -1,
    seed: int | None = None,
    sign_seed: int | None = None,
    backend: str = AUTO,
    **options: Any,
) -> QTensor:
    """Quantise a tensor to NVFP4 along ``axis``, the one a GEMM will contract.

    x: float32, bfloat16 or float16 of rank 1 or more, any strides; BF16 and FP16 are converted
    exactly. quantizer: rtn, rtn_2d, sr, sr_te, four_over_six, scale_search or ms_eden
    (``quantizers/registry.py``). seed: for stochastic ones, in [0, 2^64): same seed, same codes, on
    every backend. sign_seed: for ms_eden, the seed of its rotation, equal for both operands of a
    GEMM; defaults to ``seed``. options: block=(1, 16) | (16, 16), row_scaled, metric ("mse", "mae",
    "abs_max"), candidates of scale_search, rounds, search and its factors, group, summation,
    rotation.

    Returns a ``QTensor``; the axis is zero-padded to a multiple of 16 (of the rotation group). NaN
    or Inf anywhere makes the global scale NaN (of that row when row-scaled); empty input gives
    empty codes. Raises TypeError for another dtype or an option that no quantiser has, ValueError
    for a bad axis or name, an option that this quantiser does not take, or a missing seed.
    """
    chosen = get_quantizer(quantizer)
    checked = chosen.check(**options, seed=seed, sign_seed=sign_seed)
    return quantize_with(x, chosen, checked, axis=axis, backend=backend)


def quantize_with(
    x: torch.Tensor,
    quantizer: Quantizer,
    options: Options,
    *,
    axis: int = -1,
    backend: str = AUTO,
    amax: torch.Tensor | None = None,
) -> QTensor:
    """``quantize`` with the quantiser and its options already looked up and checked.

    amax: of a larger tensor that x is a part of, to be scaled by; see
    ``Backend.quantize_with_amax``.
    """
    x = checked_input(x)
    if not -x.dim() <= axis < x.dim():
        raise ValueError(
            f"axis must be in [{-x.dim()}, {x.dim() - 1}] for x of shape {tuple(x.shape)}, got "
            f"{axis}"
        )

    # the matrix [M, K] that a backend sees: the contraction last, the other axes flattened
    axis = axis % x.dim() - x.dim()
    matrix = x if axis == -1 else x.movedim(axis, -1)
    if matrix.dim() != 2:
        matrix = matrix.reshape(math.prod(matrix.shape[:-1]), matrix.shape[-1])

    with without_dispatch_modes():
        road: Road = "rows" if matrix.stride(1) == 1 else "columns"
        chosen = select(backend, _operation(options), x.device, quantizer, options, road)
        if amax is None:
            q = chosen.quantize(matrix, quantizer, options)
        else:
            q = chosen.quantize_with_amax(matrix, quantizer, options, amax)

    # of a matrix along its last axis it is that already
    if matrix is x:
        return q
    return QTensor(*q.tensors, q.block, tuple(x.shape), axis, q.rotation, q.swizzled_scale)


def quantize_both(
    x: torch.Tensor,
    rows: tuple[Quantizer, Options],
    columns: tuple[Quantizer, Options],
    *,
    backend: str = AUTO,
) -> tuple[QTensor, QTensor]:
    """(x [M, K] along K, x^T [K, M] along M), each by its own quantiser and options.

    Equal to two calls of ``quantize_with``; a backend may read x only once. x: a matrix, float32,
    bfloat16 or float16, any strides.
    """
    x = checked_input(x)
    if x.dim() != 2:
        raise ValueError(f"x must be a matrix, got shape {tuple(x.shape)}")

    with without_dispatch_modes():
        chosen = select_both(backend, x.device, rows, columns)
        if chosen is None:
            return quantize_with(x, *rows, backend=backend), quantize_with(
                x.t(), *columns, backend=backend
            )
        return chosen.quantize_both(x, rows, columns)


def quantize_activation(
    activation: Activation,
    rows: tuple[Quantizer, Options],
    columns: tuple[Quantizer, Options] | None = None,
    *,
    backend: str = AUTO,
) -> tuple[QTensor, QTensor | None]:
    """An activation [M, K] along K and, if ``columns`` is given, its transpose along M.

    Equal to ``quantize_both`` of ``activation.values()``; a backend need not write these to memory.
    """
    device = activation[0].device
    chosen = select(backend, "activation", device)

    # a quantiser that this backend lacks: write the values, and let another quantise them
    if not all(
        can_run(chosen, "quantize", device, *how) for how in (rows, columns) if how is not None
    ):
        x = activation.values()
        if columns is None:
            return quantize_with(x, *rows, backend=backend), None
        return quantize_both(x, rows, columns, backend=backend)
    with without_dispatch_modes(), without_autocast(device):
        return chosen.quantize_activation(activation, rows, columns)


def activation_gradients(
    activation: Activation, dy: torch.Tensor, *, backend: str = AUTO
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the activation's two inputs, each in its dtype, from dy [M, K]."""
    with without_dispatch_modes(), without_autocast(dy.device):
        return select(backend, "activation", dy.device).activation_gradients(activation, dy)


def requantize_with(
    q: QTensor, quantizer: Quantizer, options: Options, *, backend: str = AUTO
) -> QTensor:
    """Quantise the transpose of what matrix ``q`` [M, K] stands for: [K, M], contracted along M.

    Equal to decoding q in float32, cutting its padding and quantising the transpose; a backend need
    not write the decoded matrix to memory.
    """
    if len(q.shape) != 2 or q.axis != -1:
        raise ValueError(
            f"q must be a matrix quantised along its last axis, got shape {q.shape}, axis {q.axis}"
        )
    with without_dispatch_modes():
        chosen = select(backend, _operation(options), q.codes.device, quantizer, options, "codes")
        return chosen.requantize(q, quantizer, options)


def transpose(q: QTensor, *, backend: str = AUTO) -> QTensor:
    """The same codes and tile scales, rows and contraction exchanged; see ``QTensor.transpose``."""
    with without_dispatch_modes():
        return select(backend, "transpose", q.device).transpose(q)


def dequantize(
    q: QTensor, dtype: torch.dtype = torch.float32, *, backend: str = AUTO
) -> torch.Tensor:
    """The tensor that q stands for, of its original shape; see ``QTensor.dequantize``."""
    with without_dispatch_modes():
        return select(backend, "dequantize", q.device).dequantize(q, dtype)


def matmul(
    a: QTensor,
    b: QTensor,
    out_dtype: torch.dtype = torch.float32,
    *,
    bias: torch.Tensor | None = None,
    backend: str = AUTO,
) -> torch.Tensor:
    """a @ b^T of two quantised tensors: [..., K] and [N, K] give [..., N].

    Accumulates in float32 without the global scales, applies each once, adds ``bias`` (a.rows by
    [N], any float dtype) in float32 and casts once to ``out_dtype``. A NaN global scale makes its
    rows (or everything) NaN. Raises ValueError if lengths, padding or rotations differ, or the
    devices do, or the shape of ``bias`` is not [N]; TypeError for an ``out_dtype`` other than
    float32, bfloat16 and float16.
    """
    _check_product(a, b, out_dtype)
    if bias is not None and (bias.shape != (b.rows,) or bias.device != b.device):
        raise ValueError(
            f"bias must be [{b.rows}] on {b.device}, got {tuple(bias.shape)} on {bias.device}"
        )
    device = a.codes.device
    with without_dispatch_modes(), without_autocast(device):
        y = select(backend, "matmul", device).matmul(a, b, out_dtype, bias)

    # of matrices as it is: a view out of an autograd function could not be changed in place
    shape = y.shape if len(a.shape) == 2 == len(b.shape) else (*_lead(a), *_lead(b))
    return y if y.shape == shape else y.view(shape)


def _check_product(a: QTensor, b: QTensor, out_dtype: torch.dtype) -> None:
    """ValueError or TypeError if a product of these operands has no meaning."""
    if a.shape[a.axis] != b.shape[b.axis] or a.codes.shape[1] != b.codes.shape[1]:
        raise ValueError(
            f"operands contract different lengths: {a.contraction} (padded "
            f"{a.padded_contraction}) and {b.contraction} (padded {b.padded_contraction})"
        )
    if a.rotation is not b.rotation and a.rotation != b.rotation:
        raise ValueError(
            f"operands were rotated differently, so their product is meaningless: {a.rotation} "
            f"and {b.rotation}; quantise both with the same group, rounds and sign_seed"
        )
    if a.codes.device != b.codes.device:
        raise ValueError(f"operands are on different devices: {a.device} and {b.device}")
    if out_dtype not in INPUT_DTYPES:
        raise TypeError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """x itself, or the result of a collective that is still under way; TypeError for a DTensor."""
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(x, collectives.AsyncCollectiveTensor):
        return x.wait()
    if is_dtensor(x):
        raise TypeError(
            "x is a DTensor, spread over processes: quantise x.to_local() or x.full_tensor()"
        )
    return x


def fingerprint(x: torch.Tensor, *, backend: str = AUTO) -> int | None:
    """A 64-bit number that changes whenever the bytes of x do; None where a backend has none."""
    return select(backend, "quantize", x.device).fingerprint(x)


def draw_seeds(words: torch.Tensor, rank: int, gemms: int, *, backend: str = AUTO) -> torch.Tensor:
    """The seeds of one call of a layer, made where its words are; see ``Backend.draw_seeds``."""
    with without_dispatch_modes():
        return select(backend, "draw_seeds", words.device).draw_seeds(words, rank, gemms)


def _operation(options: Options) -> Operation:
    """What quantising under these options asks of a backend."""
    return "quantize" if options.held is None else "quantize_held"


def explain(
    operation: Operation,
    device: torch.device | str = "cpu",
    quantizer: str | None = None,
    **options: Any,
) -> str:
    """Which backend would run an operation on a device, and why the others would not.

    One line per backend, in order of preference. quantizer, options: as in ``quantize``.
    """
    chosen = None if quantizer is None else get_quantizer(quantizer)
    checked = None if chosen is None else chosen.check(**({"seed": 0} | options))

    lines, picked = [], False
    for backend, reason in candidates(operation, torch.device(device), chosen, checked):
        verdict = reason or ("available" if picked else "chosen")
        verdict = " ".join(verdict.split())  # what a compiler or a driver says has several lines
        seconds = measured(backend, operation, torch.device(device), chosen, checked)
        if reason is None and seconds is not None:
            verdict += f", measured {seconds * 1e6:.0f} us"
        picked = picked or reason is None
        lines.append(f"{backend.name}: {verdict}")
    return "\n".join(lines)


def checked_input(x: torch.Tensor) -> torch.Tensor:
    """x, detached and in memory; TypeError for what cannot be quantised."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in INPUT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INPUT_DTYPES)
        raise TypeError(f"x must be one of {names}, got {x.dtype}; convert it first")
    return _in_memory(x.detach())


def _lead(q: QTensor) -> list[int]:
    """The shape of q's tensor without the contraction axis."""
    return [size for i, size in enumerate(q.shape) if i != q.axis % len(q.shape)]


# Operators of torch.library. Codes and scales travel as plain tensors; seeds, which are unsigned,
# as int64 of the same bits. Tested with torch.library.opcheck. A dispatcher hands over arguments by
# position and leaves trailing defaults out, so that ``how`` is a beginning of the list that
# ``_from_schema`` takes.
_Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_HOW = (
    f"str quantizer, str backend='{AUTO}', int block_rows=1, bool row_scaled=False, "
    "str metric='mse', int group=0, int rounds=1, bool fixed=False, bool search=False, "
    "int? seed=None, int? sign_seed=None, int[]? candidates=None, float[]? factors=None, "
    "str summation='butterflies'"
)


def _from_schema(
    name: str,
    block_rows: int = 1,
    row_scaled: bool = False,
    metric: str = "mse",
    group: int = 0,
    rounds: int = 1,
    fixed: bool = False,
    search: bool = False,
    seed: int | None = None,
    sign_seed: int | None = None,
    candidates: Sequence[int] | None = None,
    factors: Sequence[float] | None = None,
    summation: str = "butterflies",
) -> tuple[Quantizer, Options]:
    """A quantiser and its options from the arguments of an operator; group 0: no rotation."""
    quantizer = get_quantizer(name)
    unsigned, unsigned_sign = (None if s is None else s % 2**64 for s in (seed, sign_seed))

    # those that always rotate take the rotation apart; for the others it is one option
    if quantizer.rotates:
        how: dict[str, object] = {
            "group": group,
            "rounds": rounds,
            "search": search,
            "sign_seed": unsigned_sign,
            "summation": summation,
        }
    else:
        how = {
            "rotation": Rotation(group, rounds, None if fixed else unsigned_sign, fixed)
            if group
            else None
        }
    if "metric" in quantizer.options:
        how["metric"] = metric
    if candidates is not None:
        how["candidates"] = tuple(candidates)
    if factors is not None:
        how["factors"] = tuple(factors)
    block = (block_rows, NVFP4.block_size)
    return quantizer, quantizer.check(block=block, row_scaled=row_scaled, seed=unsigned, **how)


def _matrix(
    codes: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor, columns: int
) -> QTensor:
    """The unrotated matrix [M, columns]; scales of 16x16 blocks have fewer rows than codes."""
    rows = codes.shape[0]
    block_rows = NVFP4.block_size if block_scale.shape[0] != rows else 1
    return QTensor(
        codes, block_scale, global_scale, (block_rows, NVFP4.block_size), (rows, columns)
    )


@torch.library.custom_op(
    "nvfp4::quantize", mutates_args=(), schema=f"(Tensor x, {_HOW}) -> (Tensor, Tensor, Tensor)"
)
def _quantize(x: torch.Tensor, quantizer: str, backend: str = AUTO, *how: Any) -> _Codes:
    """Codes, block scale and global scale of matrix x [M, K] along K; see ``quantize``."""
    chosen, options = _from_schema(quantizer, *how)
    return quantize_with(x, chosen, options, backend=backend).tensors


@_quantize.register_fake
def _(x, quantizer, backend=AUTO, *how):
    _, options = _from_schema(quantizer, *how)
    return QTensor.empty(
        tuple(x.shape), options.block, options.row_scaled, options.rotation, x.device
    ).tensors


@torch.library.custom_op(
    "nvfp4::requantize",
    mutates_args=(),
    schema=(
        f"(Tensor codes, Tensor block_scale, Tensor global_scale, int columns, {_HOW}) -> "
        "(Tensor, Tensor, Tensor)"
    ),
)
def _requantize(
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    columns: int,
    quantizer: str,
    backend: str = AUTO,
    *how: Any,
) -> _Codes:
    """The transpose [columns, M] of unrotated codes, quantised along M; see ``requantize_with``."""
    q = _matrix(codes, block_scale, global_scale, columns)
    return requantize_with(q, *_from_schema(quantizer, *how), backend=backend).tensors


@_requantize.register_fake
def _(codes, block_scale, global_scale, columns, quantizer, backend=AUTO, *how):
    _, options = _from_schema(quantizer, *how)
    shape = (columns, codes.shape[0])
    return QTensor.empty(
        shape, options.block, options.row_scaled, options.rotation, codes.device
    ).tensors


@torch.library.custom_op("nvfp4::dequantize", mutates_args=())
def _dequantize(
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    global_scale: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The unrotated matrix [M, columns] that codes and scales stand for."""
    return dequantize(_matrix(codes, block_scale, global_scale, columns), dtype).contiguous()


@_dequantize.register_fake
def _(codes, block_scale, global_scale, columns, dtype):
    return codes.new_empty(codes.shape[0], columns, dtype=dtype)


@torch.library.custom_op("nvfp4::matmul", mutates_args=())
def _matmul(
    a_codes: torch.Tensor,
    a_block_scale: torch.Tensor,
    a_global_scale: torch.Tensor,
    b_codes: torch.Tensor,
    b_block_scale: torch.Tensor,
    b_global_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    backend: str = AUTO,
) -> torch.Tensor:
    """a b^T [M, N] of operands of equal contraction and rotation, for which the caller vouches."""
    columns = a_codes.shape[1] * 2
    a = _matrix(a_codes, a_block_scale, a_global_scale, columns)
    b = _matrix(b_codes, b_block_scale, b_global_scale, columns)
    return matmul(a, b, out_dtype, bias=bias, backend=backend)


@_matmul.register_fake
def _(
    a_codes,
    a_block_scale,
    a_global_scale,
    b_codes,
    b_block_scale,
    b_global_scale,
    out_dtype,
    bias=None,
    backend=AUTO,
):
    return a_codes.new_empty(a_codes.shape[0], b_codes.shape[0], dtype=out_dtype)
