"""Counts what kernels issue per element on each card, without one: python -m tools.instructions

    the kernels that layers launch (``roofline_variants``)  x  the cards of the roofline
        triton.compile, cuobjdump -sass
        instructions by unit; loops as often as the launch makes them go round; divided by elements
        nvfp4/bench/instructions.json, which the roofline reads

A kernel takes seconds to compile, so that a run may count some of them (``--only``,
``--capabilities``): what a file had of others that still exist, it keeps. ``--listing FILE`` counts
any one kernel's listing instead, with ``--trips`` and ``--elements`` as its launch has them: how
other projects' kernels were counted for ``nvfp4/bench/published.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import triton
from rich.progress import track

from nvfp4.backends.triton.variants import KernelVariant
from nvfp4.bench.issue import COUNTS, LANES, UNITS, Counted, table_of
from nvfp4.bench.tables import Row
from nvfp4.numerics.formats import NVFP4
from tools import sass
from tools.aot import CARDS, compile_variant, machine_code, occupancy, resources
from tools.machine_code import show
from tools.quantize_variants import roofline_variants

CAPABILITIES = (90, 100, 120)
"""H100 and H200; B200 and GB200, for B300 and GB300 as well; RTX 5090."""

COLUMNS = ("kernel", "capability", "elements", "registers", "warps", "counts")
COUNTED = (*UNITS, "shared_lines", "global_lines")
DIGITS = 4


def elements_of(variant: KernelVariant) -> float:
    """Elements of the operand that a thread of this kernel works on."""
    constants = variant.constants
    tile = constants.get("T") or constants.get("T_ROWS")
    if tile is not None:
        count = tile.rows * tile.columns
    else:
        count = constants["R"] * constants["C"]
        if variant.name.startswith("finish_kernel"):  # a tile of block scales
            count *= NVFP4.block_size
    return count / (variant.num_warps * LANES)


def trips_of(variant: KernelVariant) -> tuple[float, ...]:
    """How often each loop of this kernel goes round: a search over the factors of MS-EDEN."""
    policies = [variant.constants.get(name) for name in ("P", "P_ROWS", "P_COLUMNS")]
    searches = [len(each.scales) for each in policies if each is not None]
    return tuple(count - 1.0 for count in searches if count > 2)  # once round is no loop


def count(variant: KernelVariant, capability: int) -> Counted:
    """Compile one kernel for one card, and count."""
    compiled = compile_variant(variant, capability)
    cubin = compiled.asm["cubin"]
    elements = elements_of(variant)
    listing = machine_code(cubin)
    per_thread = sass.counts(sass.executed(sass.parse(listing), trips_of(variant)))
    registers, _ = resources(cubin)
    card = CARDS[capability]
    share = occupancy(registers, compiled.metadata.shared, variant.num_warps, card)
    counts = {unit: per_thread[unit] / elements for unit in COUNTED}
    warps = round(share * card.warps)
    return Counted(variant.name, capability, elements, registers, warps, counts)


def as_json(rows: Iterable[Counted]) -> str:
    """The table, one line per kernel and card; units are named once."""
    lines = []
    for row in rows:
        counts = [float(f"{row.counts[unit]:.{DIGITS}g}") for unit in COUNTED]
        fields: list[Any] = [row.kernel, row.capability, row.elements, row.registers, row.warps]
        lines.append("  " + json.dumps([*fields, counts]))
    head = {"triton": triton.__version__, "columns": COLUMNS, "units": COUNTED}
    named = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    return "{\n" + named + ',\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def joined(path: Path, rows: Iterable[Counted], listed: Iterable[tuple[str, int]]) -> list[Counted]:
    """New rows, and of a file's old ones those of kernels that are still listed, in that order."""
    found = table_of(json.loads(path.read_text())) if path.exists() else {}
    found |= {(row.kernel, row.capability): row for row in rows}
    return [found[key] for key in listed if key in found]


def shown(row: Counted) -> Row:
    """A line of the table that is printed."""
    busy = row.cycles()
    pipe, most = row.busiest()
    cells: Row = {"kernel": row.kernel, "card": row.capability, "registers": row.registers}
    cells |= {name: round(value, 1) for name, value in busy.items()}
    return cells | {"busiest": pipe, "cycles": round(most, 1), "fault": None}


def of_listing(path: Path, trips: tuple[float, ...], elements: float) -> dict[str, float]:
    """Counts per element of the kernel that a listing of ``cuobjdump -sass`` holds."""
    per_thread = sass.counts(sass.executed(sass.parse(path.read_text()), trips))
    return {unit: value / elements for unit, value in per_thread.items()}


def variants(capability: int, only: str = "") -> Iterator[KernelVariant]:
    """The kernels to count, those alone whose name has ``only`` in it."""
    return (each for each in roofline_variants(capability) if only in each.name)


def main(arguments: list[str] | None = None) -> int:
    """Count, show, keep."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--capabilities", type=int, nargs="+", default=list(CAPABILITIES), choices=CAPABILITIES
    )
    parser.add_argument("--only", default="", help="kernels with this in their name")
    parser.add_argument("--json", type=Path, help=f"keep the table here; ours is {COUNTS.name}")
    parser.add_argument("--listing", type=Path, help="count this listing, and nothing else")
    parser.add_argument("--trips", type=float, nargs="*", default=[], help="of a listing's loops")
    parser.add_argument("--elements", type=float, default=1.0, help="of a listing's thread")
    args = parser.parse_args(arguments)
    if args.listing:
        print(json.dumps(of_listing(args.listing, tuple(args.trips), args.elements), indent=1))
        return 0

    all_listed = [(v.name, card) for card in CAPABILITIES for v in roofline_variants(card)]
    chosen = [(v, card) for card in args.capabilities for v in variants(card, args.only)]
    rows: list[Counted] = []
    for each in track(chosen, "counting"):
        rows.append(count(*each))
        if args.json:  # after each, so that what an interrupted run counted is kept
            args.json.write_text(as_json(joined(args.json, rows, all_listed)))
    show(f"instructions per element, Triton {triton.__version__}", [shown(row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
