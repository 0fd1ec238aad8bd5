"""What was counted of the C++ CUDA kernels, and the shares that follow."""

from __future__ import annotations

import math

import pytest

from nvfp4.bench import cuda_shares
from nvfp4.bench.cuda_shares import BEFORE, NOW, PATHS, counted, shares, terms
from nvfp4.bench.devices import DEVICES
from nvfp4.bench.roofline import MEMORY
from tools import cuda_counts, sass

CARDS = [DEVICES[name] for name in ("H100", "H200", "B200", "RTX 5090")]


def _seconds(table: str) -> dict[tuple[str, str], cuda_shares.CudaShare]:
    return {(each.path, each.card): each for each in shares(CARDS, table)}


def test_every_kernel_is_counted_now_and_before() -> None:
    """On three architectures, by the entries that are compiled; nothing else is kept."""
    expected = {(name, card) for card in (90, 100, 120) for name in cuda_counts.ENTRIES}
    assert set(counted(NOW)) == set(counted(BEFORE)) == expected
    assert {step.kernel for steps in PATHS.values() for step in steps} <= set(cuda_counts.ENTRIES)


def test_what_the_kernels_were_written_for() -> None:
    """Nothing became slower; shares of the bytes moved, and both orientations from one read."""
    before, now = _seconds(BEFORE), _seconds(NOW)
    assert set(before) == set(now) == {(path, card.name) for path in PATHS for card in CARDS}
    assert all(now[key].seconds <= before[key].seconds for key in now)

    def of_bytes(path: str, *cards: str) -> float:
        found = [now[path, card] for card in cards or [card.name for card in CARDS]]
        return min(each.byte_seconds / each.seconds for each in found)

    assert of_bytes("rtn") >= 0.85
    assert of_bytes("four_over_six") >= 0.7
    assert of_bytes("ms_eden(1)", "H200", "B200") >= 0.5
    two = "both, in two kernels: ms_eden(1)"
    assert all(now["both: ms_eden(1)", c.name].seconds <= now[two, c.name].seconds for c in CARDS)


def test_bytes_by_hand() -> None:
    """8192 x 8192 BF16 on an H200: rounding reads 134 MB, of which 25 MB are in L2 when the amax
    has ended there, and writes 4.5 bits per element."""
    elements, card = 8192**2, DEVICES["H200"]
    found = terms(PATHS["rtn"][1], elements, card)
    assert found is not None
    moved = elements * (16 + 4.5) / 8
    assert math.isclose(found[MEMORY], (moved - 25e6) / (4.8e12 * 0.85))
    old = terms(PATHS["rtn"][1], elements, card, BEFORE)
    assert old is not None
    assert math.isclose(old[MEMORY], moved / (4.8e12 * 0.85))


@pytest.mark.parametrize(
    ("name", "opcodes", "expected"),
    [
        ("amax", ["LDG"] * 4, cuda_counts.AMAX_TRIPS),
        ("amax", ["LDG"], 0.0),
        ("rtn_both", ["LDG", "STS"], 0.0),
        ("rtn_both", ["LDS", "FADD", "STG"], 4.0),
        ("ms_eden_2", ["SHFL", "FADD"], 2.0),
        ("ms_eden_2", ["LOP3"], 1.0),
    ],
)
def test_loops_are_told_by_what_is_in_them(name: str, opcodes: list[str], expected: float) -> None:
    """How often each goes round in a large operand of whole tiles."""
    body = [sass.Instruction(16 * i, "", opcode, "") for i, opcode in enumerate(opcodes)]
    assert cuda_counts.trips(name, body) == expected
