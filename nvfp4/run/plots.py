"""The picture of a comparison: losses above, the gap to the baseline below.

    top      loss [steps] of each run: smoothed line, dots for held-out scores; grey: each batch
    bottom   smooth(loss - loss of the baseline) [steps]

All runs see the same batches in the same order, so the noise of a batch cancels in the difference:
the lower panel shows gaps that the upper one hides.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no display is needed, none is opened
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nvfp4.run.files import write_picture

BASE_COLOUR, RAW_COLOUR = "#222222", "#D4D4D4"
# Okabe and Ito, "Color universal design" (2008), from dark to light: colour-blind readers can tell
# them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SMOOTHING = 0.02  # standard deviation of the Gaussian, as a share of the run


def draw_comparison(report: dict[str, Any], path: Path) -> None:
    """Write the PNG of what ``compare.comparison`` returns."""
    figure = Figure(figsize=(9, 6.4), dpi=160, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_losses(top, report)
    _draw_gaps(bottom, report)
    first, count = report["runs"][0], report["runs"][0]["parameters"]
    size = f"{count / 1e6:.1f} M parameters" if count >= 1e6 else f"{count / 1e3:.0f} k parameters"
    title = f"NVFP4 recipes against {report['baseline']}: {size}, {first['steps']} updates"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    write_picture(figure, path)


def smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian average of a curve, float64 [n] -> [n].

    NaN (a skipped step) has no weight; at the ends the average is over what is there.
    """
    width = max(1.0, SMOOTHING * len(values))
    reach = np.arange(-int(3 * width), int(3 * width) + 1)  # offsets, three deviations to each side
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    finite = np.isfinite(values)
    pad = len(reach) // 2

    # Weighted sum over weights: leaving a value out then means leaving both out.
    total = np.convolve(np.where(finite, values, 0.0), kernel)[pad : pad + len(values)]
    return total / np.convolve(finite.astype(float), kernel)[pad : pad + len(values)]


def spread(places: list[float], gap: float) -> list[float]:
    """The places moved apart until neighbours are at least ``gap`` apart; order is kept.

    Each pair that is too close gives way by half each, over and over, so the labels of a cluster
    spread around its middle.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for _ in range(100):
        for low, high in pairwise(order):
            short = gap - (moved[high] - moved[low])
            if short > 1e-9:
                moved[low], moved[high] = moved[low] - short / 2, moved[high] + short / 2
    return moved


def _draw_losses(axes: Axes, report: dict[str, Any]) -> None:
    ends, texts = [], []
    for run, colour in zip(report["runs"], _colours(report), strict=True):
        steps, raw = _curve(run)
        curve = smooth(raw)
        # the others' noise is that of the same batches: one says it
        if run["recipe"] == report["baseline"]:
            axes.plot(steps, raw, color=RAW_COLOUR, linewidth=0.5, zorder=1)
        axes.plot(steps, curve, color=colour, linewidth=1.6, zorder=2)
        scored = run["held_out"]
        axes.plot(
            scored["step"],
            _held_out_losses(run),
            "o",
            color=colour,
            markersize=4.5,
            markeredgecolor="white",
            zorder=3,
        )
        ends.append(float(curve[-1]))
        texts.append((f"{run['recipe']}  {run['val_bpb']:.3f}", colour))

    # The axis shows what the curves settle at, not the fall of the first steps.
    settled = [_curve(run)[1][_settling_step(run) :] for run in report["runs"]]
    # a quantile, so that a single lucky batch does not flatten the curves
    low = float(np.nanquantile(np.concatenate(settled), 0.005))
    high = max(float(smooth(_curve(run)[1])[_settling_step(run)]) for run in report["runs"])
    axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.set_ylabel("loss, nats per token")
    axes.set_title(
        "Training loss (lines: smoothed; grey: each batch; dots: held out; labels: final "
        "held-out bits per byte)",
        fontsize=9.5,
        loc="left",
    )
    plain(axes)
    axes.margins(x=0.01)
    _label_ends(axes, ends, texts)


def _draw_gaps(axes: Axes, report: dict[str, Any]) -> None:
    base = next(run for run in report["runs"] if run["recipe"] == report["baseline"])
    ends, texts, extremes = [0.0], [(base["recipe"], BASE_COLOUR)], [0.0]
    axes.axhline(0, color=BASE_COLOUR, linewidth=1.2)

    # The others minus the baseline, step by step.
    for run, colour in zip(report["runs"], _colours(report), strict=True):
        if run is base:
            continue
        steps, raw = _curve(run)
        # the same batches in the same order, so the batch's own noise cancels
        gap = smooth(raw - _curve(base)[1])
        axes.plot(steps, gap, color=colour, linewidth=1.6)
        scored = _held_out_losses(run) - _held_out_losses(base)
        axes.plot(
            run["held_out"]["step"],
            scored,
            "o",
            color=colour,
            markersize=4.5,
            markeredgecolor="white",
        )
        extremes += [*gap[_settling_step(run) :], *scored[1:][np.isfinite(scored[1:])]]
        ends.append(float(gap[-1]))
        texts.append((f"{run['recipe']}  {run['gap_percent']:+.2f} %", colour))

    # Room for all of them once they have settled.
    margin = 0.12 * (max(extremes) - min(extremes)) or 0.01
    axes.set_ylim(min(extremes) - margin, max(extremes) + margin)
    axes.set_ylabel(f"gap to {base['recipe']}, nats")
    axes.set_xlabel("optimiser update")
    axes.set_title(
        "Gap on the same batches (dots: held out; labels: gap of the final held-out bits per byte)",
        fontsize=9.5,
        loc="left",
    )
    plain(axes)
    axes.margins(x=0.01)
    _label_ends(axes, ends, texts)


def _curve(run: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    # None becomes NaN
    return np.array(run["curve"]["step"]), np.array(run["curve"]["loss"], dtype=np.float64)


def _held_out_losses(run: dict[str, Any]) -> np.ndarray:
    return np.array(run["held_out"]["val_loss"], dtype=np.float64)


def _colours(report: dict[str, Any]) -> list[str]:
    others = iter(COLOURS * (1 + len(report["runs"]) // len(COLOURS)))
    return [
        BASE_COLOUR if run["recipe"] == report["baseline"] else next(others)
        for run in report["runs"]
    ]


def _settling_step(run: dict[str, Any]) -> int:
    """Where the steep fall of the first steps is over: the axis begins to matter there."""
    return len(run["curve"]["step"]) // 12


def plain(axes: Axes) -> None:
    """Axes with two sides and faint horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _label_ends(axes: Axes, ends: list[float], texts: list[tuple[str, str]]) -> None:
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.get_figure().dpi * 72  # type: ignore[union-attr]  # points
    places = spread(ends, gap=13 / height * (high - low))
    for place, (text, colour) in zip(places, texts, strict=True):
        axes.annotate(
            text,
            xy=(1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
