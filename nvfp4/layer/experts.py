"""Stacked experts: a mixture-of-experts block keeps all experts' weights in two tensors [E, N, K].

Every expert computes as an ``nvfp4.Linear`` of its own, bit for bit: its tokens are quantised by
themselves, its weight has scales of its own, and it draws the noise of layer e in a model with the
seed fold_in(seed, layer of the stack).

    input      rows x [S, K], ordered by expert, and how many each expert got
    forward    operands of every expert that has rows, then all products of fprop in one call
    backward   operands of every such expert, then all products of dgrad in one call, then all
               of wgrad; a call (``ops.grouped_matmul``) is one launch where the hardware can

An expert without rows is left out, and its weight gets a gradient of 0. One thing is asked of the
device per forward: how many tokens each expert got, since the codes of one tensor share a scale and
the rows must be cut on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nvfp4.layer.call import LayerCall
from nvfp4.layer.gemms import (
    Pair,
    backward_operands,
    dense_fprop,
    forward_operands,
    product,
)
from nvfp4.layer.noise import CALLS, HostNoise
from nvfp4.layer.saved import (
    NO_GRADIENTS,
    Dtypes,
    Matrix,
    Needs,
    Saved,
    inputs_to_save,
    pack,
    saved_specs,
    unpack,
)
from nvfp4.layer.state import LinearState, output_dtype, refuse_second_derivative
from nvfp4.layer.weight_cache import STACKS, Codes
from nvfp4.numerics.rng import fold_in, signed
from nvfp4.numerics.torch_state import is_dtensor, without_autocast
from nvfp4.ops import grouped_matmul


def expert_call(call: LayerCall, expert: int) -> LayerCall:
    """The call of one expert, from the call of its stack."""
    assert isinstance(call.noise, HostNoise), "experts read on the host how many tokens they got"
    seed, layer, calls, rank = call.noise
    return call._replace(
        noise=HostNoise((signed(fold_in(seed % 2**64, layer)), expert, calls, rank))
    )


class ExpertsState(LinearState):
    """What one stack knows beside its weights; noise.calls counts backward passes of the stack."""

    def quantized(self, weight: torch.Tensor, call: LayerCall, amax: torch.Tensor | None) -> Codes:
        """One operand per expert."""
        return tuple(expert_call(call, e).weight(matrix) for e, matrix in enumerate(weight))


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, sizes: Sequence[int], state: ExpertsState
) -> torch.Tensor:
    """y [S, N], the rows of each expert times its matrix transposed, differentiable.

    x: [S, K], rows ordered by expert. weight: [E, N, K]. sizes: rows of every expert, adding up to
    S; 0 is fine, and such an expert's weight gets a gradient of 0. Raises ValueError if they do not
    fit, TypeError for wrong dtypes.
    """
    experts, _, inputs = weight.shape
    if x.dim() != 2 or x.shape[1] != inputs or len(sizes) != experts or sum(sizes) != x.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)} and sizes {list(sizes)} do not fit weights {tuple(weight.shape)}"
        )
    dtype = output_dtype(x, weight)

    # nothing to multiply, but a graph to hang on
    if x.shape[0] == 0:
        return F.linear(x, weight[0]).to(dtype)

    if torch.is_grad_enabled():
        return _GroupedFunction.apply(x, weight, tuple(sizes), state, dtype)
    return _forward(state, x, weight, sizes, dtype, NO_GRADIENTS)[0]


def _groups(x: torch.Tensor, sizes: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """(expert, its rows) of every expert that has some."""
    return [(e, rows) for e, rows in enumerate(x.split(list(sizes))) if rows.shape[0]]


def _forward(
    state: ExpertsState,
    x: torch.Tensor,
    weight: torch.Tensor,
    sizes: Sequence[int],
    dtype: torch.dtype,
    needs: Needs,
) -> list[torch.Tensor]:
    """y, then the packed codes of every expert with rows, equally many of each."""
    call = state.call()
    kept = state.kept_codes(weight, call)

    # the operands of each expert; where fprop is dense, the product as well
    pairs: list[Pair] = []
    dense: list[torch.Tensor] = []
    saved: list[torch.Tensor] = []
    for e, rows in _groups(x, sizes):
        codes = None if kept is None else kept[e]
        operands, own = forward_operands(
            expert_call(call, e), rows, weight[e], needs, w_codes=codes
        )
        saved += pack(own)
        if operands.x is None or operands.w is None:
            w = weight[e] if operands.w is None else operands.w
            dense.append(dense_fprop(call, rows, w, None, dtype))
        else:
            pairs.append((operands.x, operands.w))

    return [torch.cat(dense or _grouped(call, pairs, dtype)), *saved]


def _grouped(call: LayerCall, pairs: Sequence[Pair], dtype: torch.dtype) -> list[torch.Tensor]:
    """All products of one GEMM in one call, which is one launch where the hardware can."""
    return grouped_matmul([a for a, _ in pairs], [b for _, b in pairs], dtype, backend=call.backend)


def _backward(
    call: LayerCall,
    dy: torch.Tensor,
    sizes: Sequence[int],
    saved: Sequence[Saved],
    needs: Needs,
    shape: torch.Size,
    dtypes: Dtypes,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx [S, K], dw [E, N, K]); saved: of every expert with rows. shape: of the weight."""
    # every expert's operands, quantised by themselves
    groups = _groups(dy, sizes)
    operands = [
        backward_operands(expert_call(call, e), rows, own, needs)
        for (e, rows), own in zip(groups, saved, strict=True)
    ]

    # dgrad: the rows of all experts, in their order
    dx = dw = None
    if needs.dx:
        pairs, dense = [each.dgrad for each in operands], [rows for _, rows in groups]
        parts = _products(call, dense, pairs, [own.for_dx for own in saved], dtypes.dx)
        dx = torch.cat(parts)
        del parts  # as large as dx, while dw is made

    # wgrad: an expert without rows keeps its zeros
    if needs.dw:
        pairs, dense = [each.wgrad for each in operands], [rows.t() for _, rows in groups]
        parts = _products(call, dense, pairs, [own.for_dw for own in saved], dtypes.dw)
        dw = torch.zeros(shape, dtype=dtypes.dw, device=dy.device)
        for (e, _), part in zip(groups, parts, strict=True):
            dw[e] = part
    return dx, dw


