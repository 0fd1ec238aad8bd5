"""What convert did to a model, or would do: a row per linear layer, as a table.

    report(model)    what runs in which recipe on which backend, and why the rest was kept
    check(model)     the same before anything is changed, with the bytes and the padding it costs;
                     of names and shapes alone, too

Both read and change nothing. ``report`` reads what ``convert`` left on each layer: its ``nvfp4``
state, or ``nvfp4_kept``, the reason. ``check`` makes the plan that ``convert`` would carry out
(``selection.py``) and works out what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from nvfp4.backends.registry import AUTO, check_backend, select
from nvfp4.layer.experts import Experts, ExpertsState
from nvfp4.layer.linear import Linear
from nvfp4.layer.weight_cache import STACKS
from nvfp4.model.convertible import not_linear
from nvfp4.model.selection import Decision, ModuleFilter, Patterns, Recipes, Selection
from nvfp4.model.weights import quantized_weights
from nvfp4.numerics.formats import NVFP4
from nvfp4.recipes import GEMMS, Operand, Recipe


@dataclass(frozen=True)
class LayerReport:
    """One linear layer; recipe and backend are None where it was kept, and ``reason`` says why.

    gemms: the operands of fprop, dgrad and wgrad in words. precisions: "nvfp4" or "bf16" for each.
    """

    name: str
    in_features: int
    out_features: int
    recipe: str | None
    gemms: tuple[str, ...]
    backend: str | None
    reason: str | None
    precisions: tuple[str, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """Its row of the table; the operands are in the caption."""
        size = f"{self.out_features} x {self.in_features}"
        gemms = self.precisions or ("",) * len(GEMMS)
        return (
            self.name or "(root)",
            size,
            self.recipe or "",
            *gemms,
            self.backend or "",
            self.reason or "",
        )


@dataclass(frozen=True)
class LayerCheck(LayerReport):
    """One linear layer that ``convert`` would meet.

    padding: multiply-adds spent on padding by fprop and dgrad, as a share of the needed ones; wgrad
    pads the tokens, which a model does not tell. nvfp4_bytes, bf16_bytes: of the weight as fprop
    reads it; equal where it is kept.
    """

    padding: float = 0.0
    nvfp4_bytes: int = 0
    bf16_bytes: int = 0

    def cells(self) -> tuple[str, ...]:
        """The row of a report, and what it costs."""
        padding = f"{self.padding:.1%}" if self.padding else ""
        return (*super().cells(), padding, f"{self.nvfp4_bytes:,}", f"{self.bf16_bytes:,}")


@dataclass(frozen=True)
class Report:
    """Every linear layer of a model; prints as a table.

    not_linear: what else multiplies by weights, counted.
    """

    layers: tuple[LayerReport, ...]
    not_linear: tuple[str, ...] = ()

    @property
    def converted(self) -> int:
        """Number of layers that compute in NVFP4, or of those that ``convert`` would convert."""
        return sum(layer.reason is None for layer in self.layers)

    def _title(self) -> str:
        return f"{self.converted} of {len(self.layers)} linear layers in NVFP4"

    def _columns(self) -> tuple[str, ...]:
        return ("layer", "out x in", "recipe", *GEMMS, "backend", "kept because")

    def __rich__(self) -> Table:
        # below the table: the operands of each recipe, which have no room in the rows
        used = dict.fromkeys(
            (layer.recipe, layer.gemms) for layer in self.layers if layer.recipe is not None
        )
        lines = [
            f"{recipe}: "
            + "; ".join(f"{gemm} {operands}" for gemm, operands in zip(GEMMS, gemms, strict=True))
            for recipe, gemms in used
        ]
        if self.not_linear:
            lines.append(f"not linear, so not converted: {', '.join(self.not_linear)}")

        table = Table(
            title=self._title(),
            title_justify="left",
            caption="\n".join(lines),
            caption_justify="left",
        )
        for column in self._columns():
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            table.add_row(*layer.cells())
        return table

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


@dataclass(frozen=True)
class Check(Report):
    """What ``convert`` would do to a model; prints as a table with the cost of every layer."""

    layers: tuple[LayerCheck, ...]

    @property
    def nvfp4_bytes(self) -> int:
        """Of all linear weights as their forward GEMMs would read them."""
        return sum(layer.nvfp4_bytes for layer in self.layers)

    @property
    def bf16_bytes(self) -> int:
        """Of all linear weights in BF16."""
        return sum(layer.bf16_bytes for layer in self.layers)

    def _title(self) -> str:
        sizes = f"weights {self.nvfp4_bytes:,} bytes, {self.bf16_bytes:,} in BF16"
        return f"{self.converted} of {len(self.layers)} linear layers would be converted; {sizes}"

    def _columns(self) -> tuple[str, ...]:
        return (*super()._columns(), "padding", "NVFP4 bytes", "BF16 bytes")


def report(model: nn.Module) -> Report:
    """Every ``nn.Linear`` of ``model`` with its recipe and backend, or the reason why it was kept.

    Of a converted stack of experts, the size of one expert.
    """
    rows = []

    # linear layers, converted or kept
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            state = module.nvfp4
            backend = _backend(state.backend, module.weight.device)
            rows.append(LayerReport(**_describe(name, module, state.recipe, backend, None)))
        elif isinstance(module, nn.Linear):
            reason = getattr(module, "nvfp4_kept", "not_converted")
            rows.append(LayerReport(**_describe(name, module, None, None, reason)))

    # stacks of experts, each as the layer that one of them is
    for name, handle in quantized_weights(model).items():
        if isinstance(handle.owner, Experts):
            _, outputs, inputs = cast(ExpertsState, handle.state).matrices(handle.weight).shape
            one = nn.Linear(inputs, outputs, bias=False, device="meta")
            backend = _backend(handle.state.backend, handle.weight.device)
            rows.append(LayerReport(**_describe(name, one, handle.state.recipe, backend, None)))
    return Report(tuple(rows), not_linear(model))


def check(
    model_or_shapes: nn.Module | Mapping[str, tuple[int, int]],
    recipe: Recipes = "search_eden",
    *,
    filter_fn: ModuleFilter | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    keep_first: int | float = 0,
    keep_last: int | float = 0,
    backend: str = AUTO,
    experts: bool = False,
    strict: bool = False,
) -> Check:
    """What ``convert`` would do with these arguments, and what it costs; changes nothing.

    model_or_shapes: a model, also on the meta device, or a mapping from dotted names to
    (out_features, in_features). Of shapes it can only know what names and sizes tell: no ties,
    hooks or subclasses. The other arguments are as in ``convert``, and so are the warnings and,
    when ``strict``, the errors; a backend is checked for its name alone. Raises ValueError or
    TypeError for what ``convert`` refuses, and for a shape that is not two positive integers.
    """
    # as ``convert`` does, up to the point where it would change something
    selection = Selection.of(recipe, filter_fn, include, exclude, keep_first, keep_last, experts)
    check_backend(backend)
    model = (
        model_or_shapes if isinstance(model_or_shapes, nn.Module) else _skeleton(model_or_shapes)
    )
    plan = selection.plan(model)
    plan.complain(strict)

    rows = [_check_layer(decision, backend) for decision in plan.decisions]
    rows += [row for decision in plan.experts for row in _checked_experts(decision, backend)]
    return Check(tuple(rows), plan.not_linear)


def _checked_experts(decision: Decision[nn.Module], backend: str) -> Iterator[LayerCheck]:
    """A row for each stack: the size of one expert, the bytes of all."""
    for name in STACKS:
        # [E, N, K], or transposed: a layer of N x K stands for each of them
        stack = getattr(decision.module, name)
        stack = stack.mT if getattr(decision.module, "is_transposed", False) else stack
        one = nn.Linear(
            stack.shape[2], stack.shape[1], bias=False, device="meta", dtype=torch.bfloat16
        )
        row = _check_layer(
            Decision(one, (f"{decision.names[0]}.{name}",), decision.recipe, decision.reason),
            backend,
        )
        count = stack.shape[0]
        yield replace(row, nvfp4_bytes=count * row.nvfp4_bytes, bf16_bytes=count * row.bf16_bytes)


def _check_layer(decision: Decision[nn.Linear], backend: str) -> LayerCheck:
    """The row of one layer: as it is if converted already, as it would be, or why not."""
    # a layer that is converted keeps what it has, whatever the arguments say
    module, recipe = decision.module, decision.recipe
    if isinstance(module, Linear):
        recipe, backend = module.nvfp4.recipe, module.nvfp4.backend
    described = _describe(
        decision.names[0], module, recipe, None if recipe is None else backend, decision.reason
    )
    rows, columns = module.out_features, module.in_features
    size = 2 * rows * columns
    if recipe is None:
        return LayerCheck(**described, nvfp4_bytes=size, bf16_bytes=size)

    # fprop contracts K, dgrad contracts N: each pads its own
    padded = (
        _padded_length(recipe.fprop.right, columns) / columns
        + _padded_length(recipe.dgrad.left, rows) / rows
    ) / 2
    codes = _stored_bytes(recipe.fprop.right, rows, columns) if recipe.fprop.quantized else size
    return LayerCheck(**described, padding=padded - 1, nvfp4_bytes=codes, bf16_bytes=size)


def _describe(
    name: str, layer: nn.Linear, recipe: Recipe | None, backend: str | None, reason: str | None
) -> dict[str, Any]:
    """The fields of a ``LayerReport``."""
    gemms = () if recipe is None else tuple(getattr(recipe, gemm) for gemm in GEMMS)
    return {
        "name": name,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "recipe": None if recipe is None else recipe.name,
        "gemms": tuple(f"{gemm.left} / {gemm.right}" for gemm in gemms),
        "backend": backend,
        "reason": reason,
        "precisions": tuple("nvfp4" if gemm.quantized else "bf16" for gemm in gemms),
    }


def _padded_length(spec: Operand, length: int) -> int:
    """How long a contraction of this length gets in NVFP4."""
    if spec.quantizer is None:
        return length
    rotation = spec.static_options.rotation
    unit = NVFP4.block_size if rotation is None else rotation.group
    return -(-length // unit) * unit


def _stored_bytes(spec: Operand, rows: int, columns: int) -> int:
    """Bytes of codes (two per byte), block scales and global scales of a matrix [rows, columns]."""
    options, padded = spec.static_options, _padded_length(spec, columns)
    scales = -(-rows // options.block[0]) * (padded // NVFP4.block_size)
    return rows * padded // 2 + scales + 4 * (rows if options.row_scaled else 1)


def _skeleton(shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A model on the meta device: linear layers of these names and sizes, and nothing else."""
    root = nn.Module()
    for name, shape in shapes.items():
        if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
            wanted = "(out_features, in_features), positive"
            raise ValueError(f"the shape of {name!r} must be {wanted}, got {shape!r}")

        # the modules on the way to it
        *parents, last = name.split(".")
        owner = root
        for parent in parents:
            if parent not in dict(owner.named_children()):
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)

        # the layer
        if not last or hasattr(owner, last):
            raise ValueError(
                f"{name!r} cannot name a layer: empty, or holds other layers, or nn.Module has it"
            )
        owner.add_module(
            last, nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=torch.bfloat16)
        )
    return root


def _backend(backend: str, device: torch.device) -> str:
    """The name of the backend that multiplies there; on the meta device what was asked for."""
    return backend if device.type == "meta" else select(backend, "matmul", device).name
