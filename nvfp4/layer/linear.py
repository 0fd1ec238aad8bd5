"""The linear layer: ``nn.Linear`` with its three GEMMs in NVFP4, y [.., N] = x [.., K] w^T + bias.

    forward    x is flattened to [M, K];
               ``WeightCache`` has the codes of w, or makes them;
               ``gemms.forward`` quantises x, multiplies, and packs what the backward needs: codes,
               4.5 bits per element, which autograd keeps
    backward   ``gemms.backward`` unpacks them, quantises dy [M, N] and multiplies twice;
               the noise counts one call more

Each way is one function of plain tensors. Eager mode calls it directly; where a compiler or a
dispatch mode watches, the operator of torch around it is called instead, and gives the
same bits.

What a layer knows beside its parameters is its ``LinearState`` (``state.py``), the attribute
``nvfp4``. Under ``nvfp4.disabled`` it computes as an ``nn.Linear``. Where weight or x is a DTensor,
``tensor_parallel.py`` says which part is computed here. x may be a ``LazyActivation``, which is
quantised without being written if that is possible.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nvfp4.layer import gemms
from nvfp4.layer.call import LayerCall
from nvfp4.layer.dense import affine
from nvfp4.layer.lazy_activation import LazyActivation
from nvfp4.layer.noise import CALLS
from nvfp4.layer.saved import NO_GRADIENTS, Dtypes, Needs, inputs_to_save
from nvfp4.layer.sharding import Shards
from nvfp4.layer.state import LinearState, output_dtype, refuse_second_derivative
from nvfp4.numerics.torch_state import is_dtensor, is_traced


def _forward(
    state: LinearState,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    needs: Needs,
) -> list[torch.Tensor]:
    """y [M, N] in ``dtype`` of x [M, K], then the tensors of codes that the backward needs.

    RuntimeError if the noise of a capturable layer is on another device than x.
    """
    noise = state.noise
    if noise.capturable and noise.state.device != x.device:
        raise RuntimeError(
            f"x is on {x.device}, but the noise of this layer was put on {noise.state.device} "
            "by nvfp4.capturable(model): call it again, now that the model has moved"
        )

    # somebody watches: the operator
    amax = state.delayed_amax(x.device)
    if is_traced(x):
        _check_whole(state.shards)
        how = (noise.state, state.key, state.backend, dtype, list(needs))
        if amax is not None:
            given = (*amax, state.weight_amax(), noise.capturable)
            return amax.take(gemms.delayed_forward_operator(x, weight, bias, *how, *given))
        return gemms.forward_operator(x, weight, bias, *how, state.weight_amax(), noise.capturable)

    # nobody does: the same function, with the weight's codes if they are kept
    call = state.call(amax)
    kept = state.kept_codes(weight, call)
    if kept is not None:
        return gemms.forward(call, x, weight, bias, dtype, needs, w_codes=kept[0])
    return gemms.forward(call, x, weight, bias, dtype, needs, w_amax=state.weight_amax())


def _check_whole(shards: Shards | None) -> None:
    """RuntimeError for a part of a layer in a trace, which knows of no other processes."""
    if shards is not None:
        raise RuntimeError(
            "torch.compile, and other tracing, cannot see that a layer of parallelize_module is "
            "one part of a whole: run such layers eagerly, for example with torch.compiler.disable"
        )


class _LinearFunction(torch.autograd.Function):
    """y [M, N] = x w^T + bias with x [M, K], w [N, K]; see ``recipes.py`` for the three GEMMs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: LinearState,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        needs = Needs(*ctx.needs_input_grad[:3])
        y, *codes = _forward(state, x, weight, bias, dtype, needs)
        ctx.save_for_backward(*codes, *inputs_to_save(state.specs, needs, weight, x))

        # the backward takes recipe and backend as they are now, and noise as it will be then: other
        # backward passes may advance the counter before this one, which a saved tensor forbids
        ctx.noise = state.noise.state
        ctx.capturable = state.noise.capturable
        ctx.amax = state.delayed_amax(x.device)
        ctx.key, ctx.backend, ctx.shards = state.key, state.backend, state.shards
        ctx.needs, ctx.features = needs, x.shape[1]
        ctx.dtypes = Dtypes(x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        saved, needs, dtypes = ctx.saved_tensors, ctx.needs, ctx.dtypes

        # as in the forward: the operator where somebody watches, else the function itself
        if is_traced(dy):
            _check_whole(ctx.shards)
            how = (ctx.noise, ctx.key, ctx.backend, list(needs), ctx.features)
            if ctx.amax is not None:
                how = (*how, *dtypes, *ctx.amax, ctx.capturable)
                gradients = ctx.amax.take(gemms.delayed_backward_operator(dy, list(saved), *how))
            else:
                gradients = gemms.backward_operator(dy, list(saved), *how, *dtypes, ctx.capturable)
        else:
            given = (ctx.capturable, ctx.shards, ctx.amax)
            call = LayerCall.of(ctx.key, ctx.backend, ctx.noise, *given)
            gradients = gemms.backward(call, dy, saved, needs, ctx.features, dtypes)

        # here, and not in the forward: a recomputed forward has to meet the same noise
        ctx.noise[CALLS].add_(1)

        in_order = iter(gradients)
        dx, dw, db = [next(in_order) if need else None for need in needs]
        return dx, dw, db, None, None


class Linear(nn.Linear):
    """An ``nn.Linear`` whose GEMMs run in NVFP4; ``nvfp4.convert`` turns a layer into one in place.

    Parameters, keys of ``state_dict``, hooks and dtypes stay as in ``nn.Linear``. x: [...,
    in_features] in float32, bfloat16 or float16, any rank from 1, any number of tokens; y: [...,
    out_features] in the dtype ``F.linear`` would give (under autocast, the autocast dtype). NaN or
    Inf in x or the weight make the output NaN. With DTensors, as ``parallelize_module`` makes them,
    y is a DTensor: see ``tensor_parallel.py``.
    """

    nvfp4: LinearState
    original = nn.Linear

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise TypeError(
            "nvfp4.Linear has no constructor, since seed and index of its noise belong to a "
            "model: make an nn.Linear and convert it, or the model that holds it, with "
            "nvfp4.convert"
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y = x w^T + bias of x = ``input``, the name it has in ``nn.Linear``.

        Raises ValueError if x has another last dimension, TypeError if the dtypes do not fit.
        """
        x, state = input, self.nvfp4

        # it would record kernels as constants
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace cannot record an nvfp4 layer: use torch.export or torch.compile"
            )
        if not (state.enabled and state.recipe.quantized):
            return affine(x, self.weight, self.bias)
        if is_dtensor(self.weight) or is_dtensor(x):
            return self._forward_part(x)
        return _linear(x, self.weight, self.bias, state)

    def _forward_part(self, x: torch.Tensor) -> torch.Tensor:
        """This process's part of y, as a DTensor, of DTensors x and weight."""
        # costs an import that a model of plain parameters need not pay
        from nvfp4.layer.tensor_parallel import layout

        # parts are plain tensors, so that from here on a part is a layer; ``shards`` tells operands
        # which of them need the amax of the whole
        where = layout(x, self.weight)
        self.nvfp4.noise.rank = where.noise_rank
        self.nvfp4.delayed_amax(x.device)  # of the layer, not of the part
        state = replace(self.nvfp4, shards=where.shards)
        return where.whole(
            _linear(*where.local(x, self.weight, self.bias), state), self.out_features
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        """As ``nn.Module``; what the layer holds of earlier calls moves along with the weight."""
        super()._apply(fn, recurse)
        if self.weight.device.type != "meta":
            self.nvfp4.delayed_amax(self.weight.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, bias, recipe and backend."""
        state = self.nvfp4
        group = state.cache.group
        shared = "" if group is None else f", amax shared by {len(group.layers)}"
        off = "" if state.enabled else ", disabled"
        runs = f"recipe={state.recipe.name}, backend={state.backend}"
        return f"{super().extra_repr()}, {runs}{shared}{off}"


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: LinearState
) -> torch.Tensor:
    """y [..., N] of plain tensors x [..., K], weight [N, K], bias [N]."""
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., in_features={weight.shape[1]}], got {tuple(x.shape)}")
    dtype = output_dtype(x, weight)

    # [M, K]; values are written only where the recipe cannot quantise the formula
    rows = x.reshape(-1, weight.shape[1])
    if isinstance(rows, LazyActivation) and not state.can_quantize_lazily(rows):
        rows = rows.written()

    # without a graph there is nothing to save
    if torch.is_grad_enabled():
        y = _LinearFunction.apply(rows, weight, bias, state, dtype)
    else:
        y = _forward(state, rows, weight, bias, dtype, NO_GRADIENTS)[0]
    return y.view(*x.shape[:-1], weight.shape[0])


def layers(model: nn.Module) -> dict[str, Linear]:
    """The converted layers of a model by name, in conversion order; no stacked experts."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return dict(sorted(linears.items(), key=lambda item: item[1].nvfp4.noise.layer))
