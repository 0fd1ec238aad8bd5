"""What the tests of reinforcement learning share: tiny configs, a tiny model, a task of their
own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import nvfp4
from nvfp4.recipes import RECIPES, Recipe
from nvfp4.rl.config import RLConfig, model_source, resolve
from nvfp4.rl.score import register_float64_attention
from nvfp4.rl.tasks.base import Problem, Task
from nvfp4.rl.vocabulary import Text, load_vocabulary
from nvfp4.run import log
from nvfp4.run.model import build_model

CLOCK = ("step_time", "rollout_time", "tokens_per_s", "memory_gib")


@dataclass
class Sevens(Task):
    """The share of sevens in the completion: a model without any warm start finds some, and can
    learn more."""

    name: ClassVar[str] = "sevens"
    vocabulary: ClassVar[str] = "symbols"

    def problem(self, rng: np.random.Generator) -> Problem:
        return Problem("".join(map(str, rng.integers(0, 10, rng.integers(2, 5)))) + ">", "777")

    def reward(self, problem: Problem, completion: str) -> float:
        return completion.count("7") / max(1, len(completion))


SEVENS = f"{Path(__file__)}:Sevens"


def tiny(out: Path, **changes: Any) -> RLConfig:
    """A run of a few thousand parameters and a few seconds, with random rewards, so that there is
    always a gradient."""
    fields: dict[str, Any] = {
        "out": str(out),
        "reward": "random",
        "warm_steps": 0,
        "depth": 2,
        "width": 32,
        "heads": 2,
        "context": 32,
        "max_new_tokens": 6,
        "prompts": 4,
        "group": 4,
        "steps": 4,
        "lr": 1e-2,
        "device": "cpu",
        "eval_problems": 8,
        "eval_samples": 2,
        "save_every": 2,
        "check_every": 1,
    }
    return RLConfig(**{**fields, **changes})


def model_of(recipe: str | Recipe = "rl", attention: str = "float64", spread: float = 0.15) -> Any:
    """A Llama of two layers with random weights, converted; its distributions are far from even."""
    config = resolve(tiny(Path("unused")))
    model: Any = build_model(
        model_source(config), Text(load_vocabulary("symbols")), config.seed
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    if attention == "float64":
        model.set_attn_implementation(register_float64_attention())
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    return nvfp4.convert(model, recipe, seed=0, verbose=False) if recipe.quantized else model


def rows_of(out: Path) -> list[dict[str, Any]]:
    """What log.jsonl says that must not depend on the clock or the machine."""
    return [
        {key: value for key, value in row.items() if key not in CLOCK}
        for row in log.read(out / "log.jsonl")
    ]


class Failing(Sevens):
    """Rewards that fail for every completion with a seven in it, and are odd for those without."""

    name: ClassVar[str] = "failing"

    def reward(self, problem: Problem, completion: str) -> float:
        if "7" in completion:
            raise RuntimeError("a seven")
        return float("nan") if "8" in completion else 0.5


FAILING = f"{Path(__file__)}:Failing"
