"""Operands scaled by the amax of the call before, so that one pass over them is enough.

To scale a tensor by its largest magnitude takes two passes: one that looks for it, one that
quantises. Where a recipe says ``delayed_amax``, an operand is scaled by what the call before saw of
its like, times a head-room, and the pass that quantises notes what this call has:

    call t      g = held                        seen: raised by the pass, an atomic per tile
    end of t    held = min(fl(1.75 seen), FLT_MAX), seen = 0

A call ends with its backward, where the counter of the noise advances (``noise.py``). So a forward
that is recomputed meets the same g, micro-batches are calls of their own, and a forward without
gradients (evaluation, generation) reads what is held and leaves no trace. The first call of an
operand has none before it and looks for its own, in a pass of its own, times the same head-room.

    grows by more than 1.75    the scales of its largest blocks stop at 448, their codes at 6: they
                               clip, for one call, and the call is counted as ``exceeded``
    NaN or Inf                 a global scale of NaN, at once; nothing is held of it
    nothing but zeros          nothing is held of it; if there was nothing before, S = 1
    parts of one matrix        processes that hold them agree on what was seen, once per call
    weights                    have no delay: codes are kept, shared and exported

Per layer, a table float32 [3, 6] on the layer's device: held, seen and exceeded, of each operand.
It is updated in place, so that it can be captured in a CUDA graph; that an operand has been seen is
known on the host, and a capture of one that was not is refused.

Sources: Quartet II (arXiv 2601.22813), which finds the amax of the step before as good in loss;
head-room for E4M3 scales as in arXiv 2609.02846.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from nvfp4.layer.sharding import Shards
from nvfp4.numerics.scaling import with_headroom
from nvfp4.numerics.torch_state import is_capturing
from nvfp4.quantizers.base import HeldAmax
from nvfp4.recipes import GEMMS, Recipe

OPERANDS = tuple((gemm, side) for gemm in GEMMS for side in range(2))
"""The columns of the table, in order: 0 left, 1 right."""

HELD, SEEN, EXCEEDED = range(3)
"""Its rows."""


class DelayedAmax(NamedTuple):
    """What one layer holds. table: float32 [3, 6], see the head of the file.

    known: bool [6] on the CPU, whether an operand has been seen.
    """

    table: torch.Tensor
    known: torch.Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.table, self.known.tolist())  # which no map_location moves

    @classmethod
    def new(cls, device: torch.device) -> DelayedAmax:
        """Of a layer that has not been called yet."""
        with torch.inference_mode(False):  # a model that generates first may train later
            return cls(
                torch.zeros(3, len(OPERANDS), dtype=torch.float32, device=device),
                torch.zeros(len(OPERANDS), dtype=torch.bool, device="cpu"),
            )

    def on(self, device: torch.device) -> DelayedAmax:
        """The same on another device."""
        if self.table.device == device:
            return self
        with torch.inference_mode(False):
            return DelayedAmax(self.table.to(device), self.known)

    def of(self, gemm: str, side: int, own: Callable[[], torch.Tensor], records: bool) -> HeldAmax:
        """What an operand of a GEMM is scaled by, and where its own amax is noted.

        own: looks for that, float32 [1], finite; asked in the first call alone. records: whether
        this call will have a backward. RuntimeError if a CUDA graph would ask for ever.
        """
        column = OPERANDS.index((gemm, side))
        seen = self.table[SEEN, column : column + 1] if records else None

        # the usual case: nothing is launched
        held = self.table[HELD, column : column + 1]
        if self.known[column]:
            return HeldAmax(held, seen)

        # the first call looks for its own
        if is_capturing(self.table.device):
            raise RuntimeError(
                f"a CUDA graph would look for the amax of {gemm}'s operand in every replay: run a "
                "forward and a backward before the capture"
            )
        first = with_headroom(own())
        if not records:
            return HeldAmax(first, seen)
        held.copy_(first)
        self.known[column] = True
        return HeldAmax(held, seen)

    def take(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results of an operator without the last two, which this becomes, in place."""
        *others, table, known = results
        self.table.copy_(table)
        self.known.copy_(known)
        return others

    def numbers(self) -> dict[str, list[float]]:
        """All of it as plain numbers, by the names of the rows; known as 0 or 1. Waits."""
        held, seen, exceeded = self.table.tolist()
        known = [float(flag) for flag in self.known.tolist()]
        return {"held": held, "seen": seen, "exceeded": exceeded, "known": known}

    def load(self, numbers: Mapping[str, list[float]]) -> None:
        """Restore ``numbers``, in place."""
        rows = [numbers["held"], numbers["seen"], numbers["exceeded"]]
        self.table.copy_(torch.tensor(rows, dtype=torch.float32, device="cpu"))
        self.known.copy_(torch.tensor(numbers["known"], device="cpu") > 0)

    def agree(self, recipe: Recipe, shards: Shards) -> None:
        """What any process has seen of operands of which each holds a part; one collective call."""
        columns = _shared(recipe, shards)
        if not columns:
            return
        seen = self.table[SEEN, columns]
        seen = torch.where(seen.isfinite(), seen, torch.inf)  # the maximum of a NaN is anybody's
        dist.all_reduce(seen, dist.ReduceOp.MAX, shards.mesh.get_group())
        self.table[SEEN, columns] = seen


def _restored(table: torch.Tensor, known: list[bool]) -> DelayedAmax:
    """A pickled or copied one."""
    return DelayedAmax(table, torch.tensor(known, dtype=torch.bool, device="cpu"))


def _shared(recipe: Recipe, shards: Shards) -> list[int]:
    """The operands of which every process holds a part, and whose scale is the whole's."""
    columns = []
    for column, (gemm, side) in enumerate(OPERANDS):
        pair = getattr(recipe, gemm)
        spec = (pair.left, pair.right)[side]
        options = spec.options_without_noise
        if spec.delayed_amax and options is not None and shards.needs_amax(gemm, side, options):
            columns.append(column)
    return columns
