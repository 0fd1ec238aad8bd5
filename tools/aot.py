"""Compile every kernel for every card ahead of time, without one: what instructions, registers and memory it takes.

``python -m tools.aot --json PATH``, or ``make aot``, which does so with two versions of Triton: the
newest, and 3.6, which torch 2.10 and 2.11 bring along. Half an hour of one core each, shared among processes; Triton
keeps what it has compiled, so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4.backends.triton.variants import KernelVariant

KERNEL_MODULES = (
    "nvfp4.backends.triton.gemm.launch",
    "tools.quantize_variants",
    "tools.activation_variants",
    "nvfp4.backends.triton.transpose",
    "nvfp4.backends.triton.gemm.decoded",
)
"""Modules with ``kernel_variants(capability, few) -> list[KernelVariant]``."""


class Card(NamedTuple):
    """Limits of a compute capability; shared memory in bytes a block, and a multiprocessor (1 KB a block is taken)."""

    shared_block: int
    shared_total: int
    warps: int
    blocks: int


REGISTERS = 65536
"""32-bit registers a multiprocessor, on every card here."""

CARDS: dict[int, Card] = {
    80: Card(166_912, 167_936, 64, 32),
    86: Card(101_376, 102_400, 48, 16),
    89: Card(101_376, 102_400, 48, 24),
    90: Card(232_448, 233_472, 64, 32),
    100: Card(232_448, 233_472, 64, 32),
    103: Card(232_448, 233_472, 64, 32),
    120: Card(101_376, 102_400, 48, 24),
    121: Card(101_376, 102_400, 48, 24),
}
"""Source: CUDA C++ Programming Guide, "Compute Capabilities", technical specifications (blocks of 121 as of 120)."""


@dataclass(frozen=True)
class Report:
    """One kernel on one card. occupancy: resident warps of the possible. fault: what is wrong with it, or None."""

    kernel: str
    capability: int
    instruction: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    sass_instructions: int
    fault: str | None


def compile_variant(variant: KernelVariant, capability: int) -> Any:
    """Triton's compiled kernel (``asm``, ``metadata``), arguments taken to be aligned to 16 as in training."""
    names = variant.kernel.arg_names
    types = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name] != "constexpr" and not variant.kernel.params[i].do_not_specialize
    }
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options |= {"enable_fp_fusion": not variant.exact}
    source = ASTSource(variant.kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def inspect(variant: KernelVariant, capability: int, compiled: Any) -> Report:
    """Read what ``compile_variant`` returned: PTX for the instruction, machine code for rounding and resources."""
    ptx = compiled.asm["ptx"]
    found = re.search(variant.instruction, ptx) if variant.instruction else None
    registers, spilled = _resources(compiled.asm["cubin"])
    sass = machine_code(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    card = CARDS[capability]
    # dividing takes FFMAs, but none of two numbers at once: those come of our own products and sums
    own = re.search(r"\bfma\.", ptx) or re.search(r"\bFFMA2", sass)
    fused = own if variant.divides else re.search(r"\bFFMA", sass)
    flushed = re.search(r"\.ftz\.", ptx) if variant.divides else re.search(r"\bF(MUL|ADD|FMA)\S*\.FTZ", sass)
    faults = [
        "" if found or not variant.instruction else f"no {variant.instruction} in the PTX",
        f"spills {spilled} bytes" if spilled else "",
        "reads or writes local memory" if re.search(r"\b(LDL|STL)\b", sass) and not spilled else "",
        f"{shared} bytes of shared memory, {card.shared_block} allowed" if shared > card.shared_block else "",
        "float32 products and sums are fused" if variant.exact and fused else "",
        "float32 subnormals are flushed" if variant.exact and flushed else "",
    ]
    return Report(
        kernel=variant.name,
        capability=capability,
        instruction=found.group() if found else "-",
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared,
        occupancy=occupancy(registers, shared, variant.num_warps, card, compiled.metadata.tmem_size),
        sass_instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", sass, re.MULTILINE)),
        fault="; ".join(filter(None, faults)) or None,
    )


def occupancy(registers: int, shared: int, warps: int, card: Card, tensor_columns: int = 0) -> float:
    """Resident warps of the possible: whole blocks, registers allotted by 256 a warp, 1 KB of shared memory a block.

    tensor_columns: of the 512 of tensor memory that a multiprocessor with tcgen05 has.
    """
    by_tensor_memory = 512 // tensor_columns if tensor_columns else card.blocks
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = card.shared_total // (shared + 1024)
    return min(by_registers, by_shared, by_tensor_memory, card.warps // warps, card.blocks) * warps / card.warps


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes spilled a thread): ptxas counts spills as the stack frame, which Triton never uses."""
    text = _inspected(cubin, "--dump-resource-usage")
    numbers = [int(n) for n in re.findall(r"(?:REG|STACK|LOCAL):(\d+)", text)]
    if len(numbers) != 3:
        raise RuntimeError(f"cuobjdump --dump-resource-usage printed something else than one kernel: {text!r}")
    return numbers[0], numbers[1] + numbers[2]


def machine_code(cubin: bytes) -> str:
    """SASS, an instruction a line."""
    return _inspected(cubin, "-sass")


def _inspected(cubin: bytes, option: str) -> str:
    """What ``cuobjdump`` of Triton's wheel says about this machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), option, file.name], check=True, capture_output=True, text=True).stdout


class Place(NamedTuple):
    """Where a kernel is listed: what another process needs to know of it."""

    module: str
    capability: int
    few: bool
    position: int

    def variants(self) -> list[KernelVariant]:
        """The list it is in."""
        listed: list[KernelVariant] = importlib.import_module(self.module).kernel_variants(self.capability, self.few)
        return listed

    def report(self) -> Report:
        """Compile and inspect it."""
        variant = self.variants()[self.position]
        return inspect(variant, self.capability, compile_variant(variant, self.capability))


def places(capabilities: Iterable[int], few: bool = False) -> list[Place]:
    """Every listed kernel for every card."""
    lists = [Place(module, capability, few, 0) for capability in capabilities for module in KERNEL_MODULES]
    return [place._replace(position=i) for place in lists for i in range(len(place.variants()))]


def reports(found: Iterable[Place], jobs: int = 1) -> Iterator[Report]:
    """Of these kernels, in order, by this process or several; RuntimeError where Triton only interprets."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled")
    if jobs == 1:
        yield from map(Place.report, found)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(Place.report, found)


def show(rows: list[Report]) -> None:
    """A table, a kernel and card a line."""
    table = Table(title=f"compiled by Triton {triton.__version__}, run on nothing", title_justify="left")
    for column in ("sm", "kernel", "instruction", "registers", "spills", "shared", "occupancy", "SASS"):
        table.add_column(column, justify="left" if column in ("kernel", "instruction") else "right")
    for r in rows:
        counts = (r.registers, r.spill_bytes, r.shared_bytes, f"{r.occupancy:.0%}", r.sass_instructions)
        cells = (r.capability, r.kernel, r.instruction, *counts)
        table.add_row(*map(str, cells), style="red" if r.fault else None)
    console = Console()
    console.print(table)
    for r in rows:
        if r.fault:
            console.print(f"sm_{r.capability} {r.kernel}: {r.fault}", style="red", markup=False)


def as_json(rows: list[Report]) -> str:
    """The table, a kernel and card a line; columns are named once."""
    names = json.dumps([field.name for field in fields(Report)])
    lines = ",\n".join(f"  {json.dumps(astuple(row))}" for row in rows)
    return f'{{\n "triton": "{triton.__version__}",\n "columns": {names},\n "rows": [\n{lines}\n ]\n}}\n'


def main(arguments: list[str] | None = None) -> int:
    """Compile, show, keep; 1 if any kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(CARDS), choices=list(CARDS))
    parser.add_argument("--few", action="store_true", help="the few kernels that the tests compile")
    parser.add_argument("--json", type=Path, help="keep the table here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    args = parser.parse_args(arguments)
    found = places(args.capabilities, args.few)
    rows = list(track(reports(found, args.jobs), "compiling", len(found)))
    show(rows)
    if args.json:
        args.json.write_text(as_json(rows))
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    sys.exit(main())
