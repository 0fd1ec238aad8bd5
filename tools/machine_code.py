"""Reads what compilers made for GPUs that are not here; ``aot`` and ``cuda_build`` report it.

    ptx    what a kernel asked for, before ptxas
    sass   what ptxas made of it, as ``cuobjdump`` prints it

Both are looked at, because ptxas goes its own ways: it fuses products and sums of two numbers at
once (FFMA2) with contraction off, and keeps values in local memory. No PTX shows either.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

from rich.console import Console

from nvfp4.bench.tables import Row, terminal

E2M1_CONVERSION = r"cvt\.rn\.satfinite\.e2m1x2\.f32"
"""How PTX writes the rounding of two numbers to E2M1, which Blackwell does in one instruction."""


def tritons_cuobjdump() -> str | None:
    """NVIDIA's disassembler in a wheel of Triton, the newest of those on the path.

    Where an older Triton comes first on the path, as in ``make aot``, it compiles, and the newer
    one behind it reads: the disassembler of Triton 3.6 cannot decode sm_103a, for which 3.6
    compiles.
    """

    def release(wheel: Distribution) -> list[int]:
        return [int(part) for part in wheel.version.split(".")[:2]]

    newest_first = sorted(distributions(name="triton"), key=release, reverse=True)
    tools = (Path(str(d.locate_file("triton/backends/nvidia/bin/cuobjdump"))) for d in newest_first)
    return next((str(tool) for tool in tools if tool.exists()), None)


def toolkits_cuobjdump() -> str | None:
    """The one beside nvcc, or else Triton's."""
    return shutil.which("cuobjdump") or tritons_cuobjdump()


def inspected(tool: str, option: str, cubin: bytes) -> str:
    """What a disassembler prints of machine code: ``-sass``, or ``--dump-resource-usage``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instruction_count(sass: str) -> int:
    """Instructions of a kernel, padding included."""
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", sass, re.MULTILINE))


def memory_faults(sass: str, spill_bytes: int, stack_bytes: int = 0) -> Iterator[str]:
    """Values that do not stay in registers."""
    if spill_bytes:
        yield f"spills {spill_bytes} bytes"
    if stack_bytes:
        yield f"keeps {stack_bytes} bytes in local memory"
    if not spill_bytes and not stack_bytes and re.search(r"\b(LDL|STL)\b", sass):
        yield "reads or writes local memory"


def rounding_faults(ptx: str, sass: str, divides: bool) -> Iterator[str]:
    """Arithmetic other than that of the reference, which rounds after every operation.

    divides: whether the kernel divides. ptxas makes a correctly rounded quotient of FFMAs and
    scaled subnormals of its own, but of no two numbers at once, so PTX and FFMA2 have to tell.
    What is written in assembly is meant: sums of products that are exact (csrc/cuda/words.h). Of
    two numbers at once, too, as long as every sum that PTX asks for is still there (FADD2).
    """
    if divides:
        compiled = re.sub(r"// begin inline asm.*?// end inline asm", "", ptx, flags=re.DOTALL)
        asked = len(re.findall(r"\b(?:add|sub)\.rn\.f32x2\b", ptx))
        lost = asked > len(re.findall(r"\bFADD2\b", sass))
        meant = "fma.rn.f32x2" in ptx and not lost
        is_fused = re.search(r"\bfma\.(?!rn\.f64)", compiled) or (
            re.search(r"\bFFMA2\b", sass) and not meant
        )
        is_flushed = re.search(r"\.ftz\b", ptx)
    else:
        is_fused = re.search(r"\bFFMA", sass)
        is_flushed = re.search(r"\bF(MUL|ADD|FMA)\S*\.FTZ", sass)
    if is_fused:
        yield "float32 products and sums are fused"
    if is_flushed:
        yield "float32 subnormals are flushed"


def show(title: str, rows: Sequence[Row]) -> None:
    """A table of one line per kernel and card; a "fault" makes it red, and is said below."""
    faults = [row["fault"] for row in rows]
    plain = [{key: value for key, value in row.items() if key != "fault"} for row in rows]
    console = Console()
    console.print(terminal(title, plain, labels=3, red=[fault is not None for fault in faults]))
    for row, fault in zip(rows, faults, strict=True):
        if fault is not None:
            name = ", ".join(str(value) for value in list(row.values())[:2])
            console.print(f"{name}: {fault}", style="red", markup=False)
