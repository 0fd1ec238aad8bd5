"""A converted layer whose weight is a DTensor: which part of the three GEMMs this process computes.

``parallelize_module`` with ``ColwiseParallel`` and ``RowwiseParallel`` works as for ``nn.Linear``:

    style    x          weight     y          dx         dw
    colwise  Replicate  Shard(0)   Shard(-1)  Partial    Shard(0)
    rowwise  Shard(-1)  Shard(1)   Partial    Shard(-1)  Shard(1)
    -        Shard(t)   Replicate  Shard(t)   Shard(t)   Partial     other tokens per process
    -        Replicate  Replicate  Replicate  Replicate  Replicate

Which operands of the GEMMs a process then has a part of is in ``_COLWISE`` and ``_ROWWISE``; in the
last two lines it has them whole.

Scales. Each partial product is multiplied by its own global scales before it is summed, so no sum
needs equal scales. A deterministic, unrotated operand takes the amax of the whole tensor
nevertheless (``sharding.py``): fprop then has the codes of a single process, bit for bit, where K
(rowwise) and N (colwise with 16x16 tiles) are cut at multiples of 16. Stochastic and rotated
operands, all in dgrad and wgrad, scale by their own part; they stay unbiased.

Noise. Signs are equal on all processes. Rounding differs between processes, also where an operand
is replicated (x^T in colwise, dy in rowwise): what it enters is a different shard of dw or dx on
each process, so that no two copies of anything drift apart. Where the result is replicated, copies
would drift apart: so layers of the last line round alike on all processes, and layers with a plain
weight that ``parallelize_module`` left whole are made to by ``nvfp4.share_noise``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from nvfp4.layer.noise import LEFT, RIGHT
from nvfp4.layer.sharding import CONTRACTION, ROWS, Shards

_COLWISE = {
    ("fprop", RIGHT): ROWS,
    ("dgrad", LEFT): CONTRACTION,
    ("dgrad", RIGHT): CONTRACTION,
    ("wgrad", LEFT): ROWS,
}
_ROWWISE = {
    ("fprop", LEFT): CONTRACTION,
    ("fprop", RIGHT): CONTRACTION,
    ("dgrad", RIGHT): ROWS,
    ("wgrad", RIGHT): ROWS,
}


@dataclass(frozen=True)
class Layout:
    """Where x [..., K], weight [N, K] and what comes of them lie on a mesh of one dimension.

    shards: what is cut, for the operands. noise_rank: the rank to round for where all processes
    must round alike.
    """

    mesh: DeviceMesh
    y: Placement
    x_grad: Placement
    weight_grad: Placement
    bias_grad: Placement
    shards: Shards
    noise_rank: int | None = None

    def local(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """This process's parts of the three DTensors; their gradients are parts as well."""
        parts = _part(x, self.x_grad), _part(weight, self.weight_grad)
        if bias is None:
            return *parts, None

        # partial sums are added up over the mesh, so one process alone may add the bias
        part = _part(bias, self.bias_grad)
        if self.y.is_partial():
            part = _OnFirst.apply(part, self.mesh.get_local_rank() == 0)
        return *parts, part

    def whole(self, y: torch.Tensor, size: int) -> torch.Tensor:
        """The DTensor [..., size] of which y is this process's part."""
        # tokens: their number is known part by part only
        if isinstance(self.y, Shard) and self.y.dim != y.dim() - 1:
            return DTensor.from_local(y, self.mesh, [self.y], run_check=False)

        # elsewhere the shape is known; without it DTensor takes every part to be as large as this
        shape = torch.Size((*y.shape[:-1], size))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            y, self.mesh, [self.y], run_check=False, shape=shape, stride=stride
        )


class _OnFirst(torch.autograd.Function):
    """The bias of partial sums: the first process alone adds it; its gradient is equal on each."""

    @staticmethod
    def forward(ctx: Any, bias: torch.Tensor, first: bool) -> torch.Tensor:
        return bias.clone() if first else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def layout(x: torch.Tensor, weight: torch.Tensor) -> Layout:
    """The layout of a layer; TypeError naming what was found if it is none of the four above."""
    # both on one mesh: a plain tensor says nothing of what the other processes hold
    if not isinstance(weight, DTensor) or not isinstance(x, DTensor):
        which = "x is a DTensor, weight a plain tensor"
        if not isinstance(x, DTensor):
            which = "weight is a DTensor, x is not"
        raise TypeError(
            f"{which}: call the module that fully_shard wrapped, or parallelize this layer by "
            f"ColwiseParallel or RowwiseParallel"
        )

    mesh = weight.device_mesh
    if mesh.ndim != 1 or x.device_mesh != mesh:
        raise TypeError(
            f"x and weight must be on one mesh of one dimension, got {x.device_mesh} and {mesh}"
        )

    # the four lines of the table at the head of the file
    (of_x,), (of_weight,) = x.placements, weight.placements
    if of_x == Replicate() and of_weight == Shard(0):
        last = Shard(x.dim() - 1)
        return Layout(mesh, last, Partial(), Shard(0), Shard(0), Shards(mesh, _COLWISE))
    if of_x == Shard(x.dim() - 1) and of_weight == Shard(1):
        return Layout(mesh, Partial(), of_x, Shard(1), Replicate(), Shards(mesh, _ROWWISE))
    if of_x == Replicate() and of_weight == Replicate():
        first = int(mesh.mesh.flatten()[0])
        return Layout(mesh, of_x, of_x, of_x, of_x, Shards(mesh, {}), first)
    if isinstance(of_x, Shard) and of_weight == Replicate() and of_x.dim < x.dim() - 1:
        return Layout(mesh, of_x, of_x, Partial(), Partial(), Shards(mesh, {}))
    raise TypeError(
        f"x is {of_x!r} and weight {of_weight!r}; supported are ColwiseParallel (x Replicate(), "
        "weight Shard(0)), RowwiseParallel (x Shard(-1), weight Shard(1)) and a replicated weight"
    )


def _part(x: torch.Tensor, grad: Placement) -> torch.Tensor:
    """This process's part of x; grad: how the gradient of the part is to be taken."""
    assert isinstance(x, DTensor)
    return x.to_local(grad_placements=[grad])
