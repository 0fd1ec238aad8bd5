"""Compiles every Triton kernel for every card, without one: python -m tools.aot

    each module of KERNEL_MODULES lists its kernels in the forms in which recipes launch them
        triton.compile for each compute capability of CARDS
        instruction that the PTX must have, registers, spills, shared memory, occupancy
        a fault where the arithmetic is not the reference's, or a kernel does not fit

Why: a kernel that spills, that fuses a product and a sum, or that a card has no room for is found
here, without a GPU. What cannot be found is speed.

``--json PATH`` keeps the table; ``make aot`` does so with two Tritons: the newest, and 3.6, which
torch 2.10 and 2.11 bring along. Half an hour of one core each, shared among processes; Triton keeps
what it has compiled, so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import triton
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4.backends.triton.variants import KernelVariant
from tools.machine_code import (
    inspected,
    instruction_count,
    memory_faults,
    rounding_faults,
    show,
    tritons_cuobjdump,
)

KERNEL_MODULES = (
    "nvfp4.backends.triton.gemm.launch",
    "tools.quantize_variants",
    "tools.activation_variants",
    "nvfp4.backends.triton.transpose",
    "nvfp4.backends.triton.held",
    "nvfp4.backends.triton.swizzled",
    "nvfp4.backends.triton.gemm.decoded",
)
"""Modules with ``kernel_variants(capability, few) -> list[KernelVariant]``."""


class Card(NamedTuple):
    """Limits of a compute capability: bytes of shared memory per block and per multiprocessor.

    Of a multiprocessor's, 1 KB per block is taken.
    """

    shared_block: int
    shared_total: int
    warps: int
    blocks: int


REGISTERS = 65536
"""32-bit registers of a multiprocessor, on every card here."""

TENSOR_COLUMNS = 512
"""Columns of tensor memory per multiprocessor, on 100 and 103."""

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
"""CUDA C++ Programming Guide, "Compute Capabilities", technical specifications; 121 as 120."""


@dataclass(frozen=True)
class TritonKernel:
    """One kernel on one card. occupancy: resident warps of the possible. fault: or None."""

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
    """Triton's compiled kernel (``asm``, ``metadata``), pointers aligned to 16 as in training."""
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


def inspect(variant: KernelVariant, capability: int, compiled: Any) -> TritonKernel:
    """Read what ``compile_variant`` returned: PTX, machine code, and what the kernel takes."""
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, spilled = resources(cubin)
    sass = machine_code(cubin)
    shared, card = compiled.metadata.shared, CARDS[capability]

    faults = []
    instruction = re.search(variant.instruction, ptx) if variant.instruction else None
    if variant.instruction and instruction is None:
        faults.append(f"no {variant.instruction} in the PTX")
    faults += memory_faults(sass, spilled)
    if shared > card.shared_block:
        faults.append(f"{shared} bytes of shared memory, {card.shared_block} allowed")

    # Only cards with tcgen05 have tensor memory; elsewhere it is 0 columns.
    columns = compiled.metadata.tmem_size
    if columns > TENSOR_COLUMNS:
        faults.append(f"{columns} columns of tensor memory, {TENSOR_COLUMNS} allowed")

    # What Triton cannot compile for a card becomes a trap, without a word of warning.
    if re.search(r"^\s*trap;", ptx, re.MULTILINE):
        faults.append("compiled to a trap")
    if variant.exact:
        faults += rounding_faults(ptx, sass, variant.divides)

    return TritonKernel(
        kernel=variant.name,
        capability=capability,
        instruction=instruction.group() if instruction else "-",
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared,
        occupancy=occupancy(registers, shared, variant.num_warps, card, columns),
        sass_instructions=instruction_count(sass),
        fault="; ".join(faults) or None,
    )


