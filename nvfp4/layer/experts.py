"""Stacked experts: a mixture-of-experts block of transformers whose GEMMs run in NVFP4.

    hidden_states [T, H], k experts for each token
    rows of tokens, ordered by expert      x [T k, H], and where each expert's begin: ``Groups``
    gate_up_proj [E, 2 I, H], the gate     [T k, I]
    down_proj [E, H, I]                    [T k, H]
    weighted sum of each token's rows      [T, H]

Both stacks of weights are ``stacks.grouped_linear``: every expert as a linear layer of its own, bit
for bit, all experts in one call. The order of the rows, and where each expert's begin, is worked
out where they are; nothing here reads it. A backend that goes expert by expert does (all but the
CPU's do, and on a GPU wait for it once per ``Groups``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from nvfp4.grouped_ops import grouped_quantize
from nvfp4.layer import stacks
from nvfp4.layer.call import LayerCall
from nvfp4.layer.expert_parallel import (
    Part,
    Routes,
    codes_may_travel,
    codes_to_owners,
    results_to_tokens,
    routes_of,
    to_owners,
    to_tokens,
)
from nvfp4.layer.noise import CALLS, LEFT, RIGHT, HostNoise
from nvfp4.layer.saved import NO_GRADIENTS, Dtypes, Needs, inputs_to_save
from nvfp4.layer.state import LinearState, output_dtype, refuse_second_derivative
from nvfp4.layer.weight_cache import STACKS, Codes
from nvfp4.numerics.groups import GroupedQTensor, Groups
from nvfp4.numerics.torch_state import is_dtensor, without_autocast


@dataclass
class ExpertsState(LinearState):
    """What one stack knows beside its weights; noise.calls counts backward passes of the stack.

    transposed: whether the parameter is [E, K, N], as in GPT-OSS.
    """

    transposed: bool = False

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter as [E, N, K]."""
        return weight.mT if self.transposed else weight

    def quantized(self, weight: torch.Tensor, call: LayerCall, amax: torch.Tensor | None) -> Codes:
        """One operand for all experts; weight: the parameter."""
        how = call.quantizer("fprop", RIGHT)
        return (grouped_quantize(self.matrices(weight), None, *how, backend=call.backend),)

    def operand(self, weight: torch.Tensor, call: LayerCall) -> stacks.Stack:
        """fprop's operand of the parameter: codes, from an earlier call if they are there."""
        if not self.recipe.fprop.right.quantized:
            return self.matrices(weight)
        codes = self.kept_codes(weight, call) or self.quantized(weight, call, None)
        return cast(GroupedQTensor, codes[0])

    def sends_codes(self, call: LayerCall, needs: Needs) -> bool:
        """Whether rows may go to experts on other processes as fprop's codes, and nothing else."""
        from_codes = self.specs.for_dw is not None and not self.specs.x_is_transposed
        if not call.recipe.fprop.quantized or (needs.dw and not from_codes):
            return False
        return codes_may_travel(*call.quantizer("fprop", LEFT))

    def of_experts(
        self, call: LayerCall, count: int, device: torch.device, part: Part | None
    ) -> LayerCall:
        """The call of a stack with the noise of its experts, or of a part of them; count: here."""
        noise, experts = cast(HostNoise, call.noise), range(count)
        if part is not None:
            experts = part.experts
            noise = HostNoise((*noise[:3], part.rank if noise[3] < 0 else noise[3]))
        made = stacks.ExpertNoise(noise, experts, device, call.backend)
        return call._replace(noise=made)


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    groups: Groups,
    state: ExpertsState,
    bias: torch.Tensor | None = None,
    part: Part | None = None,
    routes: Routes | None = None,
) -> torch.Tensor:
    """y [S, N], the rows of each expert times its matrix transposed, plus its bias, differentiable.

    x: [S, K], rows ordered by expert. weight: [E, N, K], or [E, K, N] if the state says so. groups:
    of the rows; an expert may have none, and gets gradients of 0. bias: [E, N] or None. Raises
    ValueError if they do not fit, TypeError for wrong dtypes.

    Of experts that are spread over processes, weight and bias are this process's. part: which of
    the stack these are. routes: x and groups are of all experts and go to them first; y is
    of the rows that come here. A collective call.
    """
    count, outputs, inputs = state.matrices(weight).shape
    wanted = count if routes is None else count * dist.get_world_size(routes.group)
    if x.dim() != 2 or x.shape[1] != inputs or groups.count != wanted or groups.rows != x.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)} and {groups.count} groups of {groups.rows} rows do not fit "
            f"weights [{count}, {outputs}, {inputs}]"
        )
    if bias is not None and tuple(bias.shape) != (count, outputs):
        raise ValueError(f"bias must be [{count}, {outputs}], got {tuple(bias.shape)}")
    dtype = output_dtype(x, weight)

    # nothing to multiply, but a graph to hang on; other processes may have something
    if x.shape[0] == 0 and part is None:
        return F.linear(x, state.matrices(weight)[0], None if bias is None else bias[0]).to(dtype)

    of = StackCall(state, groups, dtype, part, routes)
    if torch.is_grad_enabled():
        return _GroupedFunction.apply(x, weight, bias, of)
    return _forward(of, x, weight, bias, NO_GRADIENTS).y


