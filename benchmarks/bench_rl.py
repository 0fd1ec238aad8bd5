"""The comparison of ``nvfp4 rl --preset sort`` as data: full precision against NVFP4 over three seeds, and a control.

No figure is printed or kept unless every gate of the comparison holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, gate, machine
from nvfp4.rl.compare import compare
from nvfp4.rl.config import PRESETS, RLConfig

ENDS = ("eval/pass@1", "eval/pass@1/low", "eval/pass@1/high", "eval/pass@4", "eval/pass@16", "eval/greedy")


def row(run: dict[str, Any]) -> dict[str, Any]:
    """A run without its curves."""
    figures = {f"{end} {key.removeprefix('eval/')}": run[end][key] for key in ENDS for end in ("before", "after")}
    entropy = {"entropy first": run["curve"]["entropy"][0], "entropy last": run["curve"]["entropy"][-1]}
    return {"run": run["name"], **figures, **entropy, "mismatch": run["mismatch"], "seconds": run["seconds"]}


def main() -> None:
    """Run what is not finished, check, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", default=PRESETS["sort"]["out"], help="folder of the comparison; finished runs are kept"
    )
    parser.add_argument("--keep", metavar="NAME", help="keep the figures as results/NAME.json, the picture as NAME.png")
    args = parser.parse_args()
    report = compare(RLConfig(**{**PRESETS["sort"], "out": args.out}))
    for verdict in report["gates"]:
        gate(verdict["passed"], f"{verdict['name']}: {verdict['value']:.3g}, bound {verdict['bound']}")
    if args.keep:
        kept = {
            "title": "nvfp4 rl --preset sort",
            "machine": machine(),
            "rows": [row(run) for run in report["runs"]],
            "gates": report["gates"],
            "ablation": report["ablation"],
        }
        (RESULTS / f"{args.keep}.json").write_text(json.dumps(kept, indent=1) + "\n")
        shutil.copy(Path(args.out) / "compare.png", RESULTS / f"{args.keep}.png")


if __name__ == "__main__":
    main()