def occupancy(
    registers: int, shared: int, warps: int, card: Card, tensor_columns: int = 0
) -> float:
    """Resident warps of the possible, in whole blocks.

    Registers are allotted by 256 per warp. tensor_columns: of those that a multiprocessor with
    tcgen05 has, ``TENSOR_COLUMNS``.
    """
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = card.shared_total // (shared + 1024)
    by_tensor_memory = TENSOR_COLUMNS // tensor_columns if tensor_columns else card.blocks
    by_warps = card.warps // warps

    # The scarcest of the five decides.
    blocks = min(by_registers, by_shared, by_tensor_memory, by_warps, card.blocks)
    return blocks * warps / card.warps


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes spilled) per thread.

    ptxas counts spills as the stack frame, which Triton never uses.
    """
    text = inspected(_cuobjdump(), "--dump-resource-usage", cubin)
    numbers = [int(n) for n in re.findall(r"(?:REG|STACK|LOCAL):(\d+)", text)]
    if len(numbers) != 3:
        what = "cuobjdump --dump-resource-usage printed something else than one kernel"
        raise RuntimeError(f"{what}: {text!r}")
    return numbers[0], numbers[1] + numbers[2]


def machine_code(cubin: bytes) -> str:
    """SASS, one instruction per line."""
    return inspected(_cuobjdump(), "-sass", cubin)


def _cuobjdump() -> str:
    tool = tritons_cuobjdump()
    if tool is None:
        raise RuntimeError(f"Triton {triton.__version__} has no cuobjdump in its wheel")
    return tool


class Place(NamedTuple):
    """Where a kernel is listed: what another process needs to know of it."""

    module: str
    capability: int
    few: bool
    position: int

    def variants(self) -> list[KernelVariant]:
        """The list it is in."""
        module = importlib.import_module(self.module)
        listed: list[KernelVariant] = module.kernel_variants(self.capability, self.few)
        return listed

    def report(self) -> TritonKernel:
        """Compile and inspect it."""
        variant = self.variants()[self.position]
        return inspect(variant, self.capability, compile_variant(variant, self.capability))


def places(capabilities: Iterable[int], few: bool = False) -> list[Place]:
    """Every listed kernel for every card."""
    lists = [
        Place(module, capability, few, 0)
        for capability in capabilities
        for module in KERNEL_MODULES
    ]
    return [each._replace(position=i) for each in lists for i in range(len(each.variants()))]


def reports(listed: Iterable[Place], jobs: int = 1) -> Iterator[TritonKernel]:
    """Reports of these kernels, in order, by this process or several.

    Raises RuntimeError where Triton only interprets.
    """
    if triton.knobs.runtime.interpret:
        what = "TRITON_INTERPRET is set: kernels are interpreted in this process"
        raise RuntimeError(f"{what} and cannot be compiled")
    if jobs == 1:
        yield from map(Place.report, listed)
        return

    # Spawned, not forked: a fork would copy Triton's and torch's threads in an unknown state.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(Place.report, listed)


def as_json(rows: list[TritonKernel]) -> str:
    """The table, one line per kernel and card; columns are named once."""
    names = json.dumps([column.name for column in fields(TritonKernel)])
    lines = ",\n".join(f"  {json.dumps(astuple(row))}" for row in rows)
    version = f' "triton": "{triton.__version__}",\n "columns": {names},'
    return f'{{\n{version}\n "rows": [\n{lines}\n ]\n}}\n'


def main(arguments: list[str] | None = None) -> int:
    """Compile, show, keep; 1 if any kernel has a fault."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    cards = list(CARDS)
    parser.add_argument("--capabilities", type=int, nargs="+", default=cards, choices=cards)
    parser.add_argument("--few", action="store_true", help="the few that the tests compile")
    parser.add_argument("--json", type=Path, help="keep the table here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiling processes")
    args = parser.parse_args(arguments)

    listed = places(args.capabilities, args.few)
    rows = list(track(reports(listed, args.jobs), "compiling", len(listed)))
    title = f"compiled by Triton {triton.__version__}, run on nothing"
    show(title, [asdict(row) for row in rows])
    if args.json:
        args.json.write_text(as_json(rows))
    return int(any(row.fault for row in rows))


if __name__ == "__main__":
    sys.exit(main())
