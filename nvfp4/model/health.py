"""The health of quantised tensors: how x and w of each layer take quantisation.

    health(x, q)                    compares a tensor with its codes: error, saturation, underflow
    with observe(model) as seen     fills ``seen`` with the health of every layer's x and w

What to look for: a relative_mse far above the quantiser's on N(0, 1) (rtn .009, four_over_six
.0076), elements that saturate, blocks whose scale underflows because one outlier sets the scale of
the whole tensor, and anything that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nvfp4.layer.linear import Linear, layers
from nvfp4.layer.sharding import values_here
from nvfp4.numerics.codec import e2m1_decode, e4m3_decode, unpack
from nvfp4.numerics.formats import E2M1, NVFP4
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.scaling import spread
from nvfp4.ops import dequantize, quantize_with


@dataclass(frozen=True)
class Health:
    """How one tensor took quantisation: shares of its elements, but for ``amax`` and relative_mse.

    relative_mse: mean squared error over mean square. saturated: elements at code +-6 whose value
    was further out. underflow: non-zero elements in a block whose scale became 0, so that they
    decode to 0. flushed: non-zero elements that decode to 0, those included. non_finite: NaN or Inf
    elements; if any, the other shares are NaN.
    """

    amax: float
    relative_mse: float
    saturated: float
    underflow: float
    flushed: float
    non_finite: float


def health(x: torch.Tensor, q: QTensor) -> Health:
    """Compare x, of any float dtype, with its unrotated quantisation q along the last axis.

    Waits for the device. Raises ValueError if q is no such quantisation of x.
    """
    if q.rotation is not None or q.axis != -1 or tuple(x.shape) != q.shape:
        raise ValueError("health needs x and an unrotated q of x along its last axis")

    # x, what the codes stand for, and the scale that each element was divided by: all [M, K]
    matrix = x.detach().to(torch.float32).reshape(q.rows, q.contraction)
    decoded = dequantize(q).reshape(matrix.shape)
    codes = e2m1_decode(unpack(q.codes))[:, : q.contraction].abs()
    block_scale = e4m3_decode(spread(q.block_scale, q.block, q.rows))
    scale = block_scale.repeat_interleave(NVFP4.block_size, dim=1)[:, : q.contraction]

    count = max(matrix.numel(), 1)
    finite = bool(matrix.isfinite().all())

    def share(mask: torch.Tensor) -> float:
        return mask.sum().item() / count if finite else float("nan")

    # in float64: squares leave the range of float32 long before x does
    square = matrix.double().square().sum()
    error = (matrix.double() - decoded).square().sum()
    if square > 0:
        relative_mse = (error / square).item()
    else:
        relative_mse = 0.0 if finite else float("nan")

    # shares of all elements
    non_zero = matrix != 0
    beyond = (codes == E2M1.max) & (matrix.abs() > decoded.abs()) & (scale > 0)
    return Health(
        amax=matrix.abs().amax().item() if matrix.numel() else 0.0,
        relative_mse=relative_mse,
        saturated=share(beyond),
        underflow=share(non_zero & (scale == 0)),
        flushed=share(non_zero & (decoded == 0)),
        non_finite=(~matrix.isfinite()).sum().item() / count,
    )


@contextmanager
def observe(model: nn.Module) -> Iterator[dict[str, Health]]:
    """Within this context every forward records the health of each converted layer's x and w.

    Yields a dict that fills with "layer/x" and "layer/w"; the last forward wins. Costs a second
    quantisation. Under tensor parallelism it looks at this process's part; a weight gathered in FP4
    has no values and is left out.
    """
    seen: dict[str, Health] = {}
    found = layers(model).items()
    hooks = [
        layer.register_forward_pre_hook(_observer(name, seen), with_kwargs=True)
        for name, layer in found
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _observer(name: str, seen: dict[str, Health]) -> Callable[..., None]:
    """A forward pre-hook that records the health of one layer's x and w."""

    def record(layer: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, Linear)

        # quantised anew, with the seed 0; what is rotated cannot be held beside its input
        fprop, x = layer.nvfp4.recipe.fprop, args[0] if args else kwargs["input"]
        for key, given, spec in (("x", x, fprop.left), ("w", layer.weight, fprop.right)):
            tensor = values_here(given)
            unrotated = spec.quantizer is not None and spec.rotation_key is None
            if tensor is not None and unrotated and tensor.numel():
                q = quantize_with(tensor.detach(), spec.rule, spec.static_options)
                seen[f"{name}/{key}"] = health(tensor, q)

    return record
