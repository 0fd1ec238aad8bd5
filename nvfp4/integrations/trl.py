"""TRL's GRPO on converted models: the sampler is held to the trainer.

    trainer = NVFP4GRPOTrainer(model=nvfp4.convert(model, "rl"), ...)   arguments as TRL's own

Given a converted model, TRL alone does three things wrong, and this file mends each:

* it loads the reference from its path, plain. The KL term then starts above 0 and pulls towards a
  model that nobody asked for. ``convert_like`` gives the reference the policy's recipes.
* without vLLM it never compares what the sampler computed with what the trainer computes, and these
  differ for every recipe whose scales depend on the other tokens of a batch. The meter scores each
  generation once more, d = log p(trainer) - log p(sampler) per token, and logs |d| and exp d.
* what it saves loads plain. ``save_recipes`` writes a file beside the weights, ``load_recipes``
  reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trl import GRPOTrainer

from nvfp4.layer.linear import Linear
from nvfp4.model.convert import convert
from nvfp4.recipes import Recipe

RECIPES_FILE = "nvfp4_training.json"
"""Beside the saved weights: the recipe of each converted layer."""


def convert_like(model: nn.Module, policy: nn.Module, backend: str = "auto") -> nn.Module:
    """Convert the layers of ``model`` that ``policy`` has converted into the same recipes.

    In place; returns ``model``. For reference models and reloaded ones. Returns ``model`` as it is
    if nothing of ``policy`` is converted. Raises ValueError if one of these layers of ``model`` is
    missing or cannot be converted.
    """
    return _apply(model, _recipes(policy), backend)


def save_recipes(model: nn.Module, folder: str | Path) -> None:
    """Write the recipes of the converted layers beside weights saved with ``save_pretrained``."""
    recipes = {name: recipe.to_dict() for name, recipe in _recipes(model).items()}
    Path(folder, RECIPES_FILE).write_text(json.dumps(recipes, indent=2) + "\n", encoding="utf-8")


def load_recipes(model: nn.Module, folder: str | Path, backend: str = "auto") -> nn.Module:
    """Convert a model just loaded from ``folder`` as it was when saved; in place, returns it.

    Raises FileNotFoundError if no recipes were saved there, ValueError as ``convert_like``.
    """
    recipes = json.loads(Path(folder, RECIPES_FILE).read_text(encoding="utf-8"))
    return _apply(
        model, {name: Recipe.from_dict(recipe) for name, recipe in recipes.items()}, backend
    )


class NVFP4Mixin:
    """Mixes into a trainer class derived from TRL's: ``class Mine(NVFP4Mixin, MyGRPOTrainer)``.

    The reference model, if there is one, is converted like the policy; ``save_model`` writes the
    recipes too; and after each generation by transformers the trainer scores what was sampled, for
    the metrics that TRL logs with vLLM: ``sampling/sampling_logp_difference/{mean,max}`` of the
    absolute differences of log-probabilities, and
    ``sampling/importance_sampling_ratio/{min,mean,max}`` of their token by token ratios. It costs
    one forward pass for each generation; mismatch_meter=False saves it. Generation in turns (tools)
    or by continuous batching has no meter.
    """

    def __init__(self, *args: Any, mismatch_meter: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.mismatch_meter = mismatch_meter and not trainer.use_vllm
        if trainer.ref_model is not None:
            convert_like(_inner(trainer, trainer.ref_model), _inner(trainer, trainer.model))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as ``Trainer`` does, with the recipes beside the weights."""
        trainer: Any = self
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if trainer.args.should_save:
            save_recipes(_inner(trainer, trainer.model), output_dir or trainer.args.output_dir)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        trainer: Any = self
        if not self.mismatch_meter:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]

        # what the sampler computed, step by step
        with _recorded(_inner(trainer, trainer.model), trainer.temperature) as steps:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        ids, mask = output["completion_ids"], output["completion_mask"].bool()
        if len(steps) < ids.shape[1] or any(len(step) != len(ids) for step in steps):
            return output  # several generations for one batch, as with tools: nothing to line up
        sampled = torch.stack(
            [step.gather(-1, ids[:, t, None])[:, 0] for t, step in enumerate(steps[: ids.shape[1]])]
        )

        # what the trainer computes of the same tokens
        scored = output.get("old_per_token_logps")
        if scored is None:
            scored = self._scored(output)
        _log(trainer, (scored.float() - sampled.T)[mask])
        return output

    def _scored(self, output: dict[str, Any]) -> torch.Tensor:
        """The trainer's log-probabilities of the completions, by the function of its loss."""
        trainer: Any = self
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        length = output["completion_ids"].shape[1]
        with torch.no_grad():
            scores = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, attention, length
            )
        logprobs: torch.Tensor = scores[0]
        return logprobs


