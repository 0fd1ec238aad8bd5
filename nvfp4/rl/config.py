"""The options of reinforcement learning, and what follows from them.

    task -> tokenizer, max_new_tokens, context       what its problems and answers need
    objective -> group, temperature, minibatches     what its authors use
    model, or width, heads, depth -> ``model_source``

``resolve`` goes through them in that order and fills in sizes last: a context can only be chosen
once task, tokenizer and the objective's longest completion are known.

An option that cannot act beside the others is refused by name: whoever gave it expects something of
it. ``PRESETS`` are sets of options which the others then change.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BeforeValidator, Field

from nvfp4.recipes import RECIPES, W4A16, Recipe
from nvfp4.rl.objectives.base import Objective, StepPlan
from nvfp4.rl.objectives.registry import OBJECTIVES
from nvfp4.rl.objectives.registry import RENAMED as RENAMED_OBJECTIVES
from nvfp4.rl.tasks.base import Task
from nvfp4.rl.tasks.registry import load_task
from nvfp4.rl.vocabulary import (
    Text,
    completion_tokens,
    context_tokens,
    load_vocabulary,
    task_lengths,
)
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import check_together, fill, refuse_idle, validate
from nvfp4.run.options import (
    Count,
    CountOrZero,
    Flag,
    Fraction,
    Free,
    Listed,
    Names,
    NotNegative,
    Positive,
    ResumableConfig,
    Seed,
    Seeds,
    Sizes,
)
from nvfp4.run.tokens import check_model_folder

AboveZero = Annotated[float, Field(gt=0, le=1)]


def _pairs(value: Any) -> Any:
    """{name: value} of a config file as the command line has it, name=value."""
    if isinstance(value, dict):
        return tuple(
            f"{name}={yaml.safe_dump(v, default_flow_style=True).split(chr(10))[0]}"
            for name, v in value.items()
        )
    return value


Options = Annotated[Names, BeforeValidator(_pairs)]


@dataclass(frozen=True, kw_only=True)
class RLConfig(ResumableConfig):
    """Config of ``nvfp4 rl``. Construct it freely; ``resolve`` checks it and fills in the rest."""

    # Defaults and sentences of the shared options that are reinforcement learning's own
    out: Free[str] = "runs/rl"
    """Run folder: config.yaml, log.jsonl, completions.jsonl, plots, checkpoints/, export/, base/,
    result.json."""
    model: str | None = None
    """Folder of a local Hugging Face causal LM to train; None: a new model from the fields below,
    warmed up."""
    depth: Count = 4
    """Layers of a new model."""
    width: Count | None = None
    """Hidden size of a new model; None: 128."""
    heads: Count | None = None
    """Attention heads of a new model; None: width / 32."""
    steps: Count = 60
    """Steps: rollouts and the updates on them."""
    lr: Positive | None = None
    """Peak learning rate of AdamW; None: 1e-4 for a new model, for --model what the objective's
    authors use, 1e-6 for most of them."""
    warmup: CountOrZero = 0
    """Steps over which the learning rate rises linearly."""
    decay: Fraction = 0.0
    """Share of all steps over which wsd decays."""
    weight_decay: NotNegative | None = None
    """Decoupled weight decay of matrices; norms, biases and embeddings have none. None: what the
    objective's authors use, else 0."""
    max_bad_steps: Free[Count] = 5
    """Steps in a row with a NaN or Inf loss or gradient, each skipped and counted, before the run
    stops."""
    seed: Seed = 0
    """Seed of the problems, the draws, the order of updates, the initial weights and the stochastic
    rounding."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Compute dtype of everything around the NVFP4 layers; bf16 (autocast) costs the exactness of
    rollouts."""
    log_every: Free[Count] = 10
    """Steps between printed lines; log.jsonl has every step."""
    eval_every: Free[CountOrZero] = 0
    """Steps between evaluations; 0: only at the beginning and at the end."""
    save_every: Free[CountOrZero] = 50
    """Steps between checkpoints; 0: only at the end."""
    export_dtype: Free[Literal["bf16", "fp32"]] = "fp32"
    """Dtype of the exported Hugging Face model."""

    # Task
    task: str = "sort"
    """Whose problems are drawn and whose verifier rewards: a name (an unknown one lists all), a
    .jsonl file of problems, or a class of yours as module:Class or file.py:Class."""
    task_options: Options = ()
    """Options of the task as name=value; an unknown name lists all."""
    unsafe_rewards: Free[Flag] = False
    """Run reward functions and programs of the model even where nothing can confine them, with all
    that your account may do; without it such a run is refused."""
    reward: Literal["task", "random", "incorrect", "format", "majority"] = "task"
    """What is maximised. Controls that a gain has to beat (arXiv 2506.10947): random, coins;
    incorrect, the group's most frequent wrong answer; format, what looks like an answer, right or
    wrong; majority, the group's most frequent answer, without a verifier."""
    random_share: Fraction = 0.5
    """Probability with which --reward random gives 1."""

    # Model
    tokenizer: str | None = None
    """symbols (32), bytes (272), or the folder of a local Hugging Face tokenizer; None: that of
    --model, for a new model the smallest that can spell the task."""
    chat: Flag = False
    """Put prompts through the tokenizer's chat template."""
    context: Count | None = None
    """Longest sequence of a new model, prompt and completion, in tokens; None: what the task's
    problems need."""
    attention: Literal["auto", "float64", "sdpa"] = "auto"
    """float64: sums that do not depend on the batch, so that rollouts over a KV cache equal the
    trainer to the bit; sdpa: PyTorch's kernels; auto: float64 on the CPU."""

    # Warm start
    warm_steps: CountOrZero | None = None
    """Supervised updates on demonstrations before the first rollout; None: what the task says (300)
    for a new model, 0 for --model."""
    warm_batch: Count = 128
    """Demonstrations in one supervised update."""
    warm_lr: Positive = 2e-3
    """Peak learning rate of the supervised updates."""
    warm_noise: Fraction = 0.5
    """Share of the demonstrations that are corrupted: what reinforcement learning is to unlearn."""

    # Quantisation
    recipe: str = "rl"
    """Recipe of the linears: rl, w4a16 (weights only), bf16 (none) or any of nvfp4.convert."""
    sampler_recipe: str | None = None
    """Recipe of the sampler where it is to differ from the trainer, as a foreign inference engine
    would: then see mismatch/* and correct with --objective-options correction=token_truncate; None:
    the sampler is the trainer."""

    # Rollouts
    prompts: Count = 32
    """Prompts of a step, over all processes."""
    group: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Completions of each prompt; None: what the objective's authors use, else 8."""
    max_new_tokens: Count | None = None
    """Longest completion in tokens, with its end-of-text token; None: what the task's answers need,
    with --model at least 64."""
    temperature: Positive | None = None
    """Temperature of sampling, and of all log-probabilities; None: what the objective's authors
    use, else 1."""
    top_k: CountOrZero | None = None
    """Draw among the most likely tokens only; 0: among all; None: what the objective's authors use,
    else 0."""
    top_p: AboveZero | None = None
    """Draw among the fewest tokens that together have this probability; None: what the objective's
    authors use, else 1."""
    rollout_rows: Count | None = None
    """Completions drawn at a time in one process; None: all, with objective brorl 1024."""
    max_batches: Count = 10
    """Rounds of rollouts to look for groups that the objective keeps (dynamic sampling), before the
    run stops."""
    aqn_stages: CountOrZero = 0
    """Adaptive noise on the sampler's norms (QeRL): parts of its schedule, e.g. 10; 0: no noise."""
    aqn_start: Positive = 1e-2
    """Standard deviation of that noise in its second stage; the first has none."""
    aqn_end: Positive = 1e-4
    """Standard deviation of that noise in its last stage."""

    # Objective
    objective: str = "grpo"
    """What is maximised; an unknown name lists all."""
    objective_options: Options = ()
    """Options of the objective as name=value; an unknown name lists all."""
    minibatches: Count | None = None
    """Updates for each pass over the completions of a step; None: as many as the objective's
    authors do, or the next smaller number that divides --prompts. At one update in all, ratios to
    the old policy are 1 and no clip acts."""
    epochs: Count = 1
    """Passes over the completions of a step."""
    micro_batch: Count | None = None
    """Completions in one forward of one process, the rest is accumulated; None: all of an update,
    with objective brorl 64."""
    track_kl: Flag = False
    """Score with the model of the beginning too, so that the log has the KL even if the objective
    does not ask."""

    # Compute
    strict: Free[Flag] = True
    """Stop if sampler and trainer differ by a bit on equal shapes, which would be a defect."""
    check_every: Free[CountOrZero] = 10
    """Steps between those checks, each a forward without gradient; 0: never."""

    # Evaluation and cadence
    eval_problems: Free[Count] = 256
    """Problems of an evaluation, the same each time and never those of training."""
    eval_samples: Free[Count] = 16
    """Completions of each of them; pass@k is estimated for k = 1, 2, 4, ... up to this."""
    eval_temperature: Positive | None = None
    """Temperature of those completions, all tokens being allowed; None: as in training, --top-k and
    --top-p included."""
    log_completions: Free[CountOrZero] = 8
    """Completions of each step kept in completions.jsonl."""

    # Comparison
    seeds: Seeds = ()
    """Train once for each of these seeds (0,1,2) from one warm start, and compare; empty: one run,
    of --seed."""
    recipes: Listed = ()
    """Train once in each of these recipes (bf16,rl), and compare; empty: only --recipe."""
    control: Flag = False
    """Add a run with random rewards to the comparison."""
    workers: Free[Count | None] = None
    """Runs of a comparison at the same time, each with one thread on the CPU; None: one for each
    core."""


