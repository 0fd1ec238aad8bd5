"""What nvcc makes of the CUDA kernels for cards that are not here: that they compile, fit, and
round every operation.

``make test`` compiles MS-EDEN with the gradient's one-read kernel for one Blackwell and decoding
for Hopper, ``make cuda`` all of them for five kinds of GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cuda_host import KERNELS

from nvfp4.backends.native.cuda_targets import SOURCES, find_nvcc
from tools import cuda_build
from tools.cuda_build import FOLDER, shared_bytes

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc on PATH")
SHARED_LIMIT = 101_376
"""Bytes a block may take on sm_120, the least of all targets (CUDA C++ Programming Guide, "Compute
Capabilities")."""


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "target", "count"),
    [("eden", "sm_100a", 12), ("scales", "sm_90a", 13), ("mma_eden", "sm_100a", 4)],
)
def test_kernels_compile_and_fit(source: str, target: str, count: int) -> None:
    """No spill, no fused product, no approximate quotient, no flushed subnormal; two blocks of 256
    threads in the registers of a multiprocessor; E2M1 conversions where the card has them."""
    rows = cuda_build.reports([target], [source])
    assert len(rows) == count
    assert {row.fault for row in rows} == {None}
    for row in rows:
        assert 0 < row.registers <= 128
        assert row.shared_bytes <= SHARED_LIMIT
        if row.kernel.startswith(("quantize", "mma_eden")):
            assert (row.converts > 0) == (target != "sm_90a")


@needs_nvcc
def test_a_kernel_that_fuses_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule itself: one product and one sum, with our flags and with contraction allowed."""
    monkeypatch.setattr(cuda_build, "FOLDER", tmp_path)
    (tmp_path / "sum.cu").write_text(
        "__global__ void sum(float* x, float y) { x[threadIdx.x] = x[threadIdx.x] * y + y; }\n"
    )
    assert [row.fault for row in cuda_build.reports(["sm_90a"], ["sum"])] == [None]
    fused = tuple(flag.replace("fmad=false", "fmad=true") for flag in cuda_build.FLAGS)
    monkeypatch.setattr(cuda_build, "FLAGS", fused)
    faults = [row.fault for row in cuda_build.reports(["sm_90a"], ["sum"])]
    assert faults == ["float32 products and sums are fused"]


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("FFMA R2, R3, R4, R5 ;", None),
        ("FMUL2 R2, R4.F32x2.HI_LO, R6.F32x2.HI_LO ;", None),
        (
            "FFMA2 R2, R4.F32x2.HI_LO, R6.F32x2.HI_LO, R8.F32x2.HI_LO ;",
            "float32 products and sums are fused",
        ),
        ("LDL.64 R2, [R1+0x8] ;", "reads or writes local memory"),
        ("STL [R1], R2 ;", "reads or writes local memory"),
    ],
)
def test_machine_code_is_looked_at(code: str, fault: str | None) -> None:
    """What ptxas does on its own, and no PTX shows: two numbers fused at once, values out of
    registers. A single FFMA may be part of a quotient."""
    log = (
        "Compiling entry function 'k' for 'sm_100a'\n 0 bytes stack frame, 0 bytes spill stores, "
        "0 bytes spill loads\n Used 10 registers"
    )
    (row,) = cuda_build.kernels_of(
        log, {"k": ""}, {"k": f"        /*0010*/     {code}\n"}, "sm_100a"
    )
    assert (row.fault, row.instructions) == (fault, 1)


def test_shared_memory_is_counted_as_it_is_asked_for() -> None:
    """The sizes in cuda_build are those of tile.h; a tile of float32 is the largest."""
    text = (FOLDER / "tile.h").read_text()
    sizes = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    assert (sizes["kTile"], sizes["kFlatRows"]) == (cuda_build.TILE_ROWS, cuda_build.FLAT_ROWS)
    assert (
        shared_bytes("quantize_kernel<unsigned int, Eden<false>, Eden<false>>")
        == 128 * 128 * 4 + 632
    )
    assert (
        shared_bytes("quantize_kernel<unsigned short, Scaled<Nearest, false>, None>")
        == 32 * 128 * 2 + 632
    )
    assert shared_bytes("amax_kernel<unsigned short, true, false>") == 32 * 128 * 2 + 632
    assert shared_bytes("mma_eden_kernel<false, true, true>") == 128 * 128 * 2 + 608
    assert shared_bytes("decode_kernel") == 0


def test_the_build_lists_every_source() -> None:
    """setup.py and the reports read one list, which has every file; the host driver compiles the
    same."""
    assert sorted(SOURCES) == sorted(KERNELS) == sorted(path.stem for path in FOLDER.glob("*.cu"))
    assert cuda_build.SOURCES is SOURCES
    setup = (FOLDER.parent.parent / "setup.py").read_text()
    assert "cuda_targets.py" in setup
    assert "sm_90" not in setup
    assert "-fmad" not in setup
