"""Activations that are not in memory: a formula and its inputs, until something needs the values.

    normal = rms_norm(x, weight, eps)    [..., K]; nothing is computed yet
    q_proj(normal), k_proj(normal)       converted layers quantise the formula: FP4 codes are all
                                         that is written, and they are written once
    normal + 1                           anything else: the values are computed now, once, and are
                                         an ordinary tensor from then on

A ``LazyActivation`` is a tensor subclass with shape, dtype, device and a place in the autograd
graph, and one NaN for memory. Its views that keep the last axis share one ``ActivationFormula``,
which holds the inputs, the codes made so far (layers that ask for equal operands, such as q, k and
v, or gate and up, share them) and the values, once written. The backward recomputes what it needs
from the inputs (``numerics/activations.py`` has the formulas and their gradients).

Three pieces of autograd hold it together. ``_Apply`` puts the activation into the graph: it returns
the one NaN, expanded to [..., K], and its backward gives the gradients of the inputs. A converted
layer uses the lazy tensor as its x, so that dx arrives there as for any other input. ``_Write``
leads from the same place to the values, if they are asked for.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from nvfp4.backends.registry import AUTO
from nvfp4.numerics.activations import Activation, RMSNorm, SwiGLU
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.torch_state import without_autocast
from nvfp4.ops import INPUT_DTYPES, activation_gradients, quantize_activation
from nvfp4.quantizers.base import Options, Quantizer

Spec = tuple[Quantizer, Options]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = AUTO
) -> torch.Tensor:
    """``activations.RMSNorm`` of x [..., K] with weight [K], lazily.

    x, weight: float32, bfloat16 or float16, any mixture. backend: for the backward. Raises
    TypeError for another dtype, ValueError if the shapes do not fit.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be [K] for x [..., K], got {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    return _lazy(RMSNorm, x, weight, (float(eps),), backend)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: str = AUTO) -> torch.Tensor:
    """``activations.SwiGLU`` of gate and up, both [..., K], lazily; otherwise as ``rms_norm``."""
    if gate.dim() == 0 or gate.shape != up.shape:
        shapes = f"{tuple(gate.shape)} and {tuple(up.shape)}"
        raise ValueError(f"gate and up must have one shape [..., K], got {shapes}")
    return _lazy(SwiGLU, gate, up, (), backend)


class ActivationFormula:
    """What a ``LazyActivation`` and its views stand for.

    activation: inputs as matrices [M, K]. codes: the operands made of it so far, by what was asked
    for. values: the activation itself, once written.
    """

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self.codes: dict[Any, tuple[QTensor, QTensor | None]] = {}
        self.values: torch.Tensor | None = None
        self._versions = _versions(activation)

    def check(self) -> None:
        """RuntimeError if an input was changed in place since the activation was called."""
        if self._versions != _versions(self.activation):
            raise RuntimeError(
                f"an input of {type(self.activation).__name__} was changed in place before a layer "
                "used the result: change a copy, or turn fusion off with nvfp4.fuse(model, False)"
            )


def _versions(activation: Activation) -> list[int | None]:
    """What changes when an input is written to in place; inference tensors do not tell."""
    return [None if t.is_inference() else t._version for t in (activation[0], activation[1])]


