"""The same run once for each recipe, and what the recipes cost: a table, a picture, a JSON file.

Each recipe trains in a process of its own, as ``nvfp4 pretrain`` would, so peak memory is its own and a crash is too.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nvfp4.run import log
from nvfp4.run.children import start
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import differences, lasting, read_config_file, saved_fields, to_fields, to_yaml
from nvfp4.run.files import write_json, write_text
from nvfp4.run.folder import RunFolder
from nvfp4.run.plots import draw_comparison
from nvfp4.run.progress import duration, rate
from nvfp4.run.signals import StopWish
from nvfp4.train.config import CompareConfig, PretrainConfig, TrainConfig, resolve
from nvfp4.train.finish import LAST

BASELINE = "bf16"


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train every recipe that is not finished, write compare.json and compare.png, print the table; returns the JSON.

    Gaps, in nats per token and in percent of bits per byte, are to bf16, or to the first recipe if bf16 is not among
    them. Raises ``TrainError`` when a run cannot start or fails, ``Interrupted`` after a signal; finished runs stay.
    """
    config = resolve(config)
    root = RunFolder(config.out)
    root.lock()
    try:
        return _compare(config, root.root)
    finally:
        root.release()


def _compare(config: CompareConfig, root: Path) -> dict[str, Any]:
    """``compare`` in a folder that is this process's."""
    plans = [run_config(config, recipe) for recipe in config.recipes]
    if config.overwrite:
        for plan in plans:
            RunFolder(plan.out).clear()
    for plan in plans:  # all refusals before the first run
        _check_run(plan)
    results = [_trained(plan) for plan in plans]
    report = comparison(config, results)
    write_json(root / "compare.json", report)
    draw_comparison(report, root / "compare.png")
    Console(width=None if sys.stdout.isatty() else 110).print(table(report))
    print(f"written: {root / 'compare.json'}, {root / 'compare.png'}")
    return report


def run_config(config: CompareConfig, recipe: str) -> PretrainConfig:
    """The resolved config of one recipe's run: all fields of the comparison, in a folder of its own below ``out``."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    return resolve(
        PretrainConfig(**{**shared, "overwrite": False, "out": str(Path(config.out) / recipe), "recipe": recipe})
    )


def comparison(config: CompareConfig, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of compare.json: each result with its gaps and its curves, as read from the runs' logs."""
    base = next((r for r in results if r["recipe"] == BASELINE), results[0])
    runs = []
    for result in results:
        rows = log.read(RunFolder(str(Path(config.out) / result["recipe"])).log)
        steps, scored = [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]
        runs.append(
            {
                **{key: value for key, value in result.items() if key != "config"},
                "gap_nats": result["val_loss"] - base["val_loss"],
                "gap_percent": 100 * (result["val_bpb"] / base["val_bpb"] - 1),
                "curve": {"step": [row["step"] for row in steps], "loss": [row["loss"] for row in steps]},
                "held_out": {key: [row[key] for row in scored] for key in ("step", "val_loss", "val_bpb")},
            }
        )
    return {"baseline": base["recipe"], "config": to_fields(config), "runs": runs}


def table(report: dict[str, Any]) -> Table:
    """The comparison as a rich table."""
    first = report["runs"][0]
    shown = Table(
        title=f"{first['parameters']:,} parameters, {first['steps']} steps; held out: {first['val_bytes']:,} bytes",
        caption=f"loss in nats per token (training: mean of the last {LAST} steps); gap % in bits per byte",
    )
    shown.add_column("recipe")
    for name in ("training loss", "held-out loss", "bits/byte", "gap nats", "gap %", "tok/s", "peak GiB", "time"):
        shown.add_column(name, justify="right")
    for run in report["runs"]:
        base = run["recipe"] == report["baseline"]
        gaps = ("", "") if base else (f"{run['gap_nats']:+.4f}", f"{run['gap_percent']:+.2f}")
        numbers = (run["train_loss"], run["val_loss"], run["val_bpb"])
        costs = (rate(run["tokens_per_s"]), f"{run['peak_memory_gib']:.2f}", duration(run["seconds"]))
        shown.add_row(run["recipe"], *("-" if n is None else f"{n:.4f}" for n in numbers), *gaps, *costs)
    return shown


def _check_run(plan: PretrainConfig) -> None:
    folder = RunFolder(plan.out)
    if not (folder.checkpoints.exists() or folder.log.exists() or folder.result.exists()):
        return
    differing = differences(read_config_file(folder.config), plan)
    if differing:
        raise TrainError(
            f"out: {folder.root} holds a run of another config: {'; '.join(differing)}; give --overwrite to delete it, "
            f"or another --out"
        )


def _trained(plan: PretrainConfig) -> dict[str, Any]:
    folder = RunFolder(plan.out)
    done = folder.read_result()
    if done is not None and done["config"] == saved_fields(plan):
        print(f"{plan.recipe}: finished before, in {folder.root}", flush=True)
        return done
    write_text(folder.config, to_yaml(lasting(plan)))
    print(f"--- {plan.recipe} ---", flush=True)
    with StopWish() as wish:
        child = start(["pretrain", "--config", str(folder.config), "--resume"])
        passed_on = 0
        while child.poll() is None:
            if wish.received and not passed_on:
                passed_on = wish.received
                child.send_signal(passed_on)
            time.sleep(0.05)
    if passed_on:
        raise Interrupted(passed_on, "stopped; run the same command again to go on")
    result = folder.read_result()
    if child.returncode != 0 or result is None:
        raise TrainError(f"the run of {plan.recipe} ended with exit code {child.returncode}; its message is above")
    return result
