"""fprop, dgrad and wgrad of one layer call, as functions of tensors; no autograd, no module, no device.

Nothing but FP4 codes and scales is kept for the backward, unless the recipe leaves a GEMM in high precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch

from nvfp4.layer.dense import affine, times
from nvfp4.layer.lazy_activation import Deferred
from nvfp4.layer.noise import LEFT, RIGHT, DeviceWords, Words, signed
from nvfp4.layer.sharding import Shards, quantize_with_amax
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import DeviceSeed
from nvfp4.numerics.torch_state import without_autocast
from nvfp4.ops import dequantize, matmul, quantize_both, quantize_with, requantize_with, transpose
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.recipes import Gemm, Operand, Recipe

Saved = torch.Tensor | QTensor | None


class Call(NamedTuple):
    """One call of a layer: its recipe, the backend, its ``Noise.words``, and which operands are cut."""

    recipe: Recipe
    backend: str
    words: Words
    shards: Shards | None = None

    def operand(self, x: torch.Tensor | QTensor, gemm: str, side: int, partner: Rotation | None = None) -> QTensor:
        """Matrix x [rows, contraction] (any strides) as the recipe's operand of a GEMM.

        A QTensor stands for the transpose of what it decodes to: x-hat^T or w-hat^T, quantised again.
        partner: the rotation of the other operand, if that one was made in an earlier call; its signs are used again.
        """
        quantizer, options = self.quantizer(gemm, side, partner)
        if self.shards is not None and self.shards.needs_amax(gemm, side, options):
            return self.shards.quantize(x, quantizer, options, self.backend)
        if isinstance(x, QTensor):
            return requantize_with(x, quantizer, options, backend=self.backend)
        return quantize_with(x, quantizer, options, backend=self.backend)

    def quantizer(self, gemm: str, side: int, partner: Rotation | None = None) -> tuple[Quantizer, Options]:
        """The quantiser of an operand, with the seeds of this call in its options."""
        spec = _side(getattr(self.recipe, gemm), side)
        if spec.noiseless is not None:
            return spec.rule, spec.noiseless
        sign_seed, seeds = self.words.seeds(gemm)
        if partner is not None and partner.sign_seed is not None:
            sign_seed = partner.sign_seed
        return spec.rule, spec.seeded(seeds[side], sign_seed)

    def weight(self, weight: torch.Tensor, amax: torch.Tensor | None) -> QTensor:
        """fprop's weight operand, scaled by ``amax`` [1] if other layers share it."""
        if amax is None:
            return self.operand(weight, "fprop", RIGHT)
        return quantize_with_amax(weight, *self.quantizer("fprop", RIGHT), amax, backend=self.backend)

    def matmul(self, a: QTensor, b: QTensor, dtype: torch.dtype, bias: torch.Tensor | None = None) -> torch.Tensor:
        """a @ b^T [a rows, b rows] on this call's backend."""
        return matmul(a, b, dtype, bias=bias, backend=self.backend)


def _side(gemm: Gemm, side: int) -> Operand:
    return gemm.right if side == RIGHT else gemm.left


def fprop(
    call: Call,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    needs: Sequence[bool],
    w_amax: torch.Tensor | None = None,
    w_codes: QTensor | None = None,
) -> tuple[torch.Tensor, Saved, Saved]:
    """y = x w^T + bias [M, N] in ``dtype``, and what (dgrad, wgrad) will need of (w, x) if ``needs`` says so.

    w_amax: what to scale the weight by, if not by its own. w_codes: the weight's operand, where it is known already.
    """
    x_codes, w_codes, saved_w, saved_x = forward_operands(call, x, weight, needs, w_amax, w_codes)
    if x_codes is None or w_codes is None:
        y = dense_forward(call, x, weight if w_codes is None else w_codes, bias, dtype)
    else:
        y = call.matmul(x_codes, w_codes, dtype, bias)
    return y, saved_w, saved_x


