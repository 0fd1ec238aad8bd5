"""Compile the CUDA kernels without a GPU and say what came out: instructions, registers, spills, shared memory.

``python -m tools.cuda_build --json PATH`` from a checkout; nvcc has to be on PATH.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nvfp4.backends.native.cuda_targets import FLAGS, SOURCES, TARGETS, find_nvcc

FOLDER = Path(__file__).parent.parent / "csrc" / "cuda"
ARCHITECTURES = tuple(f"sm_{target}" for target in TARGETS)
TILE_COLUMNS, FLAT_ROWS, TILE_ROWS, BESIDE = 128, 32, 128, 608
"""Of tile.h and quantize.h: elements of a tile, and bytes beside it; test_cuda_compile.py holds them equal."""


@dataclass(frozen=True)
class Report:
    """One kernel for one target. instructions: of machine code; converts: E2M1 conversions; fault: or None."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    converts: int
    fault: str | None


def compile_source(source: str, target: str, folder: Path) -> list[Report]:
    """What the kernels of one file become on one target; RuntimeError with nvcc's words if it does not compile."""
    made = folder / f"{source}.{target}"
    made.mkdir()
    command = [
        str(find_nvcc()),
        *FLAGS,
        f"-arch={target}",
        "-Xptxas",
        "-v",
        "-cubin",
        "--keep",
        "--keep-dir",
        str(made),
    ]
    command += [str(FOLDER / f"{source}.cu"), "-o", str(made / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source}.cu for {target}: {done.stderr}")
    ptx = "\n".join(path.read_text() for path in made.glob("*.ptx"))
    return list(_reports(done.stderr, _functions(ptx), _machine_code(made / "out.cubin"), target))


def _reports(log: str, ptx: dict[str, str], sass: dict[str, str], target: str) -> Iterator[Report]:
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, log, re.DOTALL)
    for (name, stack, stored, loaded, registers), plain in zip(found, _demangled([f[0] for f in found]), strict=True):
        text, spilled = ptx[name], int(stored) + int(loaded)
        code = sass.get(name, "")
        faults = [
            f"spills {spilled} bytes" if spilled else "",
            f"keeps {stack} bytes in local memory" if int(stack) else "",
            "reads or writes local memory" if not int(stack) and re.search(r"\b(LDL|STL)\b", code) else "",
            # a quotient takes FFMAs, but none of two numbers at once: those ptxas makes of our own products and sums
            "float32 products and sums are fused"
            if re.search(r"\bfma\.rn\.f32", text) or re.search(r"\bFFMA2\b", code)
            else "",
            "float32 subnormals are flushed" if ".ftz" in text else "",
            "an approximate quotient" if re.search(r"\b(div|rcp)\.(approx|full)", text) else "",
        ]
        yield Report(
            kernel=plain,
            target=target,
            registers=int(registers),
            spill_bytes=spilled,
            stack_bytes=int(stack),
            shared_bytes=shared_bytes(plain),
            instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, re.MULTILINE)),
            converts=text.count("cvt.rn.satfinite.e2m1x2.f32"),
            fault="; ".join(filter(None, faults)) or None,
        )


def shared_bytes(kernel: str) -> int:
    """Dynamic shared memory a launch asks for, by the (demangled) name of the kernel."""
    width = 4 if "<unsigned int" in kernel else 2
    if kernel.startswith("amax"):
        rows = TILE_ROWS if kernel.endswith("true>") else FLAT_ROWS
    elif kernel.startswith("quantize"):
        rows = FLAT_ROWS if kernel.endswith("None>") and "Eden" not in kernel else TILE_ROWS
    else:
        return 0
    return rows * TILE_COLUMNS * width + BESIDE


def _functions(ptx: str) -> dict[str, str]:
    return dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", ptx, re.DOTALL))


def _machine_code(cubin: Path) -> dict[str, str]:
    """SASS of each kernel; nothing where there is no cuobjdump."""
    tool = shutil.which("cuobjdump") or _tritons_cuobjdump()
    if tool is None:
        return {}
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _tritons_cuobjdump() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None


def _demangled(names: list[str]) -> list[str]:
    """Names without what goes without saying."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout
    for noise in ("nvfp4::", "cuda::", "scalar::", "(anonymous namespace)::", "void "):
        text = text.replace(noise, "")
    return [re.sub(r"\((Matrix|Operand|CodeMatrix).*", "", line).replace("> >", ">>") for line in text.splitlines()]


def reports(targets: Iterable[str], sources: Iterable[str] = SOURCES, jobs: int = 2) -> list[Report]:
    """Every kernel of every file for every target."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(compile_source, s, t, Path(folder)) for t, s in product(targets, sources)]
        return [report for task in tasks for report in task.result()]


def show(rows: list[Report]) -> None:
    """A table, a kernel and target a line."""
    table = Table(title="CUDA kernels, compiled and run on nothing", title_justify="left")
    names = ("target", "kernel", "registers", "spills", "stack", "shared", "instructions", "E2M1 conversions")
    for column in names:
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for r in rows:
        counts = (r.registers, r.spill_bytes, r.stack_bytes, r.shared_bytes, r.instructions, r.converts)
        table.add_row(*map(str, (r.target, r.kernel, *counts)), style="red" if r.fault else None)
    console = Console()
    console.print(table)
    for r in rows:
        if r.fault:
            console.print(f"{r.target} {r.kernel}: {r.fault}", style="red", markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Compile, show, keep; 1 if any kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--json", type=Path, help="keep the table here")
    args = parser.parse_args(arguments)
    if find_nvcc() is None:
        parser.error("there is no nvcc on PATH")
    rows = reports(args.targets, args.sources)
    show(rows)
    if args.json:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        args.json.write_text(f"[\n{lines}\n]\n")
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    sys.exit(main())
