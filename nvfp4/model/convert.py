"""convert: turn the linear layers of a model into NVFP4 ones, in place, by policy; and back.

A layer keeps its identity: only its class and one attribute change. So parameters, optimisers made before, hooks,
aliases and ties stay as they were, and no weight is copied.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import TracebackType

import torch
from torch import nn

from nvfp4.backends.registry import AUTO, check_backend
from nvfp4.layer.dense import slow_linears
from nvfp4.layer.experts import STACKS, Experts, convert_experts, revert_experts
from nvfp4.layer.linear import Linear, LinearState
from nvfp4.layer.noise import Noise
from nvfp4.layer.shared_amax import SharedAmax
from nvfp4.model.fuse import fuse, unfused
from nvfp4.model.selection import ALREADY, ModuleFilter, Patterns, Plan, Recipes, make_policy
from nvfp4.model.weights import layers, states, stored_weights
from nvfp4.numerics.rng import check_seed
from nvfp4.recipes import Recipe

PRECISIONS = ("nvfp4", "bf16")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers that inference engines fuse into one matrix, by the names that Llama and its relatives give them."""


class ConvertWarning(UserWarning):
    """A conversion that did less than its arguments suggest: a name that matches nothing, or no layer converted."""


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
    """Make the linear layers of ``model`` compute in NVFP4; changes it in place and returns the same object.

    recipe: a name (bf16, rtn, nvidia, four_over_six, tetrajet2, quartet2, search_eden, rl), a ``Recipe`` (such as
    ``W4A16``, weights only), or a mapping
    from globs to these, of which the first that matches a layer counts. filter_fn(module, name): convert only where it
    returns True; called once per dotted name of every linear. include, exclude: globs, as in the mapping over whole
    dotted name parts: "layers.1" matches "model.layers.1.mlp.up", never "layers.10". ``include`` also overrules the
    default of keeping the output embedding. keep_first, keep_last: numbered blocks left alone at either end of each
    outermost stack, a count or, if a float below 1, a share rounded up. backend: "auto" or a name. seed: of all noise,
    in [0, 2^64); by default the one given to ``torch.manual_seed``. experts: convert stacked experts too, as
    transformers 5 keeps those of Mixtral, Qwen3-MoE and others (see ``experts.py``); names are those of the modules
    that hold them, and ``filter_fn`` is not asked about them. strict: raise ValueError where there would be a
    warning. verbose: print a one-line summary, and one line more if linears that are left are slow here.

    Kept as they are, with the reason in ``nvfp4.report``: the output embedding, layers tied to an embedding, subclasses
    of nn.Linear, parametrised layers, LoRA adapters, weights that are tensor subclasses (but for DTensor), other
    dtypes, replaced forwards, and the layers that ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` use
    without calling. Converting twice changes nothing, except that deep copies of converted layers, made to be further
    layers of ``model``, get noise of their own.
    Raises ValueError for unknown names, ``BackendUnavailable`` with the reason for a backend that cannot run here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    policy = make_policy(recipe, filter_fn, include, exclude, keep_first, keep_last, experts)
    check_backend(backend, _device(model))
    seed = torch.initial_seed() % 2**64 if seed is None else check_seed(seed)
    plan = policy.plan(model)  # all is decided before any layer is changed
    complain(plan, strict)
    separated = _separate_noise(model)
    _carry_out(plan, seed, _next_index(model), backend)
    if verbose:
        names = ", ".join(dict.fromkeys(chosen.name for _, chosen in policy.recipes))
        copies = f"; copied layers given noise of their own: {', '.join(separated)}" if separated else ""
        print(f"nvfp4: recipe {names}, {plan.summary()}{copies}")
        slow = slow_linears(model)
        if slow is not None:
            print(f"nvfp4: {slow}")
    return model


def _carry_out(plan: Plan, seed: int, index: int, backend: str) -> None:
    """Change the modules of a plan; ``index``: of the first one's noise."""
    for decision in plan.decisions:
        module = decision.module
        if decision.recipe is not None:
            module.__class__ = Linear
            module.nvfp4 = LinearState(decision.recipe, Noise(seed, index), backend)  # type: ignore[assignment]
            vars(module).pop("nvfp4_kept", None)
            index += 1
        elif decision.reason != ALREADY:
            module.nvfp4_kept = decision.reason  # type: ignore[assignment]
    for found in plan.experts:
        if found.recipe is not None:
            convert_experts(found.module, found.recipe, seed, index, backend)
            index += len(STACKS)


