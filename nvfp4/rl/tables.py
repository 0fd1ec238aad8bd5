"""The tables that a comparison prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from nvfp4.run.progress import duration


def run_table(report: dict[str, Any]) -> Table:
    """pass@k before and after, and the mismatch, for each run."""
    first = report["runs"][0]
    ks = [key for key in first["after"] if key.count("/") == 1 and "@" in key]
    ends = (ks[0], ks[-1])
    shown = Table(
        title=f"{first['parameters']:,} parameters, {first['steps']} steps of {first['objective']} on {first['task']}",
        caption="held-out problems; [] is the 95 % interval over problems; mismatch: largest |difference| of "
        "log-probabilities between sampler and trainer in the whole run",
    )
    shown.add_column("run")
    names = [key.removeprefix("eval/") for key in ends]
    for name in (f"{names[0]} before", "after", f"{names[1]} before", "after", "greedy", "mismatch", "time"):
        shown.add_column(name, justify="right")
    for run in report["runs"]:
        before, after = run["before"], run["after"]
        interval = f"{after[ends[0]]:.3f} [{after[f'{ends[0]}/low']:.3f}, {after[f'{ends[0]}/high']:.3f}]"
        shown.add_row(
            run["name"],
            f"{before[ends[0]]:.3f}",
            interval,
            f"{before[ends[1]]:.3f}",
            f"{after[ends[1]]:.3f}",
            f"{before['eval/greedy']:.3f} -> {after['eval/greedy']:.3f}",
            _size(run["mismatch"]["max"]),
            duration(run["seconds"]),
        )
    return shown


def ablation_table(rows: list[dict[str, Any]]) -> Table:
    """What keeps sampler and trainer equal."""
    shown = Table(
        title="Sampled over a KV cache against teacher forcing, one model",
        caption="differences of log-probabilities in nats; mult error: mean exp |difference|, 1 is none",
    )
    shown.add_column("weights")
    shown.add_column("forward")
    for name in ("largest", "above 1e-5", "above .05", "mult error", "equal shapes"):
        shown.add_column(name, justify="right")
    for row in rows:
        shares = (f"{100 * row['above_1e-5']:.2f} %", f"{100 * row['share']:.2f} %")
        error = f"{row['token_mult_prob_error']:.4f}"
        shown.add_row(row["weights"], row["name"], _size(row["max"]), *shares, error, _size(row["same_shape"]))
    return shown


def gate_table(gates: list[dict[str, Any]]) -> Table:
    """Gate, value, bound, verdict."""
    shown = Table(title="Gates")
    for name in ("gate", "measured", "bound", ""):
        shown.add_column(name, justify="left" if name == "gate" else "right")
    for gate in gates:
        shown.add_row(gate["name"], _size(gate["value"], ".3g"), gate["bound"], "ok" if gate["passed"] else "FAILED")
    return shown


def _size(value: float, form: str = ".1e") -> str:
    return "0" if value == 0 else f"{value:{form}}"
