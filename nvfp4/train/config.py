"""The options of pretraining, and what follows from them.

    depth -> width -> heads, ffn, lr      the size dial: whatever is left open follows from depth
    seq_len -> eval_batch                 steps -> warmup

``resolve`` does it in this order: types and ranges, options that contradict each other, options
that cannot act, then the open ones. A resolved config has no open field that the run would still
have to decide, so what config.yaml says is all there is to say.

``TrainConfig`` is what one pretraining and a comparison of several share.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field

from nvfp4.recipes import RECIPES, Recipe
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import check_together, fill, refuse_idle, validate
from nvfp4.run.options import (
    Count,
    CountOrZero,
    DataOptions,
    Flag,
    Free,
    Listed,
    NotNegative,
    ResumableConfig,
    RunConfig,
    Seeds,
    Sizes,
    round_up,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataOptions, RunConfig):
    """What a pretraining and a comparison share. Construct it freely; ``resolve`` fills it in."""

    # Shared options that are pretraining's own
    out: Free[str] = "runs/pretrain"
    """Run folder: config.yaml, log.jsonl, checkpoints/, export/, sample.txt, result.json."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""

    # Model
    kv_heads: Count | None = None
    """Key and value heads (grouped-query attention); None: as many as heads."""
    ffn: Count | None = None
    """Hidden size of the gated MLP; None: 8/3 * width, rounded up to a multiple of 128."""
    tie_embeddings: Flag = False
    """Use one matrix for the input and the output embedding of a new model."""

    tokenizer: str | None = None
    """Folder of a local Hugging Face tokenizer, or bytes (257 tokens); None: that of --model,
    without one bytes."""

    # Batch
    seq_len: Annotated[int, Field(ge=2, strict=True)] = 128
    """Tokens in a sequence."""
    batch: Count = 8
    """Sequences in one optimiser update, over all processes and accumulation steps."""
    micro_batch: Count | None = None
    """Sequences in one forward pass of one process; the rest is accumulated; None: no
    accumulation."""

    # Compute
    compile: Flag = False
    """Compile the model with torch.compile."""
    recompute: Flag = False
    """Activation checkpointing: recompute each block in the backward pass to save memory."""

    # Evaluation
    eval_bytes: Free[Count] = 32768
    """Bytes of held-out text (UTF-8) in an evaluation during the run, of at least 16 documents if
    there are."""
    eval_batch: Free[Count | None] = None
    """Sequences in one forward pass of an evaluation, whatever --micro-batch and the processes are:
    with one scale per activation tensor the loss depends on it; None: as many as hold 2048 tokens,
    at least 1."""
    final_eval_bytes: Free[CountOrZero] = 131072
    """Bytes of held-out text (UTF-8) in the evaluation at the end; 0: all of it."""
    sample_tokens: Free[CountOrZero] = 300
    """Tokens of the text sample at the end; 0: none."""
    prompt: Free[str | None] = None
    """Prompt of the text sample; None: the first line of a held-out document."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig, ResumableConfig):
    """Config of ``nvfp4 pretrain``: one model, one recipe."""

    recipe: str = "quartet2"
    """Recipe of the linears: bf16, rtn, nvidia, four_over_six, tetrajet2, quartet2, search_eden or
    rl."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TrainConfig):
    """Config of ``nvfp4 compare``: the same run once for each recipe."""

    out: Free[str] = "runs/compare"
    """Folder of the comparison: compare.json, compare.png, and a run folder for each recipe.
    Finished runs are kept."""
    recipes: Listed = ("bf16", "nvidia", "quartet2", "search_eden")
    """Recipes to train (bf16, rtn, nvidia, four_over_six, tetrajet2, quartet2, search_eden, rl);
    gaps are to bf16."""
    seeds: Seeds = ()
    """Train each recipe once per seed (0,1,2), and say how sure the gaps are; empty: one run each,
    of --seed."""
    workers: Free[Count | None] = None
    """Runs at a time, which share the cores of the CPU; each run needs its own memory; None: one
    per core, and one on a GPU."""