def revert(model: nn.Module) -> nn.Module:
    """Turn converted layers back into plain ``nn.Linear``s with the same parameters, experts into what they were.

    In place; returns ``model``; undoes ``fuse`` as well. RuntimeError for a layer that ``fully_shard`` was called on
    itself, which has changed its class since.
    """
    changed = next((type(m) for m in model.modules() if isinstance(m, Linear) and type(m) is not Linear), None)
    if changed is not None:
        raise RuntimeError(
            f"a converted layer has become a {changed.__name__}: revert before fully_shard, or shard the blocks that "
            f"hold the layers; nvfp4.disabled(model) computes in high precision either way"
        )
    fuse(model, False)
    for module in model.modules():
        vars(module).pop("nvfp4_kept", None)
        if isinstance(module, Linear):
            del module.nvfp4
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif isinstance(module, Experts):
            revert_experts(module)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the converted layers of ``model`` compute as plain ``nn.Linear``s, e.g. to evaluate.

    What ``fuse`` changed computes as before, too: to the bit the model that it was, with derivatives of every order.
    """
    before = [(state, state.enabled) for state in states(model).values()]
    for state, _ in before:
        state.enabled = False
    try:
        with unfused(model):
            yield model
    finally:
        for state, enabled in before:
            state.enabled = enabled


class _Switched(AbstractContextManager[nn.Module]):
    """What ``forward_precision`` changed; leaving it as a context puts that back."""

    def __init__(self, model: nn.Module, before: list[tuple[LinearState, Recipe, Recipe | None]]) -> None:
        self._model, self._before = model, before

    def __enter__(self) -> nn.Module:
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for state, recipe, full_recipe in self._before:
            state.recipe, state.full_recipe = recipe, full_recipe


def forward_precision(model: nn.Module, precision: str) -> AbstractContextManager[nn.Module]:
    """Switch the forward GEMM of every converted layer to high precision ("bf16") or back ("nvfp4"), from now on.

    For the end of a training: most of the gap to BF16 comes from the forward pass; in arXiv 2509.25149 a BF16 forward
    with an NVFP4 backward over the last part brought it from 1.5 % to 0.5 %. "bf16" stands for the dtype that
    ``F.linear`` would use; the backward quantises x and w themselves, with the recipe's quantisers and noise, where it
    used the codes of the forward. A recipe whose backward is not quantised (rl) then computes as a plain layer.

    As a plain call it lasts; ``with forward_precision(...):`` ends it. It travels with copies and pickles of the model
    and shows in its ``repr`` and ``report``, but is no part of ``noise_state``: after resuming, call it again.
    ``revert`` drops it. Raises ValueError for another precision; warns if the model has no converted layer.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    found = list(states(model).values())
    if not found:
        warnings.warn("forward_precision: the model has no converted layer", ConvertWarning, stacklevel=2)
    before = [(state, state.recipe, state.full_recipe) for state in found]
    for state, recipe, full_recipe in before:
        if precision == "bf16" and full_recipe is None:
            state.recipe, state.full_recipe = recipe.with_dense_forward(), recipe
        elif precision == "nvfp4" and full_recipe is not None:
            state.recipe, state.full_recipe = full_recipe, None
    return _Switched(model, before)


