"""Matrices of which every process holds a part, quantised as if each process held them whole.

    part x [M, K]  -> its magnitude, float32 [1]   no copy of x
                   -> all-reduce, maximum          one number (row-scaled: M)
                   -> codes of x under that amax   the codes that x has in the whole, bit for bit

The one thing that codes of a part need to know of the whole is its largest magnitude, from which
the global scale is made; blocks need nothing, as long as no block is cut (1x16 blocks: cut the
contraction axis at multiples of 16; 16x16 tiles: the rows too). ``Shards`` says which operands that
concerns, and ``LayerCall.operand`` takes the three steps.

That holds for deterministic, unrotated operands. A rotated one is scaled by what the rotation makes
of it, and the noise of a stochastic one depends on places in the whole; both scale by their own
part, which is as unbiased.

``GatheredWeight`` is the other thing here: a weight that FSDP gathered as FP4 codes instead of
values (``nvfp4.fp4_all_gather``), so the layer finds its operand ready made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.scaling import magnitude
from nvfp4.numerics.torch_state import is_dtensor
from nvfp4.quantizers.base import Options

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ROWS, CONTRACTION = 0, 1


def amax_of_parts(
    x: torch.Tensor, group: dist.ProcessGroup, row_scaled: bool = False
) -> torch.Tensor:
    """Largest magnitude over the parts x [M, K] of a process group: float32 [1], or [M].

    Inf if any is NaN or Inf. A collective call.
    """
    amax = magnitude(x.detach(), row_scaled)

    # backends differ in what the maximum of a NaN is
    amax = torch.where(amax.isfinite(), amax, torch.inf)
    dist.all_reduce(amax, dist.ReduceOp.MAX, group)
    return amax


@dataclass(frozen=True)
class Shards:
    """Which operands of a layer's GEMMs this process holds a part of.

    mesh: of the processes that hold the parts, with one dimension. cut: (gemm, side) to the axis of
    that operand, as it enters the GEMM, along which it is cut (ROWS or CONTRACTION).
    """

    mesh: DeviceMesh
    cut: dict[tuple[str, int], int]

    def needs_amax(self, gemm: str, side: int, options: Options) -> bool:
        """Whether an operand has the whole's codes only if its scale is agreed on.

        Stochastic and rotated operands scale by their part's values, which is as unbiased.
        """
        axis = self.cut.get((gemm, side))
        if axis is None or options.seed is not None or options.rotation is not None:
            return False
        # a row that is whole has a scale of its own
        return not (options.row_scaled and axis == ROWS)


class GatheredWeight(torch.Tensor):
    """A weight [N, K] that reached this process as codes; its values are not here.

    codes: the QTensor, whose memory belongs to the all-gather. Lives from the all-gather of a layer
    to its resharding, never in an optimizer or a ``state_dict``.
    """

    codes: QTensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes: QTensor, dtype: torch.dtype) -> GatheredWeight:
        """A tensor of ``dtype`` without memory for its values."""
        weight = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device
        )
        weight.codes = codes
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GatheredWeight({tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What FSDP does to a parameter; RuntimeError for anything that needs the values."""
        # another view of the same codes, or a gradient to start from
        weight = args[0]
        if func is torch.ops.aten.detach.default:
            return cls(weight.codes, weight.dtype)
        if func is torch.ops.aten.as_strided.default and tuple(args[1]) == tuple(weight.shape):
            return cls(weight.codes, weight.dtype)
        if func is torch.ops.aten.zeros_like.default:
            return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        raise RuntimeError(
            f"{func} needs the values of a weight that was gathered in FP4: to compute in high "
            "precision, as under nvfp4.disabled(model), or in a graph of torch.compile, call "
            "nvfp4.fp4_all_gather(model, False) first"
        )


def values_here(x: torch.Tensor) -> torch.Tensor | None:
    """The values of x that this process holds: of a DTensor its part, of a gathered weight None."""
    if isinstance(x, GatheredWeight):
        return None
    return x.detach().to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]
