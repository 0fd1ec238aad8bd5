"""What a comparison shows besides its runs: an ablation, gates with a bound each, and tables.

**Ablation.** What keeps sampler and trainer equal, one thing left out at a time, measured on one
model in a few seconds: completions are sampled over a KV cache and scored by teacher forcing with
the same weights.

    full precision, rl, W4A16, float64 attention    log-probabilities equal to the bit
    full precision, float32 attention               last bits differ, by 2e-6 nats at most
    rl, float32 attention                           such a bit moves an FP4 code: up to .32 nats
    rl with one scale for all rows                  logits depend on the batch: another policy

Measured (``benchmarks/results/rl.json``): token_mult_prob_error of the last is 1.23 on random
weights and 1.005 on the warm start, and at most 1.0003 of the others.

**Gates.** Each takes the worst of all runs that it looks at: pass@1 must rise by .15, pass@k must
not fall by more than .05, NVFP4 must stay within .06 of full precision, random rewards must not
help, sampler and trainer must be equal on equal shapes, and one scale for all rows must be seen to
matter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from nvfp4.model.convert import convert
from nvfp4.model.weights import fixed_weights
from nvfp4.numerics.rng import ABLATION_BRANCH, fold_in
from nvfp4.recipes import RECIPES, W4A16, Gemm, Operand, Recipe
from nvfp4.rl.config import RLConfig, make_task, model_source
from nvfp4.rl.rollout import Sampling, rollout
from nvfp4.rl.score import register_float64_attention, score
from nvfp4.rl.statistics import PER_TENSOR, mismatch, pass_keys
from nvfp4.rl.vocabulary import Text, load_vocabulary
from nvfp4.run.model import build_model
from nvfp4.run.progress import duration

_SEED = fold_in(0, ABLATION_BRANCH)
PROMPTS, GROUP = 64, 8
SPREAD = 0.06
"""Standard deviation of random weights: three times the usual .02, for a model with opinions."""

TIGHT = 1e-5
"""|difference| of log-probabilities in nats that a KV cache may cause."""

GAIN, WIDEST_LOSS, RECIPE_GAP, APART = 0.15, 0.05, 0.06, 1.1
"""Bounds: pass@1 gained, pass@k lost, pass@1 behind full precision, mult error apart."""


@dataclass(frozen=True)
class Ablation:
    """A name for people, a recipe, and the attention that goes with it."""

    name: str
    recipe: Recipe
    attention: str


def tensor_scaled(recipe: Recipe) -> Recipe:
    """The recipe with one scale for all rows of x: logits then depend on the rest of the batch."""
    left, right = recipe.fprop.left, recipe.fprop.right
    options = tuple((key, value) for key, value in left.options if key != "row_scaled")
    operand = Operand(left.quantizer, options, left.source, left.rotation)
    return replace(recipe, name=f"{recipe.name}+tensor_scaled", fprop=Gemm(operand, right))


ABLATIONS = (
    Ablation("full precision", RECIPES["bf16"], "float64"),
    Ablation("rl: a scale for each row", RECIPES["rl"], "float64"),
    Ablation("w4a16: weights only", W4A16, "float64"),
    Ablation("full precision, float32 attention", RECIPES["bf16"], "sdpa"),
    Ablation("rl, float32 attention", RECIPES["rl"], "sdpa"),
    Ablation(PER_TENSOR, tensor_scaled(RECIPES["rl"]), "float64"),
)
"""From full precision on; attention in float64 unless the name says otherwise."""


def ablate(config: RLConfig) -> list[dict[str, Any]]:
    """The mismatch of each ablation of a resolved config's model, trained and random."""
    rows = []
    for weights, spread in (("warm start", None), ("random", SPREAD)):
        for ablation in ABLATIONS:
            figures = measure(config, ablation, spread, PROMPTS)
            rows.append({"weights": weights, "name": ablation.name, **figures})
    return rows


def measure(
    config: RLConfig,
    ablation: Ablation,
    spread: float | None,
    prompts: int,
) -> dict[str, float]:
    """``statistics.mismatch`` of one ablation: sampled over a KV cache against teacher forcing.

    spread: the standard deviation of random matrices in place of the model's. Also above_1e-5, the
    share of tokens that differ by more, and same_shape, the largest difference between two scorings
    of the same batch.
    """
    assert config.tokenizer is not None
    assert config.max_new_tokens is not None

    # The model in full precision, then the one thing that this ablation leaves out.
    text = Text(load_vocabulary(config.tokenizer), config.chat)
    model: Any = build_model(model_source(config), text, config.seed).eval()
    if spread is not None:
        generator = torch.Generator().manual_seed(0)
        matrices = [weight for weight in model.parameters() if weight.ndim == 2]
        with torch.no_grad():
            for matrix in matrices:
                matrix.copy_(spread * torch.randn(matrix.shape, generator=generator))
    if ablation.attention == "float64":
        model.set_attn_implementation(register_float64_attention())
    if ablation.recipe.quantized:
        convert(model, ablation.recipe, seed=0, verbose=False)

    # sampled, then scored twice: the second time says whether the forward repeats itself
    problems = make_task(config).problems(prompts, _SEED)
    ids = [text.prompt(problem.prompt) for problem in problems]
    sampling, stops = Sampling(config.max_new_tokens), text.stops(model)
    with torch.no_grad(), fixed_weights(model):
        samples = rollout(model, ids, range(prompts), GROUP, sampling, stops, _SEED)
        first, again = (score(model, samples, 1.0).logprobs for _ in range(2))

    sampled, mask = samples.sampler_logprobs, samples.mask
    size = (first - sampled)[mask].abs()
    return {
        **mismatch(first, sampled, mask),
        "above_1e-5": float((size > TIGHT).double().mean()),
        "same_shape": float((first - again).abs().max()),
        "tokens": int(mask.sum()),
    }


