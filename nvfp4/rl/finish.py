"""The end of a run: held-out score, picture, export, result.json.

"before" is the evaluation in row 0 of the log, so a resumed run has it too; "after" is made here,
in the same way, on the same problems with the same draws. Their difference is then what training
changed, and not which problems were drawn.
"""

from __future__ import annotations

from typing import Any

from nvfp4.rl.evaluate import evaluate
from nvfp4.rl.parts import RLRun
from nvfp4.rl.plots import draw_run
from nvfp4.rl.statistics import pass_keys
from nvfp4.run import log
from nvfp4.run.fields import saved_fields
from nvfp4.run.model import export
from nvfp4.run.progress import duration, rate


def finish(run: RLRun) -> dict[str, Any]:
    """Evaluate, draw the plot, export the model, write the result and return it.

    {} in other processes than the main one, which only take part in the evaluation.
    """
    after, shown = evaluate(run)
    if not run.accelerator.is_main_process:
        return {}

    # Row 0 is the evaluation before the first step; the others are steps.
    rows = log.read(run.folder.log)
    before = {key: value for key, value in rows[0].items() if key.startswith("eval/")}
    result = _result(run, rows[1:], before, after)
    result["completions"] = shown
    run.report.say(summary(result))
    draw_run(rows, result, run.folder.plot)
    export(run.model, run.text, run.folder.export, run.config.export_dtype)
    run.report.say(
        f"exported to {run.folder.export} (loads with transformers alone); plot: {run.folder.plot}"
    )
    run.folder.write_result(result)  # last: its presence says that the run is finished
    return result


def summary(result: dict[str, Any]) -> str:
    """One line of a result."""
    before, after = result["before"], result["after"]

    # The largest k that was estimated: it tells whether a run only sharpens what was known.
    last = pass_keys(after)[-1]
    name = last.removeprefix("eval/")
    return (
        f"{result['recipe']}: held-out pass@1 {before['eval/pass@1']:.3f} -> "
        f"{after['eval/pass@1']:.3f} "
        f"[{after['eval/pass@1/low']:.3f}, {after['eval/pass@1/high']:.3f}], {name} "
        f"{before[last]:.3f} -> "
        f"{after[last]:.3f}, greedy {before['eval/greedy']:.3f} -> {after['eval/greedy']:.3f}; "
        "mismatch at most "
        f"{result['mismatch']['max']:.2g}, {rate(result['tokens_per_s'])} tok/s, "
        f"{duration(result['seconds'])}"
    )


def _result(
    run: RLRun, rows: list[log.Row], before: dict[str, float], after: dict[str, float]
) -> dict[str, Any]:
    checked = [row["mismatch/same_shape"] for row in rows if row["mismatch/same_shape"] is not None]
    return {
        "recipe": run.config.recipe,
        "task": run.task.name,
        "objective": run.config.objective,
        "reward": run.config.reward,
        "seed": run.config.seed,
        "steps": run.config.steps,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "before": before,
        "after": after,
        "mismatch": {
            "max": max(row["mismatch/max"] for row in rows),
            "token_mult_prob_error": max(row["mismatch/token_mult_prob_error"] for row in rows),
            "quantile_999": max(row["mismatch/quantile_999"] for row in rows),
            "same_shape": max(checked, default=None),
        },
        **log.costs(rows, "step_time"),
        "config": saved_fields(run.config),
    }
