"""convert: turn the linear layers of a model into NVFP4 ones, in place; and back.

    1  ``selection.py`` checks the arguments and decides about every layer; nothing has changed yet
    2  complaints are warnings, or errors if strict
    3  each chosen layer changes its class (``reclass.py``) and gets a ``LinearState`` in the
       attribute ``nvfp4``: recipe, backend, and noise with an index in conversion order;
       each kept layer gets the reason in ``nvfp4_kept``

A layer keeps its identity: only its class and one attribute change. So parameters, optimisers made
before, hooks, aliases and ties stay as they were, and no weight is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from nvfp4.backends.registry import AUTO, check_backend
from nvfp4.layer.dense import DenseLinear
from nvfp4.layer.experts import Experts, ExpertsState
from nvfp4.layer.linear import Linear
from nvfp4.layer.noise import Noise
from nvfp4.layer.state import LinearState
from nvfp4.layer.weight_cache import STACKS
from nvfp4.model.convertible import ALREADY
from nvfp4.model.plain import slow_linears
from nvfp4.model.reclass import can_restore, reclass, restore, unfuse
from nvfp4.model.selection import ConversionPlan, ModuleFilter, Patterns, Recipes, Selection
from nvfp4.model.weights import quantized_weights, states
from nvfp4.numerics.rng import check_seed


def convert(
    model: nn.Module,
    recipe: Recipes = "search_eden",
    *,
    filter_fn: ModuleFilter | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    keep_first: int | float = 0,
    keep_last: int | float = 0,
    backend: str = AUTO,
    seed: int | None = None,
    experts: bool = False,
    strict: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """Make the linear layers of ``model`` compute in NVFP4, in place; returns the same object.

    recipe: a name (bf16, rtn, nvidia, four_over_six, tetrajet2, quartet2, search_eden, rl), a
    ``Recipe`` (such as ``W4A16``, weights only), or a mapping from globs to these, of which the
    first that matches a layer counts. filter_fn(module, name): convert only where it returns True;
    called once per dotted name of every linear. include, exclude: globs, as in the mapping over
    whole dotted name parts: "layers.1" matches "model.layers.1.mlp.up", never "layers.10".
    ``include`` also overrules the default of keeping the output embedding. keep_first, keep_last:
    numbered blocks left alone at either end of each outermost stack, a count or, if a float below
    1, a share rounded up. backend: "auto" or a name. seed: of all noise, in [0, 2^64); by default
    the one given to ``torch.manual_seed``. experts: convert stacked experts too, as transformers 5
    keeps them in Mixtral, Qwen3-MoE, GPT-OSS and others (see ``experts.py``); they go by the name
    of the module that holds them, and ``filter_fn`` is not asked about them. strict: raise
    ValueError where there would be a warning. verbose: print a one-line summary, and one line more
    if linears that are left are slow here.

    Kept as they are, with the reason in ``nvfp4.report``: the output embedding, layers tied to an
    embedding, subclasses of nn.Linear, parametrised layers, LoRA adapters, weights that are tensor
    subclasses (but for DTensor), other dtypes, replaced forwards, and the layers that
    ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` use without calling. Converting
    twice changes nothing, except that deep copies of converted layers, made to be further layers of
    ``model``, get noise of their own. Raises ValueError for unknown names, ``BackendUnavailable``
    with the reason for a backend that cannot run here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

    # decide about everything before any layer is changed
    selection = Selection.of(recipe, filter_fn, include, exclude, keep_first, keep_last, experts)
    check_backend(backend, _device(model))
    seed = torch.initial_seed() % 2**64 if seed is None else check_seed(seed)
    plan = selection.plan(model)
    plan.complain(strict)

    # indices go on where layers that are converted already end
    separated = _separate_noise(model)
    _carry_out(plan, seed, _next_index(model), backend)

    if verbose:
        names = ", ".join(dict.fromkeys(named.name for _, named in selection.recipes))
        copies = (
            f"; copied layers given noise of their own: {', '.join(separated)}" if separated else ""
        )
        print(f"nvfp4: recipe {names}, {plan.summary()}{copies}")
        slow = slow_linears(model)
        if slow is not None:
            print(f"nvfp4: {slow}")
    return model


def _carry_out(plan: ConversionPlan, seed: int, index: int, backend: str) -> None:
    """Change the modules of a plan; ``index``: of the first one's noise."""
    # linears: the class and one attribute, or the reason to keep them
    for decision in plan.decisions:
        module = decision.module
        if decision.recipe is not None:
            if isinstance(module, DenseLinear):
                restore(module)
            reclass(module, Linear)
            state = LinearState(decision.recipe, Noise(seed, index), backend)
            if module.weight.device.type != "meta":
                state.delayed_amax(module.weight.device)
            module.nvfp4 = state  # type: ignore[assignment]
            vars(module).pop("nvfp4_kept", None)
            index += 1
        elif decision.reason != ALREADY:
            module.nvfp4_kept = decision.reason  # type: ignore[assignment]

    # stacks of experts: a state per stack, by the name of its parameter
    for of_experts in plan.experts:
        if of_experts.recipe is not None:
            stacks = {}
            transposed = bool(getattr(of_experts.module, "is_transposed", False))
            for name in STACKS:
                noise = Noise(seed, index)
                stacks[name] = ExpertsState(
                    of_experts.recipe, noise, backend, transposed=transposed
                )
                index += 1
            of_experts.module.nvfp4 = stacks  # type: ignore[assignment]
            reclass(of_experts.module, Experts)


def revert(model: nn.Module) -> nn.Module:
    """Turn converted layers back into plain ``nn.Linear``s, experts into what they were.

    In place; returns ``model``; undoes ``fuse`` as well. RuntimeError for a layer that
    ``fully_shard`` was called on itself, which has changed its class since.
    """
    # all is checked before anything is changed
    converted = [module for module in model.modules() if isinstance(module, Linear | Experts)]
    changed = next((type(module) for module in converted if not can_restore(module)), None)
    if changed is not None:
        raise RuntimeError(
            f"a converted layer has become a {changed.__name__}: revert before fully_shard, or "
            "shard the blocks that hold the layers; nvfp4.disabled(model) computes in high "
            "precision either way"
        )

    # so does this: it raises before it changes anything
    unfuse(model)
    for module in model.modules():
        vars(module).pop("nvfp4_kept", None)
    for module in converted:
        del module.nvfp4
        restore(module)
    return model


def _separate_noise(model: nn.Module) -> Sequence[str]:
    """Give copies of converted layers within one model noise of their own; returns their names.

    Only copies share seed and index. Two layers of one model with the same noise make errors that
    add up instead of averaging out. A copy that stands alone, as a moving average or a reference
    does, is not met here and keeps its noise.
    """
    seen: set[tuple[int, int]] = set()
    renamed = []
    for name, handle in quantized_weights(model).items():
        noise = handle.state.noise
        if (noise.seed, noise.layer) in seen:
            # a state of its own, since a shallow copy of a layer shares the other's
            index = _next_index(model)
            noise = copy.deepcopy(noise)
            noise.layer = index
            cache, amax = copy.copy(handle.state.cache), copy.deepcopy(handle.state.amax)
            handle.put(replace(handle.state, noise=noise, cache=cache, amax=amax))
            renamed.append(name)
        seen.add((noise.seed, noise.layer))
    return renamed


def _next_index(model: nn.Module) -> int:
    """The index that no layer of the model has yet, in conversion order."""
    return 1 + max((state.noise.layer for state in states(model).values()), default=-1)


def _device(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter lives; None (not known yet) for meta or no parameters."""
    parameter = next(model.parameters(), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device
