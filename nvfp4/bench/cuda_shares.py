"""How near the bandwidth the C++ CUDA kernels come on each card, now and before, by their counts.

    PATHS    what a layer asks for: the kernels that run, and the bits per element that they move
    shares   per path and card: predicted time, shares, the bound, instructions per element
    COUNTS   cuda_instructions.json, written by ``tools/cuda_counts.py``

A kernel takes the longest of bytes / bandwidth and instructions / issue rate (``roofline.py``). Two
shares are told. Of a copy: the source read once, codes and scales written once, against all that
runs. Of its bytes: all that the kernels move (an amax reads the source before, ms_eden keeps
float32 lengths in between) in one copy, against all that runs. Kernels that begin where the one
before ended find half of an L2 cache of it there, so that this may come out above 1. Predictions,
of code that was compiled and never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nvfp4.bench.devices import Device
from nvfp4.bench.issue import Counted, table_of
from nvfp4.bench.roofline import (
    BF16_BITS,
    CODE_BITS,
    CODED_BITS,
    FLOAT_BITS,
    MEMORY,
    SCALE_BITS,
)
from nvfp4.bench.shares import SIDE
from nvfp4.bench.tables import Row
from nvfp4.numerics.formats import NVFP4

COUNTS = Path(__file__).parent / "cuda_instructions.json"
LENGTH_BITS = FLOAT_BITS / NVFP4.block_size

NOW, BEFORE = "rows", "before"
"""The tables of ``COUNTS``: of the kernels as they are, and with a tile for every operand."""


@dataclass(frozen=True)
class Step:
    """One kernel of a path. bits: per element that it moves, and of them ``again`` that the kernel
    before it has read."""

    kernel: str
    bits: float
    again: float = 0.0


_AMAX = Step("amax", BF16_BITS)
_EDEN_BITS = BF16_BITS + CODE_BITS + LENGTH_BITS
_FINISH = Step("finish", LENGTH_BITS + SCALE_BITS)


def _scaled(kernel: str, copies: int = 1) -> tuple[Step, Step]:
    return _AMAX, Step(kernel, BF16_BITS + copies * CODED_BITS, BF16_BITS)


PATHS: dict[str, tuple[Step, ...]] = {
    "rtn": _scaled("rtn"),
    "rtn, amax given": (Step("rtn", BF16_BITS + CODED_BITS),),
    "sr": _scaled("sr"),
    "sr_te": _scaled("sr_te"),
    "four_over_six": _scaled("four_over_six"),
    "four_over_six, amax given": (Step("four_over_six", BF16_BITS + CODED_BITS),),
    "ms_eden(1)": (Step("ms_eden_1", _EDEN_BITS), _FINISH),
    "ms_eden(2)": (Step("ms_eden_2", _EDEN_BITS), _FINISH),
    "both: rtn": _scaled("rtn_both", 2),
    "both: ms_eden(1)": (
        Step("ms_eden_1_both", 2 * _EDEN_BITS - BF16_BITS),
        _FINISH,
        _FINISH,
    ),
    "both, in two kernels: ms_eden(1)": (
        Step("ms_eden_1", _EDEN_BITS),
        Step("ms_eden_1_columns", _EDEN_BITS, BF16_BITS),
        _FINISH,
        _FINISH,
    ),
}
"""One operand of BF16; "both": x and x^T."""


@cache
def counted(table: str = NOW) -> dict[tuple[str, int], Counted]:
    """What was counted, by kernel and compute capability."""
    data = json.loads(COUNTS.read_text())
    return table_of(data | {"rows": data[table]})


def terms(step: Step, elements: int, device: Device, table: str = NOW) -> dict[str, float] | None:
    """Seconds of a kernel by what takes them; None if nobody counted it for this card.

    Before, kernels began where the one before them had begun, and only what fills at most half of
    the L2 cache was found there.
    """
    counts = counted(table).get((step.kernel, device.capability or 0))
    if counts is None:
        return None
    again = step.again * elements / 8
    cached = min(again, device.l2 / 2) if table == NOW else again if again <= device.l2 / 2 else 0
    found = {MEMORY: (step.bits * elements / 8 - cached) / device.memory_rate}
    return found | {
        pipe: elements * cycles / device.issue_rate for pipe, cycles in counts.cycles().items()
    }


@dataclass(frozen=True)
class CudaShare:
    """One path on one card. seconds: predicted, launches included; copy_seconds: of a copy of what
    has to move; byte_seconds: of all that is moved. bound: of the kernel that takes longest.
    instructions: per element, of all kernels."""

    path: str
    card: str
    seconds: float
    copy_seconds: float
    byte_seconds: float
    bound: str
    instructions: float

    def row(self) -> Row:
        """A line of the table."""
        return {
            "path": self.path,
            "card": self.card,
            "us": 1e6 * self.seconds,
            "of a copy": f"{self.copy_seconds / self.seconds:.0%}",
            "of its bytes": f"{self.byte_seconds / self.seconds:.0%}",
            "bound by": self.bound,
            "instructions per element": f"{self.instructions:.1f}",
        }


def shares(devices: Sequence[Device], table: str = NOW, side: int = SIDE) -> Iterator[CudaShare]:
    """Every path on every GPU for which its kernels were counted, of [side, side] in BF16."""
    elements = side * side
    for path, steps in PATHS.items():
        for device in devices:
            found = [terms(step, elements, device, table) for step in steps]
            known = [each for each in found if each is not None]
            if device.capability is None or len(known) < len(steps):
                continue
            seconds = [max(each.values()) + device.launch for each in known]
            longest = known[seconds.index(max(seconds))]
            copies = 2 if path.startswith("both") else 1
            moved = (BF16_BITS + copies * CODED_BITS) * elements / 8
            counts = [counted(table)[step.kernel, device.capability] for step in steps]
            yield CudaShare(
                path,
                device.name,
                sum(seconds),
                moved / device.memory_rate + device.launch,
                sum(step.bits for step in steps) * elements / 8 / device.memory_rate
                + device.launch,
                max(longest, key=lambda name: longest[name]),
                sum(each.instructions for each in counts),
            )
