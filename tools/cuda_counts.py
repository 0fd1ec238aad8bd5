"""Counts what the CUDA kernels issue per element on each card: python -m tools.cuda_counts

    tools/cuda_counts.cu  x  the cards of the roofline
        nvcc -cubin, with the flags of nvfp4/backends/native/cuda_targets.py; cuobjdump -sass
        instructions by unit, loops as often as a large operand makes them go round, per element
        nvfp4/bench/cuda_instructions.json, which nvfp4/bench/cuda_shares.py reads

The entries of cuda_counts.cu are the kernels as an operand of many whole tiles runs them. ``--json
PATH`` keeps the table; "before" in it, the kernels that had a tile for every operand, stays.
``--shares PATH`` keeps what follows of it for each card.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nvfp4.backends.native.cuda_targets import FLAGS, find_nvcc
from nvfp4.bench.cuda_shares import BEFORE, COUNTS, NOW, shares
from nvfp4.bench.devices import DEVICES
from nvfp4.bench.issue import Counted
from tools import sass
from tools.aot import CARDS, occupancy
from tools.cuda_build import BESIDE, OWN_SHARED, TILE_COLUMNS, TILE_ROWS
from tools.instructions import CAPABILITIES, COUNTED, DIGITS, shown
from tools.machine_code import inspected, show, toolkits_cuobjdump

SOURCE = Path(__file__).with_suffix(".cu")
COLUMNS = ("kernel", "capability", "elements", "registers", "warps", "counts")
WARPS = 8
TILE = TILE_ROWS * TILE_COLUMNS // (32 * WARPS)
"""Elements per thread of a tile that is read downwards as well."""


@dataclass(frozen=True)
class Entry:
    """An entry of cuda_counts.cu.

    elements: of a thread, or of a trip of the loop over a tensor. slots: how often the loop over a
    tile's blocks goes round. rounds: of the rotation. shared: bytes.
    """

    elements: float
    slots: float = 1.0
    rounds: float = 1.0
    shared: int = 2 * TILE_ROWS * TILE_COLUMNS + BESIDE


_ROWS = Entry(32, shared=OWN_SHARED["rows_kernel"])
ENTRIES = {
    "amax": Entry(32, shared=OWN_SHARED["flat_amax_kernel"]),
    "rtn": _ROWS,
    "sr": _ROWS,
    "sr_te": _ROWS,
    "four_over_six": _ROWS,
    "rtn_columns": Entry(TILE, slots=4),
    "rtn_both": Entry(TILE, slots=4),
    "ms_eden_1": Entry(TILE),
    "ms_eden_2": Entry(TILE, rounds=2),
    "ms_eden_1_columns": Entry(TILE),
    "ms_eden_1_both": Entry(TILE),
    "finish": Entry(8 * 16, shared=0),
}


AMAX_TRIPS = 16.0
"""Of its loop, on a tensor of 8192 x 8192 and a card of 128 multiprocessors (four blocks of 256
threads each, four loads of eight elements)."""


def trips(name: str, body: Sequence[sass.Instruction]) -> float:
    """How often a loop goes round, told by what is in it."""
    names = [each.name for each in body]
    loads = names.count("LDG")
    if name == "amax":
        return AMAX_TRIPS if loads == 4 else 0.0  # what a grid leaves over goes one by one
    if loads and "STS" in names:
        return 0.0  # tiles that are not whole
    if "STG" in names:
        return ENTRIES[name].slots
    return ENTRIES[name].rounds if "FADD" in names or "FADD2" in names else 1.0


def compiled(capability: int) -> tuple[dict[str, str], dict[str, int]]:
    """(listing of each entry, registers of each); RuntimeError with nvcc's words or for a spill."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "counts.cubin"
        swizzled = ["-DNVFP4_SWIZZLED"] if capability >= 100 else []
        command = [str(find_nvcc()), *FLAGS, *swizzled, f"-arch=sm_{capability}a", "-Xptxas", "-v"]
        command += ["-cubin", str(SOURCE), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        tool = toolkits_cuobjdump()
        if tool is None:
            raise RuntimeError("there is no cuobjdump beside nvcc, and none in Triton")
        parts = re.split(r"Function : (\w+)", inspected(tool, "-sass", cubin.read_bytes()))[1:]

    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    spilled = [name for name, bytes_spilled, _ in found if int(bytes_spilled)]
    if spilled:
        raise RuntimeError(f"spilled on sm_{capability}: {', '.join(spilled)}")
    listings = dict(zip(parts[::2], parts[1::2], strict=True))
    return listings, {name: int(registers) for name, _, registers in found}


def is_cold(block: sass.Block) -> bool:
    """Whether a block loads single elements: matrices whose rows do not begin on 16 bytes."""
    return any(re.match(r"LDG.*\.(U16|U8|S8|S16)\b", each.opcode) for each in block.instructions)


def count(capability: int) -> list[Counted]:
    """Every entry for one card."""
    listings, registers = compiled(capability)
    rows = []
    for name, entry in ENTRIES.items():
        ran = sass.executed(sass.parse(listings[name]), partial(trips, name), is_cold)
        elements = entry.elements * (AMAX_TRIPS if name == "amax" else 1)
        per_thread = sass.counts(ran)
        share = occupancy(registers[name], entry.shared, WARPS, CARDS[capability])
        rows.append(
            Counted(
                name,
                capability,
                elements,
                registers[name],
                round(share * CARDS[capability].warps),
                {unit: per_thread[unit] / elements for unit in COUNTED},
            )
        )
    return rows


def as_json(rows: Sequence[Counted], kept: dict[str, Any]) -> str:
    """The file: what it says of before, and new rows, each in a line."""

    def line(row: Counted) -> str:
        counts = [float(f"{row.counts[unit]:.{DIGITS}g}") for unit in COUNTED]
        fields = asdict(row) | {"counts": counts}
        return "  " + json.dumps([fields[column] for column in COLUMNS])

    release = subprocess.run([str(find_nvcc()), "--version"], capture_output=True, text=True)
    version = re.search(r"release ([\d.]+)", release.stdout)
    head = {"nvcc": version[1] if version else "", "columns": COLUMNS, "units": COUNTED}
    named = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    before = ",\n".join("  " + json.dumps(row) for row in kept.get("before", []))
    now = ",\n".join(line(row) for row in rows)
    return f'{{\n{named},\n "before": [\n{before}\n ],\n "rows": [\n{now}\n ]\n}}\n'


def predictions() -> str:
    """Shares of every path on every card, before and now, as JSON."""
    rows = [
        {"kernels": table, **share.row()}
        for table in (BEFORE, NOW)
        for share in shares(list(DEVICES.values()), table)
    ]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def main(arguments: list[str] | None = None) -> int:
    """Count, show, keep."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--capabilities", type=int, nargs="+", default=list(CAPABILITIES), choices=CAPABILITIES
    )
    parser.add_argument("--json", type=Path, help=f"keep the table here; ours is {COUNTS.name}")
    parser.add_argument("--shares", type=Path, help="keep here what the table gives on each card")
    args = parser.parse_args(arguments)
    if find_nvcc() is None:
        parser.error("there is no nvcc on PATH")

    rows = [row for capability in args.capabilities for row in count(capability)]
    show("instructions per element, CUDA", [shown(row) for row in rows])
    if args.json:
        kept = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(as_json(rows, kept))
    if args.shares:
        args.shares.write_text(predictions())
    return 0


if __name__ == "__main__":
    sys.exit(main())
