"""The pictures: of a run after each run, and of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed, none is opened
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nvfp4.rl.ablation import PER_TENSOR
from nvfp4.run.files import write_picture
from nvfp4.run.log import Row
from nvfp4.run.plots import BASE_COLOUR, COLOURS, smooth

BASELINE = "bf16"
FLOOR = 1e-9  # where exact zeros stand on a logarithmic axis


def draw_run(rows: list[Row], result: dict[str, Any], path: Path) -> None:
    """Write the PNG of a run's log and result."""
    steps = [row for row in rows if "reward" in row]
    figure = Figure(figsize=(12, 6.4), dpi=130, layout="constrained")
    axes = figure.subplots(2, 3)
    x = np.array([row["step"] for row in steps])
    axes[0, 0].plot(x, _column(steps, "reward"), color="#BBBBBB", linewidth=0.7)
    axes[0, 0].plot(x, smooth(_column(steps, "reward")), color=COLOURS[0], linewidth=1.6, label="mean, smoothed")
    _lines(axes[0, 0], x, steps, {"reward_std": "standard deviation in a group"}, first=1)
    _finish(axes[0, 0], "reward")
    passes(axes[0, 1], [("before", result["before"], BASE_COLOUR), ("after", result["after"], COLOURS[0])])
    _lines(axes[0, 2], x, steps, {"entropy": "entropy", "kl": "KL to the reference"})
    _finish(axes[0, 2], "entropy of a token, nats")
    mismatches(axes[1, 0], [("largest", x, _column(steps, "mismatch/max"), COLOURS[0])])
    low, high = _column(steps, "completions/min_length"), _column(steps, "completions/max_length")
    axes[1, 1].fill_between(x, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    _lines(axes[1, 1], x, steps, {"completions/mean_length": "mean; shaded: shortest to longest"})
    _finish(axes[1, 1], "length of a completion, tokens")
    _lines(axes[1, 2], x, steps, {"fp4/codes_changed": "FP4 codes that the step changed"}, scale=100)
    _lines(axes[1, 2], x, steps, {"frac_reward_zero_std": "groups of equal rewards"}, scale=100, first=1)
    if any(row.get("rewards/failed") for row in steps):
        failed = [{"failed": row["rewards/failed"] / row["samples_drawn"]} for row in steps]
        _lines(axes[1, 2], x, failed, {"failed": "rewards that failed"}, scale=100, first=2)
    axes[1, 2].set_yscale("symlog", linthresh=1)  # zeros are common, and a share of codes may be a thousandth
    axes[1, 2].set_ylim(bottom=0)
    axes[1, 2].yaxis.set_major_formatter("{x:g}")
    _finish(axes[1, 2], "shares, %")
    title = f"{result['task']}: {result['objective']} in {result['recipe']}, seed {result['seed']}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    write_picture(figure, path)


def draw_comparison(report: dict[str, Any], path: Path) -> None:
    """Write the PNG of what ``compare.comparison`` returns."""
    figure = Figure(figsize=(10, 7), dpi=140, layout="constrained")
    axes = figure.subplots(2, 2)
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        name = "full precision" if run["recipe"] == BASELINE else f"NVFP4, recipe {run['recipe']}"
        name += ", random rewards" if run["reward"] == "random" else ""
        groups.setdefault(name, []).append(run)
    colours = _colours(groups)
    task = f"rewards/{report['runs'][0]['task']}/mean"
    for axis, key in ((axes[0, 0], task), (axes[1, 0], "entropy")):
        for name, runs in groups.items():
            curves = np.array([smooth(np.array(run["curve"][key], dtype=np.float64)) for run in runs])
            x = np.array(runs[0]["curve"]["step"])
            axis.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=colours[name], alpha=0.18, linewidth=0)
            label = f"{name}, {len(runs)} seeds" if len(runs) > 1 else name
            width, style = (2.6, "--") if runs[0]["recipe"] == BASELINE else (1.5, "-")
            axis.plot(x, curves.mean(axis=0), style, color=colours[name], linewidth=width, label=label)
        axis.legend(frameon=False, fontsize=8)
    _finish(axes[0, 0], "share of right completions in training (band: lowest to highest seed)")
    _finish(axes[1, 0], "entropy of a token, nats")
    pairs = [(f"{name}: before", runs[0]["before"], colours[name]) for name, runs in groups.items()]
    pairs = [pair for pair in pairs if "random" not in pair[0]]
    ends = [(f"{name}: after", run["after"], colours[name]) for name, runs in groups.items() for run in runs]
    passes(axes[0, 1], pairs, style=":")
    passes(axes[0, 1], ends)
    lines = [
        (name, np.array(run["curve"]["step"]), np.array(run["curve"]["mismatch/max"], dtype=np.float64), colours[name])
        for name, runs in groups.items()
        for run in runs
    ]
    mismatches(axes[1, 1], lines)
    _mark_ablation(axes[1, 1], report["ablation"])
    first = report["runs"][0]
    title = f"{first['objective']}: {first['task']}, {first['parameters'] / 1e6:.1f} M parameters"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    write_picture(figure, path)


