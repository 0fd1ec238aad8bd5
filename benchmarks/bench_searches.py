"""What a search among fewer scales gives, and what it costs: python -m benchmarks.bench_searches

    errors of the blocks of a sample on each step of a byte, on each factor
        the best set of each size, by trying all of them (``best_sets``)
    the best sets, the default and what there is beside a search:
        relative MSE on N(0, 1), and on Student's t with 3 degrees of freedom
        cycles per element and scheduler of three cards, by nvfp4/bench/instructions.json
        nanoseconds per element on this processor, one thread
        of ms_eden the split-half bias^2 of a product, the left operand with 2 active columns in 128

The sample is 1024 x 1024, and each of its blocks counts with the least of its errors. Those of
ms_eden are taken before its scales are rounded, which adds as much to all of them. Factors are
looked for among sixteenths. ``--keep searches`` keeps the table that docs/recipes.md shows;
``--counts`` puts the cycles of instructions.json as it is now into the kept one, and measures
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, options, show
from nvfp4.bench.issue import counted
from nvfp4.bench.tables import Row
from nvfp4.bench.timing import interleaved
from nvfp4.numerics.formats import E2M1, ROW_BLOCK
from nvfp4.numerics.hadamard import rotate
from nvfp4.numerics.rng import fold_in
from nvfp4.numerics.rounding import nearest
from nvfp4.numerics.scaling import BYTE_STEPS, SEARCH_FACTORS, element_scale, to_blocks
from nvfp4.ops import matmul, quantize
from nvfp4.quantizers import ms_eden, scale_search

SAMPLE, SIDE, TIMED = 1024, 2048, (512, 2048)
KINDS = ("normal", "t3")
STEPS: tuple[float, ...] = tuple(range(-3, 8))
FACTORS: tuple[float, ...] = tuple(k / 16 for k in range(12, 27))
MOST = 4
"""Scales in the largest sets that are looked for."""

CARDS = {"H200": 90, "B200": 100, "RTX 5090": 120}
DRAWS = 512

Set = tuple[float, ...]


@cache
def data(kind: str, side: int, seed: int = 0) -> torch.Tensor:
    """[side, side] of N(0, 1) ("normal") or of Student's t with 3 degrees of freedom ("t3")."""
    x = torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed))
    return x[0] if kind == "normal" else x[0] / (x[1:].square().sum(0) / 3).sqrt()


def step_errors(x: torch.Tensor) -> torch.Tensor:
    """Squared error of each block of x on the scale that is each of ``STEPS`` away, [steps, n]."""
    each = [quantize(x, "scale_search", candidates=(step,)).dequantize() - x for step in STEPS]
    return torch.stack([to_blocks(e, ROW_BLOCK).square().sum(-1).view(-1) for e in each])


def factor_errors(x: torch.Tensor) -> torch.Tensor:
    """Squared error of each block of rotated x under each of ``FACTORS``, [factors, n]."""
    blocks = to_blocks(rotate(x, 1, rounds=2), ROW_BLOCK)
    found = []
    for factor in FACTORS:
        c, _ = element_scale(factor)
        v = blocks / blocks.abs().amax(-1, keepdim=True) * c
        q = nearest(v, E2M1)
        length = v.square().sum(-1, keepdim=True) / (v * q).sum(-1, keepdim=True)
        shrink = blocks.abs().amax(-1, keepdim=True) / c
        found.append(((v - q * length) * shrink).square().sum(-1).view(-1))
    return torch.stack(found)


def best_sets(errors: torch.Tensor, most: int) -> list[tuple[int, ...]]:
    """Of each size up to ``most`` the rows whose least errors [n] have the smallest sum.

    errors: [rows, n]. All subsets are tried, each as a smaller one and a later row.
    """
    best: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())] * most

    def extend(chosen: tuple[int, ...], least: torch.Tensor | None) -> None:
        for row in range(chosen[-1] + 1 if chosen else 0, len(errors)):
            more = errors[row] if least is None else torch.minimum(least, errors[row])
            grown = (*chosen, row)
            best[len(grown) - 1] = min(best[len(grown) - 1], (more.sum().item(), grown))
            if len(grown) < most:
                extend(grown, more)

    extend((), None)
    return [chosen for _, chosen in best]


def best_of_each_size(kind: str) -> Iterator[tuple[str, Set]]:
    """("scale_search", its best steps) and ("ms_eden", its best factors) of two and more."""
    x = data(kind, SAMPLE)
    for name, errors, values, usual in (
        ("scale_search", step_errors(x), STEPS, 0),
        ("ms_eden", factor_errors(x), FACTORS, 1),
    ):
        # in the order of trial: the usual scale, if it is one of them, wins ties
        for chosen in best_sets(errors, MOST)[1:]:
            tried = sorted((values[row] for row in chosen), key=lambda v: (v != usual, v))
            yield name, tuple(tried)