class StackCall(NamedTuple):
    """One call of a stack but for its tensors. dtype: of y."""

    state: ExpertsState
    groups: Groups
    dtype: torch.dtype
    part: Part | None = None
    routes: Routes | None = None


class StackResult(NamedTuple):
    """y [S, N], and what there is to save: w and x as the GEMMs had them, x's rows as they are."""

    y: torch.Tensor
    w: stacks.Stack
    for_dw: stacks.Stack | None
    rows: torch.Tensor
    groups: Groups


def _forward(
    of: StackCall, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needs: Needs
) -> StackResult:
    """One forward: the rows to their experts, if those are elsewhere, then the product."""
    call = of.state.of_experts(of.state.call(), weight.shape[0], weight.device, of.part)
    w = of.state.operand(weight, call)
    operand: stacks.Stack = x
    groups = of.groups
    if of.routes is not None:
        groups = of.routes.groups
        if of.state.sends_codes(call, needs):
            how = call.quantizer("fprop", LEFT)
            operand = codes_to_owners(x, of.groups, of.routes, *how, call.backend)
        else:
            operand = x = to_owners(x, of.routes)
    y, for_dw = stacks.forward(call, operand, w, groups, bias, of.dtype, needs)
    return StackResult(y, w, for_dw, x, groups)