def gates(runs: list[dict[str, Any]], ablation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gates as {name, value, bound, passed}: value is the worst of all runs that the gate looks at.

    runs: results of runs, at least one with the task's own reward. ablation: rows of ``ablate``.
    """
    learnt = [run for run in runs if run["reward"] == "task"]
    controls = [run for run in runs if run["reward"] == "random"]
    widest = pass_keys(learnt[0]["after"])[-1]
    name = widest.removeprefix("eval/")

    # What was learnt: by the worst seed, since a mean hides a run that lost.
    gains = [_change(run, "eval/pass@1") for run in learnt]
    lost = -min(_change(run, widest) for run in learnt)
    rows = [
        _at_least(f"pass@1 gained, least of {len(learnt)} runs", min(gains), GAIN),
        _at_most(f"{name} lost, most", lost, WIDEST_LOSS),
    ]
    gaps = recipe_gaps(learnt)
    if gaps:
        behind = "pass@1 behind full precision, most over seeds"
        rows.append(_at_most(behind, max(gaps), RECIPE_GAP))
    if controls:
        rise = max(_change(run, "eval/pass@1") for run in controls)
        rows.append(_at_most("pass@1 gained by random rewards", rise, 0.0))

    # Sampler against trainer. On equal shapes any difference is a defect; over a KV cache a last
    # bit is none, and one token in a thousand may have more.
    gap = [run["mismatch"]["same_shape"] for run in runs]
    equal_shapes = max((each for each in gap if each is not None), default=0.0)
    cached = max(run["mismatch"]["quantile_999"] for run in runs)
    rows.append(_at_most("mismatch on equal shapes, largest", equal_shapes, 0.0))
    rows.append(_at_most("mismatch over a KV cache, 99.9 % of tokens below", cached, TIGHT))
    apart = [row["token_mult_prob_error"] for row in ablation if row["name"] == PER_TENSOR]
    if apart:
        label = "token_mult_prob_error of one scale for all rows"
        rows.append(_at_least(label, max(apart), APART))
    return rows


def recipe_gaps(runs: list[dict[str, Any]]) -> list[float]:
    """pass@1 of full precision minus that of each quantised run of the same seed."""
    full = {run["seed"]: run["after"]["eval/pass@1"] for run in runs if run["recipe"] == "bf16"}
    quantised = [run for run in runs if run["recipe"] != "bf16" and run["seed"] in full]
    return [full[run["seed"]] - run["after"]["eval/pass@1"] for run in quantised]


def _change(run: dict[str, Any], key: str) -> float:
    return run["after"][key] - run["before"][key]


def _at_least(name: str, value: float, bound: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": f">= {bound:g}", "passed": value >= bound}


def _at_most(name: str, value: float, bound: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": f"<= {bound:g}", "passed": value <= bound}


def run_table(report: dict[str, Any]) -> Table:
    """pass@k before and after, and the mismatch, for each run."""
    first = report["runs"][0]
    keys = pass_keys(first["after"])
    least, most = keys[0], keys[-1]
    size = f"{first['parameters']:,} parameters"
    table = Table(
        title=f"{size}, {first['steps']} steps of {first['objective']} on {first['task']}",
        caption="held-out problems; [] is the 95 % interval over problems; mismatch: largest "
        "|difference| of log-probabilities between sampler and trainer in the whole run",
    )
    table.add_column("run")
    names = [key.removeprefix("eval/") for key in (least, most)]
    columns = (f"{names[0]} before", "after", f"{names[1]} before", "after")
    for name in (*columns, "greedy", "mismatch", "time"):
        table.add_column(name, justify="right")

    # a row for each run; the interval is that of the end
    for run in report["runs"]:
        before, after = run["before"], run["after"]
        interval = f"[{after[f'{least}/low']:.3f}, {after[f'{least}/high']:.3f}]"
        table.add_row(
            run["name"],
            f"{before[least]:.3f}",
            f"{after[least]:.3f} {interval}",
            f"{before[most]:.3f}",
            f"{after[most]:.3f}",
            f"{before['eval/greedy']:.3f} -> {after['eval/greedy']:.3f}",
            _number(run["mismatch"]["max"]),
            duration(run["seconds"]),
        )
    return table


def ablation_table(rows: list[dict[str, Any]]) -> Table:
    """What keeps sampler and trainer equal, and what each thing left out costs."""
    unit = "differences of log-probabilities in nats"
    table = Table(
        title="Sampled over a KV cache against teacher forcing, one model",
        caption=f"{unit}; mult error: mean exp |difference|, 1 is none",
    )

    # Trained and random weights: what is left out may matter on one of them alone.
    table.add_column("weights")
    table.add_column("forward")
    for name in ("largest", "above 1e-5", "above .05", "mult error", "equal shapes"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["weights"],
            row["name"],
            _number(row["max"]),
            f"{100 * row['above_1e-5']:.2f} %",
            f"{100 * row['share']:.2f} %",
            f"{row['token_mult_prob_error']:.4f}",
            _number(row["same_shape"]),
        )
    return table


def gate_table(rows: list[dict[str, Any]]) -> Table:
    """Gate, value, bound, verdict."""
    table = Table(title="Gates")
    for name in ("gate", "measured", "bound", ""):
        table.add_column(name, justify="left" if name == "gate" else "right")
    for row in rows:
        verdict = "ok" if row["passed"] else "FAILED"
        table.add_row(row["name"], _number(row["value"], ".3g"), row["bound"], verdict)
    return table


def _number(value: float, form: str = ".1e") -> str:
    return "0" if value == 0 else f"{value:{form}}"
