"""Counts what kernels issue per element on each card, without one: python -m tools.instructions

    the kernels that layers launch (``roofline_variants``)  x  the cards of the roofline
        triton.compile, cuobjdump -sass
        instructions by unit; loops as often as the launch makes them go round; divided by elements
        nvfp4/bench/instructions.json, which the roofline reads

A kernel takes seconds to compile, so that a run may count some of them (``--only``,
``--capabilities``): what a file had of others that still exist, it keeps, if their source is still
the same; ``--missing`` counts what a file has not. A test fails where a file has counts of another
source. ``--listing FILE`` counts
any one kernel's listing instead, with ``--trips`` and ``--elements`` as its launch has them: how
other projects' kernels were counted for ``nvfp4/bench/published.json``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
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

COLUMNS = ("kernel", "capability", "elements", "registers", "warps", "source", "counts")
COUNTED = (*UNITS, "shared_lines", "global_lines")
DIGITS = 4


def elements_of(variant: KernelVariant) -> float:
    """Elements of the operand that a thread of this kernel works on."""
    constants = variant.constants
    tile = constants.get("T") or constants.get("T_ROWS")
    if tile is not None:
        count = tile.rows * tile.columns * tile.turns
    else:
        count = constants["R"] * constants["C"]
    if variant.name.startswith("finish_kernel"):  # a tile of block scales
        count *= NVFP4.block_size
    return count / (variant.num_warps * LANES)


def trips_of(variant: KernelVariant) -> tuple[float, ...]:
    """How often each loop goes round: over a program's tiles, and over MS-EDEN's factors."""
    tile = variant.constants.get("T")
    turns = (float(tile.turns),) if tile is not None and tile.turns > 1 else ()
    policies = [variant.constants.get(name) for name in ("P", "P_ROWS", "P_COLUMNS")]
    searches = [len(each.scales) for each in policies if each is not None]
    return turns + tuple(count - 1.0 for count in searches if count > 2)  # once is no loop


def clears(block: sass.Block) -> bool:
    """Whether a block stores zeros: codes beside a NaN, which no ordinary operand has."""
    return any(each.name == "STG" and each.operands.endswith(" RZ") for each in block.instructions)


def count(variant: KernelVariant, capability: int) -> Counted:
    """Compile one kernel for one card, and count."""
    compiled = compile_variant(variant, capability)
    cubin = compiled.asm["cubin"]
    elements = elements_of(variant)
    listing = machine_code(cubin)
    per_thread = sass.counts(sass.executed(sass.parse(listing), trips_of(variant), clears))
    registers, _ = resources(cubin)
    card = CARDS[capability]
    share = occupancy(registers, compiled.metadata.shared, variant.num_warps, card)
    counts = {unit: per_thread[unit] / elements for unit in COUNTED}
    warps = round(share * card.warps)
    return Counted(variant.name, capability, elements, registers, warps, counts, source_of(variant))


def source_of(variant: KernelVariant) -> str:
    """A hash of what the machine code follows from: functions, constants, types, warps.

    Functions by their syntax trees without docstrings, with all that they call and the constants
    that they name, so that no comment makes a count old.
    """
    seen: dict[str, str] = {}
    _follow(variant.kernel, seen)
    what = (sorted(seen.items()), variant.constants, variant.types, variant.num_warps)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def _follow(value: Any, seen: dict[str, str]) -> None:
    """Add a function of the kernels, and what it names, to ``seen``."""
    function = getattr(value, "fn", value)
    key = f"{function.__module__}.{function.__name__}"
    if key in seen:
        return
    tree, names = _tree_of(function)
    seen[key] = tree
    for name in names:
        named = function.__globals__.get(name)
        if isinstance(named, triton.language.constexpr):
            seen[f"{function.__module__}.{name}"] = repr(named.value)
        elif isinstance(named, triton.JITFunction) or type(named).__name__ == "ConstexprFunction":
            _follow(named, seen)


@cache
def _tree_of(function: Any) -> tuple[str, tuple[str, ...]]:
    """(syntax tree without docstrings, names in it) of a function."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return ast.dump(tree), tuple(sorted(names))


def as_json(rows: Iterable[Counted]) -> str:
    """The table, one line per kernel and card; units are named once."""
    lines = []
    for row in rows:
        counts = [float(f"{row.counts[unit]:.{DIGITS}g}") for unit in COUNTED]
        fields: list[Any] = [row.kernel, row.capability, row.elements, row.registers, row.warps]
        lines.append("  " + json.dumps([*fields, row.source, counts]))
    head = {"triton": triton.__version__, "columns": COLUMNS, "units": COUNTED}
    named = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    return "{\n" + named + ',\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def joined(
    path: Path, rows: Iterable[Counted], listed: Mapping[tuple[str, int], str]
) -> list[Counted]:
    """New rows, and of a file's old ones those of listed kernels of the same source, in that order.

    listed: sources by kernel and card.
    """
    found = kept(path, listed) | {(row.kernel, row.capability): row for row in rows}
    return [found[key] for key in listed if key in found]


def kept(path: Path, listed: Mapping[tuple[str, int], str]) -> dict[tuple[str, int], Counted]:
    """Rows of a file that are of the kernels listed, as they are now."""
    found = table_of(json.loads(path.read_text())) if path.exists() else {}
    return {key: row for key, row in found.items() if listed.get(key) == row.source}


def sources() -> dict[tuple[str, int], str]:
    """Sources of all that is to be counted, by kernel and card."""
    return {(v.name, card): source_of(v) for card in CAPABILITIES for v in roofline_variants(card)}


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
    parser.add_argument("--missing", action="store_true", help="what --json has not, or of old")
    parser.add_argument("--listing", type=Path, help="count this listing, and nothing else")
    parser.add_argument("--trips", type=float, nargs="*", default=[], help="of a listing's loops")
    parser.add_argument("--elements", type=float, default=1.0, help="of a listing's thread")
    args = parser.parse_args(arguments)
    if args.listing:
        print(json.dumps(of_listing(args.listing, tuple(args.trips), args.elements), indent=1))
        return 0

    listed = sources()
    there = kept(args.json, listed) if args.missing and args.json else {}
    chosen = [
        (v, card)
        for card in args.capabilities
        for v in variants(card, args.only)
        if (v.name, card) not in there
    ]
    rows: list[Counted] = []
    for each in track(chosen, "counting"):
        rows.append(count(*each))
        if args.json:  # after each, so that what an interrupted run counted is kept
            args.json.write_text(as_json(joined(args.json, rows, listed)))
    show(f"instructions per element, Triton {triton.__version__}", [shown(row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
