"""fuse: RMSNorm and SwiGLU of a model straight into the codes of the converted layers they feed.

    norm(x) -> q, k, v        the norm returns a ``LazyActivation``; each layer quantises its
                              formula, and all three share the codes
    silu(gate) * up -> down   the MLP hands ``swiglu(gate, up)`` to down_proj

A module keeps its identity, as under ``convert``: its class becomes a subclass of what it was
(``reclass.py``), and nothing else changes.

A name proves nothing (Gemma's RMSNorm multiplies by 1 + w), so what a module computes is found out
by a trial: its own forward on random BF16 numbers, with a stand-in for its weight or its layers,
against the definition. One that computes something else stays as it is, with the reason.

Where operators must be seen as they are (a compiler, a dispatch mode, a DTensor) and under
``disabled``, a fused module computes as it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from nvfp4.backends.registry import AUTO
from nvfp4.layer.lazy_activation import rms_norm, swiglu
from nvfp4.layer.linear import Linear
from nvfp4.model.reclass import FusedModule, reclass, unfuse
from nvfp4.numerics import activations
from nvfp4.numerics.torch_state import is_dtensor, is_traced, without_autocast
from nvfp4.ops import INPUT_DTYPES

FUSED = "fused"
MLP_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
EPS_NAMES = ("variance_epsilon", "eps")
PROBE_ROWS = 16

AGREEMENT = 0.99
"""Share of BF16 results of a trial that must be equal.

Another order of a sum changes 1 result in 10^5, one more rounding every fourth.
"""


def rms_norm_linear(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, layers: Sequence[nn.Linear]
) -> tuple[torch.Tensor, ...]:
    """layer(RMSNorm(x)) of each layer, for x [..., K] and norm_weight [K]; q, k and v, for example.

    The normalised x is quantised once for all converted layers whose recipes ask for equal
    operands, never written, and its codes are kept once for the backward. Layers that are not
    converted find it as an ordinary tensor. Raises as ``lazy_activation.rms_norm`` and the layers
    do.
    """
    normal = rms_norm(x, norm_weight, eps, backend=_backend(*layers))
    return tuple(layer(normal) for layer in layers)


def swiglu_linear(gate: torch.Tensor, up: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """layer(silu(gate) * up) for gate and up [..., K]; the product is quantised and never written.

    Raises as ``lazy_activation.swiglu`` and the layer do.
    """
    return layer(swiglu(gate, up, backend=_backend(layer)))


def fuse(model: nn.Module, on: bool = True) -> dict[str, str]:
    """Fuse RMSNorms and SwiGLU MLPs with the converted layers they feed, in place; False undoes it.

    MLPs: modules of gate_proj, up_proj, down_proj and act_fn that compute
    down(silu(gate(x)) * up(x)), down_proj being converted. Norms: modules of a class named
    ...RMSNorm that compute what Llama's does, beside converted layers of their width. Parameters,
    ``state_dict``, hooks, copies, pickles and checkpointing stay as they were.

    Returns, by dotted name, "fused" or the reason why not: not_converted, other_formula,
    forward_replaced, parameters, dtype, feeds_no_converted_layer. Compiled graphs, DTensors and
    ``disabled`` compute as without; a module compiled by itself (not with ``fullgraph``) breaks its
    graph to read a lazy input. On a CPU, in a small Llama, it saves a third of what blocks keep and
    a quarter of the peak, and costs a sixth to a third of a step, since torch recomputes the
    activations.

    RuntimeError, on undoing, for a module that ``fully_shard`` was called on itself; in a forward
    that changes a norm's input in place before a layer has used the result.
    """
    if not on:
        return unfuse(model)

    # each trial is made once for all modules that it holds for
    verdicts = {}
    trials: dict[Any, bool] = {}
    for name, module, widths in _candidates(model):
        if isinstance(module, FusedModule):
            verdicts[name] = FUSED
            continue
        if widths is None:
            reason = _why_not_mlp(module, trials)
        else:
            reason = _why_not_norm(module, widths, trials)
        if reason is None:
            reclass(module, FusedMLP if widths is None else FusedNorm)
        verdicts[name] = reason or FUSED
    return verdicts


class FusedNorm(FusedModule):
    """An RMSNorm whose result is lazy."""

    weight: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The normalised x [..., K]."""
        if not self.nvfp4_fused or kwargs or len(args) != 1 or _needs_tensors(args[0], self.weight):
            return super().forward(*args, **kwargs)
        return rms_norm(args[0], self.weight, _eps(self))


class FusedMLP(FusedModule):
    """An MLP whose silu(gate) * up is lazy."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """down(silu(gate(x)) * up(x)) of x [..., K]."""
        # a hook on the activation wants a result that is never made here
        act_fn = self.act_fn
        hooked = act_fn._forward_hooks or act_fn._forward_pre_hooks or act_fn._backward_hooks
        if not self.nvfp4_fused or kwargs or len(args) != 1 or hooked:
            return super().forward(*args, **kwargs)

        gate = self.gate_proj(args[0])
        up = self.up_proj(args[0])
        return self.down_proj(act_fn(gate) * up if _needs_tensors(gate, up) else swiglu(gate, up))


def _needs_tensors(*tensors: torch.Tensor) -> bool:
    """Whether operators must be seen as they are, by whoever traces or by a tensor subclass."""
    if torch.jit.is_tracing():
        return True
    return any(is_traced(t) or is_dtensor(t) or t.dtype not in INPUT_DTYPES for t in tensors)


def _eps(module: nn.Module) -> Any:
    """The norm's epsilon, a float, or None where there is none by these names."""
    return next(
        (vars(module)[name] for name in EPS_NAMES if isinstance(vars(module).get(name), float)),
        None,
    )


