"""Compiles the CUDA kernels without a GPU and says what came out: python -m tools.cuda_build

    each file of csrc/cuda  x  each target
        nvcc -cubin --keep, with the flags of nvfp4/backends/native/cuda_targets.py, as setup.py
        registers, stack and spills from ptxas' own words, instructions from the machine code
        a fault where the arithmetic is not the reference's, or values leave the registers

``--json PATH`` keeps the table, which is benchmarks/results/cuda.json. nvcc has to be on PATH.
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

from nvfp4.backends.native.cuda_targets import FLAGS, SOURCES, TARGETS, find_nvcc
from tools.machine_code import (
    E2M1_CONVERSION,
    inspected,
    instruction_count,
    memory_faults,
    rounding_faults,
    show,
    toolkits_cuobjdump,
)

FOLDER = Path(__file__).parent.parent / "csrc" / "cuda"
ARCHITECTURES = tuple(f"sm_{target}" for target in TARGETS)

TILE_COLUMNS, FLAT_ROWS, TILE_ROWS, BESIDE = 128, 32, 128, 632
"""Of tile.h and quantize.h: elements of a tile, and bytes beside it; a test holds them equal."""

OWN_SHARED = {
    "rows_kernel": 12,
    "flat_amax_kernel": 32,
    "mma_eden_kernel": 2 * TILE_ROWS * TILE_COLUMNS + 608,
}
"""Bytes of shared memory of kernels whose tile is not tile.h's: the scales of a tensor, a word per
warp, a tile of another order with signs and factors."""


@dataclass(frozen=True)
class CudaKernel:
    """One kernel for one target.

    instructions: of machine code. converts: conversions to E2M1. fault: what is wrong, or None.
    """

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    converts: int
    fault: str | None


def compile_source(source: str, target: str, folder: Path) -> list[CudaKernel]:
    """What the kernels of one file become on one target.

    Raises RuntimeError with nvcc's words if it does not compile.
    """
    parts = folder / f"{source}.{target}"
    parts.mkdir()
    cubin = parts / "out.cubin"
    command = [str(find_nvcc()), *FLAGS, f"-arch={target}", "-Xptxas", "-v", "-cubin"]
    command += ["--keep", "--keep-dir", str(parts), str(FOLDER / f"{source}.cu"), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source}.cu for {target}: {done.stderr}")

    # nvcc keeps its PTX beside the cubin: what was asked for, and what ptxas made of it.
    ptx = "\n".join(path.read_text() for path in parts.glob("*.ptx"))
    return list(kernels_of(done.stderr, _functions(ptx), _machine_code(cubin), target))


def kernels_of(
    log: str, ptx: dict[str, str], sass: dict[str, str], target: str
) -> Iterator[CudaKernel]:
    """Every kernel that ptxas' log names. ptx, sass: by mangled name; sass may lack some."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )

    # ptxas speaks of one entry after the other, each over several lines.
    entries = re.findall(pattern, log, re.DOTALL)
    names = _demangled([entry[0] for entry in entries])
    for (mangled, stack, stored, loaded, registers), name in zip(entries, names, strict=True):
        # Faults by PTX and machine code both: ptxas adds some that no PTX shows.
        text, code = ptx[mangled], sass.get(mangled, "")
        spilled = int(stored) + int(loaded)
        faults = [*memory_faults(code, spilled, int(stack)), *rounding_faults(text, code, True)]
        if re.search(r"\b(div|rcp)\.(approx|full)", text):
            faults.append("an approximate quotient")
        yield CudaKernel(
            kernel=name,
            target=target,
            registers=int(registers),
            spill_bytes=spilled,
            stack_bytes=int(stack),
            shared_bytes=shared_bytes(name),
            instructions=instruction_count(code),
            converts=len(re.findall(E2M1_CONVERSION, text)),
            fault="; ".join(faults) or None,
        )


def shared_bytes(kernel: str) -> int:
    """Dynamic shared memory that a launch asks for, by the demangled name of the kernel."""
    width = 4 if "<unsigned int" in kernel else 2
    for name, size in OWN_SHARED.items():
        if kernel.startswith(name):
            return size
    if kernel.startswith("amax"):
        rows = TILE_ROWS if kernel.endswith("true>") else FLAT_ROWS
    elif kernel.startswith("quantize"):
        is_flat = kernel.endswith("None>") and "Eden" not in kernel
        rows = FLAT_ROWS if is_flat else TILE_ROWS
    else:
        return 0
    return rows * TILE_COLUMNS * width + BESIDE


def _functions(ptx: str) -> dict[str, str]:
    return dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", ptx, re.DOTALL))


def _machine_code(cubin: Path) -> dict[str, str]:
    """SASS of each kernel by its mangled name; nothing where there is no cuobjdump."""
    tool = toolkits_cuobjdump()
    if tool is None:
        return {}
    parts = re.split(r"Function : (\w+)", inspected(tool, "-sass", cubin.read_bytes()))[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _demangled(names: list[str]) -> list[str]:
    """Names without what goes without saying."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout
    for noise in ("nvfp4::", "cuda::", "scalar::", "(anonymous namespace)::", "void "):
        text = text.replace(noise, "")

    # The long argument lists say nothing that the template arguments do not.
    arguments = r"\((Matrix|Operand|CodeMatrix|Rows|Chunk).*"
    return [re.sub(arguments, "", line).replace("> >", ">>") for line in text.splitlines()]


def reports(
    targets: Iterable[str], sources: Iterable[str] = SOURCES, jobs: int = 2
) -> list[CudaKernel]:
    """Every kernel of every file for every target, ``jobs`` compilers at once."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        tasks = [
            pool.submit(compile_source, source, target, Path(folder))
            for target, source in product(targets, sources)
        ]
        return [row for task in tasks for row in task.result()]


def main(arguments: list[str] | None = None) -> int:
    """Compile, show, keep; 1 if any kernel has a fault."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--targets", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--json", type=Path, help="keep the table here")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    args = parser.parse_args(arguments)
    if find_nvcc() is None:
        parser.error("there is no nvcc on PATH")

    rows = reports(args.targets, args.sources, args.jobs)
    show("CUDA kernels, compiled and run on nothing", [asdict(row) for row in rows])
    if args.json:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        args.json.write_text(f"[\n{lines}\n]\n")
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    sys.exit(main())
