"""Counts MS-EDEN on tensor cores per element on each card: python -m tools.mma_counts

    csrc/cuda/mma_eden.cu  x  the cards of the roofline
        nvcc -cubin, with the flags of nvfp4/backends/native/cuda_targets.py; cuobjdump -sass
        instructions by unit, as a thread issues them on a tile within the matrix, per element
        nvfp4/bench/mma_instructions.json, which the roofline reads

Left out is what such a tile never reaches: elements read one by one, quotients out of range. What
draws the signs is done by one warp per orientation, and counts as that share of a thread's work.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nvfp4.backends.native.cuda_targets import find_nvcc
from nvfp4.bench.issue import MMA_COUNTS, Counted
from tools import sass
from tools.aot import CARDS, occupancy
from tools.cuda_build import CudaKernel, compile_source, shared_bytes
from tools.instructions import CAPABILITIES, COLUMNS, COUNTED, DIGITS, shown
from tools.machine_code import inspected, show, toolkits_cuobjdump

WARPS = 8
"""Of a block of threads, which shares a tile of 128 x 128."""

ELEMENTS = 128 * 128 / (32 * WARPS)

KERNELS = {
    "<false, true, false>": "bfloat16",
    "<false, false, true>": "bfloat16^T",
    "<false, true, true>": "both of bfloat16",
    "<true, false, true>": "codes",
}
"""By template arguments: whether of codes, whether rows, whether columns."""

_PHILOX = "0x326172a9"
"""One of its multipliers, negated, as machine code has it (philox.h)."""


def is_cold(block: sass.Block) -> bool:
    """Whether a block reads BF16 into registers: tiles that are not whole, rows on no 16 bytes.

    Whole tiles are copied without (LDGSTS).
    """
    return any(re.match(r"LDG\..*(U16|128)\b", each.opcode) for each in block.instructions)


def per_element(listing: str) -> dict[str, float]:
    """Instructions per element by unit, of one kernel's machine code."""
    instructions = sass.parse(listing)
    graph = sass.blocks(instructions)
    drawing = {
        each.address
        for block in graph
        if sum(_PHILOX in each.operands for each in block.instructions) > 1
        for each in block.instructions
    }
    assert drawing, "no block draws signs: has the compiler written its multiplier otherwise?"
    # the only loop is one over the rows of such a tile; a compiler may leave its end behind
    ran = sass.executed(instructions, (0.0,) * _loops(instructions), is_cold)
    weighed = [(each, often / WARPS if each.address in drawing else often) for each, often in ran]
    total = sass.counts(weighed)
    return {unit: total[unit] / ELEMENTS for unit in COUNTED}


def _loops(instructions: list[sass.Instruction]) -> int:
    """How many loops are left without what is cold: none, or one over rows."""
    try:
        sass.executed(instructions, (), is_cold)
    except ValueError:
        return 1
    return 0


def count(capability: int) -> Iterator[Counted]:
    """Every kernel for one card; RuntimeError with nvcc's words, or where one has a fault."""
    target = f"sm_{capability}a"
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_source("mma_eden", target, Path(folder))
        cubin = (Path(folder) / f"mma_eden.{target}" / "out.cubin").read_bytes()
    tool = toolkits_cuobjdump()
    if tool is None:
        raise RuntimeError("there is no cuobjdump beside nvcc, and none in Triton")
    listings = re.split(r"Function : \w+", inspected(tool, "-sass", cubin))[1:]
    names = re.findall(r"Function : (\w+)", inspected(tool, "-sass", cubin))
    by_arguments = {_arguments(name): text for name, text in zip(names, listings, strict=True)}

    for arguments, label in KERNELS.items():
        kernel = next(each for each in kernels if each.kernel.endswith(arguments))
        if kernel.fault is not None:
            raise RuntimeError(f"{kernel.kernel} on {target}: {kernel.fault}")
        counts = per_element(by_arguments[arguments])
        share = _occupancy(kernel, capability)
        warps = round(share * CARDS[capability].warps)
        name = f"mma_eden_kernel: {label}"
        yield Counted(name, capability, ELEMENTS, kernel.registers, warps, counts)


def _arguments(mangled: str) -> str:
    """Template arguments of a mangled name, which are all bool: "<false, true, true>"."""
    found = re.findall(r"Lb([01])E", mangled)
    return f"<{', '.join('true' if each == '1' else 'false' for each in found)}>"


def _occupancy(kernel: CudaKernel, capability: int) -> float:
    return occupancy(kernel.registers, shared_bytes(kernel.kernel), WARPS, CARDS[capability])


def as_json(rows: list[Counted]) -> str:
    """The table, one line per kernel and card; units are named once."""
    lines = []
    for row in rows:
        counts = [float(f"{row.counts[unit]:.{DIGITS}g}") for unit in COUNTED]
        fields = [row.kernel, row.capability, row.elements, row.registers, row.warps]
        lines.append("  " + json.dumps([*fields, counts]))
    head = f' "columns": {json.dumps(COLUMNS)},\n "units": {json.dumps(COUNTED)}'
    return "{\n" + head + ',\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def main(arguments: list[str] | None = None) -> int:
    """Count, show, keep."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--json", type=Path, help=f"keep the table here; ours is {MMA_COUNTS.name}")
    args = parser.parse_args(arguments)
    if find_nvcc() is None:
        parser.error("there is no nvcc on PATH")

    rows = [row for capability in CAPABILITIES for row in count(capability)]
    show("instructions per element, MS-EDEN on tensor cores", [shown(row) for row in rows])
    if args.json:
        args.json.write_text(as_json(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