PRESETS: dict[str, dict[str, Any]] = {
    "sort": {
        "out": "runs/rl-sort",
        "task": "sort",
        "max_new_tokens": 8,
        "context": 32,
        "steps": 80,
        "objective_options": ("aggregation=dapo",),
        "recipes": ("bf16", "rl"),
        "seeds": (0, 1, 2),
        "control": True,
    },
}
"""Named sets of options, which the other options then change."""

RL_RECIPES: dict[str, Recipe] = {**RECIPES, W4A16.name: W4A16}

NEW_MODEL_LR = 1e-4
"""Learning rate of a new, small model, whatever the objective: what its authors use is for models
of billions."""

EVALUATION = ("eval_every", "eval_problems", "eval_samples")
"""Fields that are free on resume, but for an objective that learns from evaluations."""


def resolve(config: RLConfig) -> RLConfig:
    """The same config with every derived value filled in; ``TrainError`` names a wrong field."""
    # What names something is looked up, what cannot be together or cannot act is refused.
    config = validate(config)
    _check_objective(config.objective)
    for name in (config.recipe, *config.recipes, config.sampler_recipe):
        if name is not None and name not in RL_RECIPES:
            raise TrainError(f"recipe: expected one of {', '.join(RL_RECIPES)}, got {name!r}")
    _check_together(config)
    _check_can_act(config)

    # What was left open: first from the task, then from the objective's authors, then sizes.
    task, new = make_task(config), config.model is None
    if config.model is not None:
        check_model_folder(config.model)
    left_open: dict[str, Any] = {
        "warm_steps": task.warm_steps if new else 0,
        "tokenizer": task.vocabulary if new else config.model,
    }
    config = _as_its_authors(fill(config, left_open))
    _check_objective_acts(config)
    return _with_sizes(config, task)