def passes(axes: Axes, figures: list[tuple[str, dict[str, float], str]], style: str = "-") -> None:
    """pass@k over k, with the intervals over problems."""
    seen = set()
    for name, row, colour in figures:
        keys = [key for key in row if key.count("/") == 1 and "@" in key]
        k = [int(key.split("@")[1]) for key in keys]
        axes.fill_between(
            k, [row[f"{key}/low"] for key in keys], [row[f"{key}/high"] for key in keys], color=colour, alpha=0.1, lw=0
        )
        label = None if name in seen else name
        axes.plot(k, [row[key] for key in keys], style, marker="o", markersize=3.5, color=colour, label=label)
        seen.add(name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(k, [str(value) for value in k])
    lowest = min(float(np.min(np.asarray(line.get_ydata()))) for line in axes.get_lines())
    axes.set_ylim(max(lowest - 0.05, 0) - 0.02, 1.02)
    axes.legend(frameon=False, fontsize=8, loc="best")
    _finish(axes, "pass@k on held-out problems", "k")


def mismatches(axes: Axes, lines: list[tuple[str, np.ndarray, np.ndarray, str]]) -> None:
    """Largest difference of a step on a logarithmic axis; exact zeros are open circles at its foot."""
    zeros = 0
    for _, x, values, colour in lines:
        zero = values == 0
        zeros += int(zero.sum())
        axes.plot(x[~zero], values[~zero], ".", color=colour, markersize=4)
        axes.plot(x[zero], np.full(zero.sum(), FLOOR), "o", color=colour, markersize=3.5, fillstyle="none", mew=0.8)
    axes.set_yscale("log")
    axes.set_ylim(FLOOR / 3, 3)
    axes.axhline(1e-5, color="#999999", linewidth=0.8, linestyle="--")
    ticks = [FLOOR, 1e-7, 1e-5, 1e-3, 1e-1]
    axes.set_yticks(ticks, ["exactly 0", *(f"$10^{{{int(np.log10(tick))}}}$" for tick in ticks[1:])])
    total = sum(len(x) for _, x, _, _ in lines)
    _finish(axes, f"sampler - trainer, nats ({zeros} of {total} steps exactly 0)")


def _mark_ablation(axes: Axes, ablation: list[dict[str, Any]]) -> None:
    for row in ablation:
        if row["name"] == PER_TENSOR and row["weights"] == "warm start":
            axes.axhline(row["max"], color="#D55E00", linewidth=1.2, linestyle="-.")
            axes.annotate(
                "with one scale for all rows (per-tensor amax)",
                xy=(0.02, row["max"]),
                xycoords=("axes fraction", "data"),
                xytext=(0, -10),
                textcoords="offset points",
                color="#D55E00",
                fontsize=8,
            )


def _colours(groups: dict[str, Any]) -> dict[str, str]:
    others = iter(COLOURS * (1 + len(groups) // len(COLOURS)))
    return {name: BASE_COLOUR if name.startswith("full") else next(others) for name in groups}


def _column(rows: list[Row], key: str) -> np.ndarray:
    return np.array([row.get(key) for row in rows], dtype=np.float64)  # None becomes NaN


def _lines(axes: Axes, x: np.ndarray, rows: list[Row], names: dict[str, str], scale: float = 1, first: int = 0) -> None:
    for place, (key, label) in enumerate(names.items(), first):
        values = scale * _column(rows, key)
        if np.isfinite(values).any():
            axes.plot(x, values, color=COLOURS[place], linewidth=1.3, label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _finish(axes: Axes, title: str, x_label: str = "step") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x_label)
