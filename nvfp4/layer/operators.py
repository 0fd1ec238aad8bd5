"""The layer's operators ``nvfp4::linear_fprop`` and ``nvfp4::linear_backward``, which compiled graphs call.

A compiled graph quantises its weights in every call: codes are kept in eager mode only. Recipes travel as
``Recipe.key``, noise as ``Noise.words`` (``capturable``: on the device for good), and nothing else tells one layer from
another, so that equal blocks share one compiled graph. Tested with ``torch.library.opcheck``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nvfp4.layer.gemms import Call, Saved, empty_codes, flatten, stored_operands, unflatten
from nvfp4.layer.gemms import backward as backward_gemms
from nvfp4.layer.gemms import fprop as fprop_gemm
from nvfp4.layer.noise import words_of
from nvfp4.recipes import Recipe


def _call(words: torch.Tensor, recipe: str, backend: str, capturable: bool) -> Call:
    return Call(Recipe.from_key(recipe), backend, words_of(words, capturable, backend))


@torch.library.custom_op("nvfp4::linear_fprop", mutates_args=())
def fprop(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    words: torch.Tensor,
    recipe: str,
    backend: str,
    dtype: torch.dtype,
    needs: list[bool],
    w_amax: torch.Tensor | None = None,
    capturable: bool = False,
) -> list[torch.Tensor]:
    """y = x w^T + bias [M, N] in ``dtype``, then the codes of w and of x that the backward needs."""
    y, saved_w, saved_x = fprop_gemm(_call(words, recipe, backend, capturable), x, weight, bias, dtype, needs, w_amax)
    return [y, *flatten(saved_w), *flatten(saved_x)]


@fprop.register_fake
def _(x, weight, bias, words, recipe, backend, dtype, needs, w_amax=None, capturable=False):
    chosen = Recipe.from_key(recipe)
    made = [x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)]
    (m, k), n = x.shape, weight.shape[0]
    shapes = _stored_shapes(chosen, m, k, n)
    for need, stored, shape in zip(needs, stored_operands(chosen), shapes, strict=False):
        if need and stored is not None:
            made += empty_codes(stored, shape, x, capturable)
    return made


def _stored_shapes(recipe: Recipe, m: int, k: int, n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the stored matrices of w [N, K] and x [M, K]; x lies transposed where wgrad quantises it itself."""
    return (n, k), (k, m) if stored_operands(recipe)[1] is recipe.wgrad.right else (m, k)


@torch.library.custom_op("nvfp4::linear_backward", mutates_args=())
def backward(
    dy: torch.Tensor,
    saved: list[torch.Tensor],
    words: torch.Tensor,
    recipe: str,
    backend: str,
    needs: list[bool],
    features: int,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    b_dtype: torch.dtype | None,
    capturable: bool = False,
) -> list[torch.Tensor]:
    """Those of dx [M, K], dw [N, K], dbias [N] that ``needs`` asks for."""
    call = _call(words, recipe, backend, capturable)
    return eager_backward(call, dy, saved, needs, features, (x_dtype, w_dtype, b_dtype))


@backward.register_fake
def _(dy, saved, words, recipe, backend, needs, features, x_dtype, w_dtype, b_dtype, capturable=False):
    (m, n), k = dy.shape, features
    shapes = ((m, k), x_dtype), ((n, k), w_dtype), ((n,), b_dtype)
    return [dy.new_empty(shape, dtype=dtype) for need, (shape, dtype) in zip(needs, shapes, strict=True) if need]


def eager_backward(
    call: Call,
    dy: torch.Tensor,
    saved: Sequence[torch.Tensor],
    needs: Sequence[bool],
    features: int,
    dtypes: Sequence[torch.dtype | None],
) -> list[torch.Tensor]:
    """What the operator does, without the dispatcher."""
    saved_w, saved_x = restore(call, saved, needs, dy.shape, features)
    made = backward_gemms(call, dy, saved_w, saved_x, needs, dtypes)
    return [gradient for gradient in made if gradient is not None]


def restore(
    call: Call, saved: Sequence[torch.Tensor], needs: Sequence[bool], shape: torch.Size, features: int
) -> tuple[Saved, Saved]:
    """(w, x) from the tensors saved by a forward: codes of w, codes of x, then w or x themselves."""
    stored_w, stored_x = stored_operands(call.recipe)
    tensors = iter(saved)
    w: Saved = None
    x: Saved = None
    w_shape, x_shape = _stored_shapes(call.recipe, shape[0], features, shape[1])
    if needs[0] and stored_w is not None:
        w = unflatten(tensors, stored_w, w_shape, call.words)
    if needs[1] and stored_x is not None:
        x = unflatten(tensors, stored_x, x_shape, call.words)
    if needs[0] and stored_w is None:
        w = next(tensors)
    if needs[1] and stored_x is None:
        x = next(tensors)
    return w, x