def _as_its_authors(config: RLConfig) -> RLConfig:
    """The config with what the objective's authors use, where it is open."""
    defaults = OBJECTIVES[config.objective].defaults
    minibatches = max(
        d for d in range(1, config.prompts + 1) if config.prompts % d == 0 and d <= defaults.updates
    )

    # Their updates, reduced to what divides the prompts; their learning rate only for models of a
    # size like theirs.
    values = {
        **{name: value for name, value in vars(defaults).items() if name != "updates"},
        "minibatches": minibatches,
        "lr": defaults.lr if config.model is not None else NEW_MODEL_LR,
    }
    return fill(config, values)


def plan(config: RLConfig) -> StepPlan:
    """What the loop will do with the objective of a resolved config."""
    assert config.minibatches is not None
    return StepPlan(config.minibatches * config.epochs, config.eval_every > 0)


def remarks(config: RLConfig) -> list[str]:
    """What a user should know about a resolved config that may be meant so.

    So far one thing: fewer updates per rollout than the objective's authors do.
    """
    usual, updates = OBJECTIVES[config.objective].defaults.updates, plan(config).updates
    if updates > 1 or usual == 1:
        return []
    return [
        f"minibatches: one update per rollout, where the authors of {config.objective} do {usual}: "
        f"every ratio to the old policy stays exactly 1, so clips never act"
    ]


def _with_sizes(config: RLConfig, task: Task) -> RLConfig:
    """The config with max_new_tokens and a new model's context, as the task needs them."""
    new = config.model is None
    if config.max_new_tokens is not None and (config.context is not None or not new):
        return config
    assert config.tokenizer is not None
    prompt, answer = task_lengths(task, Text(load_vocabulary(config.tokenizer), config.chat))
    config = fill(config, {"max_new_tokens": completion_tokens(answer, new)})
    assert config.max_new_tokens is not None
    longest = make_objective(config).longest_completion(config.max_new_tokens)
    return fill(config, {"context": context_tokens(prompt, longest)}) if new else config


def make_task(config: RLConfig) -> Task:
    """The config's task; ``TrainError`` if its name or an option is wrong."""
    unsafe = {"unsafe_rewards": True} if config.unsafe_rewards else {}
    return load_task(config.task, **{**_values(config.task_options, "task_options"), **unsafe})


