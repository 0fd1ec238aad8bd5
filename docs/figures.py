"""The figures of README and docs/, from the data they were measured as.

A page marks a place; this program says what stands there, and a test holds the two equal:

    <!-- figures: headline -->
    ...
    <!-- end -->

    python docs/figures.py            say which pages are out of date (exit code 1)
    python docs/figures.py --write    bring them up to date

Data: ``benchmarks/results/*.json``; for ``quantisers`` what each of them claims, which the property
tests measure.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from math import ceil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_PLACE = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """README and every page of the book."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def up_to_date(text: str) -> str:
    """The text of a page with every marked place filled in; KeyError for a name that nothing here
    makes."""
    return _PLACE.sub(lambda place: f"{place[1]}{FIGURES[place[2]]()}\n{place[4]}", text)


def headline() -> str:
    """The result that README opens with: size, data, bits per byte, and the gap of each recipe.

    Of several seeds the means, the largest standard error of a gap, and how many there were.
    """
    report = _read("compare")
    baseline, first = report["baseline"], report["runs"][0]
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        runs.setdefault(run["recipe"], []).append(run)
    base = fmean(run["val_bpb"] for run in runs.pop(baseline))

    # the smallest gap first
    mean = {name: fmean(run["gap_percent"] for run in several) for name, several in runs.items()}
    gaps = ", ".join(
        f"{mean[name]:+.1f} % (`{name}`)" for name in sorted(mean, key=mean.__getitem__)
    )

    # how sure they are
    seeds = len(report["runs"]) // (1 + len(runs))
    doubt = (
        "(One seed; differences of a percent between recipes are within its noise at this size.)"
    )
    if seeds > 1:
        spread = max(
            stdev(run["gap_percent"] for run in several) / seeds**0.5 for several in runs.values()
        )
        most = ceil(10 * spread) / 10
        doubt = f"(Means of {seeds} seeds; the standard error of a gap is {most} % or less.)"
    size = f"{first['parameters'] / 1e6:.1f} M parameters, {first['steps']} updates"
    data = (
        "on the source of Python's standard library"
        if not report["config"]["data"]
        else "on text files"
    )
    return (
        f"A {report['config']['architecture'].capitalize()} of {size} {data}, same init and same "
        "data order for all:\n"
        f"**{base:.3f} bits per byte in BF16; in NVFP4 {gaps}.**\n"
        f"{doubt}"
    )


def quantisers() -> str:
    """Each quantiser's error on N(0, 1) and whether its mean is the input."""
    from nvfp4.quantizers.registry import QUANTIZERS

    rows = []
    for shown, name, options, unbiased, what in _QUANTISERS:
        quantizer = QUANTIZERS[name]
        claims = quantizer.claims(quantizer.check(seed=0, **options))
        error = f"{claims.relative_mse * 1e3:.2f}"
        if name == "rtn":
            tiles = QUANTIZERS["rtn_2d"]
            error += f" (16x16: {tiles.claims(tiles.check()).relative_mse * 1e3:.2f})"
        rows.append((f"`{shown}`", error, unbiased, what))
    return _table(
        ("quantiser", "relative MSE on N(0, 1), x 1e-3", "unbiased", "what it does"), rows
    )


_QUANTISERS: tuple[tuple[str, str, dict[str, Any], str, str], ...] = (
    ("rtn", "rtn", {}, "no", "nearest, TransformerEngine's scales"),
    ("four_over_six", "four_over_six", {}, "no", "block maximum at 6 or at 4, whichever is closer"),
    ("scale_search", "scale_search", {}, "no", "the best of nine neighbouring scales"),
    ("sr", "sr", {}, "yes", "stochastic; scales rounded up, so nothing clips"),
    ("sr_te", "sr_te", {}, "slightly biased (clips)", "stochastic, NVIDIA's"),
    (
        "ms_eden",
        "ms_eden",
        {},
        "dense rows; sparse ones from 2 rounds",
        "rotate, round, repair the length in a stochastic scale",
    ),
    ("ms_eden(search)", "ms_eden", {"search": True}, "as ms_eden", "and the best of six scales"),
)


