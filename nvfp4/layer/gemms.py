"""The three GEMMs of one layer call, as functions of tensors: no autograd, no module, no device.

    forward    quantise x [M, K], and w [N, K] if no earlier call has; multiply,
               y [M, N] = x w^T + bias; pack what the backward will need
    backward   unpack it, quantise dy [M, N] along both axes in one read, multiply twice:
               dx [M, K] = dy w, dw [N, K] = dy^T x; db [N] = sum of dy over the tokens

Both take and return plain tensors. Between them lie the steps that stacked experts take one by one
(``experts.py``): the operands of each GEMM first, then all products of a GEMM in one launch. A GEMM
that the recipe does not quantise runs in high precision. Noise comes from ``LayerCall.noise``
alone, which is a function of (seed, layer, call, GEMM, operand, rank).

At the end of the file both are operators of torch, ``nvfp4::linear_fprop`` and
``nvfp4::linear_backward``. A compiler or a dispatch mode (selective checkpointing, ``make_fx``)
must see a layer as one operator: kernels write through raw pointers to memory that it would
otherwise take for uninitialised, and reorder. So a traced layer calls these, which give the same
bits. Each has a fake that gives shapes for [M, K] x [N, K], and is tested with
``torch.library.opcheck``. A recipe travels as ``Recipe.key`` and noise as ``Noise.state``, int64
[4]; nothing else tells one layer from another, so equal blocks share one compiled graph. The weight
is quantised in every such call: codes are kept in eager mode alone. Two more,
``nvfp4::linear_fprop_delayed`` and ``nvfp4::linear_backward_delayed``, do the same under a recipe
with delayed amaxes, and return the table as it is afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch

from nvfp4.layer.call import DeviceNoise, LayerCall, dense_fprop, dense_product
from nvfp4.layer.delayed_amax import DelayedAmax
from nvfp4.layer.lazy_activation import LazyActivation
from nvfp4.layer.noise import LEFT, RIGHT
from nvfp4.layer.saved import Dtypes, Matrix, Needs, Saved, empty, pack, saved_specs, unpack
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.torch_state import without_autocast
from nvfp4.ops import matmul, quantize_both, transpose
from nvfp4.recipes import Recipe

Pair = tuple[QTensor, QTensor]
"""The left and the right operand of a GEMM: the product is left @ right^T."""


def forward(
    call: LayerCall,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    needs: Needs,
    w_amax: torch.Tensor | None = None,
    w_codes: QTensor | None = None,
) -> list[torch.Tensor]:
    """y [M, N] in ``dtype``, then the tensors of codes that the backward needs (``saved.pack``).

    w_amax: as in ``LayerCall.weight``. w_codes: what that gave of the weight in an earlier call, if
    it is known.
    """
    operands, saved = forward_operands(call, x, weight, needs, w_amax, w_codes)

    # weights alone in FP4, or nothing: the product is dense
    if operands.x is None or operands.w is None:
        y = dense_fprop(call, x, weight if operands.w is None else operands.w, bias, dtype)
    else:
        y = matmul(operands.x, operands.w, dtype, bias=bias, backend=call.backend)
    return [y, *pack(saved)]


def backward(
    call: LayerCall,
    dy: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    needs: Needs,
    features: int,
    dtypes: Dtypes,
) -> list[torch.Tensor]:
    """Those of dx [M, K], dw [N, K] and db [N] that ``needs`` asks for, each in its dtype.

    tensors: what ``forward`` returned after y, then ``saved.inputs_to_save``. features: K.
    """
    # what the forward left: codes first, then w and x themselves
    rest = iter(tensors)
    m, n = dy.shape
    saved = unpack(rest, call.recipe, needs, (m, features, n), isinstance(call.noise, DeviceNoise))
    if needs.dx and saved.for_dx is None:
        saved = saved._replace(for_dx=next(rest))
    if needs.dw and saved.for_dw is None:
        saved = saved._replace(for_dw=next(rest))

    # autocast would round a dense GEMM in float32 to BF16
    gradients = []
    with without_autocast(dy.device):
        operands = backward_operands(call, dy, saved, needs)
        if needs.dx:
            gradients.append(product(call, dy, operands.dgrad, saved.for_dx, dtypes.dx))
        if needs.dw:
            gradients.append(product(call, dy.t(), operands.wgrad, saved.for_dw, dtypes.dw))
        if needs.db:
            db = dy.sum(0, dtype=torch.float32)
            gradients.append(db.to(cast(torch.dtype, dtypes.db)))
    call.end()
    return gradients


class ForwardOperands(NamedTuple):
    """fprop's x and w, each None where it enters as it is."""

    x: QTensor | None
    w: QTensor | None


