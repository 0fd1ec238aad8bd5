"""Stacked experts: the two weights [E, N, K] of a mixture-of-experts block, with their GEMMs in NVFP4.

Every expert computes as an ``nvfp4.Linear`` of its own, bit for bit: its tokens are quantised by themselves, its weight
has scales of its own, and its noise is that of layer e in a model with the seed fold_in(seed, layer of the stack). One
number is asked of the device in a forward: how many tokens each expert got, since codes of one tensor share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nvfp4.layer.gemms import Call, Saved, backward_operands, dense_forward, flatten, forward_operands, product
from nvfp4.layer.linear import LinearState, output_dtype, refuse_second_derivative
from nvfp4.layer.noise import CALLS, HostWords, Noise, signed
from nvfp4.layer.operators import restore
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import fold_in
from nvfp4.numerics.torch_state import is_dtensor, is_plain_parameter, without_autocast
from nvfp4.ops import INPUT_DTYPES, grouped_matmul
from nvfp4.recipes import Recipe

STACKS = ("gate_up_proj", "down_proj")
"""Parameters of an experts module, as transformers 5 names them: [E, 2 I, H] and [E, H, I]."""


def expert_call(call: Call, expert: int) -> Call:
    """The call of one expert, from that of its stack."""
    assert isinstance(call.words, HostWords), "experts read on the host how many tokens they got"
    seed, layer, calls, rank = call.words
    return call._replace(words=HostWords((signed(fold_in(seed % 2**64, layer)), expert, calls, rank)))


class ExpertsState(LinearState):
    """What one stack of experts knows beside its weights; noise.calls counts backward passes of the stack."""

    def made(self, weight: torch.Tensor, amax: torch.Tensor | None, call: Call) -> tuple[QTensor, ...]:
        """One operand an expert."""
        return tuple(expert_call(call, e).weight(matrix, None) for e, matrix in enumerate(weight))


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, sizes: Sequence[int], state: ExpertsState) -> torch.Tensor:
    """y [S, N], the rows of each expert times its matrix transposed, differentiable.

    x: [S, K], rows ordered by expert. weight: [E, N, K]. sizes: rows of every expert, adding up to S; 0 is fine, and
    such an expert's weight gets a gradient of 0. Raises ValueError if they do not fit, TypeError for wrong dtypes.
    """
    experts, _, inputs = weight.shape
    if x.dim() != 2 or x.shape[1] != inputs or len(sizes) != experts or sum(sizes) != x.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and sizes {list(sizes)} do not fit weights {tuple(weight.shape)}")
    dtype = output_dtype(x, weight)
    if x.shape[0] == 0:
        return F.linear(x, weight[0]).to(dtype)  # nothing to multiply, but a graph to hang on
    if torch.is_grad_enabled():
        return _GroupedFunction.apply(x, weight, tuple(sizes), state, dtype)
    return _fprop(state, x, weight, sizes, dtype, (False, False))[0]


def _fprop(
    state: ExpertsState,
    x: torch.Tensor,
    weight: torch.Tensor,
    sizes: Sequence[int],
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y, and of every expert with tokens the codes that its backward needs, flattened, equally many of each."""
    call = state.call()
    kept = state.operands(weight, call) if state.recipe.fprop.right.quantized else None
    left: list[QTensor] = []
    right: list[QTensor] = []
    saved: list[torch.Tensor] = []
    dense = []
    for e, rows in _groups(x, sizes):
        codes = None if kept is None else kept[e]
        x_codes, w_codes, saved_w, saved_x = forward_operands(
            expert_call(call, e), rows, weight[e], needs, w_codes=codes
        )
        saved += [*flatten(saved_w), *flatten(saved_x)]
        if x_codes is None or w_codes is None:
            dense.append(dense_forward(call, rows, weight[e] if w_codes is None else w_codes, None, dtype))
        else:
            left.append(x_codes)
            right.append(w_codes)
    return torch.cat(dense or grouped_matmul(left, right, dtype, backend=call.backend)), saved


