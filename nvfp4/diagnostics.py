"""What happened to a model and to its numbers: the conversion report, and the health of quantised tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from nvfp4.backends.registry import select
from nvfp4.codec import e2m1_decode, e4m3_decode, unpack
from nvfp4.formats import E2M1, NVFP4
from nvfp4.linear import Linear, layers
from nvfp4.ops import dequantize, quantize_with
from nvfp4.qtensor import QTensor
from nvfp4.quantizers.registry import get_quantizer
from nvfp4.recipes import GEMMS
from nvfp4.scaling import spread


@dataclass(frozen=True)
class LayerReport:
    """One linear layer. recipe and backend are None where it was kept, and ``reason`` says why."""

    name: str
    in_features: int
    out_features: int
    recipe: str | None
    gemms: tuple[str, ...]
    backend: str | None
    reason: str | None


@dataclass(frozen=True)
class Report:
    """Every linear layer of a model; prints as a table."""

    layers: tuple[LayerReport, ...]

    @property
    def converted(self) -> int:
        """Number of layers that compute in NVFP4."""
        return sum(layer.reason is None for layer in self.layers)

    def __rich__(self) -> Table:
        converted = {layer.recipe: layer.gemms for layer in self.layers if layer.recipe is not None}
        caption = "\n".join(
            f"{recipe}: " + "; ".join(f"{gemm} {operands}" for gemm, operands in zip(GEMMS, gemms, strict=True))
            for recipe, gemms in converted.items()
        )
        title = f"{self.converted} of {len(self.layers)} linear layers in NVFP4"
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        for column in ("layer", "out x in", "recipe", "backend", "kept because"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            size = f"{layer.out_features} x {layer.in_features}"
            table.add_row(layer.name or "(root)", size, layer.recipe or "", layer.backend or "", layer.reason or "")
        return table

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def report(model: nn.Module) -> Report:
    """Every ``nn.Linear`` of ``model`` with its recipe and backend, or the reason why ``convert`` kept it."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            recipe = backend = None
            gemms: tuple[str, ...] = ()
            reason = getattr(module, "nvfp4_kept", "not_converted")
            if isinstance(module, Linear):
                state, reason = module.nvfp4, None
                recipe, backend = state.recipe.name, _backend(module)
                gemms = tuple(f"{getattr(state.recipe, g).left} / {getattr(state.recipe, g).right}" for g in GEMMS)
            rows.append(LayerReport(name, module.in_features, module.out_features, recipe, gemms, backend, reason))
    return Report(tuple(rows))


def _backend(layer: Linear) -> str:
    device = layer.weight.device
    return layer.nvfp4.backend if device.type == "meta" else select(layer.nvfp4.backend, "matmul", device).name


@dataclass(frozen=True)
class Health:
    """How one tensor took quantisation. All but ``amax`` are shares of elements, or relative to its mean square.

    relative_mse: mean squared error over mean square. saturated: elements at code +-6 whose value was further out.
    underflow: non-zero elements in a block whose scale became 0, so that they decode to 0. flushed: non-zero elements
    that decode to 0, those included. non_finite: NaN or Inf elements; if any, the other shares are NaN.
    """

    amax: float
    relative_mse: float
    saturated: float
    underflow: float
    flushed: float
    non_finite: float


def health(x: torch.Tensor, q: QTensor) -> Health:
    """Compare x, of any float dtype, with its unrotated quantisation q along the last axis. Synchronises the device."""
    if q.rotation is not None or q.axis != -1 or tuple(x.shape) != q.shape:
        raise ValueError("health needs x and an unrotated q of x along its last axis")
    matrix = x.detach().to(torch.float32).reshape(q.rows, q.contraction)
    decoded = dequantize(q).reshape(matrix.shape)
    codes = e2m1_decode(unpack(q.codes))[:, : q.contraction].abs()
    block_scale = e4m3_decode(spread(q.block_scale, q.block, q.rows))
    scale = block_scale.repeat_interleave(NVFP4.block_size, dim=1)[:, : q.contraction]
    non_zero = matrix != 0
    beyond = (codes == E2M1.max) & (matrix.abs() > decoded.abs()) & (scale > 0)
    count = max(matrix.numel(), 1)
    finite = bool(matrix.isfinite().all())

    def share(mask: torch.Tensor) -> float:
        return mask.sum().item() / count if finite else float("nan")

    square = matrix.double().square().sum()  # squares leave the range of float32 long before x does
    error = (matrix.double() - decoded).square().sum()
    return Health(
        amax=matrix.abs().amax().item() if matrix.numel() else 0.0,
        relative_mse=(error / square).item() if square > 0 else 0.0 if finite else float("nan"),
        saturated=share(beyond),
        underflow=share(non_zero & (scale == 0)),
        flushed=share(non_zero & (decoded == 0)),
        non_finite=(~matrix.isfinite()).sum().item() / count,
    )


@contextmanager
def observe(model: nn.Module) -> Iterator[dict[str, Health]]:
    """Within this context every forward records the health of each converted layer's x and w under its fprop recipe.

    Yields a dict that fills with "layer/x" and "layer/w"; the last forward wins. Costs a second quantisation.
    """
    seen: dict[str, Health] = {}
    found = layers(model).items()
    hooks = [layer.register_forward_pre_hook(_observer(name, seen), with_kwargs=True) for name, layer in found]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _observer(name: str, seen: dict[str, Health]):
    def record(layer: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        assert isinstance(layer, Linear)
        fprop, x = layer.nvfp4.recipe.fprop, args[0] if args else kwargs["input"]
        for key, tensor, spec in (("x", x, fprop.left), ("w", layer.weight, fprop.right)):
            if spec.quantizer is not None and spec.turned is None and tensor.numel():
                q = quantize_with(tensor.detach(), get_quantizer(spec.quantizer), spec.checked(seed=0))
                seen[f"{name}/{key}"] = health(tensor, q)

    return record