class NVFP4GRPOTrainer(NVFP4Mixin, GRPOTrainer):
    """``trl.GRPOTrainer`` with what ``NVFP4Mixin`` adds.

    The model is to be converted before, with the recipe "rl" if the sampler is to agree with it.
    """


def _recipes(model: nn.Module) -> dict[str, Recipe]:
    """Recipes of the converted layers by name, all names of a layer that has several.

    Longer names come first, since a name is also a pattern for its end.
    """
    converted = [
        (name, m)
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, Linear)
    ]
    converted.sort(key=lambda item: -item[0].count("."))
    return {name: layer.nvfp4.full_recipe or layer.nvfp4.recipe for name, layer in converted}


def _apply(model: nn.Module, recipes: dict[str, Recipe], backend: str) -> nn.Module:
    if not recipes:
        return model
    linears = {
        name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)
    }
    _complain(recipes.keys() - linears, "are not there")

    # Each layer by its full name, with a recipe of its own; a name that is left over is an error.
    convert(
        model,
        recipes,
        filter_fn=lambda _, name: name in recipes,
        include=list(recipes),
        backend=backend,
        verbose=False,
    )
    _complain(recipes.keys() - _recipes(model).keys(), "cannot be converted")
    return model


def _complain(names: Set[str], what: str) -> None:
    if names:
        raise ValueError(
            f"{len(names)} layers converted in the other model {what}, first {min(names)!r}"
        )


def _inner(trainer: Any, model: nn.Module) -> nn.Module:
    inner: nn.Module = trainer.accelerator.unwrap_model(model)
    return inner


@contextmanager
def _recorded(model: nn.Module, temperature: float) -> Iterator[list[torch.Tensor]]:
    """Within this context: log-probabilities of each step of ``generate``, float32 [rows, V].

    They are the model's, before any cut of top-k or top-p, as the trainer sees them. A step of
    generation is a forward without gradient that uses a cache.
    """
    steps: list[torch.Tensor] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("past_key_values") is not None and not torch.is_grad_enabled():
            steps.append((output.logits[:, -1].float() / temperature).log_softmax(dim=-1))

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield steps
    finally:
        handle.remove()


def _log(trainer: Any, difference: torch.Tensor) -> None:
    """TRL's metrics of ``difference``, trainer minus sampler, [tokens], over all processes."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    gather = trainer.accelerator.gather
    size, ratio = difference.abs(), difference.exp()
    if not difference.numel():
        size, ratio = difference.new_zeros(1), difference.new_ones(1)

    # TRL's own names, so that its plots and callbacks show them.
    metrics["sampling/sampling_logp_difference/mean"].append(gather(size.mean()).mean().item())
    metrics["sampling/sampling_logp_difference/max"].append(gather(size.max()).max().item())
    metrics["sampling/importance_sampling_ratio/min"].append(gather(ratio.min()).min().item())
    metrics["sampling/importance_sampling_ratio/mean"].append(gather(ratio.mean()).mean().item())
    metrics["sampling/importance_sampling_ratio/max"].append(gather(ratio.max()).max().item())
