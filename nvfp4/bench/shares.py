"""How near a copy each way of quantising comes on each card, and what keeps it from there.

    PATHS       what a layer asks a backend for: one copy of a tensor, both at once, codes anew
    shares      per path and card: predicted time, share of a copy, the bound, instructions

A copy moves the bytes that have to move: the source once, the codes and their scales once. What a
path moves beside counts against it (the amax reads the source before, ms_eden keeps float32 lengths
in between), as do its instructions. Predictions, of kernels that were compiled and never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nvfp4.bench.devices import Device
from nvfp4.bench.roofline import (
    BF16_BITS,
    CODED_BITS,
    OURS,
    Kernel,
    alone,
    both,
    decode,
)
from nvfp4.bench.tables import Row
from nvfp4.numerics.hadamard import Rotation
from nvfp4.recipes import Operand, operand

SIDE = 8192
"""Rows and columns of the operand: 134 MB of BF16, more than any L2 cache holds."""

_ROTATED = operand("sr_te", rotation=Rotation(16, fixed=True))
_RTN, _EDEN = operand("rtn"), operand("ms_eden")

PATHS: dict[str, tuple[Operand, ...]] = {
    "rtn": (_RTN,),
    "four_over_six": (operand("four_over_six"),),
    "scale_search": (operand("scale_search"),),
    "sr_te": (operand("sr_te"),),
    "ms_eden(1)": (_EDEN,),
    "ms_eden(2, search)": (operand("ms_eden", rounds=2, search=True),),
    "both: rtn": (_RTN, _RTN),
    "both: ms_eden(1)": (_EDEN, _EDEN),
    "both: sr_te, rotated sr_te": (operand("sr_te"), _ROTATED),
    "codes: ms_eden(1)": (operand("ms_eden", source="decoded"),),
    "codes: ms_eden(2, search)": (operand("ms_eden", source="decoded", rounds=2, search=True),),
    "codes to BF16": (operand(None, source="decoded"),),
}
"""One operand: a copy of a tensor; two: x and x^T, read once; of codes, their transpose."""


@dataclass(frozen=True)
class Share:
    """One path on one card. seconds: predicted, launches included. bound: its longest kernel's.

    instructions: per element, of all its kernels; None if one of them was not counted.
    twice_seconds: of a copy that reads the source twice if the rule needs an amax first, as
    ``on_gpu`` measures.
    """

    path: str
    card: str
    seconds: float
    copy_seconds: float
    bound: str
    instructions: float | None
    twice_seconds: float

    @property
    def of_copy(self) -> float:
        """Share of the time that a copy would take."""
        return self.copy_seconds / self.seconds

    @property
    def of_moved(self) -> float:
        """Share of the time that a copy would take of what has to be moved, an amax's read too."""
        return self.twice_seconds / self.seconds

    def row(self) -> Row:
        """A line of the table."""
        line: Row = {"path": self.path, "card": self.card, "us": 1e6 * self.seconds}
        line |= {"of a copy": f"{self.of_copy:.0%}", "its amax read too": f"{self.of_moved:.0%}"}
        line["bound by"] = self.bound
        known = self.instructions is not None
        return line | {"instructions per element": f"{self.instructions:.1f}" if known else "-"}


def kernels(path: str, elements: int, capability: int | None = None) -> list[Kernel]:
    """What a path launches on a card, on one operand of so many elements."""
    operands = PATHS[path]
    if len(operands) == 2:
        return list(both(*operands, "x", "fprop", elements, OURS, capability))
    (only,) = operands
    if only.quantizer is None:
        return [decode(_RTN, "x", "fprop", elements, with_global=False)]
    return list(alone(only, "x", "fprop", elements, OURS))


def bits_to_move(path: str) -> float:
    """Per element: the source, and what is kept of it."""
    operands = PATHS[path]
    coded = operands[0].source == "decoded"
    if operands[0].quantizer is None:
        return CODED_BITS + BF16_BITS
    return (CODED_BITS if coded else BF16_BITS) + CODED_BITS * len(operands)


def shares(devices: Sequence[Device], side: int = SIDE) -> Iterator[Share]:
    """Every path on every GPU, of an operand [side, side] in BF16."""
    elements = side * side
    for path in PATHS:
        for device in devices:
            if device.capability is None:
                continue
            launched = kernels(path, elements, device.capability)
            counts = [kernel.counts(device) for kernel in launched]
            known = [each.instructions for each in counts if each is not None]
            seconds = [kernel.seconds(device) for kernel in launched]
            longest = launched[seconds.index(max(seconds))]
            moved = bits_to_move(path) * elements / 8
            looked = sum(each.bytes for each in launched if each.name.startswith("amax"))
            yield Share(
                path,
                device.name,
                sum(seconds),
                moved / device.memory_rate + device.launch,
                longest.bound(device),
                sum(known) if len(known) == len(launched) else None,
                (moved + looked) / device.memory_rate + device.launch,
            )
