"""What a compiler made of the kernels: instructions by function, read from a disassembly."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SCALAR_COMPARE = re.compile(r"v?u?comiss|v?cmp\w*ss|fcmpe?|fccmpe?|fcsel")
SCALAR_MOVE = re.compile(r"v?movss")
FEW_COMPARES = 8
FEW_MOVES = 20


def instructions(binary: Path, objdump: str = "objdump") -> dict[str, Counter[str]]:
    """How often each instruction occurs in each named function of ``binary``, by its C++ name."""
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            counts = functions.setdefault(heading[1], Counter())
        elif (columns := line.split("\t")) and len(columns) > 1:
            counts[columns[1].split()[0]] += 1
    return functions


def scalar_faults(functions: dict[str, Counter[str]], isa: str) -> Iterator[str]:
    """A line per kernel of ``isa`` that goes element by element: it compares floats one by one, or
    moves them.

    FEW are allowed: a tensor's two scales are compared, and a block's scale is decoded alone. A
    move is also how SSE2 begins to fill a vector with one number, hence a tenth; of code that a
    compiler took apart a quarter is moves.
    """
    kernels = {name: counts for name, counts in functions.items() if f"nvfp4::{isa}::" in name}
    for name, counts in kernels.items():
        compares, moves = (
            sum(count for mnemonic, count in counts.items() if kind.fullmatch(mnemonic))
            for kind in (SCALAR_COMPARE, SCALAR_MOVE)
        )
        if compares > FEW_COMPARES:
            yield f"{compares} scalar compares in {name}"
        if moves > FEW_MOVES and moves > counts.total() / 10:
            yield f"{moves} scalar moves among {counts.total()} instructions of {name}"


def missing(*tools: str) -> str | None:
    """Which of the programs are not on PATH, as the reason to skip a test; None if all are."""
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return f"not on PATH: {', '.join(absent)}" if absent else None
