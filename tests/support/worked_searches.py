"""Worked cases of the searches, vectors/vectors_3.npz: python tests/support/worked_searches.py

docs/numerics.md once more, read by somebody who has seen neither the package nor the oracle: a
number is a Python float, which has 53 bits, and ``fl`` rounds it to the 24 of float32. A sum, a
product or a quotient of two float32 numbers rounded to 53 bits and then to 24 is the one rounded at
once (Figueroa 1995: 53 >= 2 * 24 + 2), so that this is float32 without any float32 arithmetic. A
grid value is the nearest of all, by distance, one after the other. Only the file is numpy's.

The cases have what tells one order of trial from another, blocks that several scales give without
an error; scales at either end of E4M3, from where steps lead out of it; zero scales, zeros, ragged
shapes, NaN.
"""

from __future__ import annotations

import math
import random
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEED, SIGN_SEED = 0x5EA2C4_00000007, 0xFEDCBA98_76543210
LARGEST = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]


def fl(x: float) -> float:
    """x rounded to float32, to nearest even; Inf beyond the largest."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


# The values of codes 0..7 and of bytes 0..126.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = tuple(
    (b % 8) * 2.0**-9 if b < 8 else (1 + b % 8 / 8) * 2.0 ** (b // 8 - 7) for b in range(127)
)


def nearest(grid: Sequence[float], a: float) -> int:
    """The code nearest to a >= 0; half way, the even one. Close distances are exact."""
    best = 0
    for code, value in enumerate(grid):
        closer = abs(value - a) < abs(grid[best] - a)
        if closer or (abs(value - a) == abs(grid[best] - a) and code % 2 == 0):
            best = code
    return best


def tree(values: Sequence[float]) -> float:
    """x[i] + x[i + n/2], until one is left."""
    while len(values) > 1:
        half = len(values) // 2
        values = [fl(values[i] + values[i + half]) for i in range(half)]
    return values[0]


def signed(code: int, x: float) -> int:
    """A code with the sign of x, also of -0."""
    return code + 8 * (math.copysign(1, x) < 0)


# 5. Random bits
def philox(seed: int, i: int, stream: int) -> list[int]:
    """The four words of counter (i, stream) under the key of a seed."""
    mask = 2**32 - 1
    key = [seed & mask, seed >> 32]
    c = [i & mask, i >> 32, stream, 0]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ key[0], b & mask, (a >> 32) ^ c[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c


def scale_noise(n: int) -> float:
    """u of draw n of the block scales' stream."""
    word = philox(SEED, n // 8, 2)[n % 8 // 2]
    return ((word >> 16 * (n % 2)) % 2**16 + 0.5) / 2**16


# 4. Rotation
def rotated(row: list[float], rounds: int, group: int) -> list[float]:
    """A row, padded to whole groups, through all rounds."""
    p = group.bit_length() - 1
    out: list[float] = []
    for start in range(0, len(row), group):
        y = row[start : start + group]
        for i in range(rounds):
            words = philox(SIGN_SEED, i, 0)
            y = [-v if words[j // 32] >> j % 32 & 1 else v for j, v in enumerate(y)]
            stride = 1
            while stride < group:
                for j in range(group):
                    if j // stride % 2 == 0:
                        a, b = y[j], y[j + stride]
                        y[j], y[j + stride] = fl(a + b), fl(a - b)
                stride *= 2
            last_even = i == rounds - 1 and i % 2 == 0
            factor = 2 ** -(p / 2) if last_even else 2.0 ** -(p // 2 if i % 2 == 0 else p - p // 2)
            y = [fl(v * fl(factor)) for v in y]
        out += y
    return out


# 3. and 4. The two searches
def encode_scale(g: float) -> float:
    """S of the cap 256."""
    return 1.0 if g == 0 else min(fl(6 * 256 / g), LARGEST)


def scale_search(x: list[float], s: float, steps: Sequence[int]) -> tuple[list[int], int]:
    """Codes and scale byte of one block."""
    base = min(fl(max(map(abs, x)) * fl(s * fl(1 / 6))), LARGEST)
    first = nearest(E4M3, min(base, 448.0))
    xs = [fl(v * s) for v in x]
    best: tuple[float, list[int], int] | None = None
    for k in steps:
        byte = 0 if first == 0 else sorted((1, first + k, 126))[1]
        inverse = 0.0 if byte == 0 else fl(1 / E4M3[byte])
        codes = [nearest(E2M1, min(abs(fl(v * inverse)), 6.0)) for v in xs]
        errors = [
            fl(v - math.copysign(E2M1[c] * E4M3[byte], v)) for v, c in zip(xs, codes, strict=True)
        ]
        error = tree([fl(e * e) for e in errors])
        if best is None or error < best[0]:
            best = error, [signed(c, v) for c, v in zip(codes, x, strict=True)], byte
    assert best is not None
    return best[1], best[2]


FULL_SCALE = float.fromhex("0x1.849d64p+2")


def ms_eden(y: list[float], factors: Sequence[float]) -> tuple[list[int], float]:
    """Codes and r of one rotated block."""
    a = max(map(abs, y))
    if a < 2.0**-120:
        return [signed(0, v) for v in y], 0.0
    z = [fl(v * fl(1 / a)) for v in y]
    best: tuple[float, list[int], float] | None = None
    for k in factors:
        c = fl(FULL_SCALE / k)
        v = [fl(e * c) for e in z]
        codes = [nearest(E2M1, min(abs(e), 6.0)) for e in v]
        q = [math.copysign(E2M1[n], e) for n, e in zip(codes, v, strict=True)]
        num = tree([fl(e * e) for e in v])
        den = tree([fl(e * f) for e, f in zip(v, q, strict=True)])
        t = fl((fl(num / den) if den != 0 else 1.0) * fl(1 / c))
        errors = [fl(e - fl(f * t)) for e, f in zip(z, q, strict=True)]
        error = tree([fl(e * e) for e in errors])
        if best is None or error < best[0]:
            best = error, [signed(n, e) for n, e in zip(codes, y, strict=True)], fl(a * t)
    assert best is not None
    return best[1], best[2]


def stochastic_byte(v: float, u: float) -> int:
    """The byte of v >= 0, rounded by the noise u."""
    v = min(v, 448.0)
    exponent = max(math.frexp(v)[1] - 1, -6) if v else -6
    step = 2.0 ** (exponent - 3)
    return E4M3.index(min(math.floor(fl(fl(v / step) + u)) * step, 448.0))


Rows = list[list[float]]
Result = tuple[Rows, Rows, list[float]]  # codes, block scale bytes, global scales


def padded(x: Rows, unit: int, height: int = 1) -> Rows:
    """x with zeros up to whole blocks."""
    width = -(-len(x[0]) // unit) * unit
    rows = [row + [0.0] * (width - len(row)) for row in x]
    return rows + [[0.0] * width for _ in range(-len(rows) % height)]


def by_scales(x: Rows, steps: Sequence[int], height: int = 1, row_scaled: bool = False) -> Result:
    """scale_search of a matrix."""
    y = padded(x, 16, height)
    width = len(y[0])
    codes = [[0] * width for _ in y]
    scales = [[0] * (width // 16) for _ in range(len(y) // height)]
    tops = [max(map(abs, row)) if all(map(math.isfinite, row)) else math.nan for row in y]
    if not row_scaled:
        tops = [math.nan if any(map(math.isnan, tops)) else max(tops)] * len(y)
    for top in range(0, len(y), height):
        if math.isnan(tops[top]):
            continue
        for left in range(0, width, 16):
            block = [v for row in y[top : top + height] for v in row[left : left + 16]]
            found, byte = scale_search(block, encode_scale(tops[top]), steps)
            scales[top // height][left // 16] = byte
            for i, code in enumerate(found):
                codes[top + i // 16][left + i % 16] = code
    ranges = [math.nan if math.isnan(g) else fl(1 / encode_scale(g)) for g in tops]
    return codes[: len(x)], scales, ranges[: len(x)] if row_scaled else ranges[:1]


def by_factors(x: Rows, factors: Sequence[float], rounds: int = 1, group: int = 128) -> Result:
    """ms_eden of a matrix."""
    y = [rotated(row, rounds, group) for row in padded(x, group)]
    width = len(y[0])
    if not all(math.isfinite(v) for row in [*x, *y] for v in row):
        return [[0] * width for _ in y], [[0] * (width // 16) for _ in y], [math.nan]
    blocks = [ms_eden(row[c : c + 16], factors) for row in y for c in range(0, width, 16)]
    top = max(r for _, r in blocks)
    scale = fl(top / 448) if top else 1.0
    stored = [stochastic_byte(fl(r / scale), scale_noise(n)) for n, (_, r) in enumerate(blocks)]
    across = width // 16
    codes = [code for found, _ in blocks for code in found]
    return (
        [codes[i * width :][:width] for i in range(len(y))],
        [stored[i * across :][:across] for i in range(len(y))],
        [scale],
    )


THREE, LATE = (0, -1, 5), (5, 4, -1, 0)
WIDE = (8, -8, 7, -7, 6, -6, 5, -5, 4, -4, 3, -3, 2, -2, 1, -1)  # all but 0
MANY = tuple(k / 64 for k in (128, 32, 61, 64, 67, 70, 73, 76, 79, 82, 85, 88, 91, 94, 97, 100))
RULES: dict[str, Callable[[Rows], Result]] = {
    "scale_search_3": lambda x: by_scales(x, THREE),
    "scale_search_late": lambda x: by_scales(x, LATE),
    "scale_search_up": lambda x: by_scales(x, (4,)),
    "scale_search_wide": lambda x: by_scales(x, WIDE),
    "scale_search_2_2d": lambda x: by_scales(x, (0, 5), height=16),
    "scale_search_3_row": lambda x: by_scales(x, THREE, row_scaled=True),
    "ms_eden_2_search_3": lambda x: by_factors(x, (1.0, 1.25, 1.5), rounds=2),
    "ms_eden_search_late": lambda x: by_factors(x, (1.5, 1.25, 1.0), group=32),
    "ms_eden_search_one": lambda x: by_factors(x, (1.0625,), group=16),
    "ms_eden_search_many": lambda x: by_factors(x, MANY, group=64),
}


def cases() -> dict[str, Rows]:
    """Matrices of float32 numbers, the same on every machine."""
    draw = random.Random(20261128)

    def bell(rows: int, columns: int) -> Rows:
        return [[fl(draw.gauss(0, 1)) for _ in range(columns)] for _ in range(rows)]

    def lone(rows: int, columns: int) -> Rows:
        """One element per block, a grid value: several scales give it without an error."""
        x = [[0.0] * columns for _ in range(rows)]
        for row in x:
            for left in range(0, columns, 16):
                row[left + draw.randrange(16)] = draw.choice((1, -1)) * draw.choice(E2M1[1:]) * 2.0
        return x

    def deep(rows: int, columns: int, depths: Sequence[float]) -> Rows:
        """Blocks so far below the largest that their scale has this value, or rounds to 0."""
        x = bell(rows, columns)
        for row in x:
            for left in range(0, columns, 16):
                block = row[left : left + 16]
                shrink = draw.choice(depths) / max(map(abs, block))
                row[left : left + 16] = [fl(v * shrink) for v in block]
        x[0][0] = 1.0
        return x

    bytes_of_scales = [E4M3[b] / 256 for b in (1, 1, 2, 3, 5, 7, 8, 9)]
    nan, inf = bell(4, 40), bell(4, 40)
    nan[1][37], inf[3][0] = math.nan, -math.inf
    zeros = [[draw.choice((0.0, -0.0)) for _ in range(40)] for _ in range(5)]
    return {
        "normal": bell(16, 128),
        "heavy": [
            [fl(v / max(abs(w), 0.01)) for v, w in zip(*pair, strict=True)]
            for pair in zip(bell(8, 128), bell(8, 128), strict=True)
        ],
        "ragged": bell(19, 75),
        "one": [[-3.0]],
        "column": bell(17, 1),
        "zeros": zeros,
        "lone": lone(16, 64),
        "smallest_scales": deep(16, 64, bytes_of_scales),
        "zero_scales": deep(4, 64, [2.0**-18, 2.0**-19, 2.0**-30]),
        "largest_scales": deep(16, 64, [1.0, 1.0, 0.98, 0.9]),
        "quarters": [[draw.randrange(-24, 25) / 4 for _ in range(48)] for _ in range(8)],
        "tiny": [
            [draw.randrange(-(2**12), 2**12) * 2.0**-149 for _ in range(32)] for _ in range(3)
        ],
        "huge": [[fl(v * 2.0**120) for v in row] for row in bell(3, 128)],
        "nan": nan,
        "inf": inf,
    }


def main() -> None:
    """Work every case of every rule, and write the file."""
    arrays: dict[str, Any] = {"seed": np.uint64(SEED), "sign_seed": np.uint64(SIGN_SEED)}
    for case, x in cases().items():
        arrays[f"{case}/x"] = np.array(x, np.float32)
        for rule, work in RULES.items():
            codes, scales, ranges = work(x)
            packed = [
                [low | high << 4 for low, high in zip(r[::2], r[1::2], strict=True)] for r in codes
            ]
            arrays[f"{case}/{rule}/codes"] = np.array(packed, np.uint8)
            arrays[f"{case}/{rule}/block_scale"] = np.array(scales, np.uint8)
            arrays[f"{case}/{rule}/global_scale"] = np.array(ranges, np.float32)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "vectors"
    np.savez_compressed(out / "vectors_3.npz", **arrays)


if __name__ == "__main__":
    main()
