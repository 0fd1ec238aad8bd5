"""Reinforcement learning as data, each figure from runs of ``nvfp4 rl`` itself.

    compare     full precision against NVFP4 over three seeds, and a control (``nvfp4 rl --preset
                sort``); no figure is printed or kept unless every gate of the comparison holds
    objectives  every objective from one warm start over three seeds, with its authors' settings and
                at least two updates per rollout: one is not enough to tell most of them apart
    foreign     samplers that are not the trainer, with and without a correction; one seed
    tasks       every task as it comes; one seed

Runs that are finished are not done again, so a study may be stopped at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, gate, machine, show
from nvfp4.rl.compare import compare
from nvfp4.rl.config import NEW_MODEL_LR, PRESETS, RLConfig, resolve
from nvfp4.rl.loop import rl
from nvfp4.rl.objectives.registry import OBJECTIVES
from nvfp4.rl.setup import from_base
from nvfp4.rl.warmstart import warm_start

ENDS = (
    "eval/pass@1",
    "eval/pass@1/low",
    "eval/pass@1/high",
    "eval/pass@4",
    "eval/pass@16",
    "eval/greedy",
)

COMPLETIONS = 64  # of each step, whatever the objective makes of them
STEPS = 10
LEAST_UPDATES = 2
SEEDS = (0, 1, 2)
GROUPS = {"brorl": 32, "reasonmaxxer": 16}
"""Where the objective's own group would leave too few prompts in a step of ``COMPLETIONS``."""

OPTIONS: dict[str, tuple[str, ...]] = {"reasonmaxxer": ("entropy_gate=0.3", "problem_share=1")}
"""Where a default speaks of models of another size, or of hundreds of problems."""

FOREIGN: dict[str, tuple[str, ...]] = {
    "no correction": (),
    "TIS": ("correction=token_truncate",),
    "MIS": ("correction=token_mask",),
}
"""Of grpo whose sampler computes in full precision, while the policy is NVFP4."""

TASKS = ("sort", "reverse", "parity", "addition", "modular", "countdown", "fill_in")


def row(run: dict[str, Any]) -> dict[str, Any]:
    """A run without its curves."""
    figures = {
        f"{end} {key.removeprefix('eval/')}": run[end][key]
        for key in ENDS
        for end in ("before", "after")
    }
    entropy = {
        "entropy first": run["curve"]["entropy"][0],
        "entropy last": run["curve"]["entropy"][-1],
    }
    return {
        "run": run["name"],
        **figures,
        **entropy,
        "mismatch": run["mismatch"],
        "seconds": run["seconds"],
    }


def comparison(out: Path, keep: str | None) -> None:
    """Run what is not finished, check, keep."""
    report = compare(RLConfig(**{**PRESETS["sort"], "out": str(out)}))

    # A figure is kept only if everything that the comparison has to show holds.
    for verdict in report["gates"]:
        gate(
            verdict["passed"],
            f"{verdict['name']}: {verdict['value']:.3g}, bound {verdict['bound']}",
        )
    if keep:
        kept = {
            "title": "nvfp4 rl --preset sort",
            "machine": machine(),
            "rows": [row(run) for run in report["runs"]],
            "gates": report["gates"],
            "ablation": report["ablation"],
        }
        (RESULTS / f"{keep}.json").write_text(json.dumps(kept, indent=1) + "\n")
        shutil.copy(out / "compare.png", RESULTS / f"{keep}.png")


