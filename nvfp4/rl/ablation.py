"""What keeps sampler and trainer equal, one thing left out at a time: measured on one model in a few seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from nvfp4.model.convert import convert
from nvfp4.model.weights import fixed_weights
from nvfp4.numerics.rng import ABLATION_BRANCH, fold_in
from nvfp4.recipes import RECIPES, W4A16, Gemm, Operand, Recipe
from nvfp4.rl.attention import register
from nvfp4.rl.config import RLConfig, make_task, model_source
from nvfp4.rl.meter import mismatch
from nvfp4.rl.rollout import Sampling, rollout
from nvfp4.rl.score import score
from nvfp4.rl.text import Text
from nvfp4.rl.tokens import load_vocabulary
from nvfp4.run.model import build_model

_SEED = fold_in(0, ABLATION_BRANCH)
PROMPTS, GROUP = 64, 8
SPREAD = 0.06  # of random weights: thrice what transformers starts from, so that the model has opinions
TIGHT = 1e-5  # |difference| of log-probabilities that a cache may cause


@dataclass(frozen=True)
class Variant:
    """A name for people, a recipe, and the attention that goes with it."""

    name: str
    recipe: Recipe
    attention: str


def tensor_scaled(recipe: Recipe) -> Recipe:
    """The recipe with one scale for all rows of x: a token's logits then depend on the rest of its batch."""
    left = recipe.fprop.left
    options = tuple((key, value) for key, value in left.options if key != "row_scaled")
    operand = Operand(left.quantizer, options, left.source, left.rotation)
    return replace(recipe, name=f"{recipe.name}+tensor_scaled", fprop=Gemm(operand, recipe.fprop.right))


PER_TENSOR = "rl, but one scale for all rows"
VARIANTS = (
    Variant("full precision", RECIPES["bf16"], "float64"),
    Variant("rl: a scale for each row", RECIPES["rl"], "float64"),
    Variant("w4a16: weights only", W4A16, "float64"),
    Variant("full precision, float32 attention", RECIPES["bf16"], "sdpa"),
    Variant("rl, float32 attention", RECIPES["rl"], "sdpa"),
    Variant(PER_TENSOR, tensor_scaled(RECIPES["rl"]), "float64"),
)
"""From full precision to the ablations; attention in float64 unless the name says otherwise."""


def ablate(config: RLConfig) -> list[dict[str, Any]]:
    """The mismatch of each variant of the config's model (resolved), as it is and with random weights."""
    return [
        {"weights": weights, "name": variant.name, **measure(config, variant, spread, PROMPTS)}
        for weights, spread in (("warm start", None), ("random", SPREAD))
        for variant in VARIANTS
    ]


def measure(config: RLConfig, variant: Variant, spread: float | None, prompts: int) -> dict[str, float]:
    """``meter.mismatch`` of one variant: sampled over a KV cache against teacher forcing by the same weights.

    spread: the standard deviation of random matrices in place of the model's. Also above_1e-5, the share of tokens that
    differ by more, and same_shape, the largest difference between two scorings of the same batch.
    """
    assert config.tokenizer is not None
    assert config.max_new_tokens is not None
    text = Text(load_vocabulary(config.tokenizer), config.chat)
    model: Any = build_model(model_source(config), text, config.seed).eval()
    if spread is not None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for matrix in (weight for weight in model.parameters() if weight.ndim == 2):
                matrix.copy_(spread * torch.randn(matrix.shape, generator=generator))
    if variant.attention == "float64":
        model.set_attn_implementation(register())
    if variant.recipe.quantized:
        convert(model, variant.recipe, seed=0, verbose=False)
    problems = make_task(config).problems(prompts, _SEED)
    ids = [text.prompt(problem.prompt) for problem in problems]
    with torch.no_grad(), fixed_weights(model):
        samples = rollout(model, ids, range(prompts), GROUP, Sampling(config.max_new_tokens), text.stops(model), _SEED)
        first, again = (score(model, samples, 1.0).logprobs for _ in range(2))
    size = (first - samples.sampler_logprobs)[samples.mask].abs()
    return {
        **mismatch(first, samples.sampler_logprobs, samples.mask),
        "above_1e-5": float((size > TIGHT).double().mean()),
        "same_shape": float((first - again).abs().max()),
        "tokens": int(samples.mask.sum()),
    }