def _backend(*layers: nn.Linear) -> str:
    """The backend of the first converted layer among them."""
    return next((layer.nvfp4.backend for layer in layers if isinstance(layer, Linear)), AUTO)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, set[int] | None]]:
    """Modules that look right, by name: norms with the widths around them, MLPs with None."""
    # a list, since what is yielded may change its class
    seen: set[int] = set()
    for prefix, parent in list(model.named_modules()):
        if all(isinstance(getattr(parent, part, None), nn.Module) for part in MLP_PARTS):
            yield prefix, parent, None
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm") and id(child) not in seen:
                seen.add(id(child))
                yield f"{prefix}.{name}" if prefix else name, child, _widths(parent)


def _widths(parent: nn.Module) -> set[int]:
    """in_features of the converted layers that a module, or one of its children, holds itself."""
    held = [inner for child in parent.children() for inner in (child, *child.children())]
    # PEFT keeps the layer in a wrapper
    held = [getattr(inner, "base_layer", inner) for inner in held]
    return {inner.in_features for inner in held if isinstance(inner, Linear)}


def _why_not_norm(module: nn.Module, widths: set[int], trials: dict[Any, bool]) -> str | None:
    """Why a norm cannot be fused, or None. trials: what was found out, by what it depends on."""
    weight = vars(module)["_parameters"].get("weight")
    if "forward" in vars(module):
        return "forward_replaced"

    # the parts of an RMSNorm, and no others
    if weight is None or weight.dim() != 1:
        return "parameters"
    if _eps(module) is None or len([*module.parameters()]) != 1:
        return "parameters"
    if weight.dtype not in INPUT_DTYPES:
        return "dtype"
    if len(weight) not in widths:
        return "feeds_no_converted_layer"

    # what it computes depends on these alone
    key = (type(module), _eps(module), len(weight))
    if key not in trials:
        trials[key] = _agrees(lambda: _try_norm(module, len(weight)))
    return None if trials[key] else "other_formula"


def _why_not_mlp(module: nn.Module, trials: dict[Any, bool]) -> str | None:
    """Why an MLP cannot be fused, or None."""
    down = module.get_submodule("down_proj")
    if "forward" in vars(module) or "forward" in vars(module.get_submodule("act_fn")):
        return "forward_replaced"
    if not isinstance(getattr(down, "base_layer", down), Linear):
        return "not_converted"

    # what it computes depends on these alone, if it has no other parts
    key = (type(module), type(module.get_submodule("act_fn")))
    if key not in trials:
        same_parts = set(dict(module.named_children())) == set(MLP_PARTS)
        trials[key] = same_parts and _agrees(lambda: _try_mlp(module))
    return None if trials[key] else "other_formula"


def _agrees(trial: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether both results of a trial are one formula's, rounded in the same places."""
    with torch.no_grad(), without_autocast(torch.device("cpu")):
        try:
            got, want = trial()
        except Exception:  # whatever it raises on plain inputs, it is not the formula
            return False
    return (
        got.dtype == want.dtype
        and got.shape == want.shape
        and bool((got == want).float().mean() > AGREEMENT)
    )


def _try_norm(module: nn.Module, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what it computes, RMSNorm) of random x [PROBE_ROWS, width] and a random weight."""
    x, weight = _random(PROBE_ROWS, width, 0), _random(1, width, 1)[0]
    stand_in = _stand_in(module, _parameters={"weight": nn.Parameter(weight)})
    return type(module).forward(stand_in, x), activations.RMSNorm(x, weight, _eps(module)).values()


def _try_mlp(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(what it hands to its last layer, SwiGLU) of random gate and up [PROBE_ROWS, 64]."""
    x, gate, up = (_random(PROBE_ROWS, 64, seed) for seed in range(3))
    parts = {"gate_proj": _Recorder(gate), "up_proj": _Recorder(up), "down_proj": _Recorder(None)}
    stand_in = _stand_in(module, _modules=vars(module)["_modules"] | parts)
    result = type(module).forward(stand_in, x)

    # each layer is asked once, gate and up for x itself
    once = all(len(part.inputs) == 1 for part in parts.values())
    if not once or any(parts[name].inputs[0] is not x for name in ("gate_proj", "up_proj")):
        raise ValueError("it asks its layers something else")
    return result, activations.SwiGLU(gate, up).values()


def _random(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal BF16 numbers [rows, columns], without touching torch's own generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float32).to(
        torch.bfloat16
    )


def _stand_in(module: nn.Module, **replaced: Any) -> nn.Module:
    """A module of the same class and attributes, in training, with other parameters or children."""
    copied = type(module).__new__(type(module))
    vars(copied).update(vars(module) | {"training": True} | replaced)
    return copied


class _Recorder(nn.Module):
    """Stands in for a linear layer: keeps its inputs, returns ``value`` or else the input."""

    def __init__(self, value: torch.Tensor | None) -> None:
        super().__init__()
        self.value = value
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The given value."""
        self.inputs.append(x)
        return x if self.value is None else self.value