class LazyActivation(torch.Tensor):
    """An activation [..., K] whose values nobody has asked for, by ``rms_norm`` or ``swiglu``."""

    formula: ActivationFormula

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        # what needs no values
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)

        # another shape, but not another dtype (``view`` takes either)
        if func in _RESHAPING and not any(
            isinstance(a, torch.dtype) for a in (*args[1:], *kwargs.values())
        ):
            return args[0]._reshaped(func, args[1:], kwargs)

        # everything else: on ordinary tensors
        args, kwargs = tree_map_only(LazyActivation, LazyActivation.written, (args, kwargs))
        return func(*args, **kwargs)

    def _reshaped(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """A view that keeps the last axis stays lazy."""
        with torch._C.DisableTorchFunctionSubclass():
            shaped = func(self, *args, **kwargs)
            same_rows = shaped.dim() > 0 and shaped.shape[-1] == self.shape[-1]
        if same_rows:
            return _with_formula(shaped, self.formula)
        return func(self.written(), *args, **kwargs)

    @property
    def is_written(self) -> bool:
        """Whether something has already asked for its values."""
        return self.formula.values is not None

    def written(self) -> torch.Tensor:
        """The activation as an ordinary tensor, with this one's gradient; computed once."""
        formula = self.formula
        with torch._C.DisableTorchFunctionSubclass():
            # once, but again where a graph is wanted and they were written without one
            wants_graph = torch.is_grad_enabled() and self.requires_grad
            if formula.values is None or (wants_graph and not formula.values.requires_grad):
                formula.check()
                with without_autocast(self.device):
                    graph = self.as_subclass(torch.Tensor)
                    formula.values = _Write.apply(graph, formula.activation)

            # not a view of it where it fits: hooks and retain_grad must reach what layers use
            values = formula.values
            return values if values.shape == self.shape else values.view(self.shape)

    def operands(
        self, rows: Spec, columns: Spec | None, backend: str
    ) -> tuple[QTensor, QTensor | None]:
        """The matrix [M, K] along K and, with ``columns``, its transpose along M.

        Made once for equal specs and backend, however many layers ask.
        """
        formula = self.formula
        key = tuple(None if spec is None else (spec[0].name, spec[1]) for spec in (rows, columns))
        codes = formula.codes.get((key, backend))
        if codes is None:
            formula.check()
            codes = quantize_activation(formula.activation, rows, columns, backend=backend)
            formula.codes[key, backend] = codes
        return codes


def _functions(*names: str) -> frozenset[Any]:
    """Methods and properties of ``torch.Tensor`` as ``__torch_function__`` gets them."""
    members = (getattr(torch.Tensor, name) for name in names)
    return frozenset(member if callable(member) else member.__get__ for member in members)


_DESCRIBING = _functions(
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn",
    "is_cuda", "is_cpu", "is_meta", "is_nested", "is_sparse", "is_quantized", "is_mkldnn", "is_mps",
    "is_xpu", "size", "dim", "ndimension", "numel", "nelement", "element_size",
    "is_floating_point", "is_complex", "is_inference", "__len__", "__hash__",
)  # fmt: skip
"""What can be said of it without its values."""

_RESHAPING = frozenset((torch.Tensor.reshape, torch.Tensor.view, torch.reshape))


def _lazy(
    kind: type[RMSNorm] | type[SwiGLU],
    first: torch.Tensor,
    second: torch.Tensor,
    rest: tuple[float, ...],
    backend: str,
) -> torch.Tensor:
    """kind(first, second, *rest), not computed; the inputs are checked."""
    # a formula's inputs are tensors in memory
    first, second = (t.written() if isinstance(t, LazyActivation) else t for t in (first, second))
    if first.dtype not in INPUT_DTYPES or second.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"inputs must be float32, bfloat16 or float16, got {first.dtype} and {second.dtype}"
        )
    if first.device != second.device:
        raise ValueError(f"inputs are on different devices: {first.device} and {second.device}")

    graph = _Apply.apply(first, second, kind, rest, backend)
    return _with_formula(
        graph, ActivationFormula(_matrix(kind, first.detach(), second.detach(), rest))
    )


def _matrix(
    kind: type[RMSNorm] | type[SwiGLU],
    first: torch.Tensor,
    second: torch.Tensor,
    rest: tuple[float, ...],
) -> Activation:
    """The activation of inputs [..., K], flattened to [M, K]; a norm's weight stays [K]."""
    columns = first.shape[-1]
    return kind(
        first.reshape(-1, columns),
        second if second.dim() == 1 else second.reshape(-1, columns),
        *rest,
    )


def _with_formula(graph: torch.Tensor, formula: ActivationFormula) -> LazyActivation:
    """``graph``, a place in the autograd graph, as a lazy activation."""
    # takes seconds to import; where nothing is compiled it is not
    dynamo = sys.modules.get("torch._dynamo.config")
    if dynamo is not None and LazyActivation not in dynamo.nontraceable_tensor_subclasses:
        # a module that is compiled by itself breaks its graph to read the activation
        dynamo.nontraceable_tensor_subclasses.add(LazyActivation)
    lazy = graph.as_subclass(LazyActivation)
    lazy.formula = formula
    return lazy


class _Apply(torch.autograd.Function):
    """The place of a lazy activation in the graph; the backward recomputes what it needs."""

    @staticmethod
    def forward(
        ctx: Any,
        first: torch.Tensor,
        second: torch.Tensor,
        kind: Any,
        rest: tuple[float, ...],
        backend: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(first, second)
        ctx.kind, ctx.rest, ctx.backend = kind, rest, backend

        # all the memory it has: one NaN, so that whoever reads past ``written`` sees it
        dtype = torch.promote_types(first.dtype, second.dtype)
        return torch.full((1,), float("nan"), dtype=dtype, device=first.device).expand(first.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # from the inputs: nothing of the forward was kept
        first, second = ctx.saved_tensors
        activation = _matrix(ctx.kind, first, second, ctx.rest)
        gradients = activation_gradients(
            activation, dy.reshape(activation[0].shape), backend=ctx.backend
        )
        d_first, d_second = (
            d.view(t.shape) for d, t in zip(gradients, (first, second), strict=True)
        )
        return d_first, d_second, None, None, None


class _Write(torch.autograd.Function):
    """From a place in the graph to the values that belong there."""

    @staticmethod
    def forward(ctx: Any, graph: torch.Tensor, activation: Activation) -> torch.Tensor:
        return activation.values().view(graph.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy, None
