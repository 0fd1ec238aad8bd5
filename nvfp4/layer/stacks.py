"""The three GEMMs of a stack of weights [E, N, K], a linear layer for each of E groups of rows.

    fprop   y [S, N] = x w[e]^T + bias[e] for the rows of x [S, K] that are group e's
    dgrad   dx [S, K] = dy w[e]
    wgrad   dw[e] [N, K] = dy^T x of the rows of group e; 0 if it has none

As ``gemms.py`` for one layer, as functions of tensors: every group computes as a layer of its own,
bit for bit. Its rows are quantised by themselves, its weight has scales of its own, and it draws
the noise of layer e in a model with the seed fold_in(seed, layer of the stack) (``ExpertNoise``).

    forward    x and all weights quantised, one call each; one call for the products
    backward   dy for both GEMMs; w and x once more; one call each for dgrad and for wgrad

Each of these calls (``grouped_ops``) is about all groups, and one launch where the hardware can.
Where a group's rows begin is known on the device alone (``Groups``): nothing here reads it, but for
the dense products of recipes that have some, which go group by group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from nvfp4.grouped_ops import (
    grouped_matmul,
    grouped_quantize,
    grouped_quantize_both,
    grouped_requantize,
    grouped_sum,
    grouped_transpose,
)
from nvfp4.layer.call import DeviceNoise, LayerCall, dense_fprop, dense_product
from nvfp4.layer.noise import LEFT, RIGHT, GemmSeeds, HostNoise
from nvfp4.layer.saved import Dtypes, Needs, saved_specs
from nvfp4.numerics.groups import GroupedQTensor, Groups
from nvfp4.numerics.rng import DeviceSeed, fold_in, signed
from nvfp4.numerics.torch_state import is_capturing

Stack = torch.Tensor | GroupedQTensor
"""Weights [E, N, K] or rows [S, K] of all groups, as they are or as codes."""


class ExpertNoise(DeviceNoise):
    """The noise of all experts of a stack: seeds int64 [E] where one layer has one.

    experts: their numbers in the whole stack.
    """

    def __init__(
        self, noise: HostNoise, experts: range, device: torch.device, backend: str
    ) -> None:
        self._of_stack, self._experts, self._device = noise, experts, device
        self._backend = backend
        self._table: torch.Tensor | None = None
        self._seeds: dict[str, GemmSeeds] = {}

    def seeds(self, gemm: str) -> GemmSeeds:
        """The seeds of one GEMM; RuntimeError in the capture of a CUDA graph."""
        if is_capturing():
            self._of_stack.seeds(gemm)  # says why not

        # what ``Noise.state`` would hold of a layer for each expert, made where it is read
        if self._table is None:
            seed, layer, calls, rank = self._of_stack
            words = torch.empty(len(self._experts), 4, dtype=torch.int64, device=self._device)
            words[:, 0] = signed(fold_in(seed % 2**64, layer))
            words[:, 1] = torch.arange(self._experts.start, self._experts.stop, device=self._device)
            words[:, 2], words[:, 3] = calls, rank
            self._state = words
        return super().seeds(gemm)


def forward(
    call: LayerCall,
    x: Stack,
    w: Stack,
    groups: Groups,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    needs: Needs,
) -> tuple[torch.Tensor, Stack | None]:
    """y [S, N] in ``dtype``, and what wgrad starts from: x, its codes, or those of x^T.

    x: [S, K], or fprop's codes of it. w: [E, N, K], or fprop's codes. bias: [E, N] or None.
    """
    specs, backend = saved_specs(call.recipe), call.backend

    # x and, where wgrad quantises x^T itself, that too
    transposed = needs.dw and specs.x_is_transposed
    codes: Stack = x
    x_transposed: GroupedQTensor | None = None
    if isinstance(x, torch.Tensor):
        if call.recipe.fprop.quantized and transposed:
            how = call.quantizer("fprop", LEFT), call.quantizer("wgrad", RIGHT)
            codes, x_transposed = grouped_quantize_both(x, groups, *how, backend=backend)
        elif call.recipe.fprop.quantized:
            codes = grouped_quantize(x, groups, *call.quantizer("fprop", LEFT), backend=backend)
        elif transposed:
            right = call.quantizer("wgrad", RIGHT)
            x_transposed = grouped_quantize(x, groups, *right, transposed=True, backend=backend)

    if isinstance(codes, GroupedQTensor) and isinstance(w, GroupedQTensor):
        y = grouped_matmul(codes, w, dtype, bias=bias, backend=backend)
    else:
        y = _dense_forward(call, cast(torch.Tensor, codes), w, groups, bias, dtype)

    # what the backward will start from
    if not needs.dw:
        return y, None
    return y, x if specs.for_dw is None else x_transposed if transposed else codes


def _dense_forward(
    call: LayerCall,
    x: torch.Tensor,
    w: Stack,
    groups: Groups,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """fprop of weights alone in FP4, or of none: group by group."""
    made = []
    for e, rows in enumerate(groups.split(x)):
        if rows.shape[0]:
            own = None if bias is None else bias[e]
            made.append(dense_fprop(call, rows, _of_group(w, e), own, dtype))
    return torch.cat(made)


def _of_group(stack: Stack, e: int) -> Any:
    """The matrix of one group, or its codes."""
    return stack.group(e) if isinstance(stack, GroupedQTensor) else stack[e]


def backward(
    call: LayerCall,
    dy: torch.Tensor,
    groups: Groups,
    for_dx: Stack | None,
    for_dw: Stack | None,
    needs: Needs,
    dtypes: Dtypes,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx [S, K], dw [E, N, K], db [E, N]), those that are needed.

    for_dx: w or fprop's codes. for_dw: as ``forward`` returned it. groups: of the rows of dy, and
    those of for_dw.
    """
    backend = call.backend
    w = _w_operand(call, for_dx) if needs.dx and call.recipe.dgrad.quantized else None
    x = _x_operand(call, for_dw) if needs.dw and call.recipe.wgrad.quantized else None

    # dy along N for dgrad and along each group's rows for wgrad
    rows = columns = None
    of_rows = None if w is None else call.quantizer("dgrad", LEFT)
    of_columns = None if x is None else call.quantizer("wgrad", LEFT, partner=x.rotation)
    if of_rows is not None and of_columns is not None:
        rows, columns = grouped_quantize_both(dy, groups, of_rows, of_columns, backend=backend)
    elif of_rows is not None:
        rows = grouped_quantize(dy, groups, *of_rows, backend=backend)
    elif of_columns is not None:
        columns = grouped_quantize(dy, groups, *of_columns, transposed=True, backend=backend)

    # dgrad and wgrad, all groups in one call each, if it is quantised
    dx = dw = db = None
    if rows is not None and w is not None:
        dx = grouped_matmul(rows, w, dtypes.dx, backend=backend)
    elif needs.dx:
        dx = torch.cat(_dense(dy, groups, for_dx, dtypes.dx, summed=False))
    if columns is not None and x is not None:
        dw = grouped_matmul(columns, x, dtypes.dw, backend=backend)
    elif needs.dw:
        dw = torch.stack(_dense(dy, groups, for_dw, dtypes.dw, summed=True))
    if needs.db:
        db = grouped_sum(dy, groups, backend=backend).to(cast(torch.dtype, dtypes.db))
    return dx, dw, db