def make_objective(config: RLConfig) -> Objective:
    """The config's objective; ``TrainError`` lists what it takes if an option is wrong."""
    kind: Any = OBJECTIVES[config.objective]
    values = _values(config.objective_options, "objective_options")
    known = {f.name: f.default for f in dataclasses.fields(kind)}
    listed = ", ".join(f"{name}={default}" for name, default in known.items())

    # An option that was renamed is told by its new name, any other unknown one by what there is.
    for name in sorted(values.keys() & kind.renamed.keys()):
        raise TrainError(
            f"objective_options: {name} is no longer an option: give {kind.renamed[name]}"
        )
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise TrainError(
            f"objective_options: {config.objective} has no {', '.join(unknown)}; it takes {listed}"
        )

    # Types and ranges by pydantic, as those of the config itself.
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise TrainError(
            f"objective_options: {reason}; {config.objective} takes {listed}"
        ) from error


def _values(given: tuple[str, ...], field: str) -> dict[str, Any]:
    """name=value pairs with values as YAML reads them, and 1e-3 as the number that it is."""
    values = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals:
            raise TrainError(f"{field}: expected name=value, got {pair!r}")
        value = yaml.safe_load(text)
        with suppress(ValueError):
            value = float(value) if isinstance(value, str) else value
        values[name.strip().replace("-", "_")] = value
    return values


def model_source(config: RLConfig) -> str | Sizes:
    """What ``build_model`` builds the model of a resolved config from.

    ``TrainError`` if the sizes of a new one do not fit each other.
    """
    if config.model is not None:
        return config.model
    assert config.context is not None
    width = config.width or 128
    heads = config.heads or max(1, width // 32)
    return Sizes(config.architecture, config.depth, width, heads, config.context)


def _check_objective(name: str) -> None:
    if name in RENAMED_OBJECTIVES:
        raise TrainError(f"objective: {name} is no longer a name: give {RENAMED_OBJECTIVES[name]}")
    if name not in OBJECTIVES:
        raise TrainError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {name!r}")


def _check_objective_acts(config: RLConfig) -> None:
    """Refuse an option that is set and cannot act, and an objective that would be another one."""
    objective, present = make_objective(config), plan(config)
    other = objective.acts_like(present)
    if other is not None:
        raise TrainError(
            f"minibatches: with {present.updates} update per rollout {config.objective} is "
            f"{other}; give --minibatches 2 or more, or --epochs 2, or another --objective"
        )

    # Only options that were given are refused: a default that cannot act disturbs nobody.
    reasons = objective.idle(present)
    idle = [
        name for name in _values(config.objective_options, "objective_options") if name in reasons
    ]
    if idle:
        listed = "; ".join(f"{name} cannot act: {reasons[name]}" for name in idle)
        raise TrainError(
            f"objective_options: {listed}; change that, or leave {', '.join(idle)} out"
        )


def _check_together(config: RLConfig) -> None:
    if config.minibatches is not None and config.prompts % config.minibatches:
        raise TrainError(
            f"minibatches: must divide prompts = {config.prompts}, got {config.minibatches}"
        )
    if config.aqn_stages == 1:
        raise TrainError("aqn_stages: the first has no noise, so at least 2 are needed; 0 for none")
    check_together(config)

    # A model from a folder has sizes; controls belong to rewards that can be true.
    if config.model is not None and (config.width or config.heads):
        raise TrainError(f"width, heads: {config.model} brings its own sizes; leave them out")
    if config.reward != "random" and config.random_share != 0.5:
        raise TrainError("random_share: only --reward random reads it; leave it out")
    if config.reward != "task" and config.control:
        raise TrainError(
            "control: adds a run with random rewards to one with the task's; leave out --reward"
        )


def _check_can_act(config: RLConfig) -> None:
    given, alone = config.model is not None, not (config.seeds or config.recipes)
    rules = (
        ("architecture depth context", given, "--model brings its own sizes"),
        (
            "warm_batch warm_lr warm_noise",
            given or config.warm_steps == 0,
            "there is no warm start",
        ),
        ("control workers", alone, "only a comparison has them: give --seeds or --recipes"),
        ("recipe", bool(config.recipes), "--recipes says which"),
        ("aqn_start aqn_end", config.aqn_stages == 0, "there is no noise without --aqn-stages"),
    )
    refuse_idle(config, rules)
    if given and config.warm_steps:
        raise TrainError(
            f"warm_steps: {config.model} is trained as it is, without a warm start; leave it out"
        )
