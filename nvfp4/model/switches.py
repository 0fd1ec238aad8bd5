"""Switches of a model: what it computes changes, what it holds does not.

    with disabled(model): ...           every layer as the ``nn.Linear`` it was, norms and MLPs
                                        unfused
    forward_precision(model, "bf16")    forward GEMMs in high precision, backward still in NVFP4;
                                        "nvfp4" switches back
    share_amax(model)                   one scale for q, k and v, one for gate and up, as servers
                                        that fuse them want
    capturable(model)                   noise on the device, before a CUDA graph is captured

Each sets a field of the layers' ``LinearState`` and touches no parameter, so optimisers, hooks and
``state_dict`` notice nothing. (``dense_linears``, for what is not converted, is in ``plain.py``.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from torch import nn

from nvfp4.layer.linear import Linear, layers
from nvfp4.layer.state import LinearState
from nvfp4.layer.weight_cache import AmaxGroup
from nvfp4.model.reclass import without_fusion
from nvfp4.model.selection import ConvertWarning
from nvfp4.model.weights import states
from nvfp4.recipes import Recipe

PRECISIONS = ("nvfp4", "bf16")

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers of one input, which inference engines make one matrix of, as Llama and its relatives name
them."""


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the converted layers of ``model`` compute as plain ``nn.Linear``s.

    What ``fuse`` changed computes as before, too: to the bit the model that it was, with
    derivatives of every order. For evaluation in high precision, for example.
    """
    before = [(state, state.enabled) for state in states(model).values()]
    for state, _ in before:
        state.enabled = False
    try:
        with without_fusion(model):
            yield model
    finally:
        for state, enabled in before:
            state.enabled = enabled


class _Switched(AbstractContextManager[nn.Module]):
    """What ``forward_precision`` changed; leaving it as a context puts that back."""

    def __init__(
        self, model: nn.Module, before: list[tuple[LinearState, Recipe, Recipe | None]]
    ) -> None:
        self._model = model
        self._before = before

    def __enter__(self) -> nn.Module:
        return self._model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for state, recipe, full_recipe in self._before:
            state.recipe = recipe
            state.full_recipe = full_recipe


def forward_precision(model: nn.Module, precision: str) -> AbstractContextManager[nn.Module]:
    """Switch every forward GEMM to high precision ("bf16") or back ("nvfp4"), from now on.

    For the end of a training: most of the gap to BF16 comes from the forward pass. In arXiv
    2509.25149 a BF16 forward with an NVFP4 backward over the last part brought it from 1.5 % to
    0.5 %. "bf16" stands for the dtype that ``F.linear`` would use; the backward quantises x and w
    themselves, with the recipe's quantisers and noise, where it used the codes of the forward. A
    recipe whose backward is not quantised (rl) then computes as a plain layer.

    As a plain call it lasts; ``with forward_precision(...):`` ends it. It travels with copies and
    pickles of the model and shows in its ``repr`` and ``report``, but is no part of
    ``noise_state``: after resuming, call it again. ``revert`` drops it. Raises ValueError for
    another precision; warns if the model has no converted layer.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    here = list(states(model).values())
    if not here:
        warnings.warn(
            "forward_precision: the model has no converted layer", ConvertWarning, stacklevel=2
        )

    # a layer that is switched already keeps the recipe that it came from
    before = [(state, state.recipe, state.full_recipe) for state in here]
    for state, recipe, full_recipe in before:
        if precision == "bf16" and full_recipe is None:
            state.recipe = recipe.with_dense_forward()
            state.full_recipe = recipe
        elif precision == "nvfp4" and full_recipe is not None:
            state.recipe = full_recipe
            state.full_recipe = None
    return _Switched(model, before)


def capturable(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Keep the noise of each converted layer on the device of its weight, or (False) on the host.

    Call it before a CUDA graph is captured, and before its warm-up: kernels then draw their seeds
    from the device's memory and the backward advances it there, so every replay makes new noise,
    the very noise that eager calls would make. Changes no result; costs one small kernel per
    forward or backward that has noise. Under ``torch.compile(mode="reduce-overhead")`` too. Copies
    stay capturable, unpickled models do not; call it again when the model has moved. Reading
    ``noise_state`` then waits for the device. Returns ``model``; RuntimeError for weights on the
    meta device.
    """
    # all is checked before anything is changed
    converted = layers(model)
    for name, layer in converted.items():
        if enabled and layer.weight.device.type == "meta":
            raise RuntimeError(
                f"{name or 'the layer'} has no memory yet: materialise the model before capturable"
            )

    for layer in converted.values():
        noise = layer.nvfp4.noise
        noise.place(noise.state, layer.weight.device if enabled else "cpu", enabled)
    return model


def share_amax(
    model: nn.Module, groups: Sequence[Sequence[str]] = SHARED_INPUT
) -> list[tuple[str, ...]]:
    """Scale weights that servers fuse, such as q, k and v, by the largest magnitude of all of them.

    Their global scales are then equal, as inference engines want them of a fused matrix, so that
    what is exported is what was trained (with 16x16 blocks, where rows come in multiples of 16).
    groups: last name parts of layers that one module holds side by side; () ends the sharing.
    Returns the groups found, by dotted name; layers that are not converted join none. A copy of one
    of them alone takes the others along. Raises ValueError, and changes nothing, if a recipe's
    weight has no single scale that follows from its amax, if recipes or dtypes differ within a
    group, or if groups overlap.
    """
    if any(isinstance(group, str) for group in groups):
        raise TypeError(f"groups must be a sequence of sequences of names, got {groups!r}")

    # converted layers side by side, by dotted name
    members: dict[tuple[str, ...], list[Linear]] = {}
    for prefix, module in model.named_modules():
        for group in groups:
            children = {name: getattr(module, name, None) for name in group}
            linears = {name: child for name, child in children.items() if isinstance(child, Linear)}
            if len(linears) > 1:
                names = tuple(f"{prefix}.{name}" if prefix else name for name in linears)
                members[names] = list(linears.values())
    _check_groups(members)

    # the groups of an earlier call end
    for layer in layers(model).values():
        layer.nvfp4.cache.group = None
    for linears_of_group in members.values():
        shared = AmaxGroup(linears_of_group)
        for layer in linears_of_group:
            layer.nvfp4.cache.group = shared
    return list(members)


def _check_groups(groups: dict[tuple[str, ...], list[Linear]]) -> None:
    """All is checked before anything is changed."""
    group_of: dict[int, tuple[str, ...]] = {}
    for names, members in groups.items():
        _check_group(names, members)
        for layer in members:
            if id(layer) in group_of:
                other = ", ".join(group_of[id(layer)])
                raise ValueError(f"groups overlap: {other} and {', '.join(names)} share a layer")
            group_of[id(layer)] = names


def _check_group(names: tuple[str, ...], members: list[Linear]) -> None:
    """ValueError if one scale cannot serve these layers."""
    # under ``forward_precision`` what counts is the recipe to come back to
    group = ", ".join(names)
    states_of_group = [layer.nvfp4 for layer in members]
    specs = [(state.full_recipe or state.recipe).fprop.right for state in states_of_group]
    if len({layer.weight.dtype for layer in members}) > 1:
        raise ValueError(
            f"{group} have weights of different dtypes, so no scale can serve them all"
        )
    if any(spec != specs[0] for spec in specs):
        raise ValueError(
            f"{group} have different recipes for their weights, so no scale can serve all"
        )
    if specs[0].options_given_amax is None:
        raise ValueError(
            f"{group}: weights under {specs[0]} have no single scale that follows from amax"
        )