def _w_operand(call: LayerCall, saved: Stack | None) -> GroupedQTensor:
    """dgrad's operand w^T [K, N] of every group, contracted along N."""
    if call.recipe.dgrad.right.source == "codes":
        return grouped_transpose(cast(GroupedQTensor, saved), backend=call.backend)
    how = call.quantizer("dgrad", RIGHT)
    if isinstance(saved, GroupedQTensor):
        return grouped_requantize(saved, *how, backend=call.backend)
    return grouped_quantize(
        cast(torch.Tensor, saved), None, *how, transposed=True, backend=call.backend
    )


def _x_operand(call: LayerCall, saved: Stack | None) -> GroupedQTensor:
    """wgrad's operand x^T [K, m] of every group, contracted along its tokens."""
    q, source = cast(GroupedQTensor, saved), call.recipe.wgrad.right.source
    if source == "decoded":
        return grouped_requantize(q, *call.quantizer("wgrad", RIGHT), backend=call.backend)
    return grouped_transpose(q, backend=call.backend) if source == "codes" else q


def _dense(
    dy: torch.Tensor,
    groups: Groups,
    saved: Stack | None,
    dtype: torch.dtype,
    summed: bool,
) -> list[torch.Tensor]:
    """One GEMM of the backward that the recipe does not quantise, group by group.

    summed: dy^T x, with zeros for a group without rows; else dy w.
    """
    assert saved is not None
    parts = list(groups.split(saved)) if isinstance(saved, torch.Tensor) and summed else None
    made = []
    for e, rows in enumerate(groups.split(dy)):
        if rows.shape[0] == 0:
            if summed:
                columns = saved.contraction if parts is None else saved.shape[1]  # type: ignore[union-attr]
                made.append(dy.new_zeros(dy.shape[1], columns, dtype=dtype))
            continue
        own = _of_group(saved, e) if parts is None else parts[e]
        made.append(dense_product(rows.t() if summed else rows, own, dtype))
    return made