def dense_forward(
    call: Call, x: torch.Tensor, w: torch.Tensor | QTensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """x w^T + bias in ``dtype``; of w, what its codes stand for where the recipe quantises w alone."""
    w = dequantize(w, dtype, backend=call.backend) if isinstance(w, QTensor) else w.to(dtype)
    return affine(x.to(dtype), w, None if bias is None else bias.to(dtype))


def forward_operands(
    call: Call,
    x: torch.Tensor,
    weight: torch.Tensor,
    needs: Sequence[bool],
    w_amax: torch.Tensor | None = None,
    w_codes: QTensor | None = None,
) -> tuple[QTensor | None, QTensor | None, Saved, Saved]:
    """What fprop multiplies, (x, w), each None where it is dense, and what (dgrad, wgrad) will need of (w, x)."""
    recipe = call.recipe
    keep = stored_operands(recipe)
    x_codes = x_transposed = None
    if not recipe.fprop.right.quantized:
        w_codes = None
    elif w_codes is None:
        w_codes = call.weight(weight, w_amax)
    if recipe.fprop.quantized:
        x_codes, x_transposed = _x_operands(call, x, needs[1] and keep[1] is recipe.wgrad.right)
    saved_w: Saved = None if not needs[0] else weight if keep[0] is None else w_codes
    saved_x: Saved = None if not needs[1] else x if keep[1] is None else x_codes
    if needs[1] and keep[1] is not None and keep[1] is recipe.wgrad.right:
        saved_x = call.operand(x.t(), "wgrad", RIGHT) if x_transposed is None else x_transposed
    return x_codes, w_codes, saved_w, saved_x


def _x_operands(call: Call, x: torch.Tensor, both: bool) -> tuple[QTensor, QTensor | None]:
    """x for fprop and, where wgrad wants x^T itself and not fprop's codes, that one as well."""
    if isinstance(x, Deferred):
        columns = call.quantizer("wgrad", RIGHT) if both else None
        return x.operands(call.quantizer("fprop", LEFT), columns, call.backend)
    if not both or call.shards is not None:
        return call.operand(x, "fprop", LEFT), None
    rows, columns = call.quantizer("fprop", LEFT), call.quantizer("wgrad", RIGHT)
    return quantize_both(x, rows, columns, backend=call.backend)


def backward(
    call: Call,
    dy: torch.Tensor,
    saved_w: Saved,
    saved_x: Saved,
    needs: Sequence[bool],
    dtypes: Sequence[torch.dtype | None],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx [M, K], dw [N, K], dbias [N]) of dy [M, N], each in its dtype, or None where it is not needed."""
    dx = dw = db = None
    with without_autocast(dy.device):
        dy_rows, w, dy_columns, x = backward_operands(call, dy, saved_w, saved_x, needs)
        if needs[0]:
            dx = product(call, dy, dy_rows, w, saved_w, dtypes[0])
        if needs[1]:
            dw = product(call, dy.t(), dy_columns, x, saved_x, dtypes[1])
        if needs[2]:
            db = dy.sum(0, dtype=torch.float32).to(dtypes[2])
    return dx, dw, db


def backward_operands(
    call: Call, dy: torch.Tensor, saved_w: Saved, saved_x: Saved, needs: Sequence[bool]
) -> tuple[QTensor | None, QTensor | None, QTensor | None, QTensor | None]:
    """dgrad's (dy, w^T) and wgrad's (dy^T, x^T), each None where it is not needed or not quantised."""
    w = _dgrad_operand(call, saved_w) if needs[0] and call.recipe.dgrad.quantized else None
    x = _wgrad_operand(call, saved_x) if needs[1] and call.recipe.wgrad.quantized else None
    dy_rows, dy_columns = _dy_operands(call, dy, w, x)
    return dy_rows, w, dy_columns, x


def _dgrad_operand(call: Call, saved: Saved) -> QTensor:
    """w^T [K, N], contracted along N."""
    if call.recipe.dgrad.right.source == "codes":
        return transpose(cast(QTensor, saved), backend=call.backend)
    return call.operand(saved if isinstance(saved, QTensor) else cast(torch.Tensor, saved).t(), "dgrad", RIGHT)


def _wgrad_operand(call: Call, saved: Saved) -> QTensor:
    """x^T [K, M], contracted along the tokens."""
    q, source = cast(QTensor, saved), call.recipe.wgrad.right.source
    if source == "decoded":
        return call.operand(q, "wgrad", RIGHT)
    return transpose(q, backend=call.backend) if source == "codes" else q


def _dy_operands(
    call: Call, dy: torch.Tensor, w: QTensor | None, x: QTensor | None
) -> tuple[QTensor | None, QTensor | None]:
    """dy for dgrad and dy^T for wgrad, as far as their partners exist; read together where both do.

    An x^T quantised in the forward keeps the signs of that call, and dy^T has to meet it under the same.
    """
    if w is not None and x is not None and call.shards is None:
        rows, columns = call.quantizer("dgrad", LEFT), call.quantizer("wgrad", LEFT, partner=x.rotation)
        return quantize_both(dy, rows, columns, backend=call.backend)
    return (
        None if w is None else call.operand(dy, "dgrad", LEFT),
        None if x is None else call.operand(dy.t(), "wgrad", LEFT, partner=x.rotation),
    )


def product(
    call: Call, dy: torch.Tensor, left: QTensor | None, right: QTensor | None, saved: Saved, dtype: torch.dtype | None
) -> torch.Tensor:
    """In FP4 or, where the recipe says so, dy @ saved in dy's dtype, or in BF16 of a decoded forward operand."""
    assert dtype is not None
    if left is not None and right is not None:
        return call.matmul(left, right, dtype)
    if isinstance(saved, QTensor):
        return times(dy.to(torch.bfloat16), dequantize(saved, torch.bfloat16)).to(dtype)
    return times(dy, cast(torch.Tensor, saved).to(dy.dtype)).to(dtype)


def stored_operands(recipe: Recipe) -> tuple[Operand | None, Operand | None]:
    """Which codes a forward keeps of (w, x) for the backward; None: the tensor itself, which costs nothing for w."""
    w, x = recipe.dgrad.right, recipe.wgrad.right
    return (
        None if w.source == "tensor" else recipe.fprop.right,
        recipe.fprop.left if x.source != "tensor" else x if x.quantized else None,
    )


def flatten(saved: Saved) -> tuple[torch.Tensor, ...]:
    """The tensors of codes to save for the backward.

    The seed of drawn signs travels with the codes that they turned: under activation checkpointing both must be the
    recomputation's, since a layer used twice may have finished a backward since its first forward.
    """
    if not isinstance(saved, QTensor):
        return ()
    if saved.rotation is None or saved.rotation.sign_seed is None:
        return saved.tensors
    seed = saved.rotation.sign_seed
    if isinstance(seed, DeviceSeed):
        return *saved.tensors, seed.bits.clone()  # two results of an operator may not share memory
    return *saved.tensors, torch.tensor(signed(seed), device="cpu")


def unflatten(tensors: Iterator[torch.Tensor], stored: Operand, shape: tuple[int, int], words: Words) -> QTensor:
    """The inverse of ``flatten`` for the matrix of ``shape`` that ``stored`` quantised, taking tensors in order.

    words: of the call, which say whether a seed is a number or lies on a device.
    """
    layout = stored.layout
    codes, block_scale, global_scale = next(tensors), next(tensors), next(tensors)
    rotation = layout.rotation
    if rotation is not None and not rotation.fixed:
        bits = next(tensors)
        sign_seed = DeviceSeed(bits) if isinstance(words, DeviceWords) else int(bits) % 2**64
        rotation = replace(rotation, sign_seed=sign_seed)
    return QTensor(codes, block_scale, global_scale, layout.block, shape, -1, rotation)


def empty_codes(
    stored: Operand, shape: tuple[int, int], like: torch.Tensor, capturable: bool
) -> tuple[torch.Tensor, ...]:
    """Uninitialised tensors as ``flatten`` makes them, on the device of ``like``; for shape inference."""
    layout = stored.layout
    tensors = QTensor.empty(shape, layout.block, layout.row_scaled, layout.rotation, like.device).tensors
    if layout.rotation is None or layout.rotation.fixed:
        return tensors
    return *tensors, torch.empty((), dtype=torch.int64, device=like.device if capturable else "cpu")
