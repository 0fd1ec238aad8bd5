"""Activations that are not in memory: a formula and its inputs, until something needs the numbers.

A converted layer quantises the formula, so that nothing but FP4 codes is written; layers that share the activation
(q, k and v; gate and up) and ask for equal operands share these codes, too. Whatever else touches it finds an ordinary
tensor with the same values, written on first use.
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


class Deferred(torch.Tensor):
    """An activation [..., K] of which only shape, dtype, device and place in the autograd graph exist.

    Made by ``rms_norm`` and ``swiglu``. Its own memory is one NaN. Views that keep the last axis stay deferred.
    """

    source: Source

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _RESHAPING and not any(isinstance(a, torch.dtype) for a in (*args[1:], *kwargs.values())):
            return args[0]._reshaped(func, args[1:], kwargs)
        args, kwargs = tree_map_only(Deferred, Deferred.written, (args, kwargs))
        return func(*args, **kwargs)

    def _reshaped(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            shaped = func(self, *args, **kwargs)
            same_rows = shaped.dim() > 0 and shaped.shape[-1] == self.shape[-1]
        return _describe(shaped, self.source) if same_rows else func(self.written(), *args, **kwargs)

    @property
    def in_memory(self) -> bool:
        """Whether something has already asked for its numbers."""
        return self.source.values is not None

    def written(self) -> torch.Tensor:
        """The activation as an ordinary tensor, with this one's gradient; computed once."""
        source = self.source
        with torch._C.DisableTorchFunctionSubclass():
            wants_graph = torch.is_grad_enabled() and self.requires_grad
            if source.values is None or (wants_graph and not source.values.requires_grad):
                source.check()
                with without_autocast(self.device):
                    source.values = _Write.apply(self.as_subclass(torch.Tensor), source.activation)
            # not a view of it where it fits: hooks and retain_grad must reach what layers use
            return source.values if source.values.shape == self.shape else source.values.view(self.shape)

    def operands(self, rows: Spec, columns: Spec | None, backend: str) -> tuple[QTensor, QTensor | None]:
        """The matrix [M, K] along K and, if ``columns`` is given, its transpose along M; made once for equal specs."""
        key = tuple(None if spec is None else (spec[0].name, spec[1]) for spec in (rows, columns))
        found = self.source.codes.get((key, backend))
        if found is None:
            self.source.check()
            found = quantize_activation(self.source.activation, rows, columns, backend=backend)
            self.source.codes[key, backend] = found
        return found


class Source:
    """What a ``Deferred`` and its views stand for. codes: operands made of it; values: it, once written."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self.codes: dict[Any, tuple[QTensor, QTensor | None]] = {}
        self.values: torch.Tensor | None = None
        self._versions = _versions(activation)

    def check(self) -> None:
        """RuntimeError if an input was changed in place since the activation was called."""
        if self._versions != _versions(self.activation):
            raise RuntimeError(
                f"an input of {type(self.activation).__name__} was changed in place before a layer used the result: "
                f"change a copy, or turn fusion off with nvfp4.fuse(model, False)"
            )


def _versions(activation: Activation) -> list[int | None]:
    return [None if t.is_inference() else t._version for t in (activation[0], activation[1])]


def _described(*names: str) -> frozenset[Any]:
    found = (getattr(torch.Tensor, name) for name in names)
    return frozenset(f if callable(f) else f.__get__ for f in found)


_DESCRIBING = _described(
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_cpu", "is_meta",
    "is_nested", "is_sparse", "is_quantized", "is_mkldnn", "is_mps", "is_xpu",
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "is_inference",
    "__len__", "__hash__",
)  # fmt: skip
"""What can be said of it without its numbers."""
_RESHAPING = frozenset((torch.Tensor.reshape, torch.Tensor.view, torch.reshape))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = AUTO) -> torch.Tensor:
    """``activations.RMSNorm`` of x [..., K] with weight [K], deferred: float32, bfloat16 or float16, any mixture.

    backend: for the backward. Raises TypeError for another dtype, ValueError if the shapes do not fit.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [K] for x [..., K], got {tuple(weight.shape)} and {tuple(x.shape)}")
    return _deferred(RMSNorm, x, weight, (float(eps),), backend)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: str = AUTO) -> torch.Tensor:
    """``activations.SwiGLU`` of gate and up, both [..., K], deferred; otherwise as ``rms_norm``."""
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ValueError(f"gate and up must have one shape [..., K], got {tuple(gate.shape)} and {tuple(up.shape)}")
    return _deferred(SwiGLU, gate, up, (), backend)


def _deferred(
    kind: type[RMSNorm] | type[SwiGLU], first: torch.Tensor, second: torch.Tensor, rest: tuple[float, ...], backend: str
) -> torch.Tensor:
    first, second = (t.written() if isinstance(t, Deferred) else t for t in (first, second))
    if first.dtype not in INPUT_DTYPES or second.dtype not in INPUT_DTYPES:
        raise TypeError(f"inputs must be float32, bfloat16 or float16, got {first.dtype} and {second.dtype}")
    if first.device != second.device:
        raise ValueError(f"inputs are on different devices: {first.device} and {second.device}")
    graph = _Apply.apply(first, second, kind, rest, backend)
    return _describe(graph, Source(_matrix(kind, first.detach(), second.detach(), rest)))


def _matrix(
    kind: type[RMSNorm] | type[SwiGLU], first: torch.Tensor, second: torch.Tensor, rest: tuple[float, ...]
) -> Activation:
    columns = first.shape[-1]
    return kind(first.reshape(-1, columns), second if second.dim() == 1 else second.reshape(-1, columns), *rest)


def _describe(graph: torch.Tensor, source: Source) -> Deferred:
    dynamo = sys.modules.get("torch._dynamo.config")  # takes seconds to import; where nothing is compiled it is not
    if dynamo is not None and Deferred not in dynamo.nontraceable_tensor_subclasses:
        dynamo.nontraceable_tensor_subclasses.add(Deferred)  # a module compiled by itself breaks its graph to read it
    deferred = graph.as_subclass(Deferred)
    deferred.source = source
    return deferred


class _Apply(torch.autograd.Function):
    """Its place in the graph: nothing is computed before the backward, which recomputes what it needs."""

    @staticmethod
    def forward(
        ctx: Any, first: torch.Tensor, second: torch.Tensor, kind: Any, rest: tuple[float, ...], backend: str
    ) -> torch.Tensor:
        ctx.save_for_backward(first, second)
        ctx.kind, ctx.rest, ctx.backend = kind, rest, backend
        dtype = torch.promote_types(first.dtype, second.dtype)
        return torch.full((1,), float("nan"), dtype=dtype, device=first.device).expand(first.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, second = ctx.saved_tensors
        activation = _matrix(ctx.kind, first, second, ctx.rest)
        made = activation_gradients(activation, dy.reshape(activation[0].shape), backend=ctx.backend)
        d_first, d_second = (d.view(t.shape) for d, t in zip(made, (first, second), strict=True))
        return d_first, d_second, None, None, None


class _Write(torch.autograd.Function):
    """From a place in the graph to the numbers that belong there."""

    @staticmethod
    def forward(ctx: Any, graph: torch.Tensor, activation: Activation) -> torch.Tensor:
        return activation.values().view(graph.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy, None
