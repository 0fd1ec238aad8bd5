"""Machine code as counts: kept listings, loops by trips, what is cold, and counts by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from nvfp4.backends.triton.quantize.policy import TURNS
from nvfp4.bench import issue
from nvfp4.bench.issue import (
    ARCHITECTURES,
    SCHEDULERS,
    UNITS,
    Counted,
    counted,
    cycles,
    table_of,
)
from nvfp4.numerics.scaling import BYTE_STEPS, SEARCH_FACTORS
from tools import instructions, sass
from tools.instructions import COUNTED
from tools.quantize_variants import roofline_variants

STRAIGHT = """
	code for sm_100
		Function : copy
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x37c] ;                 /* 0x0000df00ff017b82 */
                                                                           /* 0x000e220000000800 */
        /*0010*/                   S2R R0, SR_TID.X ;                      /* 0x0000000000007919 */
        /*0020*/                   LDCU.64 UR4, c[0x0][0x358] ;            /* 0x00006b00ff0477ac */
        /*0030*/                   IMAD.WIDE R2, R0, 0x10, R2 ;            /* 0x0000001000027825 */
        /*0040*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;        /* 0x0000000402040981 */
        /*0050*/                   LOP3.LUT R8, R4, 0x7fff7fff, RZ, 0xc0, !PT ;
        /*0060*/                   F2FP.SATFINITE.E2M1.F32.PACK_AB_MERGE_C R9, R6, R7, RZ ;
        /*0070*/                   SHFL.BFLY PT, R10, R9, 0x1, 0x1f ;
        /*0080*/                   FMUL2 R12, R4.F32x2.HI_LO, R6.F32x2.HI_LO ;
        /*0090*/                   STG.E.U8 desc[UR4][R2.64], R9 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
        /*00c0*/                   NOP;
"""

LOOP = """
        /*0000*/                   MOV R0, 0x5 ;
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/                   FMUL R4, R2, R3 ;
        /*0030*/                   ISETP.NE.AND P1, PT, R0, RZ, PT ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   MUFU.RCP R5, R4 ;
        /*0060*/               @P0 BRA 0xa0 ;
        /*0070*/                   MOV R6, 0x90 ;
        /*0080*/                   CALL.REL.NOINC 0xc0 ;
        /*0090*/                   MOV R5, R6 ;
        /*00a0*/                   STS.128 [R7], R4 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   FFMA R6, R6, R6, R6 ;
        /*00d0*/                   RET.REL.NODEC R6 0x0 ;
"""


def counts_of(listing: str, trips: tuple[float, ...] = ()) -> dict[str, float]:
    return dict(sass.counts(sass.executed(sass.parse(listing), trips)))


def test_a_listing_by_hand() -> None:
    """Each instruction once, by who runs it; nothing behind the end; bytes of wide accesses."""
    assert counts_of(STRAIGHT) == {
        "constant": 2,  # LDC, S2R
        "uniform": 1,  # LDCU
        "imad": 1,
        "global": 2,
        "global_lines": 4 + 1,  # 16 bytes of each lane are four lines; a byte each is a part of one
        "logic": 1,
        "pack": 1,
        "shuffle": 1,
        "fp32x2": 1,
        "control": 1,  # EXIT, and not the jump to itself behind it
    }
    first = sass.parse(STRAIGHT)[4]
    assert (first.address, first.predicate, first.opcode) == (0x40, "!P0", "LDG.E.128")
    assert first.bytes == 16


def test_a_loop_goes_round_as_often_as_the_caller_says() -> None:
    """Four instructions of it, five times; the quotient's slow road, a subroutine, never."""
    found = counts_of(LOOP, trips=(5,))
    assert found["fp32"] == 2 * 5
    assert found["logic"] == 1 + 5  # MOV, and the comparison; neither MOV beside the call
    assert found["control"] == 5 + 2  # the loop's jump, the branch around the call, and the end
    assert (found["xu"], found["shared"], found["shared_lines"]) == (1, 1, 4)
    with pytest.raises(ValueError, match=r"2 loops were expected; the code has 1: 0x10"):
        counts_of(LOOP, trips=(5, 5))
    with pytest.raises(ValueError, match="0 loops were expected"):
        counts_of(LOOP)


def test_a_cold_block_is_not_counted() -> None:
    """What the caller says that no ordinary operand reaches, and what only that leads to."""
    text = LOOP.replace("CALL.REL.NOINC 0xc0", "LDG.E.U8 R6, [R2] ")
    parsed = sass.parse(text)
    assert sass.counts(sass.executed(parsed, (1,)))["global"] == 1

    def reads_bytes(block: sass.Block) -> bool:
        return any(each.opcode == "LDG.E.U8" for each in block.instructions)

    assert sass.counts(sass.executed(parsed, (1,), reads_bytes))["global"] == 0