def _backward(
    call: Call,
    dy: torch.Tensor,
    sizes: Sequence[int],
    saved: Sequence[tuple[Saved, Saved]],
    needs: Sequence[bool],
    shape: torch.Size,
    dtypes: Sequence[torch.dtype],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx [S, K], dw [E, N, K]); saved: (w, x) of every expert with tokens."""
    groups = list(_groups(dy, sizes))
    made = [
        backward_operands(expert_call(call, e), rows, w, x, needs)
        for (e, rows), (w, x) in zip(groups, saved, strict=True)
    ]
    dx = dw = None
    if needs[0]:
        pairs = [(m[0], m[1]) for m in made]
        dx = torch.cat(_products(call, [rows for _, rows in groups], pairs, [w for w, _ in saved], dtypes[0]))
    if needs[1]:
        pairs = [(m[2], m[3]) for m in made]
        parts = _products(call, [rows.t() for _, rows in groups], pairs, [x for _, x in saved], dtypes[1])
        dw = torch.zeros(shape, dtype=dtypes[1], device=dy.device)
        for (e, _), part in zip(groups, parts, strict=True):
            dw[e] = part
    return dx, dw


def _products(
    call: Call,
    dense: Sequence[torch.Tensor],
    pairs: Sequence[tuple[QTensor | None, QTensor | None]],
    saved: Sequence[Saved],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """All of one GEMM in one launch if it is quantised, otherwise one after the other as a layer would."""
    quantized = [(left, right) for left, right in pairs if left is not None and right is not None]
    if len(quantized) == len(pairs):
        return grouped_matmul([a for a, _ in quantized], [b for _, b in quantized], dtype, backend=call.backend)
    return [product(call, rows, None, None, kept, dtype) for rows, kept in zip(dense, saved, strict=True)]


def _groups(x: torch.Tensor, sizes: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """(expert, its rows) of every expert that has some."""
    return [(e, rows) for e, rows in enumerate(x.split(list(sizes))) if rows.shape[0]]


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
        needs = ctx.needs_input_grad[:2]
        y, saved = _fprop(state, x, weight, sizes, dtype, needs)
        ctx.words, ctx.key, ctx.backend = state.noise.words, state.key, state.backend  # words: see ``linear.py``
        ctx.sizes, ctx.needs, ctx.shape, ctx.dtypes = sizes, needs, weight.shape, (x.dtype, weight.dtype)
        ctx.dense = (needs[0] and state.saves_weight, needs[1] and state.saves_input)
        ctx.save_for_backward(*saved, *([weight] if ctx.dense[0] else []), *([x] if ctx.dense[1] else []))
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivative()
        call = Call(Recipe.from_key(ctx.key), ctx.backend, HostWords(ctx.words.tolist()))
        tensors = list(ctx.saved_tensors)
        x = tensors.pop() if ctx.dense[1] else None
        weight = tensors.pop() if ctx.dense[0] else None
        groups = [] if x is None else [rows for _, rows in _groups(x, ctx.sizes)]
        active = [(e, size) for e, size in enumerate(ctx.sizes) if size]
        each = len(tensors) // len(active)
        _, outputs, features = ctx.shape
        saved = []
        for i, (e, size) in enumerate(active):
            own = tensors[i * each : (i + 1) * each]
            own += ([] if weight is None else [weight[e]]) + (groups[i : i + 1])
            saved.append(restore(call, own, ctx.needs, torch.Size((size, outputs)), features))
        with without_autocast(dy.device):
            dx, dw = _backward(call, dy, ctx.sizes, saved, ctx.needs, ctx.shape, ctx.dtypes)
        ctx.words[CALLS].add_(1)
        return dx, dw, None, None, None


class Experts(nn.Module):
    """An experts module of transformers whose GEMMs run in NVFP4; made by ``nvfp4.convert(model, experts=True)``.

    A class made for each class of experts inherits from this and from it, so parameters, keys of ``state_dict`` and
    everything but ``forward`` are those of the model. Runs eagerly, also under torch.compile, which it interrupts.
    """

    nvfp4: dict[str, ExpertsState]
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] of hidden_states [T, H], each token through its experts top_k_index [T, k], by top_k_weights."""
        if not all(state.enabled and state.recipe.quantized for state in self.nvfp4.values()):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        routed = torch.compiler.disable(self._routed) if torch.compiler.is_compiling() else self._routed
        return routed(hidden_states, top_k_index, top_k_weights)

    def _routed(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if any(is_dtensor(getattr(self, name)) for name in STACKS) or getattr(self, "_is_expert_parallel", False):
            raise RuntimeError(
                "converted experts hold their weights whole: shard the block that holds them, or keep experts that "
                "are spread over processes in high precision (nvfp4.disabled, or convert without experts=True)"
            )
        tokens, chosen = hidden_states.shape[0], top_k_index.shape[-1]
        experts = top_k_index.reshape(-1)
        order = experts.argsort(stable=True)
        sizes = experts.bincount(minlength=self.gate_up_proj.shape[0]).tolist()
        x = hidden_states[order // chosen]
        inner = self._apply_gate(grouped_linear(x, self.gate_up_proj, sizes, self.nvfp4["gate_up_proj"]))
        y = grouped_linear(inner, self.down_proj, sizes, self.nvfp4["down_proj"])
        weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return weighted[back].view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).__mro__[2],), self.__getstate__()

    def extra_repr(self) -> str:
        """Sizes, recipe and backend."""
        state = self.nvfp4[STACKS[0]]
        sizes = ", ".join(f"{name}={tuple(getattr(self, name).shape)}" for name in STACKS)
        return f"{sizes}, recipe={state.recipe.name}, backend={state.backend}{'' if state.enabled else ', disabled'}"


