"""How long a card takes to issue a kernel's instructions, which on data-centre cards decides.

    instructions.json   per kernel and card: instructions per element, by the unit that runs them
    ARCHITECTURES       per architecture: cycles that a warp's instruction holds its pipe
    cycles              the two multiplied: {"issue": 31.2, "alu": 44.0, "fma": 12.5, ...}
    Counted.seconds     the busiest pipe's cycles, over all schedulers of the card

A multiprocessor has four schedulers, each with pipes of its own; a scheduler starts one instruction
of a warp per cycle, and a pipe of 16 lanes is busy with it for two. So a kernel takes at least as
long as its busiest pipe, and "issue", one cycle per instruction, is the pipe that all share. What
``tools/instructions.py`` counted stands in instructions.json, so that nobody needs a disassembler.
The counts are of code compiled for that card; no count here comes from running it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

COUNTS = Path(__file__).parent / "instructions.json"
MMA_COUNTS = Path(__file__).parent / "mma_instructions.json"
OTHERS = Path(__file__).parent / "published.json"

SCHEDULERS = 4
"""Of a multiprocessor, each with a quarter of its pipes (Hopper and Blackwell white papers)."""

LANES = 32

UNITS = (
    "fp32",  # FADD, FMUL, FFMA
    "fp32x2",  # the same of two numbers: FADD2, FMUL2, FFMA2
    "half2",  # HADD2, HMUL2, HFMA2, of two 16-bit numbers
    "imad",  # IMAD, products of integers
    "iadd",  # IADD3, VIADD, LEA: sums and addresses
    "minmax",  # FMNMX, VIMNMX, IMNMX, VHMNMX
    "logic",  # LOP3, SHF, PRMT, SEL, FSEL, ISETP, FSETP, MOV
    "pack",  # F2FP, I2FP: conversions that run beside the logic
    "xu",  # MUFU, POPC, FLO: the transcendental unit
    "convert",  # I2F, F2F, FRND on the transcendental unit
    "to_integer",  # F2I
    "shuffle",  # SHFL
    "shared",  # LDS, STS, LDSM, STSM, by 128 bytes of a warp
    "global",  # LDG, STG, by 128 bytes of a warp
    "atomic",  # ATOM, RED
    "vote",  # VOTE, MATCH, REDUX
    "tensor",  # HMMA, OMMA, UTCMMA
    "uniform",  # the datapath of what all lanes share: ULOP3, UIADD3, R2UR, S2UR, LDCU
    "control",  # BRA, BAR, EXIT
    "constant",  # LDC, S2R
)
"""Who runs an instruction; ``tools/sass.py`` sorts opcodes into them."""


@dataclass(frozen=True)
class Architecture:
    """Cycles that a pipe of one scheduler is held by one instruction of a warp.

    pipes: by pipe and unit. A unit in no pipe only takes its cycle of issue. source: where the
    rates come from.
    """

    pipes: Mapping[str, Mapping[str, float]]
    source: str


def _per_warp(results_per_clock: float) -> float:
    """Cycles per instruction of one scheduler's share of a multiprocessor's results per clock."""
    return LANES * SCHEDULERS / results_per_clock


_XU = {"xu": _per_warp(16), "convert": _per_warp(16), "to_integer": _per_warp(16)}

LOAD_STORE = "load/store"
HEAVY = "heavy fma"
"""The half of the FMA lanes that multiplies integers; either half takes an FP32 instruction."""

_MEMORY = {
    "shuffle": _per_warp(32),
    "shared": _per_warp(32),
    "global": 2 * _per_warp(32),
    "atomic": _per_warp(32),
}
"""One 32-lane access of 4 bytes per clock and multiprocessor, so 128 bytes of shared memory; what
comes from L2 moves at 64 bytes per clock."""

_GUIDE = (
    "CUDA C++ Programming Guide 12.6 and Best Practices Guide 13.4, Throughput of Native "
    "Arithmetic Instructions"
)
_PIPES = (
    "which unit is on which pipe: Nsight Compute, Metrics Reference, Pipelines; L1 and L2 bytes "
    "per clock: Jia et al. 2018 (arXiv 1804.06826), measured on Volta and unchanged since"
)

ARCHITECTURES: dict[int, Architecture] = {
    90: Architecture(
        {
            "alu": {
                "iadd": _per_warp(64),
                "minmax": _per_warp(64),
                "logic": _per_warp(64),
                "pack": _per_warp(64),
            },
            "fma": {"fp32": _per_warp(128), "imad": _per_warp(128), "half2": _per_warp(128)},
            HEAVY: {"imad": _per_warp(64)},
            "xu": _XU,
            LOAD_STORE: _MEMORY,
            "uniform": {"uniform": _per_warp(64)},
        },
        f"{_GUIDE}, 9.0: 128 FP32, 64 integer sums, products, logic, shifts, minima, 16 "
        f"transcendental, 32 shuffles; {_PIPES}",
    ),
    100: Architecture(
        {
            "alu": {
                "iadd": _per_warp(64),
                "minmax": _per_warp(128),
                "logic": _per_warp(64),
                "pack": _per_warp(64),
            },
            "fma": {
                "fp32": _per_warp(128),
                "fp32x2": _per_warp(64),
                "imad": _per_warp(128),
                "half2": _per_warp(64),
            },
            HEAVY: {"imad": _per_warp(64)},
            "xu": _XU,
            LOAD_STORE: _MEMORY,
            "uniform": {"uniform": _per_warp(64)},
        },
        f"{_GUIDE}, 10.0: as 9.0, but 128 FP32 minima and 64 x 2 products of FP32 or 16-bit pairs "
        f"per clock; {_PIPES}",
    ),
    120: Architecture(
        {
            "alu": {
                "minmax": _per_warp(64),
                "logic": _per_warp(64),
                "pack": _per_warp(64),
            },
            "fma": {
                "fp32": _per_warp(128),
                "iadd": _per_warp(128),
                "imad": _per_warp(128),
                "half2": _per_warp(64),
            },
            HEAVY: {"imad": _per_warp(64)},
            "xu": _XU,
            LOAD_STORE: _MEMORY,
            "uniform": {"uniform": _per_warp(64)},
        },
        f"{_GUIDE}, 12.0: 128 FP32 and integer sums on the same cores, 64 logic, shifts, FP32 "
        f"minima and integer products; {_PIPES}",
    ),
}
"""By compute capability.