def test_a_branch_may_have_its_condition_among_its_operands() -> None:
    """BRA.U by a predicate of all lanes goes on behind it; BRA.DIV is for lanes that parted."""
    text = """
        /*0000*/                   BRA.U UP0, 0x30 ;
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/                   BRA.DIV UR4, 0x50 ;
        /*0030*/                   FMUL R2, R2, R3 ;
        /*0040*/                   EXIT ;
        /*0050*/                   MUFU.RCP R2, R2 ;
        /*0060*/                   BRA 0x30 ;
    """
    assert counts_of(text) == {"control": 3, "fp32": 2}
    assert counts_of(text.replace("UP0, 0x30", "0x30")) == {"control": 2, "fp32": 1}


def test_nested_loops_multiply() -> None:
    text = """
        /*0000*/                   MOV R0, 0x5 ;
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/                   FMUL R2, R2, R3 ;
        /*0030*/               @P1 BRA 0x20 ;
        /*0040*/               @P2 BRA 0x10 ;
        /*0050*/                   EXIT ;
    """
    assert counts_of(text, trips=(3, 7))["fp32"] == 3 + 3 * 7


def test_an_unknown_opcode_is_an_error() -> None:
    """A new one must be sorted by hand, or a table would be wrong in silence."""
    with pytest.raises(ValueError, match=r"which unit runs FROBNICATE\.X\? add it"):
        counts_of("        /*0000*/                   FROBNICATE.X R0 ;\n")
    assert sass.parse("        /*0000*/   UFROBNICATE UR0 ;\n")[0].unit == "uniform"


def test_units_are_those_of_the_package() -> None:
    assert set(sass._OPCODES) | {"uniform"} == set(UNITS)
    opcodes = " ".join(sass._OPCODES.values()).split()
    assert len(opcodes) == len(set(opcodes)), "an opcode stands at two units"
    for architecture in ARCHITECTURES.values():
        held = [
            unit
            for pipe, units in architecture.pipes.items()
            for unit in units
            if pipe != issue.HEAVY  # a half of another pipe
        ]
        assert len(held) == len(set(held)), "a unit is on two pipes"
        assert set(held) <= set(UNITS)
        assert architecture.source


def test_cycles_by_hand() -> None:
    """32 lanes x 4 schedulers over results per clock, summed per pipe; issue is one each."""
    counts = {"fp32": 10.0, "imad": 4.0, "logic": 8.0, "minmax": 2.0, "xu": 1.0, "shuffle": 3.0}
    assert cycles(counts, 90) == {
        "issue": 28,
        "alu": 2 * 8 + 2 * 2,
        "fma": 10 + 4,
        "heavy fma": 2 * 4,
        "xu": 8,
        "load/store": 4 * 3,
        "uniform": 0,
    }
    assert cycles(counts, 100)["alu"] == 2 * 8 + 2, "FP32 minima at full rate on 10.0"
    assert cycles({"iadd": 6.0}, 120)["fma"] == 6, "sums of integers on all cores of 12.0"
    assert all(cycles({"to_integer": 1.0}, each)["xu"] == 8 for each in ARCHITECTURES)
    wide = {"global": 2.0, "global_lines": 8.0, "shared": 1.0, "shared_lines": 4.0}
    assert cycles(wide, 90)["load/store"] == 8 * 8 + 4 * 4
    assert cycles(wide, 90)["issue"] == 3, "lines are no instructions"


def test_few_warps_do_not_fill_a_scheduler() -> None:
    """Two per scheduler start half an instruction per cycle; four are enough."""
    kernel = Counted("k", 90, 16, 255, 8, {"fp32": 10.0})
    assert kernel.cycles()["latency"] == 10 / (0.25 * 8 / SCHEDULERS) == 20
    assert kernel.busiest() == ("latency", 20)
    assert "latency" not in Counted("k", 90, 16, 128, 16, {"fp32": 10.0}).cycles()


@pytest.mark.parametrize(
    ("kernel", "tries"),
    [
        ("quantize_kernel: rtn of bfloat16", 0),
        ("quantize_kernel: four_over_six of bfloat16", 2),
        ("quantize_kernel: scale_search of bfloat16", len(BYTE_STEPS)),
        ("quantize_kernel: ms_eden_rounds=1 of bfloat16", 1),
        # the first factor, and a loop over the others: as often as the launch has it go round
        ("quantize_kernel: ms_eden_rounds=2_search=True of bfloat16", len(SEARCH_FACTORS)),
    ],
)
@pytest.mark.parametrize("capability", [100, 120])
def test_kept_counts_by_hand(kernel: str, tries: int, capability: int) -> None:
    """Conversions, which Blackwell makes in hardware, two elements at a time.

    The codes take half of one per element; each scale that is tried takes half of one to round, and
    half of one to come back. Nothing else converts, so that the count follows from the rule alone.
    """
    conversions = counted()[kernel, capability].counts["pack"]
    assert conversions == pytest.approx(tries + 0.5, abs=0.01)