def forward_operands(
    call: LayerCall,
    x: torch.Tensor,
    weight: torch.Tensor,
    needs: Needs,
    w_amax: torch.Tensor | None = None,
    w_codes: QTensor | None = None,
) -> tuple[ForwardOperands, Saved]:
    """What fprop multiplies, and what the backward needs; w_amax, w_codes: as in ``forward``.

    x is read once where fprop and wgrad both quantise it, and so is dy in the backward (on a CPU
    rtn 5.2 -> 4.5 ms, sr 8.5 -> 7.6; nothing for ms_eden, which is bound by arithmetic).
    """
    recipe = call.recipe
    specs = saved_specs(recipe)
    if needs.dx or needs.dw:
        call = call.recording()

    # w, unless its codes are there from an earlier call
    if not recipe.fprop.right.quantized:
        w_codes = None
    elif w_codes is None:
        w_codes = call.weight(weight, w_amax)

    # x and, where wgrad quantises x^T itself, that too: in one read if fprop wants x as well
    transposed = needs.dw and specs.x_is_transposed
    x_codes = x_transposed = None
    if recipe.fprop.quantized:
        x_codes, x_transposed = _x_operands(call, x, transposed)
    if transposed and x_transposed is None:
        x_transposed = call.operand(x.t(), "wgrad", RIGHT)

    # what the backward will start from
    for_dx: Matrix | None = None
    for_dw: Matrix | None = None
    if needs.dx:
        for_dx = weight if specs.for_dx is None else w_codes
    if needs.dw:
        for_dw = x if specs.for_dw is None else x_transposed if transposed else x_codes
    return ForwardOperands(x_codes, w_codes), Saved(for_dx, for_dw)


def _x_operands(call: LayerCall, x: torch.Tensor, both: bool) -> tuple[QTensor, QTensor | None]:
    """fprop's operand of x and, if ``both`` and in one read, wgrad's operand x^T."""
    # never written, x is computed in the kernel that quantises it
    if isinstance(x, LazyActivation):
        columns = call.quantizer("wgrad", RIGHT, None) if both else None
        return x.operands(call.quantizer("fprop", LEFT, None), columns, call.backend)

    # parts of a whole are quantised one orientation at a time; the caller does the other
    if not both or call.shards is not None:
        return call.operand(x, "fprop", LEFT), None
    rows, columns = call.quantizer("fprop", LEFT, x), call.quantizer("wgrad", RIGHT, x.t())
    return quantize_both(x, rows, columns, backend=call.backend)


class BackwardOperands(NamedTuple):
    """dgrad's (dy, w^T) and wgrad's (dy^T, x^T); None where it is not needed or not quantised."""

    dgrad: Pair | None
    wgrad: Pair | None


def backward_operands(
    call: LayerCall, dy: torch.Tensor, saved: Saved, needs: Needs
) -> BackwardOperands:
    """The operands of the backward's GEMMs; dy is read once where both want it.

    An x^T that the forward quantised keeps the signs of that call, and dy^T has to meet it under
    the same ones.
    """
    recipe, call = call.recipe, call.recording()
    w = _w_operand(call, saved.for_dx) if needs.dx and recipe.dgrad.quantized else None
    x = _x_transposed(call, saved.for_dw) if needs.dw and recipe.wgrad.quantized else None

    # dy along N for dgrad and along the tokens for wgrad, from one read
    if w is not None and x is not None and call.shards is None:
        rows, columns = (
            call.quantizer("dgrad", LEFT, dy),
            call.quantizer("wgrad", LEFT, dy.t(), partner=x.rotation),
        )
        dy_rows, dy_columns = quantize_both(dy, rows, columns, backend=call.backend)
        return BackwardOperands((dy_rows, w), (dy_columns, x))

    return BackwardOperands(
        None if w is None else (call.operand(dy, "dgrad", LEFT), w),
        None if x is None else (call.operand(dy.t(), "wgrad", LEFT, partner=x.rotation), x),
    )


def _w_operand(call: LayerCall, saved: Matrix | None) -> QTensor:
    """dgrad's operand w^T [K, N], contracted along N."""
    # 16x16 blocks: fprop's own codes, rows and columns exchanged
    if call.recipe.dgrad.right.source == "codes":
        return transpose(cast(QTensor, saved), backend=call.backend)
    return call.operand(
        saved if isinstance(saved, QTensor) else cast(torch.Tensor, saved).t(), "dgrad", RIGHT
    )


def _x_transposed(call: LayerCall, saved: Matrix | None) -> QTensor:
    """wgrad's operand x^T [K, M], contracted along the tokens."""
    q, source = cast(QTensor, saved), call.recipe.wgrad.right.source
    if source == "decoded":
        return call.operand(q, "wgrad", RIGHT)
    return transpose(q, backend=call.backend) if source == "codes" else q


