"""What a comparison has to show, as numbers with a bound each."""

from __future__ import annotations

from typing import Any

from nvfp4.rl.ablation import PER_TENSOR

GAIN, WIDEST_LOSS, RECIPE_GAP = 0.15, 0.05, 0.06
TIGHT, APART = 1e-5, 1.1


def verdicts(runs: list[dict[str, Any]], ablation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gates as {name, value, bound, passed}: value is the worst of all runs that the gate looks at."""
    learnt = [run for run in runs if run["reward"] == "task"]
    controls = [run for run in runs if run["reward"] == "random"]
    widest = max(int(key.split("@")[1]) for key in learnt[0]["after"] if key.count("/") == 1 and "@" in key)
    wide = f"eval/pass@{widest}"
    gains = [_change(run, "eval/pass@1") for run in learnt]
    found = [
        _gate(f"pass@1 gained, least of {len(learnt)} runs", min(gains), GAIN, above=True),
        _gate(f"pass@{widest} lost, most", -min(_change(run, wide) for run in learnt), WIDEST_LOSS, above=False),
    ]
    gaps = recipe_gaps(learnt)
    if gaps:
        found.append(_gate("pass@1 behind full precision, most over seeds", max(gaps), RECIPE_GAP, above=False))
    if controls:
        fall = max(_change(run, "eval/pass@1") for run in controls)
        found.append(_gate("pass@1 gained by random rewards", fall, 0.0, above=False))
    shapes = [run["mismatch"]["same_shape"] for run in runs if run["mismatch"]["same_shape"] is not None]
    found += [
        _gate("mismatch on equal shapes, largest", max(shapes, default=0.0), 0.0, above=False),
        _gate(
            "mismatch over a KV cache, 99.9 % of tokens below",
            max(run["mismatch"]["quantile_999"] for run in runs),
            TIGHT,
            above=False,
        ),
    ]
    apart = [row["token_mult_prob_error"] for row in ablation if row["name"] == PER_TENSOR]
    if apart:
        found.append(_gate("token_mult_prob_error of one scale for all rows", max(apart), APART, above=True))
    return found


def recipe_gaps(runs: list[dict[str, Any]]) -> list[float]:
    """pass@1 of full precision minus that of each quantised run of the same seed."""
    base = {run["seed"]: run["after"]["eval/pass@1"] for run in runs if run["recipe"] == "bf16"}
    return [
        base[run["seed"]] - run["after"]["eval/pass@1"]
        for run in runs
        if run["recipe"] != "bf16" and run["seed"] in base
    ]


def _change(run: dict[str, Any], key: str) -> float:
    return run["after"][key] - run["before"][key]


def _gate(name: str, value: float, bound: float, *, above: bool) -> dict[str, Any]:
    passed = value >= bound if above else value <= bound
    return {"name": name, "value": value, "bound": f"{'>=' if above else '<='} {bound:g}", "passed": passed}
