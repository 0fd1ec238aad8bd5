"""What Triton makes of our kernels for cards that are not here: the instructions, and that they
fit.

``make test`` compiles a few kernels for three cards, ``make aot`` all of them for eight.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from nvfp4.backends.triton.gemm.decoded import DECODING, ISSUE_SHARE, pays  # noqa: E402
from nvfp4.backends.triton.gemm.launch import TILES, choose_tile, family, kernel_variants  # noqa: E402
from tools import aot, machine_code  # noqa: E402
from tools.quantize_variants import kernel_variants as quantizers  # noqa: E402

if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
    pytest.skip("this Triton has no CUDA tools in its wheel", allow_module_level=True)

TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
FP4 = {
    100: "kind::mxf4nvf4.block_scale",
    120: "kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
}


OF_THE_CARD = ("gemm", "quantize_kernel: rtn", "quantize_kernel: ms_eden")
"""Kernels with instructions that another card does not have: tensor cores, and conversions to
E2M1."""


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [
        (90, OF_THE_CARD),
        (100, ("",)),
        (120, OF_THE_CARD),
        pytest.param(90, ("",), marks=pytest.mark.slow),
        pytest.param(120, ("",), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, int) else "all" if value == ("",) else "own",
)
def test_kernels_compile_to_tensor_cores_and_fit(capability, kernels):
    """Native FP4 on both Blackwells, FP16 on Hopper; E2M1 by the hardware's conversion; no spill,
    no fused rounding, shared memory within the card's. The kernels that are the same on every card
    are slow but for one card."""
    places = [
        p
        for p in aot.places([capability], few=True)
        if p.variants()[p.position].name.startswith(kernels)
    ]
    rows = list(aot.reports(places))
    assert {row.fault for row in rows} == {None}
    gemms = [row for row in rows if row.kernel.startswith("gemm")]
    assert len(gemms) == 2
    for row in gemms:
        assert row.instruction.startswith(TENSOR_CORES[capability])
        assert FP4.get(capability, "f32.f16.f16") in row.instruction
        assert 32 <= row.registers <= 255
        assert 0 < row.shared_bytes <= aot.CARDS[capability].shared_block
        assert 0 < row.occupancy <= 1
        assert row.sass_instructions > 300
    nearest = [
        row
        for row in rows
        if row.kernel.startswith(("quantize_kernel: rtn", "quantize_kernel: ms_eden"))
    ]
    assert {row.instruction for row in nearest} == {
        "cvt.rn.satfinite.e2m1x2.f32" if capability >= 100 else "-"
    }
    assert len(nearest) == 2
    assert kernels == OF_THE_CARD or any("seeds in memory" in row.kernel for row in rows)


@pytest.mark.parametrize("capability", [103, 121])
def test_a_conversion_packs_two_elements(capability):
    """In the machine code: one instruction for two of the 32 elements of a thread, and the packing
    is in it."""
    variant = quantizers(capability, few=True)[0]
    sass = aot.machine_code(aot.compile_variant(variant, capability).asm["cubin"])
    assert len(re.findall(r"F2FP\.SATFINITE\.E2M1\.F32\.PACK_AB_MERGE_C", sass)) == 32 // 2


def test_the_one_cast_rounds_to_nearest():
    """float32 to BF16, which the interpreter cannot show."""
    assert "cvt.rn.bf16" in aot.compile_variant(kernel_variants(90, few=True)[0], 90).asm["ptx"]


def test_faults_are_found():
    """The rules themselves, on a kernel made worse: 128 x 256 sums on 4 warps spill and exceed what
    sm_120 shares."""
    variant = kernel_variants(100, few=True)[0]
    worse = replace(variant, num_warps=4, num_stages=6, instruction="dp4a")
    fault = aot.inspect(worse, 120, aot.compile_variant(worse, 120)).fault
    for words in ("no dp4a in the PTX", "spills", "bytes of shared memory, 101376 allowed"):
        assert words in fault
    adds = kernel_variants(90, few=True)[1]
    fused = aot.compile_variant(replace(adds, exact=False), 90)
    assert aot.inspect(adds, 90, fused).fault == "float32 products and sums are fused"


def test_local_memory_is_found_in_machine_code(monkeypatch):
    """An array indexed by a variable lies there, without any spill."""
    variant, read = kernel_variants(90, few=True)[1], aot.machine_code
    compiled = aot.compile_variant(variant, 90)
    monkeypatch.setattr(
        aot, "machine_code", lambda cubin: read(cubin) + "        /*0010*/   STL [R1], R2 ;\n"
    )
    assert aot.inspect(variant, 90, compiled).fault == "reads or writes local memory"


def test_another_process_reports_the_same():
    """A kernel finds its way there by name; and the table that is kept has a kernel a line under
    columns named once."""
    found = [place for place in aot.places([90], few=True) if "quantize" in place.module][-2:-1]
    rows = list(aot.reports(found, jobs=2))
    assert rows == list(aot.reports(found))
    kept = json.loads(aot.as_json(rows))
    assert [aot.TritonKernel(*row) for row in kept["rows"]] == rows
    assert kept["columns"][0] == "kernel"


def test_occupancy_counts_whole_blocks():
    """By hand: 128 registers x 256 threads fit twice, 100 KB of shared memory twice, 512 columns
    once."""
    card = aot.CARDS[100]
    assert aot.occupancy(128, 0, 8, card) == 2 * 8 / 64
    assert aot.occupancy(32, 100 * 1024, 8, card) == 2 * 8 / 64
    assert aot.occupancy(32, card.shared_total // 2 - 512, 8, card) == 8 / 64, (
        "each block takes a KB more"
    )
    assert aot.occupancy(32, 0, 8, card, tensor_columns=512) == 8 / 64
    assert aot.occupancy(32, 0, 1, card) == 32 / 64
    assert aot.occupancy(129, 0, 8, card) == 8 / 64  # allotted as 136


def test_an_interpreting_process_cannot_compile(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        next(aot.reports(aot.places([90], few=True)))


@pytest.mark.parametrize(
    ("version", "native"), [("3.6.0", False), ("3.9.0", True), ("3.10.1", True)]
)
def test_an_old_triton_decodes_on_sm_121(version, native, monkeypatch):
    """Its compiler fails on FP4 products there; sm_120 and sm_100 have them since 3.6."""
    monkeypatch.setattr(triton, "__version__", version)
    assert family(121) == ("mma_fp4" if native else "mma")
    assert (family(120), family(100)) == ("mma_fp4", "tcgen05")


def test_families_and_tiles(monkeypatch):
    """Native only where Triton has FP4 instructions; few rows get low tiles, many rows large
    ones."""
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    kinds = {
        80: "mma",
        86: "mma",
        89: "mma",
        90: "wgmma",
        100: "tcgen05",
        103: "tcgen05",
        120: "mma_fp4",
        121: "mma_fp4",
    }
    assert {capability: family(capability) for capability in aot.CARDS} == kinds
    decoded = {capability: family(capability, native=False) for capability in (100, 103, 120, 121)}
    assert decoded == {100: "tcgen05_decoded", 103: "tcgen05_decoded", 120: "mma", 121: "mma"}
    assert choose_tile(16, 4096, "mma_fp4", 170).m == 16
    assert choose_tile(16384, 16384, "mma_fp4", 170) == TILES["mma_fp4"][0]
    assert choose_tile(16384, 16384, "tcgen05", 148) == TILES["tcgen05"][0]
    assert choose_tile(16384, 16384, "tcgen05", 148, widest=128) == TILES["tcgen05"][1]


def test_where_operands_are_decoded_first():
    """Large cubes on cards without FP4, and larger ones in two passes; never few tokens, and never
    where FP4 is native."""
    assert pays(4096, 4096, 4096, "wgmma", one_pass=True)
    assert not pays(4096, 4096, 4096, "wgmma", one_pass=False)
    assert pays(8192, 8192, 8192, "wgmma", one_pass=False)
    assert not pays(2048, 2048, 2048, "wgmma", one_pass=True)
    assert not pays(16, 8192, 8192, "wgmma", one_pass=True)
    assert not pays(8192, 8192, 512, "mma", one_pass=False)
    assert not any(pays(16384, 16384, 16384, kind, True) for kind in ("tcgen05", "mma_fp4"))


def test_the_loss_of_decoding_in_registers_is_between_its_bounds():
    """All of the products hidden behind the decoding of another program, or none of them."""
    for card in DECODING.values():
        vendor = card.tensor / card.share
        hidden = card.issue / ISSUE_SHARE / vendor - 1
        assert max(hidden, 0) < card.loss < (card.issue / ISSUE_SHARE + card.tensor) / vendor - 1
    assert 0.4 < DECODING["wgmma"].loss < 0.5


def test_the_newest_disassembler_reads_what_an_older_triton_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling needs the old Triton first on the path; its disassembler does not know all cards it
    compiles for."""
    for version in ("3.6.0", "3.10.1", "3.9.0"):
        wheel = tmp_path / version
        (wheel / f"triton-{version}.dist-info").mkdir(parents=True)
        (wheel / f"triton-{version}.dist-info" / "METADATA").write_text(
            f"Name: triton\nVersion: {version}\n"
        )
        (wheel / "triton/backends/nvidia/bin").mkdir(parents=True)
        (wheel / "triton/backends/nvidia/bin/cuobjdump").touch()
    monkeypatch.setattr(
        sys, "path", [str(tmp_path / version) for version in ("3.6.0", "3.10.1", "3.9.0")]
    )

    assert machine_code.tritons_cuobjdump() == str(
        tmp_path / "3.10.1/triton/backends/nvidia/bin/cuobjdump"
    )