def short(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """One row for people."""
    before, after, mismatch = result["before"], result["after"], result["mismatch"]
    row: dict[str, Any] = {"run": name, "steps": result["steps"]}
    most = max(
        int(key.partition("@")[2])
        for key in before
        if key.startswith("eval/pass@") and key.count("/") == 1
    )
    keys = ("pass@1", f"pass@{most}")
    for key in keys:
        row |= {f"{key} before": before[f"eval/{key}"], f"{key} after": after[f"eval/{key}"]}
    row["token_mult_prob_error"] = mismatch["token_mult_prob_error"]
    row["same shapes"] = mismatch["same_shape"]
    return row | {"seconds": result["seconds"]}


def warm(out: Path) -> RLConfig:
    """What the runs of objectives share: sort, one warm start, one temperature for evaluations."""
    sort = {name: PRESETS["sort"][name] for name in ("task", "max_new_tokens", "context")}
    cadence = {
        "eval_problems": 24,
        "eval_samples": 8,
        "eval_temperature": 1.0,
        "save_every": 0,
        "check_every": 5,
    }
    config = RLConfig(**sort, **cadence, device="cpu", depth=2, steps=STEPS)
    base = resolve(config)
    warm_start(base, out / "base")
    return from_base(config, out / "base")


def settings(name: str) -> dict[str, Any]:
    """An objective as its authors have it, for ``COMPLETIONS`` of a small model.

    But at least temperature 1, with all tokens: sampled colder, the warm start hardly fails, and
    there is nothing to learn from.
    """
    defaults = OBJECTIVES[name].defaults
    group = GROUPS.get(name, defaults.group)
    prompts = COMPLETIONS // group
    updates = min(max(defaults.updates, LEAST_UPDATES), prompts)

    # At one update per rollout every ratio is 1, and most objectives are the same one.
    options = {
        "objective": name,
        "group": group,
        "prompts": prompts,
        "objective_options": OPTIONS.get(name, ()),
        "minibatches": updates,
        "lr": NEW_MODEL_LR,
    }
    return options | ({"temperature": 1.0, "top_p": 1.0} if defaults.temperature < 1 else {})


def objectives(out: Path) -> Iterator[tuple[str, RLConfig]]:
    """Runs of each objective, seed by seed, so that what is finished is complete at any time."""
    base = warm(out)
    for seed in SEEDS:
        for name in OBJECTIVES:
            yield f"{name} seed {seed}", dataclasses.replace(base, seed=seed, **settings(name))


def over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per objective: means over its seeds, and the sample standard deviation as spread."""
    table = []
    for name in OBJECTIVES:
        runs = [run for run in rows if run["run"].rpartition(" seed ")[0] == name]
        if not runs:
            continue
        row: dict[str, Any] = {"objective": name, "seeds": len(runs)}
        row |= {key: settings(name)[key] for key in ("group", "minibatches")}
        for key in (
            "pass@1 before",
            "pass@1 after",
            "pass@8 after",
            "token_mult_prob_error",
            "same shapes",
        ):
            values = [run[key] for run in runs]
            row[key] = statistics.fmean(values)
            if key.endswith("after"):
                row[f"{key}, spread"] = statistics.stdev(values) if len(values) > 1 else None

        # The mean hides a seed that lost; the least gain does not.
        gains = [run["pass@1 after"] - run["pass@1 before"] for run in runs]
        row["gain, least of the seeds"] = min(gains)
        table.append(row)
    return table


def foreign(out: Path) -> Iterator[tuple[str, RLConfig]]:
    """grpo with a sampler that computes in full precision."""
    base = dataclasses.replace(warm(out), **settings("grpo"))
    for name, options in FOREIGN.items():
        own = {"sampler_recipe": "bf16", "objective_options": options}
        yield f"grpo, sampler bf16, {name}", dataclasses.replace(base, **own)


def tasks(out: Path) -> Iterator[tuple[str, RLConfig]]:
    """``nvfp4 rl --task NAME`` for each."""
    for name in TASKS:
        yield name, RLConfig(task=name, device="cpu", eval_problems=128)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="compare", choices=("compare", *STUDIES))
    parser.add_argument("--only", nargs="*", help="only these rows of objectives or tasks")
    parser.add_argument(
        "--out", help="folder of the runs; finished ones are kept; default: below runs/"
    )
    parser.add_argument("--keep", metavar="NAME", help="keep the figures as results/NAME.json")
    args = parser.parse_args()
    if args.what == "compare":
        comparison(Path(args.out or PRESETS["sort"]["out"]), args.keep)
        return
    out = Path(args.out or f"runs/rl-{args.what}")
    rows = []

    # Each run resumes what an earlier call has left, and its row is printed as it comes.
    for name, config in STUDIES[args.what](out):
        if args.only is None or name in args.only:
            folder = str(out / name.replace(", ", "-").replace(" ", "_"))
            rows.append(short(name, rl(dataclasses.replace(config, out=folder, resume=True))))
            print(name, json.dumps(rows[-1]), flush=True)

    # Many seeds in one table say more than a row per run.
    if args.what == "objectives":
        work = f"{STEPS} steps of {COMPLETIONS} completions"
        title = f"nvfp4 rl, objectives, recipe rl, {work}, objectives {code()}"
        show(title, over_seeds(rows), args.keep)
    else:
        show(f"nvfp4 rl, {args.what}, one seed, recipe rl", rows, args.keep)


STUDIES = {"objectives": objectives, "foreign": foreign, "tasks": tasks}


def code() -> str:
    """The git tree of nvfp4/rl/objectives: any commit with these very objectives has it."""
    git = ["git", "rev-parse", "--short=10", "HEAD:nvfp4/rl/objectives"]
    return subprocess.run(
        git, capture_output=True, text=True, check=True, cwd=RESULTS.parent
    ).stdout.strip()


if __name__ == "__main__":
    main()