class Packed(NamedTuple):
    """Codes of a stack without their tensors, which autograd keeps. signs: whether seeds follow."""

    codes: GroupedQTensor
    signs: bool

    @classmethod
    def of(cls, q: GroupedQTensor) -> tuple[Packed, list[torch.Tensor]]:
        """What to remember of q, and its tensors: codes, scales, and seeds of drawn signs.

        The seeds travel along, as in ``saved.pack``: under checkpointing codes and seeds must both
        be the recomputation's.
        """
        nothing = torch.empty(0, device="meta")
        bare = replace(q, codes=nothing, block_scale=nothing, global_scale=nothing, groups=None)
        seed = None if q.rotation is None else q.rotation.sign_seed
        if not isinstance(seed, DeviceSeed):
            return cls(bare, False), list(q.tensors)
        rotation = replace(cast(Any, q.rotation), sign_seed=None)
        return cls(replace(bare, rotation=rotation), True), [*q.tensors, seed.bits]

    def again(self, tensors: list[torch.Tensor], groups: Groups) -> GroupedQTensor:
        """The codes, of the first of ``tensors``, which are taken out; groups: of the tokens."""
        names = ("codes", "block_scale", "global_scale")
        fields: dict[str, Any] = {name: tensors.pop(0) for name in names}
        if self.signs:
            seed = DeviceSeed(tensors.pop(0))
            fields["rotation"] = replace(cast(Any, self.codes.rotation), sign_seed=seed)
        ragged = None if self.codes.ragged is None else groups
        return replace(self.codes, **fields, groups=ragged)


def pack(
    for_dx: Stack | None, for_dw: Stack | None
) -> tuple[list[Packed | None], list[torch.Tensor]]:
    """What ``unpack`` needs of what the backward starts from: of codes what they are, and tensors.

    Of what is not codes nothing: None.
    """
    kinds: list[Packed | None] = []
    tensors: list[torch.Tensor] = []
    for stack in (for_dx, for_dw):
        kind = None
        if isinstance(stack, GroupedQTensor):
            kind, own = Packed.of(stack)
            tensors += own
        kinds.append(kind)
    return kinds, tensors


def unpack(
    kinds: list[Packed | None], tensors: list[torch.Tensor], groups: Groups
) -> list[GroupedQTensor | None]:
    """The codes that went into ``pack``, whose tensors are taken out of the list."""
    return [None if kind is None else kind.again(tensors, groups) for kind in kinds]
