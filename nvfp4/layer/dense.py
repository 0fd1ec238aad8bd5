"""Products of 16-bit matrices on processors without instructions for them, at float32's speed.

A linear layer in high precision is y = x w^T + bias with x [M, K], w [N, K] in BF16 (or FP16). A
processor with AVX-512 BF16 or AMX multiplies that natively and torch is fast. One without (AVX2,
and AVX-512 before Cooper Lake) makes torch emulate: its BF16 ``F.linear`` forward and backward took
40 times as long as float32's at 1024^3 with AVX2, 5 times with AVX-512. But the product of two BF16
numbers is exact in float32, so a float32 GEMM, rounded once, is the BF16 GEMM up to the order of
its sum. So here:

    product(a, b)   a b^T [M, N] of a [M, K], b [N, K], each with either orientation in memory:
                    the native kernel packs 16-bit elements straight into its float32 panels;
                    without it, torch multiplies float32 copies
    affine(x, w)    ``F.linear``: the product where torch emulates that dtype (``EMULATED``),
                    else torch's own
    times(a, b)     ``a @ b``, likewise
    gradients       the same product of (dy, w^T) and (dy^T, x^T): derivatives of every order exist

Eager mode calls the kernel directly; a compiled graph sees the operator ``nvfp4::dense_product``.
Under autocast both operands are rounded to its dtype, as ``F.linear`` does. Processors are asked
(``torch.cpu.get_capabilities``), nothing is measured and nothing kept: the same process gives the
same bits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nvfp4.backends.native.cpu import EMULATED, dense_product
from nvfp4.numerics.torch_state import autocast_dtype, is_dtensor, is_traced, without_dispatch_modes


def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x w^T + bias as ``F.linear``: x [..., K], weight [N, K], bias [N], y [..., N].

    Where torch emulates that dtype: float32 sums, bias added in float32, one rounding; elsewhere
    ``F.linear`` itself. Raises what ``F.linear`` raises.
    """
    dtype = _emulated(x, weight, bias)
    if dtype is None:
        return F.linear(x, weight, bias)

    # under autocast this is autocast's dtype, otherwise the one that all three have
    x, weight = x.to(dtype), weight.to(dtype)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = product(rows, weight, None if bias is None else bias.to(dtype))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """a b^T + bias [M, N] of a [M, K], b [N, K] on a CPU: float32 sums, rounded once to out_dtype.

    a, b: float32, bfloat16 or float16, any strides, dtypes may differ. bias: [N], added in float32.
    out_dtype: by default a's; float32 keeps the sums. NaN and Inf behave as in a float32
    GEMM; an empty contraction gives the bias, or zeros. Differentiable any number of times;
    gradients have the dtypes of what they are gradients of.
    """
    dtype = a.dtype if out_dtype is None else out_dtype

    # the operator only where somebody has to see it: at width 128 the dispatcher takes as long as
    # the product
    if is_traced(a):
        return _operator(a, b, bias, dtype)
    if torch.is_grad_enabled() and (
        a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Product.apply(a, b, bias, dtype)
    return dense_product(a, b, bias, dtype)


def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b [M, N] of a [M, K], b [K, N] of one dtype: ``a @ b``; by ``product`` if emulated."""
    if is_emulated(a) and b.dtype == a.dtype and not (is_dtensor(a) or is_dtensor(b)):
        return product(a, b.t())
    return a @ b


class DenseLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies by ``affine``; ``nvfp4.dense_linears`` makes it one."""

    original = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + bias of x = ``input``, as ``nn.Linear``."""
        return affine(input, self.weight, self.bias)


def is_emulated(x: torch.Tensor) -> bool:
    """Whether torch emulates products of x's dtype where x is."""
    return x.device.type == "cpu" and x.dtype in EMULATED


def _emulated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.dtype | None:
    """The dtype of a linear layer's product if it is computed here; None: torch computes it."""
    if x.device.type != "cpu" or weight.device.type != "cpu" or is_dtensor(x) or is_dtensor(weight):
        return None

    # the dtype that F.linear would multiply in; None where it would raise, so that it does
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        if torch.float64 in (x.dtype, weight.dtype):
            return None
    else:
        dtype = x.dtype
        if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
            return None  # torch says what is wrong

    # shapes that do not fit are torch's to refuse, too
    fits = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    return dtype if fits and dtype in EMULATED else None


def _gradients(
    ctx: Any, dy: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
    """dy b, dy^T a and the column sums of dy, each if needed, in the dtype it is a gradient of."""
    needs, dtypes = ctx.needs_input_grad, ctx.dtypes
    a, b = ctx.saved_tensors
    da = product(dy, b.t(), None, dtypes[0]) if needs[0] else None
    db = product(dy.t(), a.t(), None, dtypes[1]) if needs[1] else None
    dbias = dy.sum(0, dtype=torch.float32).to(dtypes[2]) if needs[2] else None
    return da, db, dbias, None


class _Product(torch.autograd.Function):
    """``product`` in eager mode, without the dispatcher."""

    @staticmethod
    def forward(
        a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return dense_product(a, b, bias, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Apart from ``forward``, so that torch.func can differentiate too."""
        a, b, bias, _ = inputs
        needs = ctx.needs_input_grad
        ctx.save_for_backward(a if needs[1] else None, b if needs[0] else None)
        ctx.dtypes = (a.dtype, b.dtype, None if bias is None else bias.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradients(ctx, dy)


# torch binds the arguments of a ``forward`` without a context by its signature, for which it asks
# ``inspect`` in every call unless it stands here
_Product.forward.__signature__ = inspect.signature(_Product.forward)  # type: ignore[attr-defined]


@torch.library.custom_op("nvfp4::dense_product", mutates_args=())
def _operator(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``product`` as compiled graphs call it."""
    with without_dispatch_modes():
        return dense_product(a, b, bias, dtype)


@_operator.register_fake
def _(a, b, bias, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """What ``_gradients`` reads: both operands, and three dtypes."""
    a, b, bias, _ = inputs
    ctx.save_for_backward(a, b)
    ctx.dtypes = (a.dtype, b.dtype, None if bias is None else bias.dtype)


_operator.register_autograd(_gradients, setup_context=_keep)
