"""What can compute in NVFP4, whatever the arguments of ``convert`` say.

A linear layer can if it is an ``nn.Linear`` to the letter: another class, forward, parametrisation
or dtype has arithmetic of its own, which a conversion would replace in silence. Stacked experts can
if they have the layout of transformers 5. What multiplies by weights and is neither is counted, and
the report names it.

Each ``why_not_...`` gives the machine-readable reason, or None.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from nvfp4.layer.dense import DenseLinear
from nvfp4.layer.weight_cache import STACKS
from nvfp4.numerics.torch_state import is_plain_parameter
from nvfp4.ops import INPUT_DTYPES
from nvfp4.recipes import Recipe

ALREADY = "already_converted"


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of any kind."""
    return isinstance(module, nn.Linear)


def is_converted(module: nn.Module) -> bool:
    """Whether ``convert`` gave it a state, which has a recipe; experts have one per stack."""
    state = vars(module).get("nvfp4")
    states = state.values() if isinstance(state, dict) else (state,)
    return any(isinstance(getattr(each, "recipe", None), Recipe) for each in states)


def has_stacks(module: nn.Module) -> bool:
    """Whether it holds the weights of experts, stacked."""
    return all(_rank(getattr(module, stack, None)) == 3 for stack in STACKS)


def _rank(tensor: object) -> int | None:
    """Its number of axes, None for what is no tensor."""
    return tensor.dim() if isinstance(tensor, torch.Tensor) else None


def why_not_linear(module: nn.Linear) -> str | None:
    """Why a linear layer cannot be converted, in a word, or None; ``bypass_reasons`` knows more."""
    if is_converted(module):
        return ALREADY
    if parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter):
        return "parametrized"  # also the older weight_norm, whose weight is computed by a hook

    # another forward would be replaced in silence
    if type(module) not in (nn.Linear, DenseLinear):
        return "subclass"
    if "forward" in vars(module):
        return "forward_replaced"

    # another kind of weight, or another dtype, has arithmetic of its own
    if isinstance(module.weight, nn.UninitializedParameter):
        return "uninitialized"
    if not all(is_plain_parameter(parameter) for parameter in module.parameters(recurse=False)):
        return "tensor_subclass"
    if module.weight.dtype not in INPUT_DTYPES:
        return "dtype"

    # sizes, not the weight's: a weight that is gathered when needed may be empty until then
    if 0 in (module.in_features, module.out_features):
        return "empty"
    return None


def why_not_experts(module: nn.Module) -> str | None:
    """Why a module with stacked experts cannot be converted, in a word, or None.

    What can: the layouts of transformers' ``use_experts_implementation`` with a gate, with and
    without biases, transposed or not, without a norm of its own.
    """
    stacks = [getattr(module, name, None) for name in STACKS]
    if is_converted(module):
        return ALREADY

    # the layout: up [E, 2 I, H] and down [E, H, I], or [E, H, 2 I] and [E, I, H], with a gate
    # between them
    up, down = stacks
    if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter):
        return "experts_layout"
    if not up.dim() == down.dim() == 3:
        return "experts_layout"
    if not callable(getattr(module, "_apply_gate", None)) or not getattr(module, "has_gate", False):
        return "experts_without_gate"
    hidden = (1, 2) if getattr(module, "is_transposed", False) else (2, 1)
    if up.shape[0] != down.shape[0] or up.shape[hidden[0]] != down.shape[hidden[1]]:
        return "experts_layout"
    if getattr(module, "has_post_expert_norm", False):
        return "experts_norm"
    if getattr(module, "has_bias", False) and not all(_is_bias(module, name) for name in STACKS):
        return "experts_bias"

    # what was done to this one
    if "forward" in vars(module):
        return "forward_replaced"
    if getattr(module, "_is_expert_parallel", False):
        return "expert_parallel"
    if any(
        type(stack) is not nn.Parameter and not isinstance(stack, FakeTensor)
        for stack in (up, down)
    ):
        return "tensor_subclass"
    return None if up.dtype in INPUT_DTYPES and down.dtype in INPUT_DTYPES else "dtype"


def _is_bias(module: nn.Module, stack: str) -> bool:
    """Whether the stack of that name has a bias [E, N] beside it."""
    bias, weight = getattr(module, f"{stack}_bias", None), getattr(module, stack)
    outputs = weight.shape[2 if getattr(module, "is_transposed", False) else 1]
    return isinstance(bias, nn.Parameter) and bias.shape == (weight.shape[0], outputs)


def bypass_reasons(model: nn.Module) -> dict[int, str]:
    """Linears, by id, whose owner reads their weight and never calls them.

    In eval mode ``nn.TransformerEncoderLayer`` hands its weights to one fused kernel, if its batch
    comes first and ``torch.backends.mha.set_fastpath_enabled(False)`` was not called;
    ``nn.MultiheadAttention`` always uses the weight.
    """
    # a subclass with a forward of its own may well call them
    reasons: dict[int, str] = {}
    for module in model.modules():
        if (
            isinstance(module, nn.MultiheadAttention)
            and type(module).forward is nn.MultiheadAttention.forward
        ):
            reasons[id(module.out_proj)] = "bypassed"
        if isinstance(module, nn.TransformerEncoderLayer) and _may_take_fast_path(module):
            reasons |= dict.fromkeys((id(module.linear1), id(module.linear2)), "fast_path")
    return reasons


def _may_take_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether its forward, in eval mode, may be the one fused kernel."""
    is_torchs = type(layer).forward is nn.TransformerEncoderLayer.forward
    return is_torchs and layer.self_attn.batch_first and torch.backends.mha.get_fastpath_enabled()


def not_linear(model: nn.Module, converted: Collection[int] = ()) -> tuple[str, ...]:
    """What multiplies by weights and is no ``nn.Linear``, counted: Conv1D, fused experts.

    converted: modules, by id, that are about to be; experts that are already do not count either.
    """
    # GPT-2's Conv1D is a linear layer with a transposed weight
    conv1d = sum(
        type(m).__name__ == "Conv1D" and _rank(getattr(m, "weight", None)) == 2
        for m in model.modules()
    )

    # a parameter of three axes in something that calls itself experts
    experts = 0
    for name, module in model.named_modules():
        done = is_converted(module) or id(module) in converted
        if not done and "expert" in f"{name} {type(module).__name__}".lower():
            experts += sum(_rank(parameter) == 3 for parameter in module.parameters(recurse=False))
    counted = ((conv1d, "Conv1D"), (experts, "3-D expert parameter"))
    return tuple(f"{what} x {count}" for count, what in counted if count)
