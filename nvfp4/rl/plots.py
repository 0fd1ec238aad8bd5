"""The pictures: six panels of a run, and four of a comparison.

    a run           reward and its spread | pass@k before, after  | entropy, KL
                    mismatch              | length of completions | FP4 codes changed, failures
    a comparison    reward by recipe      | pass@k before, after
                    entropy by recipe     | mismatch of every step, with the ablation as a line

Mismatch is on a logarithmic axis at whose foot exact zeros stand as open circles: that a step has
none is what the design promises, so zeros must be seen and not fall off the axis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed, none is opened
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nvfp4.rl.statistics import PER_TENSOR, pass_keys
from nvfp4.run.files import write_picture
from nvfp4.run.log import Row
from nvfp4.run.plots import BASE_COLOUR, COLOURS, plain, smooth

BASELINE = "bf16"
FLOOR = 1e-9  # where exact zeros stand on a logarithmic axis
GREY, VERMILION = "#BBBBBB", "#D55E00"


def draw_run(rows: list[Row], result: dict[str, Any], path: Path) -> None:
    """Write the PNG of a run's log and result."""
    steps = [row for row in rows if "reward" in row]
    x = np.array([row["step"] for row in steps])
    figure = Figure(figsize=(12, 6.4), dpi=130, layout="constrained")
    axes = figure.subplots(2, 3)

    # The upper row says what was learnt, the lower one whether the run was sound.
    reward = _column(steps, "reward")
    axes[0, 0].plot(x, reward, color=GREY, linewidth=0.7)
    axes[0, 0].plot(x, smooth(reward), color=COLOURS[0], linewidth=1.6, label="mean, smoothed")
    _lines(axes[0, 0], x, steps, {"reward_std": "standard deviation in a group"}, first=1)
    _finish(axes[0, 0], "reward")
    before = ("before", result["before"], BASE_COLOUR)
    after = ("after", result["after"], COLOURS[0])
    passes(axes[0, 1], [before, after])
    _lines(axes[0, 2], x, steps, {"entropy": "entropy", "kl": "KL to the reference"})
    _finish(axes[0, 2], "entropy of a token, nats")

    # how far the sampler was, how long the answers
    mismatches(axes[1, 0], [("largest", x, _column(steps, "mismatch/max"), COLOURS[0])])
    low = _column(steps, "completions/min_length")
    high = _column(steps, "completions/max_length")
    axes[1, 1].fill_between(x, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    name = "completions/mean_length"
    _lines(axes[1, 1], x, steps, {name: "mean; shaded: shortest to longest"})
    _finish(axes[1, 1], "length of a completion, tokens")

    # shares, of which many are 0 and one of codes may be a thousandth
    codes = {"fp4/codes_changed": "FP4 codes that the step changed"}
    _lines(axes[1, 2], x, steps, codes, scale=100)
    _lines(axes[1, 2], x, steps, {"frac_reward_zero_std": "groups of equal rewards"}, 100, first=1)
    if any(row.get("rewards/failed") for row in steps):
        failed = [{"failed": row["rewards/failed"] / row["samples_drawn"]} for row in steps]
        _lines(axes[1, 2], x, failed, {"failed": "rewards that failed"}, scale=100, first=2)
    axes[1, 2].set_yscale("symlog", linthresh=1)
    axes[1, 2].set_ylim(bottom=0)
    axes[1, 2].yaxis.set_major_formatter("{x:g}")
    _finish(axes[1, 2], "shares, %")

    title = f"{result['task']}: {result['objective']} in {result['recipe']}, seed {result['seed']}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    write_picture(figure, path)


def draw_comparison(report: dict[str, Any], path: Path) -> None:
    """Write the PNG of what ``compare.comparison`` returns."""
    runs_of: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        full = run["recipe"] == BASELINE
        name = "full precision" if full else f"NVFP4, recipe {run['recipe']}"
        name += ", random rewards" if run["reward"] == "random" else ""
        runs_of.setdefault(name, []).append(run)
    colours = _colours(runs_of)
    figure = Figure(figsize=(10, 7), dpi=140, layout="constrained")
    axes = figure.subplots(2, 2)

    # curves: the mean over seeds, and a band from the lowest to the highest
    task = f"rewards/{report['runs'][0]['task']}/mean"
    _curves(axes[0, 0], runs_of, colours, task)
    _finish(axes[0, 0], "share of right completions in training (band: lowest to highest seed)")
    _curves(axes[1, 0], runs_of, colours, "entropy")
    _finish(axes[1, 0], "entropy of a token, nats")

    # pass@k; runs begin alike, so one line before is enough
    starts, ends, lines = [], [], []
    for name, runs in runs_of.items():
        if "random" not in name:
            starts.append((f"{name}: before", runs[0]["before"], colours[name]))
        for run in runs:
            ends.append((f"{name}: after", run["after"], colours[name]))
            x = np.array(run["curve"]["step"])
            gap = np.array(run["curve"]["mismatch/max"], dtype=np.float64)
            lines.append((name, x, gap, colours[name]))
    passes(axes[0, 1], starts, style=":")
    passes(axes[0, 1], ends)

    mismatches(axes[1, 1], lines)
    _mark_ablation(axes[1, 1], report["ablation"])
    first = report["runs"][0]
    size = f"{first['parameters'] / 1e6:.1f} M parameters"
    title = f"{first['objective']}: {first['task']}, {size}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    write_picture(figure, path)


def passes(
    axes: Axes,
    figures: list[tuple[str, dict[str, float], str]],
    style: str = "-",
) -> None:
    """pass@k over k with the intervals over problems; figures: (label, evaluation, colour)."""
    labels = set()
    for name, row, colour in figures:
        keys = pass_keys(row)
        k = [int(key.split("@")[1]) for key in keys]
        low, high = ([row[f"{key}/{end}"] for key in keys] for end in ("low", "high"))
        axes.fill_between(k, low, high, color=colour, alpha=0.1, lw=0)
        label = None if name in labels else name
        rates = [row[key] for key in keys]
        axes.plot(k, rates, style, marker="o", markersize=3.5, color=colour, label=label)
        labels.add(name)

    # from just below the lowest point, so that small differences are seen
    axes.set_xscale("log", base=2)
    axes.set_xticks(k, [str(value) for value in k])
    lowest = min(float(np.min(np.asarray(line.get_ydata()))) for line in axes.get_lines())
    axes.set_ylim(max(lowest - 0.05, 0) - 0.02, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="best")
    _finish(axes, "pass@k on held-out problems", "k")


def mismatches(axes: Axes, lines: list[tuple[str, np.ndarray, np.ndarray, str]]) -> None:
    """Largest difference of a step on a logarithmic axis; exact zeros are open circles at its foot.

    lines: (name, steps [N], differences [N] in nats, colour).
    """
    zeros = 0
    for _, x, values, colour in lines:
        zero = values == 0
        zeros += int(zero.sum())
        foot = np.full(zero.sum(), FLOOR)
        axes.plot(x[~zero], values[~zero], ".", color=colour, markersize=4)
        (circles,) = axes.plot(x[zero], foot, "o", color=colour, markersize=3.5, mew=0.8)
        circles.set_fillstyle("none")

    # The dashed line is the bound of the gate: 1e-5 nats.
    axes.set_yscale("log")
    axes.set_ylim(FLOOR / 3, 3)
    axes.axhline(1e-5, color="#999999", linewidth=0.8, linestyle="--")
    ticks = [1e-7, 1e-5, 1e-3, 1e-1]
    powers = [f"$10^{{{int(np.log10(tick))}}}$" for tick in ticks]
    axes.set_yticks([FLOOR, *ticks], ["exactly 0", *powers])
    total = sum(len(x) for _, x, _, _ in lines)
    _finish(axes, f"sampler - trainer, nats ({zeros} of {total} steps exactly 0)")


def _curves(
    axes: Axes,
    runs_of: dict[str, list[dict[str, Any]]],
    colours: dict[str, str],
    key: str,
) -> None:
    """A figure over steps, one line for each kind of run."""
    for name, runs in runs_of.items():
        curves = np.array([smooth(np.array(run["curve"][key], np.float64)) for run in runs])
        x = np.array(runs[0]["curve"]["step"])
        low, high = curves.min(axis=0), curves.max(axis=0)
        axes.fill_between(x, low, high, color=colours[name], alpha=0.18, linewidth=0)
        label = f"{name}, {len(runs)} seeds" if len(runs) > 1 else name
        width, style = (2.6, "--") if runs[0]["recipe"] == BASELINE else (1.5, "-")
        mean = curves.mean(axis=0)
        axes.plot(x, mean, style, color=colours[name], linewidth=width, label=label)
    axes.legend(frameon=False, fontsize=8)


def _mark_ablation(axes: Axes, ablation: list[dict[str, Any]]) -> None:
    """A line at the mismatch that one scale for all rows would have."""
    for row in ablation:
        if row["name"] == PER_TENSOR and row["weights"] == "warm start":
            axes.axhline(row["max"], color=VERMILION, linewidth=1.2, linestyle="-.")
            axes.annotate(
                "with one scale for all rows (per-tensor amax)",
                xy=(0.02, row["max"]),
                xycoords=("axes fraction", "data"),
                xytext=(0, -10),
                textcoords="offset points",
                color=VERMILION,
                fontsize=8,
            )


def _colours(names: dict[str, Any]) -> dict[str, str]:
    others = iter(COLOURS * (1 + len(names) // len(COLOURS)))
    return {name: BASE_COLOUR if name.startswith("full") else next(others) for name in names}


def _column(rows: list[Row], key: str) -> np.ndarray:
    return np.array([row.get(key) for row in rows], dtype=np.float64)  # None becomes NaN


def _lines(
    axes: Axes,
    x: np.ndarray,
    rows: list[Row],
    names: dict[str, str],
    scale: float = 1,
    first: int = 0,
) -> None:
    """One line for each of ``names`` (key: label) with a finite value; first: of the colours."""
    for place, (key, label) in enumerate(names.items(), first):
        values = scale * _column(rows, key)
        if np.isfinite(values).any():
            axes.plot(x, values, color=COLOURS[place], linewidth=1.3, label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _finish(axes: Axes, title: str, x_label: str = "step") -> None:
    plain(axes)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x_label)