LISTED = [
    (variant.name, capability)
    for capability in instructions.CAPABILITIES
    for variant in roofline_variants(capability)
]


def test_every_counted_kernel_exists() -> None:
    """What instructions.json names is what layers launch, in the order in which it is listed."""
    kept = json.loads(issue.COUNTS.read_text())
    ours = list(table_of(kept))
    assert ours == [key for key in LISTED if key in ours]
    assert len(kept["rows"]) == len(ours), "a kernel stands twice"
    assert len(LISTED) == len(set(LISTED))
    for entry in counted().values():
        assert entry.instructions > 0
        assert all(math.isfinite(value) and value >= 0 for value in entry.counts.values())
        assert 0 < entry.warps <= 64


def test_a_run_of_some_kernels_keeps_the_others(tmp_path: Path) -> None:
    """New counts replace old ones; what is no longer listed goes."""
    path = tmp_path / "counts.json"
    old, other = (
        Counted(name, 90, 8.0, 32, 64, dict.fromkeys(COUNTED, 1.0), name) for name in "ab"
    )
    gone, stale = replace(old, kernel="gone"), replace(old, kernel="c", source="another")
    path.write_text(instructions.as_json([old, other, gone, stale]))
    new = replace(old, registers=40)
    kept = instructions.joined(path, [new], {("b", 90): "b", ("c", 90): "c", ("a", 90): "a"})
    assert kept == [other, new]
    assert table_of(json.loads(instructions.as_json(kept)))["a", 90] == new
    assert instructions.joined(tmp_path / "absent.json", [new], {("a", 90): "a"}) == [new]


def test_no_count_is_of_an_older_source() -> None:
    """Whoever changes a kernel counts it anew; comments and docstrings change nothing."""
    now = instructions.sources()
    old = [key for key, row in counted().items() if key in now and row.source != now[key]]
    assert not old, f"python -m tools.instructions --missing --json {issue.COUNTS}: {old}"


def test_a_source_is_what_is_compiled(monkeypatch) -> None:
    """A function far down, a constant, and the tile are part of it; another kernel's are not."""
    from nvfp4.backends.triton.quantize import rules

    variants = {each.name: each for each in roofline_variants(100)}
    rtn = variants["quantize_kernel: rtn of bfloat16"]
    finish = variants["finish_kernel: ms_eden, row-major scales"]
    before = [instructions.source_of(each) for each in (rtn, finish)]
    monkeypatch.setattr(rules, "FLOAT32_MAX", type(rules.FLOAT32_MAX)(1.0))
    after = [instructions.source_of(each) for each in (rtn, finish)]
    assert before[0] != after[0]
    assert before[1] == after[1]
    smaller = rtn.constants["T"]._replace(warps=2)
    other = replace(rtn, constants=rtn.constants | {"T": smaller})
    assert instructions.source_of(other) != after[0]


def test_trips_and_elements_come_from_the_launch() -> None:
    """A search goes round once per factor but the first, within a loop over a program's tiles; a
    tile is shared out among its threads."""
    variants = {each.name: each for each in roofline_variants(100)}
    searched = variants["quantize_kernel: ms_eden_rounds=2_search=True of bfloat16"]
    assert instructions.trips_of(searched) == (TURNS, len(SEARCH_FACTORS) - 1)
    assert instructions.elements_of(searched) == TURNS * 16 * 128 / (4 * 32)
    plain = variants["quantize_kernel: rtn of bfloat16"]
    assert instructions.trips_of(plain) == (TURNS,)
    assert instructions.elements_of(plain) == TURNS * 16 * 256 / (4 * 32)
    down = variants["quantize_kernel: ms_eden_rounds=1 of bfloat16^T"]
    assert instructions.trips_of(down) == ()
    assert instructions.elements_of(down) == 16 * 128 / 32
    scales = variants["finish_kernel: ms_eden, row-major scales"]
    assert instructions.elements_of(scales) == 16 * 64 * 16 / (4 * 32)


def test_a_listing_of_others_is_counted(tmp_path: Path, capsys) -> None:
    """As the kernels of published.json were."""
    path = tmp_path / "listing.sass"
    path.write_text(LOOP)
    assert instructions.main(["--listing", str(path), "--trips", "5", "--elements", "10"]) == 0
    assert json.loads(capsys.readouterr().out)["fp32"] == 1.0
