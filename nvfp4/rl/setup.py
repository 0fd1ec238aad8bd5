"""Everything a reinforcement learning run is made of, built from the config, in one process.

    task, objective -> the folder is claimed -> warm start (a new model) -> model -> attention
      -> sampler and policy in their recipes -> reference, if one is asked for -> wrapped -> AdamW

What can be refused is refused here, before the first step, and before a warm start of minutes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from nvfp4.model.convert import convert
from nvfp4.rl.config import RL_RECIPES, RLConfig, make_objective, make_task, model_source
from nvfp4.rl.folder import RLFolder
from nvfp4.rl.objectives.base import Objective
from nvfp4.rl.parts import RLRun
from nvfp4.rl.progress import Progress
from nvfp4.rl.rollout import check_context
from nvfp4.rl.score import register_float64_attention
from nvfp4.rl.tasks.base import Task
from nvfp4.rl.vocabulary import Text, load_vocabulary, longest_prompt
from nvfp4.rl.warmstart import warm_start
from nvfp4.run.errors import TrainError
from nvfp4.run.model import build_model
from nvfp4.run.optim import adamw
from nvfp4.run.precision import conversion, without_emulation
from nvfp4.run.processes import accelerator_for, stop_together


def prepare(config: RLConfig) -> RLRun:
    """Build a run from a resolved config: task, objective, warm start, converted model, optimiser.

    ``TrainError`` for anything in the config that cannot work here.
    """
    accelerator = _accelerator(config)
    report = Progress(config.recipe, config.steps, config.log_every, accelerator.is_main_process)
    task, objective = make_task(config), make_objective(config)
    if accelerator.num_processes > 1:
        objective.connect(
            lambda tensor: accelerator.reduce(tensor, reduction="sum"), accelerator.gather
        )

    # What would stop the run later stops it now; from here on the folder is this process's.
    folder = RLFolder(config.out)
    _check_problems(task)
    if (walls := task.confinement()) is not None:
        report.say(walls)
    with stop_together(accelerator):
        if accelerator.is_main_process:
            folder.claim(config)
    try:
        return _prepare(config, accelerator, report, folder, task, objective)
    except BaseException:
        # a notebook keeps the traceback, and with it the folder and its lock
        folder.release()
        raise


def _prepare(
    config: RLConfig,
    accelerator: Accelerator,
    report: Progress,
    folder: RLFolder,
    task: Task,
    objective: Objective,
) -> RLRun:
    """The rest of ``prepare``, in a folder that is this process's."""
    assert config.tokenizer is not None
    assert config.max_new_tokens is not None
    main = accelerator.is_main_process

    # Is there room for the longest prompt and completion? Asked now, and not after a warm start or
    # when a later stage allows longer completions.
    text = Text(load_vocabulary(config.tokenizer), config.chat)
    needed = longest_prompt(task, text) + objective.longest_completion(config.max_new_tokens)
    if config.model is None:
        check_context(config.context, needed)
    source = model_source(config)

    # A new model learns from demonstrations first, in the main process, while the others wait.
    if config.model is None and config.warm_steps:
        with stop_together(accelerator):
            if main:
                warm_start(config, folder.base)
        source = str(folder.base)
    model = build_model(source, text, config.seed).eval()  # without dropout: the sampler has none
    check_context(getattr(model.config.get_text_config(), "max_position_embeddings", None), needed)

    # The policy. A sampler in another recipe shares its weights, so no update has to be copied.
    _set_attention(model, config, accelerator)
    model.to(accelerator.device)
    sampler = model
    if config.sampler_recipe is not None:
        sampler = on_the_same_weights(model)
        _convert(sampler, config.sampler_recipe, config, main)
    _convert(model, config.recipe, config, main)
    for each in (model,) if sampler is model else (model, sampler):
        without_emulation(each, accelerator.device, config.dtype)

    # A copy of the policy as it is now; it takes as much memory again, so only if somebody asks.
    reference = None
    if objective.needs_reference or config.track_kl:
        reference = copy.deepcopy(model).requires_grad_(False)
    parts = (
        config,
        accelerator,
        report,
        folder,
        model,
        accelerator.prepare(model),
        adamw(model, config),
    )
    return RLRun(*parts, task, objective, text, text.stops(model), sampler, reference)


def _convert(model: PreTrainedModel, name: str, config: RLConfig, verbose: bool) -> None:
    with conversion(RL_RECIPES[name], config, verbose) as keywords:
        convert(model, seed=config.seed, **keywords)


def on_the_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same class on the parameters of ``model``, which are not copied."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)  # what the memo already holds is not copied


def _check_problems(task: Task) -> None:
    """``TrainError`` if training or evaluation would have no problems.

    Now, and not after a warm start of minutes.
    """
    try:
        for held_out in (False, True):
            task.problems(1, 0, held_out=held_out)
    except ValueError as error:
        raise TrainError(f"{error}; an eighth of the problems, by hash, is held out") from error


def from_base(config: RLConfig, folder: Path) -> RLConfig:
    """The config with the warm start in ``folder`` as its model, without what made that."""
    of_new_models = ("architecture", "depth", "context", "warm_batch", "warm_lr", "warm_noise")
    defaults = {field.name: field.default for field in dataclasses.fields(RLConfig)}
    without: dict[str, Any] = {name: defaults[name] for name in of_new_models}
    return dataclasses.replace(
        config, model=str(folder), warm_steps=0, width=None, heads=None, **without
    )


def _accelerator(config: RLConfig) -> Accelerator:
    accelerator = accelerator_for(config.device)
    count = accelerator.num_processes
    assert config.minibatches is not None

    # Every update has as many whole groups in every process, so that gradients can be averaged.
    if config.prompts % (config.minibatches * count):
        fitting = (
            math.gcd(config.minibatches, config.prompts // count)
            if config.prompts % count == 0
            else 0
        )
        fewer = (
            f"; give other --prompts, or --minibatches {fitting}"
            if fitting
            else "; give other --prompts"
        )
        raise TrainError(
            f"prompts: must be a multiple of minibatches x processes = {config.minibatches} x "
            f"{count}, "
            f"got {config.prompts}{fewer}"
        )
    return accelerator


def _set_attention(model: PreTrainedModel, config: RLConfig, accelerator: Accelerator) -> None:
    attention = config.attention
    if attention == "auto":
        attention = "float64" if accelerator.device.type == "cpu" else "sdpa"
    if attention == "float64":
        model.set_attn_implementation(register_float64_attention())