def share_amax(model: nn.Module, groups: Sequence[Sequence[str]] = FUSED) -> list[tuple[str, ...]]:
    """Scale the weights of layers that servers fuse, such as q, k and v, by the largest magnitude of all of them.

    Their global scales are then equal, as inference engines want them of a fused matrix, so that what is exported is
    what was trained (with 16x16 blocks, where rows come in multiples of 16). groups: last name parts of layers that one
    module holds side by side; () ends the sharing. Returns the groups found, by dotted name; layers that are not
    converted join none. A copy of one of them alone takes the others along.
    Raises ValueError, and changes nothing, if a recipe's weight has no single scale that follows from its amax, if
    recipes or dtypes differ within a group, or if groups overlap.
    """
    if any(isinstance(group, str) for group in groups):
        raise TypeError(f"groups must be a sequence of sequences of names, got {groups!r}")
    found: dict[tuple[str, ...], list[Linear]] = {}
    for prefix, module in model.named_modules():
        for group in groups:
            members = {name: getattr(module, name, None) for name in group}
            linears = {name: m for name, m in members.items() if isinstance(m, Linear)}
            if len(linears) > 1:
                names = tuple(f"{prefix}.{name}" if prefix else name for name in linears)
                found[names] = list(linears.values())
    _check_shared(found)
    for layer in layers(model).values():
        layer.nvfp4.shared = None
    for group_layers in found.values():
        shared = SharedAmax(group_layers)
        for layer in group_layers:
            layer.nvfp4.shared = shared
    return list(found)


def _check_shared(groups: dict[tuple[str, ...], list[Linear]]) -> None:
    """All is checked before anything is changed."""
    seen: dict[int, tuple[str, ...]] = {}
    for names, members in groups.items():
        _check_group(names, members)
        for layer in members:
            if id(layer) in seen:
                raise ValueError(f"groups overlap: {', '.join(seen[id(layer)])} and {', '.join(names)} share a layer")
            seen[id(layer)] = names


def _check_group(names: tuple[str, ...], members: list[Linear]) -> None:
    states = [layer.nvfp4 for layer in members]
    specs = [(state.full_recipe or state.recipe).fprop.right for state in states]
    if len({layer.weight.dtype for layer in members}) > 1:
        raise ValueError(f"{', '.join(names)} have weights of different dtypes, so no scale can serve them all")
    options = specs[0].noiseless if specs[0].quantized else None
    if any(spec != specs[0] for spec in specs):
        raise ValueError(f"{', '.join(names)} have different recipes for their weights, so no scale can serve them all")
    if options is None or options.rotation is not None or options.row_scaled:
        raise ValueError(f"{', '.join(names)}: weights under {specs[0]} have no single scale that follows from amax")


def complain(plan: Plan, strict: bool, stacklevel: int = 3) -> None:
    """Warn of what is wrong with a plan, or raise ValueError; of what no argument can change, only warn."""
    for message in plan.complaints:
        if strict:
            raise ValueError(message)
        warnings.warn(message, ConvertWarning, stacklevel=stacklevel)
    experts = next((kind for kind in plan.not_linear if "expert" in kind), None)
    if experts is not None:
        why = ", ".join(sorted({decision.reason for decision in plan.experts if decision.reason is not None}))
        hint = f" ({why})" if plan.experts else "; experts=True converts those it knows"
        message = f"{experts}: fused experts are no linear layers and stay in high precision{hint}"
        warnings.warn(message, ConvertWarning, stacklevel=stacklevel)


def _separate_noise(model: nn.Module) -> Sequence[str]:
    """Give converted layers that share seed and index, which only copies do, an index of their own; returns names.

    Two layers of one model with the same noise make errors that add up instead of averaging out. A copy that stands
    alone, as a moving average or a reference does, is not met here and keeps its noise.
    """
    seen: set[tuple[int, int]] = set()
    renamed = []
    for name, stored in stored_weights(model).items():
        noise = stored.state.noise
        if (noise.seed, noise.layer) in seen:
            index = _next_index(model)
            # a shallow copy of a layer shares its state; what the state refers to stays what it is
            noise = copy.deepcopy(noise)
            noise.layer = index
            stored.put(replace(stored.state, noise=noise, weight_codes=None))
            renamed.append(name)
        seen.add((noise.seed, noise.layer))
    return renamed


def _next_index(model: nn.Module) -> int:
    return 1 + max((state.noise.layer for state in states(model).values()), default=-1)


def _device(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter lives; None (not known yet) for meta or no parameters."""
    parameter = next(model.parameters(), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device
