"""Full precision against NVFP4 from one warm start, over seeds, with a control: side by side.

    warm start   once, for all: the runs differ in recipe, seed or reward alone
    ablation     what keeps sampler and trainer equal, one thing left out at a time
    runs         every recipe with every seed, and a control with random rewards
    gates        what the comparison has to show, as numbers with a bound each

``run/arms.py`` does the runs; what came out is compare.json, compare.png and tables.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from nvfp4.rl.config import RLConfig, resolve
from nvfp4.rl.folder import RLFolder
from nvfp4.rl.plots import draw_comparison
from nvfp4.rl.progress import Bars
from nvfp4.rl.report import ablate, ablation_table, gate_table, gates, run_table
from nvfp4.rl.setup import from_base
from nvfp4.rl.warmstart import warm_start
from nvfp4.run import log
from nvfp4.run.arms import Arm, SideBySide, publish, run_all
from nvfp4.run.fields import saved_fields

CURVES = ("reward", "entropy", "completions/mean_length", "mismatch/max", "fp4/codes_changed")


def compare(config: RLConfig) -> dict[str, Any]:
    """Do every run that is not finished, write compare.json and compare.png; returns the JSON.

    Raises ``TrainError`` when a run cannot start or fails, ``Interrupted`` after a signal; finished
    runs stay.
    """
    config = resolve(config)
    folder = RLFolder(config.out)
    with folder.hold():
        if config.model is None and config.warm_steps:
            warm_start(config, folder.base)
            config = from_base(config, folder.base)

        # From here on the warm start's model is simply the model that all runs are given.
        arms = plan(config)
        for arm in arms if config.overwrite else ():
            arm.folder.clear()

        # The ablation takes seconds and comes first: if it fails, no training is lost.
        ablation = ablate(config)
        workers = config.workers or os.cpu_count() or 1
        share = SideBySide(workers, None if config.device == "cuda" else 1)
        results = run_all(arms, share, Bars())
        report = comparison(config, arms, results, ablation)
        tables = [ablation_table(ablation), run_table(report), gate_table(report["gates"])]
        return publish(report, folder.root, draw_comparison, tables)


def plan(config: RLConfig) -> list[Arm]:
    """The runs: every recipe with every seed, and the control in the last recipe, first seed."""
    recipes, seeds = config.recipes or (config.recipe,), config.seeds or (config.seed,)
    grid = [(recipe, seed, config.reward) for recipe in recipes for seed in seeds]
    if config.control:
        grid.append((recipes[-1], seeds[0], "random"))
    # bf16 last: the quantised ones take longer, and begun first they end together with it
    return [_arm(config, *each) for each in sorted(grid, key=lambda each: each[0] == "bf16")]


def comparison(
    config: RLConfig, arms: list[Arm], results: list[dict[str, Any]], ablation: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of compare.json: results, curves from the logs, the ablation, the gates."""
    runs = []
    for arm, result in zip(arms, results, strict=True):
        rows = [row for row in log.read(arm.folder.log) if "reward" in row]
        named = (*CURVES, f"rewards/{result['task']}/mean")
        curves = {name: [row[name] for row in rows] for name in named}
        kept = {key: value for key, value in result.items() if key not in ("config", "completions")}
        runs.append(
            {"name": arm.name, **kept, "curve": {"step": [row["step"] for row in rows], **curves}}
        )
    report = {"config": saved_fields(config), "runs": runs, "ablation": ablation}
    return {**report, "gates": gates(runs, ablation)}


def _arm(config: RLConfig, recipe: str, seed: int, reward: str) -> Arm:
    name = f"{'control-' if reward == 'random' else ''}{recipe}-seed{seed}"
    own: dict[str, Any] = {
        "recipe": recipe,
        "seed": seed,
        "reward": reward,
        "out": str(Path(config.out) / name),
    }

    # What belongs to the comparison as a whole; an arm is an ordinary run.
    shared: dict[str, Any] = {
        "seeds": (),
        "recipes": (),
        "control": False,
        "workers": None,
        "overwrite": False,
    }
    resolved = resolve(dataclasses.replace(config, **own, **shared))
    return Arm(name, "rl", resolved, RLFolder(resolved.out))