class _GroupedFunction(torch.autograd.Function):
    """y = x w[e]^T + bias[e] of every expert e; see ``grouped_linear``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        of: StackCall,
    ) -> torch.Tensor:
        ctx.needs = Needs(*ctx.needs_input_grad[:3])
        ctx.dtypes = Dtypes(x.dtype, weight.dtype, None if bias is None else bias.dtype)
        state = of.state
        made = _forward(of, x, weight, bias, ctx.needs)

        # codes, each as what it is and as tensors; then weight and x where they are needed whole
        for_dx = made.w if ctx.needs.dx and state.specs.for_dx is not None else None
        ctx.packed, tensors = stacks.pack(for_dx, made.for_dw)
        whole = inputs_to_save(state.specs, ctx.needs, weight, made.rows)
        ctx.save_for_backward(made.groups.offsets, *tensors, *whole)

        # noise is no saved tensor: see ``linear.py``
        ctx.noise, ctx.key, ctx.backend = state.noise.state, state.key, state.backend
        ctx.state, ctx.rows, ctx.part, ctx.routes = state, made.groups.rows, of.part, of.routes
        ctx.count = weight.shape[0]
        return made.y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        offsets, *tensors = ctx.saved_tensors
        groups, state = Groups(offsets, ctx.rows), ctx.state
        for_dx, for_dw = stacks.unpack(ctx.packed, tensors, groups)

        # what was saved whole is left over, in the order of ``inputs_to_save``
        if ctx.needs.dx and for_dx is None:
            for_dx = state.matrices(tensors.pop(0))
        if ctx.needs.dw and for_dw is None:
            for_dw = tensors.pop(0)

        call = LayerCall.of(ctx.key, ctx.backend, ctx.noise, capturable=False)
        call = state.of_experts(call, ctx.count, dy.device, ctx.part)
        with without_autocast(dy.device):
            dx, dw, db = stacks.backward(call, dy, groups, for_dx, for_dw, ctx.needs, ctx.dtypes)
        ctx.noise[CALLS].add_(1)
        if dx is not None and ctx.routes is not None:
            dx = to_tokens(dx, ctx.routes)
        return dx, None if dw is None else state.matrices(dw), db, None


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
            if is_dtensor(self.gate_up_proj):
                raise RuntimeError(
                    "experts that nvfp4.expert_parallel spread over processes compute in NVFP4 "
                    "alone: spread them after, and not under, nvfp4.disabled(model)"
                )
            return super().forward(hidden_states, top_k_index, top_k_weights)
        routed = (
            torch.compiler.disable(self._routed) if torch.compiler.is_compiling() else self._routed
        )
        return routed(hidden_states, top_k_index, top_k_weights)

    def _routed(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``forward`` in NVFP4, where a compiler does not look."""
        processes = self._processes()

        # one row per token and expert it goes to, ordered by expert: x [T k, H]; where each begins
        # is found on the device
        tokens, per_token = hidden_states.shape[0], top_k_index.shape[-1]
        experts = top_k_index.reshape(-1)
        order = experts.argsort(stable=True)
        numbers = torch.arange(self.gate_up_proj.shape[0] + 1, device=order.device)
        offsets = torch.searchsorted(experts[order], numbers, out_int32=True)
        groups = Groups(offsets, len(order))
        x = hidden_states[order // per_token]

        # both matrices of every expert, here or where the expert is
        if processes is None:
            inner = self._apply_gate(self._linear(x, groups, STACKS[0]))
            y = self._linear(inner, groups, STACKS[1])
        else:
            routes = routes_of(groups, processes)
            inner = self._apply_gate(self._linear(x, groups, STACKS[0], routes.part, routes))
            y = self._linear(inner, routes.groups, STACKS[1], routes.part)
            y = results_to_tokens(y, routes)

        # back in the order of the tokens, and the weighted sum of each token's rows
        weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        return weighted[back].view(tokens, per_token, -1).sum(dim=1).to(hidden_states.dtype)

    def _linear(
        self,
        x: torch.Tensor,
        groups: Groups,
        name: str,
        part: Part | None = None,
        routes: Routes | None = None,
    ) -> torch.Tensor:
        """The rows of each expert through the stack of that name."""
        state, weight = self.nvfp4[name], _part(getattr(self, name))
        bias = getattr(self, f"{name}_bias", None)
        bias = None if bias is None else _part(bias)
        return grouped_linear(x, weight, groups, state, bias, part, routes)

    def _processes(self) -> dist.ProcessGroup | None:
        """The processes that this module's experts are spread over; None where all are here."""
        if getattr(self, "_is_expert_parallel", False):
            raise RuntimeError(
                "transformers has spread these experts over processes, which converted experts do "
                "not follow: leave that to nvfp4.expert_parallel, or convert without experts=True"
            )
        weights: list[Any] = [getattr(self, name) for name in STACKS]
        if not any(is_dtensor(weight) for weight in weights):
            return None
        meshes: list[Any] = [getattr(weight, "device_mesh", None) for weight in weights]
        spread = [
            str(getattr(weight, "placements", None)) == "(Shard(dim=0),)" for weight in weights
        ]
        if meshes[0] is not meshes[1] or not all(spread):
            raise RuntimeError(
                "converted experts are whole, or spread by nvfp4.expert_parallel: shard the block "
                "that holds them, not the experts"
            )
        group: dist.ProcessGroup = meshes[0].get_group()
        return group

    def extra_repr(self) -> str:
        """Sizes, recipe and backend."""
        state = self.nvfp4[STACKS[0]]
        sizes = ", ".join(f"{name}={tuple(getattr(self, name).shape)}" for name in STACKS)
        off = "" if state.enabled else ", disabled"
        return f"{sizes}, recipe={state.recipe.name}, backend={state.backend}{off}"


def _part(parameter: Any) -> torch.Tensor:
    """This process's part of a parameter, with its gradient."""
    return parameter.to_local() if is_dtensor(parameter) else parameter