def _products(
    call: LayerCall,
    dense: Sequence[torch.Tensor],
    pairs: Sequence[Pair | None],
    saved: Sequence[Matrix | None],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """All of one GEMM: in one call if it is quantised, else one by one as a layer would."""
    quantized = [pair for pair in pairs if pair is not None]
    if len(quantized) == len(pairs):
        return _grouped(call, quantized, dtype)
    return [product(call, rows, None, own, dtype) for rows, own in zip(dense, saved, strict=True)]


class _GroupedFunction(torch.autograd.Function):
    """y = x w[e]^T of every expert e; see ``grouped_linear``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        sizes: tuple[int, ...],
        state: ExpertsState,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        needs = Needs(*ctx.needs_input_grad[:2])
        y, *codes = _forward(state, x, weight, sizes, dtype, needs)
        ctx.save_for_backward(*codes, *inputs_to_save(state.specs, needs, weight, x))

        # noise is no saved tensor: see ``linear.py``
        ctx.noise, ctx.key, ctx.backend = state.noise.state, state.key, state.backend
        ctx.sizes, ctx.needs, ctx.shape = sizes, needs, weight.shape
        ctx.dtypes = Dtypes(x.dtype, weight.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        call = LayerCall.of(ctx.key, ctx.backend, ctx.noise, capturable=False)
        saved = _unpack(call, ctx.saved_tensors, ctx.sizes, ctx.needs, ctx.shape)
        with without_autocast(dy.device):
            dx, dw = _backward(call, dy, ctx.sizes, saved, ctx.needs, ctx.shape, ctx.dtypes)
        ctx.noise[CALLS].add_(1)
        return dx, dw, None, None, None


def _unpack(
    call: LayerCall,
    tensors: Sequence[torch.Tensor],
    sizes: Sequence[int],
    needs: Needs,
    shape: torch.Size,
) -> list[Saved]:
    """What was saved of every expert with rows.

    tensors: codes, expert by expert, then weight [E, N, K] and x [S, K] if they are saved whole.
    """
    _, n, k = shape
    specs = saved_specs(call.recipe)
    rest = iter(tensors)

    # the codes of each expert that got rows; others saved nothing
    active = [(e, size) for e, size in enumerate(sizes) if size]
    saved = [unpack(rest, call.recipe, needs, (size, k, n), on_device=False) for _, size in active]

    # what was saved whole is cut up
    if needs.dx and specs.for_dx is None:
        weight = next(rest)
        saved = [own._replace(for_dx=weight[e]) for own, (e, _) in zip(saved, active, strict=True)]
    if needs.dw and specs.for_dw is None:
        groups = _groups(next(rest), sizes)
        saved = [own._replace(for_dw=rows) for own, (_, rows) in zip(saved, groups, strict=True)]
    return saved


class Experts(nn.Module):
    """An experts module of transformers whose GEMMs run in NVFP4.

    A class made for each class of experts inherits from this and from it, so parameters, keys of
    ``state_dict`` and everything but ``forward`` stay the model's. Runs eagerly, also under
    torch.compile, which it interrupts.
    """

    nvfp4: dict[str, ExpertsState]
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H]: each token of hidden_states [T, H] through its experts.

        top_k_index, top_k_weights: [T, k], which experts, and the weight of each in the sum.
        """
        if not all(state.enabled and state.recipe.quantized for state in self.nvfp4.values()):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        routed = (
            torch.compiler.disable(self._routed) if torch.compiler.is_compiling() else self._routed
        )
        return routed(hidden_states, top_k_index, top_k_weights)

    def _routed(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``forward`` in NVFP4, where a compiler does not look."""
        if any(is_dtensor(getattr(self, name)) for name in STACKS) or getattr(
            self, "_is_expert_parallel", False
        ):
            raise RuntimeError(
                "converted experts hold their weights whole: shard the block that holds them, or "
                "keep experts that are spread over processes in high precision (nvfp4.disabled, "
                "or convert without experts=True)"
            )

        # one row per token and expert it goes to, ordered by expert: x [T k, H]; ``tolist`` is the
        # one time that the host waits for the device
        tokens, per_token = hidden_states.shape[0], top_k_index.shape[-1]
        experts = top_k_index.reshape(-1)
        order = experts.argsort(stable=True)
        sizes = experts.bincount(minlength=self.gate_up_proj.shape[0]).tolist()
        x = hidden_states[order // per_token]

        # both matrices of every expert
        inner = self._apply_gate(
            grouped_linear(x, self.gate_up_proj, sizes, self.nvfp4["gate_up_proj"])
        )
        y = grouped_linear(inner, self.down_proj, sizes, self.nvfp4["down_proj"])

        # back in the order of the tokens, and the weighted sum of each token's rows
        weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        return weighted[back].view(tokens, per_token, -1).sum(dim=1).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Sizes, recipe and backend."""
        state = self.nvfp4[STACKS[0]]
        sizes = ", ".join(f"{name}={tuple(getattr(self, name).shape)}" for name in STACKS)
        off = "" if state.enabled else ", disabled"
        return f"{sizes}, recipe={state.recipe.name}, backend={state.backend}{off}"