def how(name: str, tried: Set | None) -> dict[str, Any]:
    """The options of a quantiser that tries these; None: no search."""
    if name == "scale_search":
        return {"candidates": tuple(int(step) for step in tried or ())}
    if name != "ms_eden":
        return {}
    return {"rounds": 2} | ({} if tried is None else {"search": True, "factors": tried})


def kernel(name: str, tried: Set | None) -> str:
    """Its Triton kernel on rows of BF16, as instructions.json has it."""
    words = [name]
    if name == "ms_eden":
        words += ["rounds=2"] if tried is None else ["rounds=2", "search=True"]
    if name == "scale_search" and tried != BYTE_STEPS:
        words.append(f"candidates={how(name, tried)['candidates']}")
    if name == "ms_eden" and tried not in (None, SEARCH_FACTORS):
        words.append(f"factors={tried}")
    return f"quantize_kernel: {'_'.join(words)} of bfloat16"


def cycles(name: str, tried: Set | None) -> Row:
    """Of its kernel on each card; None where that was not counted."""
    entries = {card: counted().get((kernel(name, tried), of)) for card, of in CARDS.items()}
    return {f"{card} cycles": entry and entry.busiest()[1] for card, entry in entries.items()}


def count_again(path: Path) -> None:
    """The cycles of a kept table, by the counts as they are now."""
    kept = json.loads(path.read_text())
    for row in kept["rows"]:
        words = tuple(float(word) for word in row["tries"].split())
        row |= cycles(row["quantiser"], words or None)
    path.write_text(json.dumps(kept, indent=1) + "\n")


def relative_mse(kind: str, name: str, tried: Set | None) -> float:
    """x 1e-3, of 2048 x 2048."""
    x = data(kind, SIDE, seed=1000)
    error = quantize(x, name, **how(name, tried), seed=1).dequantize().sub_(x)
    return 1e3 * error.square_().sum(dtype=torch.float64).item() / x.double().square().sum().item()


def bias(tried: Set | None) -> float:
    """Split-half bias^2 of A B^T, 256 x 512 each, A with the same 2 columns of 128 in every row."""
    a, b = data("normal", 512, seed=1)[:256], data("normal", 512, seed=2)[:256]
    a = a * torch.isin(torch.arange(512) % 128, torch.tensor([5, 77]))
    exact = a.double() @ b.double().t()
    halves = [torch.zeros_like(exact) for _ in range(2)]
    for draw in range(DRAWS):
        sign_seed = fold_in(1, draw)
        seeds = [{"seed": fold_in(sign_seed, side), "sign_seed": sign_seed} for side in (1, 2)]
        left, right = (
            quantize(x, "ms_eden", **how("ms_eden", tried), **seed)
            for x, seed in zip((a, b), seeds, strict=True)
        )
        halves[draw % 2] += matmul(left, right)
    even, odd = (half / (DRAWS // 2) - exact for half in halves)
    return ((even * odd).sum() / exact.square().sum()).item()


def rows() -> list[Row]:
    """The table: fewest scales first."""
    found: dict[tuple[str, Set | None], list[str]] = {
        ("four_over_six", None): [],
        ("scale_search", (0,)): [],
        ("ms_eden", None): [],
        ("scale_search", tuple(BYTE_STEPS)): ["default"],
        ("ms_eden", SEARCH_FACTORS): ["default"],
    }
    for name, claimed in (("scale_search", scale_search), ("ms_eden", ms_eden)):
        for tried in claimed.RELATIVE_MSE:
            found.setdefault((name, tried), [])
    for kind in KINDS:
        for each in best_of_each_size(kind):
            found.setdefault(each, []).append(f"best {len(each[1] or ())} on {kind}")

    x = data("normal", TIMED[1])[: TIMED[0]].to(torch.bfloat16)
    turns = {
        str(each): lambda each=each: quantize(x, each[0], **how(*each), seed=1) for each in found
    }
    times = interleaved(turns, seconds=1.0)
    lines: list[Row] = []
    for each, why in sorted(found.items(), key=lambda item: (item[0][0], len(item[0][1] or ()))):
        name, tried = each
        line: Row = {"quantiser": name, "tries": _words(tried), "why": "; ".join(why)}
        line |= {f"{kind} x 1e-3": relative_mse(kind, *each) for kind in KINDS}
        line |= cycles(*each)
        line["ns per element"] = times[str(each)] * 1e6 / x.numel()
        line["bias^2"] = bias(tried) if name == "ms_eden" else None
        lines.append(line)
    return lines


def _words(tried: Sequence[float] | None) -> str:
    return "" if tried is None else " ".join(f"{value:g}" for value in tried)


def main() -> None:
    """Measure and show; keep on request; or count again."""
    parser = options(__doc__)
    parser.add_argument("--counts", action="store_true", help="cycles of the kept table anew")
    args = parser.parse_args()
    if args.counts:
        count_again(RESULTS / "searches.json")
        return
    torch.set_num_threads(1)
    show("searches among fewer scales", rows(), args.keep, labels=2)


if __name__ == "__main__":
    main()
