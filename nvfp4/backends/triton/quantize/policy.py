"""What the quantising kernels are compiled for, as data, and which tile suits it.

    Policy    the rule of an operand and its options; kernels of equal policies are one kernel
    Tile      what one program computes, [rows, columns], and how it reads that
    Coded     how a source is scaled that is codes itself

Tiles are chosen by what they compile to: registers and spills for eight cards, as ``tools/aot.py``
reports them. A larger tile reads memory in longer runs, until it spills. None was timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

RULES = {
    "rtn": "rtn",
    "rtn_2d": "rtn",
    **{n: n for n in ("sr", "sr_te", "four_over_six", "scale_search", "ms_eden")},
}
"""The rule of each quantiser that has one here."""

SEARCHES = ("four_over_six", "scale_search")
"""The rules that compare scales; their cap leaves room to enlarge one."""

NOISY = ("sr", "sr_te")
"""The rules that draw a number for each element."""


TURNS = 4
MANY = 1 << 22
"""Tiles per program from so many elements on: 256 to 2048 programs are left."""


READ_TWICE = (80, 90, 100, 103)
"""Compute capabilities of cards whose memory outruns their instructions: data-centre cards."""


class Policy(NamedTuple):
    """What a kernel is compiled for: one orientation of one quantiser under its options.

    tile: rows of a block. round_scales: the scale of each round of the rotation (none: no
    rotation). fixed: NVIDIA's rotation. converts: whether the card rounds to E2M1 by itself (sm_100
    and later), to the same bits. steps: of the scale byte, that scale_search tries. scales: (c,
    fl(1 / c)) that ms_eden tries, one without a search. held: whether the amax is held from an
    earlier call. The rest as in ``Options``. No seed is part of it.
    """

    rule: str
    tile: int = 1
    row_scaled: bool = False
    metric: str = "mse"
    search: bool = False
    group: int = 16
    round_scales: tuple[float, ...] = ()
    fixed: bool = False
    converts: bool = False
    steps: tuple[int, ...] = ()
    scales: tuple[tuple[float, float], ...] = ()
    held: bool = False

    @property
    def is_bare(self) -> bool:
        """Whether the amax is that of the elements, whichever way they lie."""
        return not self.round_scales and not self.row_scaled


class Tile(NamedTuple):
    """What one program computes, [rows, columns], and how it reads them.

    down: memory runs down the columns, otherwise along the rows. run: neighbours in memory that
    stay together. pieces: how many such runs, one after the other along a row, a thread holds (1:
    as the compiler likes). warps: of 32 threads that share the tile. turns: how many tiles, one
    below the other, a program takes.
    """

    rows: int
    columns: int
    down: bool
    run: int
    pieces: int
    warps: int
    turns: int = 1

    def of(self, policy: Policy, rows: int, columns: int) -> Tile:
        """The same with as many turns as suit an operand of this size.

        A program works out once what all its tiles share: a quarter of the instructions of rtn.
        Scales of rows are shared by nobody, a small matrix needs its programs side by side, and a
        tile that is read down its columns has elements enough: 64 per thread, and 247 registers
        with turns for 172 without.
        """
        crowded = policy.rule == "scale_search" and not policy.converts  # 255 registers for 72
        shared = not (self.down or policy.row_scaled or crowded)
        return self._replace(turns=TURNS) if shared and rows * columns >= MANY else self


class Coded(NamedTuple):
    """How a source that is codes is scaled. tile: rows of a block."""

    tile: int
    row_scaled: bool


def tile_along(policy: Policy) -> Tile:
    """The tile of operands whose rows are contiguous.

    A thread reads 16 bytes of BF16 at once and holds whole blocks, one after the other a quarter of
    a rotation group of 128, or one block alone where candidates are compared.
    """
    if policy.search or policy.rule in SEARCHES:
        return Tile(16, 128, False, 8, 2, 4)
    wide = policy.group == 128 and bool(policy.round_scales)
    return Tile(16, 256, False, 8, 4 if wide else 2, 4)


def tile_of_peak(policy: Policy, tile: Tile, bits: int) -> Tile:
    """The tile in which a matrix of so many bits per element is looked over for its amax.

    tile: the one that it is rounded in. Where nothing turns it and it has one amax, a thread may
    read 256 bytes at once: one maximum across threads for all of them.
    """
    if not policy.is_bare:
        return tile
    return Tile(1024 // bits, 256, False, 8, 1, 4)


def tile_down(policy: Policy, coded: bool = False) -> Tile:
    """The tile of operands whose columns are contiguous, or that are codes.

    A thread holds whole blocks, a warp whole rotation groups.
    """
    if policy.search or policy.rule in SEARCHES:
        return Tile(max(8, policy.tile), 128, True, 2, 1, 2 if policy.tile == 16 else 1)
    if policy.round_scales:
        # with 128 columns, groups of 16 would take 168 registers, and sr of codes would spill on
        # sm_100; groups of 128 take half the rows if the source is coded, for the same reason
        small = policy.group == 16
        return Tile(8 if coded and not small else 16, 64 if small else 128, True, 4, 1, 1)
    return Tile(32, 128, True, 4, 1, 2)


def reads_once(rows: str, columns: str, capability: int) -> bool:
    """Whether x and x^T are rounded by one kernel that reads x once, and not by one each; by rules.

    By instructions counted (``nvfp4/bench/instructions.json``), to which a test holds it: the one
    kernel shares nothing but the reading, and for ms_eden the second orientation of its tile comes
    through shared memory: 86 cycles per element on sm_100 for 27 + 37. Where memory is slow, as on
    an RTX 5090, one reading is worth more than they are.
    """
    return not ("ms_eden" in (rows, columns) and capability in READ_TWICE)


def tiles_of_both(rows: Policy, columns: Policy) -> tuple[Tile, Tile]:
    """The same elements as a tile of x and of x^T, holding whole groups and tiles of both."""
    height, width = max(columns.group, 32), max(rows.group, 64)
    along, down = tile_along(rows), tile_down(columns)

    # two groups of 128 go on twice the warps: 125 registers per thread and not all 255; and so
    # do two roundings by noise, which with the rotation of one of them spill 48 bytes per thread
    # where Triton 3.6 compiles for sm_90; and two searches of four_over_six, which spill 32 on
    # sm_100: 52 registers and not 80
    noisy = rows.rule in NOISY and columns.rule in NOISY
    compared = rows.rule == columns.rule == "four_over_six"
    crowded = height == width == 128 or noisy or compared
    warps = height * width // (32 * 16 * down.run) * (2 if crowded else 1)
    return (
        Tile(height, width, False, min(along.run, width), along.pieces, warps),
        Tile(width, height, True, down.run, 1, warps),
    )