def linear() -> str:
    """Forward and backward of one layer relative to BF16, a row per machine, instruction set and
    size."""
    recipes = ("nvidia", "quartet2", "search_eden")
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in _read("linear")["rows"]:
        where = (_processor(row["machine"], row["instructions"]), row["layer"].split()[0])
        times.setdefault(where, {})[row["recipe"]] = row["x bf16"]

    rows = [
        (*where, *(f"{found[recipe]:.2f}" for recipe in recipes))
        for where, found in sorted(times.items())
    ]
    return _table(("machine", "tokens = in = out", *(f"`{recipe}`" for recipe in recipes)), rows)


def quantize() -> str:
    """Milliseconds of each quantiser on each machine, and copies of the same bytes in brackets."""
    measured = _read("quantize")["rows"]
    machines = sorted({_processor(row["machine"], row["instruction set"]) for row in measured})
    cells: dict[str, dict[str, str]] = {}
    for row in measured:
        machine = _processor(row["machine"], row["instruction set"])
        cells.setdefault(row["quantiser"], {})[machine] = (
            f"{row['row-wise ms']:.1f} ms ({row['x copy']:.1f})"
        )

    rows = [
        (f"`{name}`", *(found.get(machine, "") for machine in machines))
        for name, found in cells.items()
    ]
    return _table(("quantiser", *machines), rows)


def _processor(machine: dict[str, Any], instructions: str) -> str:
    """A machine in a few words: processor, threads, and the instruction set that the process was
    held to."""
    return (
        f"{machine['processor'].split(' (')[0]}, {machine['threads']} threads, "
        f"{instructions.upper()}"
    )


def memory() -> str:
    """What one more layer adds to the peak."""
    data = _read("memory")
    shares = sorted({f"{row['x bf16']:.2f}" for row in data["rows"] if row["recipe"] != "bf16"})
    return (
        f"Saved for backward, and peak memory of one more layer: {' to '.join(shares)} of BF16's "
        "activations."
    )


def rl() -> str:
    """pass@1 and pass@16 before and after, for full precision, NVFP4 and random rewards."""
    runs = {row["run"]: row for row in _read("rl")["rows"]}
    kinds = {
        "bf16-seed": "full precision",
        "rl-seed": "NVFP4 (`rl`: weights and activations in 4 bits)",
        "control-rl-seed": "NVFP4, random rewards",
    }
    rows = []
    for prefix, what in kinds.items():
        seeds = [row for name, row in sorted(runs.items()) if name.startswith(prefix)]
        after = ", ".join(f"{row['after pass@1']:.3f}" for row in seeds)
        last = " to ".join(sorted({f"{row['after pass@16']:.3f}" for row in seeds}))
        rows.append((what, f"{seeds[0]['before pass@1']:.3f}", after, last))
    return _table(("", "pass@1 before", "after, each seed", "pass@16 after"), rows)


def objectives() -> str:
    """What each objective reaches from the same warm start."""
    rows = [
        (
            row["objective"],
            row["group"],
            row["minibatches"],
            f"{row['pass@1 before']:.2f}",
            f"{row['pass@1 after']:.2f} +- {row['pass@1 after, spread']:.2f}",
        )
        for row in sorted(_read("rl_objectives")["rows"], key=lambda row: -row["pass@1 after"])
    ]
    return _table(
        ("objective", "group", "updates per rollout", "pass@1 before", "after, mean +- spread"),
        rows,
    )


def published() -> str:
    """What others measured on their cards, and the roofline's prediction of the same."""
    rows = [
        (
            row["what"],
            row["card"],
            f"{row['published']:.3g} {row['unit']}",
            f"{row['predicted']:.3g}",
            f"{row['ratio']:.2f}",
        )
        for row in _read("roofline")["published"]
    ]
    return _table(("what", "card", "published", "predicted", "ratio"), rows)


