"""Just enough of PTX to run the inline assembly of the kernels in Triton's interpreter, which has
none: by the words of the PTX ISA on ``cvt`` and ``mov``, with the E2M1 of the oracle."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

Register = npt.NDArray[Any]


def _to_e2m1x2(upper: Register, lower: Register) -> Register:
    """cvt.rn.satfinite.e2m1x2.f32 d, a, b: a into the upper four bits; NaN becomes the largest
    number."""
    high, low = (
        np.where(np.isnan(x), 7, oracle.e2m1_nearest(x.astype(np.float32))) for x in (upper, lower)
    )
    return (high << 4 | low).astype(np.uint8)


def _from_e2m1x2(codes: Register) -> Register:
    """cvt.rn.f16x2.e2m1x2 d, a: the upper four bits into the upper half."""
    high, low = (
        oracle.e2m1_value((codes >> shift & 15).astype(np.uint8)).astype(np.float16)
        for shift in (4, 0)
    )
    return high.view(np.uint16).astype(np.uint32) << 16 | low.view(np.uint16)


CONVERSIONS = {
    "cvt.rn.satfinite.e2m1x2.f32": _to_e2m1x2,
    "cvt.rn.f16x2.e2m1x2": _from_e2m1x2,
    "cvt.f32.f16": lambda half: half.astype(np.uint16).view(np.float16).astype(np.float32),
}


def execute(assembly: str, registers: dict[str, Register]) -> None:
    """Run a block of instructions; ``registers`` holds the inputs, and then everything. KeyError
    for an unknown one."""
    for line in filter(
        None, (line.strip() for line in re.sub(r"^\{|\}$", "", assembly.strip()).split(";"))
    ):
        if line.startswith(".reg"):
            continue
        name, operands = line.split(None, 1)
        first, rest = re.fullmatch(r"(\{.*?\}|[^,]+),(.*)", operands, re.DOTALL).groups()  # type: ignore[union-attr]
        if name != "mov.b32":
            registers[first.strip()] = CONVERSIONS[name](
                *(registers[word.strip()] for word in rest.split(","))
            )
        elif first.startswith("{"):
            for place, part in enumerate(first.strip("{}").split(",")):
                registers[part.strip()] = (registers[rest.strip()] >> 16 * place & 0xFFFF).astype(
                    np.uint16
                )
        else:
            parts = [
                registers[part.strip()].astype(np.uint32) for part in rest.strip(" {}").split(",")
            ]
            width = 32 // len(parts)
            registers[first.strip()] = sum(
                (p << width * i for i, p in enumerate(parts)), np.uint32(0)
            )


def inline_asm_elementwise(
    asm: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int
) -> tl.tensor:
    """``tl.inline_asm_elementwise`` with one result: ``pack`` neighbours are one call."""
    given = constraints.split(",")
    assert given.count("=f") + given.count("=r") == pack
    assert len(given) == pack * (1 + len(args))
    columns = [arg.handle.data.reshape(-1, pack)[:, j] for arg in args for j in range(pack)]
    registers = {f"${pack + i}": column for i, column in enumerate(columns)}
    execute(asm, registers)
    kind = {tl.float32: np.float32, tl.int32: np.int32}[dtype]
    made = np.stack([registers[f"${j}"] for j in range(pack)], axis=1).astype(
        kind if kind is np.float32 else np.uint32
    )
    shape = args[0].handle.data.shape
    return tl.tensor(
        TensorHandle(made.view(kind).reshape(shape), dtype), tl.block_type(dtype, list(shape))
    )
