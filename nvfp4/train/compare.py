"""The same run once per recipe and seed, and what the recipes cost.

    plan          a run per recipe, or per recipe and seed where several are asked for
    gap           held-out loss minus that of bf16 in the run of the same seed: same initial
                  weights, same batches
    paired_gaps   the mean gap over seeds, and its standard error

``run/arms.py`` does the runs; what came out is compare.json, compare.png and a table.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from nvfp4.run import log
from nvfp4.run.arms import Arm, Display, Lines, paired_gaps, publish, run_all, side_by_side
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import differences, read_config_file, to_fields
from nvfp4.run.folder import RunFolder
from nvfp4.run.plots import draw_comparison
from nvfp4.run.progress import duration, rate
from nvfp4.train.config import CompareConfig, PretrainConfig, TrainConfig, resolve

BASELINE = "bf16"


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train each recipe that is not finished, write compare.json and compare.png; returns the JSON.

    Gaps, in nats per token and in percent of bits per byte, are to bf16, or to the first recipe if
    bf16 is not among them. Raises ``TrainError`` when a run cannot start or fails, ``Interrupted``
    after a signal; finished runs stay.
    """
    config = resolve(config)
    folder = RunFolder(config.out)
    with folder.hold():
        arms = plan(config)
        for arm in arms if config.overwrite else ():
            arm.folder.clear()
        for arm in arms:  # all refusals before the first run
            _check_run(arm)
        share = side_by_side(arms, config.workers)
        if share.workers == 1:
            results = run_all(arms, share, Display())
        else:
            # bf16, the quickest, is listed first; begun last it leaves the least of a core waiting
            results = run_all(arms[::-1], share, Lines())[::-1]
        report = comparison(config, arms, results)
        report["side_by_side"] = dataclasses.asdict(share)
        return publish(report, folder.root, draw_over_seeds, [table(report)])


def plan(config: CompareConfig) -> list[Arm]:
    """A run per recipe of a resolved config; with seeds, per recipe and seed."""
    if not config.seeds:
        return [_arm(config, recipe, recipe, config.seed) for recipe in config.recipes]
    return [
        _arm(config, f"{recipe}-seed{seed}", recipe, seed)
        for recipe in config.recipes
        for seed in config.seeds
    ]


def comparison(
    config: CompareConfig, arms: list[Arm], results: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of compare.json: each result with its gaps, and its curves from the run's log."""
    baseline = BASELINE if BASELINE in config.recipes else config.recipes[0]
    base = {
        arm.config.seed: r for arm, r in zip(arms, results, strict=True) if r["recipe"] == baseline
    }

    # Each result beside the baseline's of the same seed, with its curves.
    runs = []
    for arm, result in zip(arms, results, strict=True):
        rows = log.read(arm.folder.log)
        # rows of steps have a loss, rows of evaluations a held-out one; some have both
        steps, scored = (
            [row for row in rows if "loss" in row],
            [row for row in rows if "val_loss" in row],
        )
        same = base[arm.config.seed]
        runs.append(
            {
                **{key: value for key, value in result.items() if key != "config"},
                **({"name": arm.name, "seed": arm.config.seed} if config.seeds else {}),
                "gap_nats": result["val_loss"] - same["val_loss"],
                "gap_percent": 100 * (result["val_bpb"] / same["val_bpb"] - 1),
                "curve": {
                    "step": [row["step"] for row in steps],
                    "loss": [row["loss"] for row in steps],
                },
                "held_out": {
                    key: [row[key] for row in scored] for key in ("step", "val_loss", "val_bpb")
                },
            }
        )
    report = {"baseline": baseline, "config": to_fields(config), "runs": runs}

    # With two seeds or more the spread of the pairs says how sure a gap is.
    if len(config.seeds) > 1:
        losses = {(run["recipe"], run["seed"]): run["val_loss"] for run in runs}
        report["paired"] = paired_gaps(losses, baseline)
    return report


def draw_over_seeds(report: dict[str, Any], path: Path) -> None:
    """The picture of a report; a recipe's figures and curves are the means over its seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        groups.setdefault(run["recipe"], []).append(run)
    draw_comparison({**report, "runs": [_mean(runs) for runs in groups.values()]}, path)


def table(report: dict[str, Any]) -> Table:
    """The comparison as a rich table."""
    first = report["runs"][0]
    share = report.get("side_by_side", {"workers": 1})
    shown = Table(
        title=(
            f"{first['parameters']:,} parameters, {first['steps']} steps; held out: "
            f"{first['val_bytes']:,} bytes"
        ),
        caption="\n".join(
            [
                f"loss in nats per token (training: mean of the last {log.LAST} steps); gap % in "
                "bits per byte; peak GiB: resident, and comparable among these runs alone",
                *(
                    [f"{share['workers']} runs at a time, {share['threads']} threads each"]
                    if share["workers"] > 1
                    else []
                ),
                *(
                    f"{recipe}: {gap['mean']:+.4f} ± {gap['standard_error']:.4f} nats over "
                    f"{gap['seeds']} seeds"
                    for recipe, gap in report.get("paired", {}).items()
                ),
            ]
        ),
    )

    # Figures to the right, so that digits stand below each other.
    shown.add_column("recipe")
    for name in (
        "training loss",
        "held-out loss",
        "bits/byte",
        "gap nats",
        "gap %",
        "tok/s",
        "peak GiB",
        "time",
    ):
        shown.add_column(name, justify="right")

    # A row per run; the baseline has no gap to itself.
    for run in report["runs"]:
        base = run["recipe"] == report["baseline"]
        gaps = ("", "") if base else (f"{run['gap_nats']:+.4f}", f"{run['gap_percent']:+.2f}")
        numbers = (run["train_loss"], run["val_loss"], run["val_bpb"])
        costs = (
            rate(run["tokens_per_s"]),
            f"{run['peak_memory_gib']:.2f}",
            duration(run["seconds"]),
        )
        name = run.get("name", run["recipe"])
        shown.add_row(name, *("-" if n is None else f"{n:.4f}" for n in numbers), *gaps, *costs)
    return shown


def _mean(several: list[Any]) -> Any:
    """The mean, key by key and place by place; of texts the first, None if one is None."""
    first = several[0]
    if isinstance(first, dict):
        return {key: _mean([each[key] for each in several]) for key in first}
    if isinstance(first, list):
        return [_mean(list(each)) for each in zip(*several, strict=True)]
    if None in several or isinstance(first, str):
        return None if None in several else first
    return statistics.fmean(several)


def _arm(config: CompareConfig, name: str, recipe: str, seed: int) -> Arm:
    """A run with all fields of the comparison, in a folder of its own below ``out``."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    own = {"overwrite": False, "out": str(Path(config.out) / name), "recipe": recipe, "seed": seed}

    # Resolved now, so that a recipe that cannot run is refused before the first one trains.
    plan = resolve(PretrainConfig(**{**shared, **own}))
    return Arm(name, "pretrain", plan, RunFolder(plan.out))


def _check_run(arm: Arm) -> None:
    """``TrainError`` for a folder that holds a run of another config."""
    folder = arm.folder
    if not (folder.checkpoints.exists() or folder.log.exists() or folder.result.exists()):
        return
    differing = differences(read_config_file(folder.config), arm.config)
    if differing:
        raise TrainError(
            f"out: {folder.root} holds a run of another config: {'; '.join(differing)}; give "
            "--overwrite to delete it, "
            f"or another --out"
        )