Conversions to integers (F2I) are taken to run at 16 per clock everywhere. A reader of the Best
Practices Guide 13.4 quotes a footnote that gives 2 beyond 10.0, which nobody confirms; if it holds,
stochastic rounding as it is written here takes 64 cycles per element on a GB300 and an RTX 5090.
"""
ARCHITECTURES[103] = ARCHITECTURES[100]

ISSUE = "issue"
LATENCY = "latency"

WARP_RATE = 0.25
"""Instructions that one warp starts per cycle.

A dependent one waits 4 cycles (Jia et al. 2018, arXiv 1804.06826, and every microbenchmark since),
and no more is taken to be independent: a scheduler with fewer than four warps is not filled.
"""


def cycles(counts: Mapping[str, float], capability: int) -> dict[str, float]:
    """Cycles of each pipe of a scheduler, for the instructions that ``counts`` has by unit.

    ``counts`` may be of a thread, or of an element; so are the cycles. "issue" counts each
    instruction once, wide accesses to memory too, which hold their pipe for several cycles.
    """
    pipes = ARCHITECTURES[capability].pipes
    busy = {ISSUE: float(sum(counts.get(unit, 0.0) for unit in UNITS))}
    for pipe, units in pipes.items():
        busy[pipe] = sum(
            held * counts.get(WIDE.get(unit, unit), counts.get(unit, 0.0))
            for unit, held in units.items()
        )
    return busy


WIDE = {"shared": "shared_lines", "global": "global_lines"}
"""What these units' pipe counts instead of instructions: accesses of 128 bytes of a warp."""


@dataclass(frozen=True)
class Counted:
    """One kernel compiled for one card.

    counts: instructions per element, by unit; beside them "shared_lines" and "global_lines".
    elements: of a thread. registers: of a thread. warps: resident on a multiprocessor. source:
    a hash of what was compiled.
    """

    kernel: str
    capability: int
    elements: float
    registers: int
    warps: int
    counts: Mapping[str, float]
    source: str = ""

    @property
    def instructions(self) -> float:
        """Per element."""
        return cycles(self.counts, self.capability)[ISSUE]

    def cycles(self) -> dict[str, float]:
        """Per element, by pipe; "latency" where too few warps are resident to fill a scheduler."""
        busy = cycles(self.counts, self.capability)
        filled = WARP_RATE * self.warps / SCHEDULERS
        return busy if filled >= 1 else busy | {LATENCY: busy[ISSUE] / filled}

    def busiest(self) -> tuple[str, float]:
        """The pipe that decides, and its cycles per element."""
        busy = self.cycles()
        pipe = max(busy, key=lambda name: busy[name])
        return pipe, busy[pipe]


def table_of(data: Mapping[str, Any]) -> dict[tuple[str, int], Counted]:
    """The rows of a file of counts, by kernel and compute capability."""
    found = {}
    for row in data["rows"]:
        fields = dict(zip(data["columns"], row, strict=True))
        counts = dict(zip(data["units"], fields.pop("counts"), strict=True))
        entry = Counted(counts=counts, **fields)
        found[entry.kernel, entry.capability] = entry
    return found


@cache
def counted() -> dict[tuple[str, int], Counted]:
    """What was counted of our kernels, and of those that published figures are of."""
    return {
        key: entry
        for path in (COUNTS, MMA_COUNTS, OTHERS)
        for key, entry in table_of(json.loads(path.read_text())).items()
    }