Config = TypeVar("Config", bound=TrainConfig)


def resolve(config: Config) -> Config:
    """The same config with every derived value filled in.

    width, heads, kv_heads, ffn and lr follow from depth. With ``model`` given its own config
    decides the sizes, so they must be left open. ``TrainError`` naming each field that is wrong.
    """
    config = validate(config)
    _check(config)

    # An evaluation has 2048 tokens per forward, a fixed number, since the loss of most recipes
    # depends on which rows share a forward (evaluate.py).
    config = fill(
        config,
        {"eval_batch": max(1, 2048 // config.seq_len), "warmup": min(1000, config.steps // 6)},
    )
    if config.model is not None:
        return fill(config, {"lr": 2e-5})

    # The size dial: the others follow from depth. 0.4 / width is within a third of GPT-3's rates
    # (Brown et al. 2020, table 2.1) up to width 5140: 5.2e-4 at 768 (theirs is 6.0e-4), 2.0e-4 at
    # 2048 (2.0e-4), 9.8e-5 at 4096 (1.2e-4).
    width = config.width or round_up(64 * config.depth, 128)
    heads = config.heads or max(1, width // (64 if width <= 1024 else 128))
    sizes = sizes_of(dataclasses.replace(config, width=width, heads=heads))
    names = ("width", "heads", "kv_heads", "ffn")
    return fill(config, {**{name: getattr(sizes, name) for name in names}, "lr": 0.4 / width})


def sizes_of(config: TrainConfig) -> Sizes:
    """The sizes of a new model; ``TrainError`` if they do not fit each other."""
    assert config.width is not None
    assert config.heads is not None
    own = (config.kv_heads, config.ffn, config.tie_embeddings)
    return Sizes(
        config.architecture, config.depth, config.width, config.heads, config.seq_len, *own
    )


def _check(config: TrainConfig) -> None:
    """``TrainError`` for options that contradict each other, cannot act, or name nothing."""
    if config.micro_batch is not None and config.batch % config.micro_batch:
        raise TrainError(
            f"micro_batch: must divide batch = {config.batch}, got {config.micro_batch}"
        )
    check_together(config)

    # Sizes that a model from a folder would silently ignore.
    if config.model is not None:
        sizes = [
            name
            for name in ("width", "heads", "kv_heads", "ffn")
            if getattr(config, name) is not None
        ]
        if sizes:
            raise TrainError(
                f"{sizes[0]}: {config.model} brings its own sizes; leave out {', '.join(sizes)}"
            )

    # Options that were given and cannot act.
    seeds = config.seeds if isinstance(config, CompareConfig) else ()
    rules = (
        (
            "architecture depth tie_embeddings",
            config.model is not None,
            "--model brings its own sizes",
        ),
        ("holdout", bool(config.held_out_data), "--held-out-data says what is held out"),
        ("seed", bool(seeds), "--seeds says which"),
    )
    refuse_idle(config, rules)

    # Recipes and seeds, of which each gets a run.
    if isinstance(config, PretrainConfig):
        _check_recipe("recipe", config.recipe)
    if isinstance(config, CompareConfig):
        for name in config.recipes:
            _check_recipe("recipes", name)
        if not config.recipes or len(set(config.recipes)) < len(config.recipes):
            listed = ", ".join(config.recipes) or "none"
            raise TrainError(f"recipes: expected different names, at least one, got {listed}")
    if len(set(seeds)) < len(seeds):
        raise TrainError(f"seeds: expected different numbers, got {', '.join(map(str, seeds))}")


def _check_recipe(field: str, name: str) -> None:
    try:
        Recipe.from_name(name)
    except ValueError:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        raise TrainError(
            f"{field}: expected one of {', '.join(RECIPES)}, got {name!r}"
            + (f"; did you mean {close[0]}?" if close else "")
        ) from None
