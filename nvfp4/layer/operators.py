"""``gemms.forward`` and ``gemms.backward`` as operators of torch.

A compiler or a dispatch mode (selective checkpointing, ``make_fx``) must see a layer as one
operator: kernels write through raw pointers to memory that it would otherwise take for
uninitialised, and reorder. So a traced layer calls ``nvfp4::linear_fprop`` and
``nvfp4::linear_backward``. Each is registered with a fake that gives shapes for [M, K] x [N, K],
and tested with ``torch.library.opcheck``.

A recipe travels as ``Recipe.key`` and noise as ``Noise.state``, int64 [4]; nothing else tells one
layer from another, so equal blocks share one compiled graph. The weight is quantised in every call:
codes are kept in eager mode alone.
"""

from __future__ import annotations

import torch

from nvfp4.layer import gemms
from nvfp4.layer.gemms import LayerCall
from nvfp4.layer.saved import Dtypes, Needs, empty
from nvfp4.recipes import Recipe


@torch.library.custom_op("nvfp4::linear_fprop", mutates_args=())
def fprop(
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
    return gemms.forward(call, x, weight, bias, dtype, Needs(*needs), w_amax)


@fprop.register_fake
def _(x, weight, bias, noise, recipe, backend, dtype, needs, w_amax=None, capturable=False):
    # shapes alone: what the forward will save follows from the recipe and from needs
    (m, k), n = x.shape, weight.shape[0]
    codes = empty(Recipe.from_key(recipe), Needs(*needs), (m, k, n), x.device, capturable)
    return [x.new_empty(m, n, dtype=dtype), *codes]


@torch.library.custom_op("nvfp4::linear_backward", mutates_args=())
def backward(
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
    return gemms.backward(
        call, dy, saved, Needs(*needs), features, Dtypes(x_dtype, w_dtype, b_dtype)
    )


@backward.register_fake
def _(
    dy, saved, noise, recipe, backend, needs, features, x_dtype, w_dtype, b_dtype, capturable=False
):
    # in the order of Needs
    (m, n), k = dy.shape, features
    gradients = ((m, k), x_dtype), ((n, k), w_dtype), ((n,), b_dtype)
    return [
        dy.new_empty(shape, dtype=dtype)
        for need, (shape, dtype) in zip(needs, gradients, strict=True)
        if need
    ]
