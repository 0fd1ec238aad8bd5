"""Reinforcement learning as data, each figure from runs of ``nvfp4 rl`` itself.

compare: full precision against NVFP4 over three seeds, and a control (``nvfp4 rl --preset sort``); no figure is printed
or kept unless every gate of the comparison holds. objectives: every objective from one warm start, and samplers that
are not the trainer, with and without a correction. tasks: every task as it comes. The last two have one seed each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, gate, machine, show
from nvfp4.rl.compare import compare
from nvfp4.rl.config import PRESETS, RLConfig, resolve
from nvfp4.rl.loop import rl
from nvfp4.rl.objectives.registry import OBJECTIVES
from nvfp4.rl.setup import from_base
from nvfp4.rl.warmstart import warm_start
from nvfp4.train.progress import Reporter

ENDS = ("eval/pass@1", "eval/pass@1/low", "eval/pass@1/high", "eval/pass@4", "eval/pass@16", "eval/greedy")

COMPLETIONS = 128  # of each step, whatever the objective makes of them
STEPS = 30
GROUPS = {"brorl": 64, "reasonmaxxer": 16}
"""Where the objective's own group would leave too few prompts in a step of ``COMPLETIONS``."""

OPTIONS: dict[str, tuple[str, ...]] = {"reasonmaxxer": ("entropy_gate=0.3",)}
"""Where a default speaks of models of another size."""

FOREIGN: dict[str, tuple[str, ...]] = {
    "no correction": (),
    "TIS": ("correction=token_truncate",),
    "MIS": ("correction=token_mask",),
}
"""Of grpo whose sampler computes in full precision, while the policy is NVFP4."""

TASKS = ("sort", "reverse", "parity", "addition", "modular", "countdown", "fill_in")


def row(run: dict[str, Any]) -> dict[str, Any]:
    """A run without its curves."""
    figures = {f"{end} {key.removeprefix('eval/')}": run[end][key] for key in ENDS for end in ("before", "after")}
    entropy = {"entropy first": run["curve"]["entropy"][0], "entropy last": run["curve"]["entropy"][-1]}
    return {"run": run["name"], **figures, **entropy, "mismatch": run["mismatch"], "seconds": run["seconds"]}


def comparison(out: Path, keep: str | None) -> None:
    """Run what is not finished, check, keep."""
    report = compare(RLConfig(**{**PRESETS["sort"], "out": str(out)}))
    for verdict in report["gates"]:
        gate(verdict["passed"], f"{verdict['name']}: {verdict['value']:.3g}, bound {verdict['bound']}")
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
    found: dict[str, Any] = {"run": name, "steps": result["steps"]}
    found |= {f"{key} {end}": row[f"eval/{key}"] for key in ("pass@1", "pass@16") for end, row in _ends(before, after)}
    found |= {"token_mult_prob_error": mismatch["token_mult_prob_error"], "same shapes": mismatch["same_shape"]}
    return {**found, "seconds": result["seconds"]}


def _ends(before: dict[str, Any], after: dict[str, Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    return ("before", before), ("after", after)


def objectives(out: Path) -> Iterator[tuple[str, RLConfig]]:
    """A run of each objective, and those of the foreign sampler, all from one warm start on sort."""
    sort = {name: PRESETS["sort"][name] for name in ("task", "max_new_tokens", "context")}
    base = resolve(RLConfig(**sort, device="cpu", eval_problems=64, eval_every=0, save_every=0, steps=STEPS))
    warm_start(base, out / "base", Reporter("warm start", 300, 100))
    base = dataclasses.replace(from_base(base, out / "base"), temperature=1.0)
    for name, kind in OBJECTIVES.items():
        group = GROUPS.get(name, kind.default_group or 8)
        own = {"group": group, "prompts": COMPLETIONS // group, "objective_options": OPTIONS.get(name, ())}
        yield name, dataclasses.replace(base, objective=name, **own)
    for name, options in FOREIGN.items():
        yield f"grpo, sampler bf16, {name}", dataclasses.replace(base, sampler_recipe="bf16", objective_options=options)


def tasks(out: Path) -> Iterator[tuple[str, RLConfig]]:
    """``nvfp4 rl --task NAME`` for each."""
    for name in TASKS:
        yield name, RLConfig(task=name, device="cpu", eval_problems=128)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", default="compare", choices=("compare", "objectives", "tasks"))
    parser.add_argument("--only", nargs="*", help="only these rows of objectives or tasks")
    parser.add_argument("--out", help="folder of the runs; finished ones are kept; default: below runs/")
    parser.add_argument("--keep", metavar="NAME", help="keep the figures as results/NAME.json")
    args = parser.parse_args()
    if args.what == "compare":
        comparison(Path(args.out or PRESETS["sort"]["out"]), args.keep)
        return
    out = Path(args.out or f"runs/rl-{args.what}")
    rows = []
    for name, config in (objectives if args.what == "objectives" else tasks)(out):
        if args.only is None or name in args.only:
            folder = str(out / name.replace(", ", "-").replace(" ", "_"))
            rows.append(short(name, rl(dataclasses.replace(config, out=folder, resume=True))))
    show(f"nvfp4 rl, {args.what}, one seed, recipe rl", rows, args.keep)


if __name__ == "__main__":
    main()