def objection(module: nn.Module) -> str | None:
    """Why a module with stacked experts cannot be converted, in a word, or None.

    What can: the layout of transformers' ``use_experts_implementation`` with a gate, without biases, not transposed.
    """
    stacks = [getattr(module, name, None) for name in STACKS]
    if isinstance(module, Experts):
        return "already_converted"
    up, down = stacks
    if not (isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.dim() == down.dim() == 3):
        return "experts_layout"
    if not callable(getattr(module, "_apply_gate", None)) or not getattr(module, "has_gate", False):
        return "experts_without_gate"
    if up.shape[0] != down.shape[0] or up.shape[2] != down.shape[1] or getattr(module, "is_transposed", True):
        return "experts_layout"
    if getattr(module, "has_bias", True) or getattr(module, "has_post_expert_norm", False):
        return "experts_bias_or_norm"
    if "forward" in vars(module):
        return "forward_replaced"
    if getattr(module, "_is_expert_parallel", False):
        return "expert_parallel"
    if is_dtensor(up) or is_dtensor(down) or not (is_plain_parameter(up) and is_plain_parameter(down)):
        return "tensor_subclass"
    return None if up.dtype in INPUT_DTYPES and down.dtype in INPUT_DTYPES else "dtype"


@lru_cache(maxsize=64)
def experts_class(plain: Any) -> Any:
    """The NVFP4 class of a class of experts."""
    about = {"__module__": plain.__module__, "__doc__": Experts.__doc__}
    return type(f"NVFP4{plain.__name__}", (Experts, plain), about)


def _empty(plain: Any) -> nn.Module:
    made = experts_class(plain)
    return made.__new__(made)  # copy and pickle fill it


def convert_experts(module: nn.Module, recipe: Recipe, seed: int, index: int, backend: str) -> None:
    """Turn a module into NVFP4 experts in place; its stacks get the noise of layers ``index`` and ``index`` + 1."""
    module.nvfp4 = {  # type: ignore[assignment]
        name: ExpertsState(recipe, Noise(seed, index + i), backend) for i, name in enumerate(STACKS)
    }
    plain: Any = type(module)
    module.__class__ = experts_class(plain)


def revert_experts(module: Experts) -> None:
    """The inverse of ``convert_experts``."""
    del module.nvfp4
    module.__class__ = type(module).__mro__[2]
