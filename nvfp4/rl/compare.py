"""Full precision against NVFP4 from one warm start, over seeds, with a control: runs side by side, and what came out.

Each run is a process of its own, as ``nvfp4 rl`` would do it, several at a time.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from nvfp4.rl.ablation import ablate
from nvfp4.rl.config import RLConfig, resolve
from nvfp4.rl.folder import RLFolder
from nvfp4.rl.gates import verdicts
from nvfp4.rl.plots import draw_comparison
from nvfp4.rl.progress import Bars
from nvfp4.rl.setup import from_base
from nvfp4.rl.tables import ablation_table, gate_table, run_table
from nvfp4.rl.warmstart import warm_start
from nvfp4.run import log
from nvfp4.run.children import start
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import saved_fields, to_yaml
from nvfp4.run.files import write_json, write_text
from nvfp4.run.progress import Reporter
from nvfp4.run.signals import StopWish

CURVES = ("reward", "entropy", "completions/mean_length", "mismatch/max", "fp4/codes_changed")


@dataclass(frozen=True)
class Arm:
    """One run of a comparison: its name, the folder's too, and its config."""

    name: str
    config: RLConfig

    @property
    def folder(self) -> RLFolder:
        """Where it runs."""
        return RLFolder(self.config.out)


def compare(config: RLConfig) -> dict[str, Any]:
    """Do every run that is not finished, write compare.json and compare.png, print tables; returns the JSON.

    Raises ``TrainError`` when a run cannot start or fails, ``Interrupted`` after a signal; finished runs stay.
    """
    config = resolve(config)
    root = RLFolder(config.out)
    root.lock()
    try:
        return _compare(config, root)
    finally:
        root.release()


def _compare(config: RLConfig, root: RLFolder) -> dict[str, Any]:
    """``compare`` in a folder that is this process's."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    if config.model is None and config.warm_steps:
        warm_start(config, root.base, Reporter("warm start", config.warm_steps, 100))
        config = from_base(config, root.base)
    arms = plan(config)
    if config.overwrite:
        for arm in arms:
            arm.folder.clear()
    ablation = ablate(config)
    console.print(ablation_table(ablation))
    run_all(arms, config.workers or os.cpu_count() or 1)
    report = comparison(config, arms, ablation)
    write_json(root.root / "compare.json", report)
    draw_comparison(report, root.root / "compare.png")
    console.print(run_table(report))
    console.print(gate_table(report["gates"]))
    print(f"written: {root.root / 'compare.json'}, {root.root / 'compare.png'}")
    return report


def plan(config: RLConfig) -> list[Arm]:
    """The runs: every recipe with every seed, and the control in the last recipe with the first seed."""
    recipes, seeds = config.recipes or (config.recipe,), config.seeds or (config.seed,)
    wanted = [(recipe, seed, config.reward) for recipe in recipes for seed in seeds]
    if config.control:
        wanted.append((recipes[-1], seeds[0], "random"))
    # the slow ones first, so that the processes end together
    return [_arm(config, *each) for each in sorted(wanted, key=lambda each: each[0] == "bf16")]


def run_all(arms: list[Arm], workers: int) -> None:
    """Run what is not finished, ``workers`` at a time; the first failure or signal stops them all."""
    waiting = [arm for arm in arms if not _finished(arm)]
    for arm in arms:
        if arm not in waiting:
            print(f"{arm.name}: finished before, in {arm.folder.root}", flush=True)
    running: dict[Arm, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        wish, bars = stack.enter_context(StopWish()), stack.enter_context(Bars())
        stack.callback(_stop, running)  # whatever ends this: no run goes on alone
        while (waiting or running) and not wish.received:
            while waiting and len(running) < workers:
                arm = waiting.pop(0)
                running[arm] = _start(arm)
                bars.add(arm.name, arm.config.steps)
            time.sleep(0.2)
            for arm, child in list(running.items()):
                bars.advance(arm.name, arm.folder.log)
                if child.poll() is not None:
                    del running[arm]
                    bars.done(arm.name, arm.folder.read_result())
                    if child.returncode != 0 or not _finished(arm):
                        raise TrainError(f"{arm.name} ended with exit code {child.returncode}: {_last_words(arm)}")
        if wish.received:
            raise Interrupted(wish.received, "stopped; run the same command again to go on")


def comparison(config: RLConfig, arms: list[Arm], ablation: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of compare.json: results, curves as read from the logs, the ablation, the gates."""
    runs = []
    for arm in arms:
        result = arm.folder.read_result()
        assert result is not None
        rows = [row for row in log.read(arm.folder.log) if "reward" in row]
        named = (*CURVES, f"rewards/{result['task']}/mean")
        curves = {name: [row[name] for row in rows] for name in named}
        kept = {key: value for key, value in result.items() if key not in ("config", "completions")}
        runs.append({"name": arm.name, **kept, "curve": {"step": [row["step"] for row in rows], **curves}})
    report = {"config": saved_fields(config), "runs": runs, "ablation": ablation}
    return {**report, "gates": verdicts(runs, ablation)}


def _arm(config: RLConfig, recipe: str, seed: int, reward: str) -> Arm:
    name = f"{'control-' if reward == 'random' else ''}{recipe}-seed{seed}"
    own: dict[str, Any] = {"recipe": recipe, "seed": seed, "reward": reward, "out": str(Path(config.out) / name)}
    shared: dict[str, Any] = {"seeds": (), "recipes": (), "control": False, "workers": None, "overwrite": False}
    return Arm(name, resolve(dataclasses.replace(config, **own, **shared)))


def _finished(arm: Arm) -> bool:
    done = arm.folder.read_result()
    return done is not None and done["config"] == saved_fields(arm.config)


def _start(arm: Arm) -> subprocess.Popen[bytes]:
    folder = arm.folder
    write_text(folder.root / "given.yaml", to_yaml(arm.config))
    threads = {} if arm.config.device == "cuda" else {"OMP_NUM_THREADS": "1"}
    try:
        with open(folder.root / "output.txt", "ab") as output:
            return start(["rl", "--config", str(folder.root / "given.yaml"), "--resume"], threads, output)
    except OSError as error:
        raise TrainError(
            f"cannot write {error.filename}: {error.strerror}; make room and run the same again"
        ) from error


def _stop(running: dict[Arm, subprocess.Popen[bytes]]) -> None:
    for child in running.values():
        child.terminate()
    for child in running.values():
        child.wait()


def _last_words(arm: Arm) -> str:
    lines = (arm.folder.root / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