def shares() -> str:
    """Predicted share of a copy, the bound, and instructions per element: paths by cards."""
    found = _read("roofline")["quantising"]
    cards = list(dict.fromkeys(row["card"] for row in found))
    rows: dict[str, list[str]] = {}
    for row in found:
        cell = f"{row['of a copy']} {row['bound by']}, {row['instructions per element']}"
        rows.setdefault(row["path"], []).append(cell)
    return _table(("", *cards), ((f"`{path}`", *cells) for path, cells in rows.items()))


def changed() -> str:
    """Paths before and after their kernels were changed by counts: share, bound, instructions."""
    cards = ("H100", "H200", "B200", "RTX 5090")
    before, after = (
        {(row["path"], row["card"]): row for row in _read(name)["quantising"]}
        for name in ("roofline_before", "roofline")
    )
    lines = []
    for path in dict.fromkeys(path for path, _ in before):
        cells = [f"`{path}`"]
        for card in cards:
            old, new = before[path, card], after[path, card]
            shares = f"{old['of a copy']} -> **{new['of a copy']}** ({new['its amax read too']})"
            counts = f"{old['instructions per element']} -> {new['instructions per element']}"
            cells.append(f"{shares} {new['bound by']}, {counts}")
        lines.append(cells)
    return _table(("", *cards), lines)


def cuda_shares() -> str:
    """Predicted shares of the C++ kernels, before and now, and their instructions per element."""
    found = _read("cuda_shares")
    cards = ("H100", "H200", "B200", "RTX 5090")
    cells: dict[tuple[str, str, str], dict[str, Any]] = {
        (row["path"], row["card"], row["kernels"]): row for row in found
    }
    rows = []
    for path in dict.fromkeys(row["path"] for row in found):
        line = [f"`{path}`"]
        for card in cards:
            before, now = cells[path, card, "before"], cells[path, card, "rows"]
            line.append(
                f"{before['of its bytes']} -> {now['of its bytes']} {now['bound by']}, "
                f"{before['instructions per element']} -> {now['instructions per element']}"
            )
        rows.append(line)
    return _table(("", *cards), rows)


def searches() -> str:
    """What a search among fewer scales gives and costs."""
    rows = []
    for row in _read("searches")["rows"]:
        shown = f"`{row['quantiser']}`" + (f" {row['tries']}" if row["tries"] else "")
        errors = (f"{row[f'{kind} x 1e-3']:.2f}" for kind in ("normal", "t3"))
        cycles = (row[f"{card} cycles"] for card in ("H200", "B200", "RTX 5090"))
        counted = ("-" if each is None else f"{each:.0f}" for each in cycles)
        bias = "-" if row["bias^2"] is None else f"{1e5 * row['bias^2']:.1f}"
        rows.append((shown, *errors, *counted, f"{row['ns per element']:.2f}", bias))
    columns = ("tries", "N(0, 1)", "t(3)", "H200", "B200", "RTX 5090", "ns", "bias^2, x 1e-5")
    return _table(columns, rows)


def predicted() -> str:
    """Predicted speed-ups over BF16 of every recipe, for the block of a model of 7 B parameters."""
    rows = _read("roofline")["recipes"]
    cards = [name for name in rows[0] if name not in ("recipe", "uncounted")]
    cells = (
        (
            f"`{row['recipe']}`",
            *(
                f"{'< ' if card in row['uncounted'].split(', ') else ''}{row[card]:.2f}"
                for card in cards
            ),
        )
        for row in rows
    )
    return _table(("recipe", *cards), cells)


FIGURES: dict[str, Callable[[], str]] = {
    maker.__name__: maker
    for maker in (
        headline,
        quantisers,
        linear,
        quantize,
        memory,
        rl,
        objectives,
        published,
        shares,
        changed,
        cuda_shares,
        searches,
        predicted,
    )
}


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> int:
    """Compare, or write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="bring the pages up to date")
    write = parser.parse_args().write
    stale = {}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if up_to_date(text) != text:
            stale[page] = up_to_date(text)
    for page, text in stale.items():
        print(f"{page.relative_to(ROOT)}: {'written' if write else 'out of date'}")
        if write:
            page.write_text(text, encoding="utf-8")
    return 0 if write else int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