def product(
    call: LayerCall,
    dy: torch.Tensor,
    operands: Pair | None,
    saved: Matrix | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One GEMM of the backward in ``dtype``: in FP4, or ``call.dense_product``."""
    if operands is not None:
        return matmul(*operands, dtype, backend=call.backend)
    return dense_product(dy, cast(Matrix, saved), dtype)


@torch.library.custom_op("nvfp4::linear_fprop", mutates_args=())
def forward_operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    noise: torch.Tensor,
    recipe: str,
    backend: str,
    dtype: torch.dtype,
    needs: list[bool],
    w_amax: torch.Tensor | None = None,
    capturable: bool = False,
) -> list[torch.Tensor]:
    """y = x w^T + bias [M, N] in ``dtype``, then the codes that the backward needs.

    needs: (dx, dw, db).
    """
    call = LayerCall.of(recipe, backend, noise, capturable)
    return forward(call, x, weight, bias, dtype, Needs(*needs), w_amax)


@forward_operator.register_fake
def _(x, weight, bias, noise, recipe, backend, dtype, needs, w_amax=None, capturable=False):
    return _empty_forward(x, weight, recipe, dtype, needs, capturable)


def _empty_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    recipe: str,
    dtype: torch.dtype,
    needs: list[bool],
    capturable: bool,
) -> list[torch.Tensor]:
    """The results of a forward operator without values."""
    # shapes alone: what the forward will save follows from the recipe and from needs
    (m, k), n = x.shape, weight.shape[0]
    codes = empty(Recipe.from_key(recipe), Needs(*needs), (m, k, n), x.device, capturable)
    return [x.new_empty(m, n, dtype=dtype), *codes]


@torch.library.custom_op("nvfp4::linear_backward", mutates_args=())
def backward_operator(
    dy: torch.Tensor,
    saved: list[torch.Tensor],
    noise: torch.Tensor,
    recipe: str,
    backend: str,
    needs: list[bool],
    features: int,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    b_dtype: torch.dtype | None,
    capturable: bool = False,
) -> list[torch.Tensor]:
    """Those of dx [M, K], dw [N, K], db [N] that ``needs`` asks for; features: K."""
    call = LayerCall.of(recipe, backend, noise, capturable)
    return backward(call, dy, saved, Needs(*needs), features, Dtypes(x_dtype, w_dtype, b_dtype))


@backward_operator.register_fake
def _(
    dy, saved, noise, recipe, backend, needs, features, x_dtype, w_dtype, b_dtype, capturable=False
):
    return _empty_gradients(dy, needs, features, (x_dtype, w_dtype, b_dtype))


def _empty_gradients(
    dy: torch.Tensor, needs: list[bool], features: int, dtypes: Sequence[torch.dtype | None]
) -> list[torch.Tensor]:
    """The results of a backward operator without values."""
    # in the order of Needs
    (m, n), k = dy.shape, features
    gradients = zip(((m, k), (n, k), (n,)), dtypes, strict=True)
    return [
        dy.new_empty(shape, dtype=dtype)
        for need, (shape, dtype) in zip(needs, gradients, strict=True)
        if need
    ]


@torch.library.custom_op("nvfp4::linear_fprop_delayed", mutates_args=())
def delayed_forward_operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    noise: torch.Tensor,
    recipe: str,
    backend: str,
    dtype: torch.dtype,
    needs: list[bool],
    table: torch.Tensor,
    known: torch.Tensor,
    w_amax: torch.Tensor | None = None,
    capturable: bool = False,
) -> list[torch.Tensor]:
    """``forward_operator`` under a recipe with delayed amaxes, then what these have become.

    table, known: ``DelayedAmax``, which is not changed here: functionalisation knows no operator
    that changes an argument and returns a list.
    """
    amax = DelayedAmax(table.clone(), known.clone())
    call = LayerCall.of(recipe, backend, noise, capturable, amax=amax)
    return [*forward(call, x, weight, bias, dtype, Needs(*needs), w_amax), *amax]


@delayed_forward_operator.register_fake
def _(
    x,
    weight,
    bias,
    noise,
    recipe,
    backend,
    dtype,
    needs,
    table,
    known,
    w_amax=None,
    capturable=False,
):
    made = _empty_forward(x, weight, recipe, dtype, needs, capturable)
    return [*made, torch.empty_like(table), torch.empty_like(known)]


@torch.library.custom_op("nvfp4::linear_backward_delayed", mutates_args=())
def delayed_backward_operator(
    dy: torch.Tensor,
    saved: list[torch.Tensor],
    noise: torch.Tensor,
    recipe: str,
    backend: str,
    needs: list[bool],
    features: int,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    b_dtype: torch.dtype | None,
    table: torch.Tensor,
    known: torch.Tensor,
    capturable: bool = False,
) -> list[torch.Tensor]:
    """``backward_operator`` that ends a call with delayed amaxes, then what these have become."""
    amax = DelayedAmax(table.clone(), known.clone())
    call = LayerCall.of(recipe, backend, noise, capturable, amax=amax)
    dtypes = Dtypes(x_dtype, w_dtype, b_dtype)
    return [*backward(call, dy, saved, Needs(*needs), features, dtypes), *amax]


@delayed_backward_operator.register_fake
def _(
    dy,
    saved,
    noise,
    recipe,
    backend,
    needs,
    features,
    x_dtype,
    w_dtype,
    b_dtype,
    table,
    known,
    capturable=False,
):
    made = _empty_gradients(dy, needs, features, (x_dtype, w_dtype, b_dtype))
    return [*made, torch.empty_like(table), torch.empty_like(known)]
