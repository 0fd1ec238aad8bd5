"""The quantised weights of a model: which there are, and how long codes are kept.

A forward quantises a weight whenever it has changed (``layer/weight_cache.py``). Two functions say
that it has not, and no result changes:

    with fixed_weights(model): ...    for generation, or the micro-batches of one optimiser step
    after_step(optimizer, model)      for training: a step of the optimiser quantises what it
                                      changed, and no forward does

``invalidate`` says that it has, after a write that leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from nvfp4.layer.state import LinearState
from nvfp4.layer.weight_cache import Mode


class WeightHandle(NamedTuple):
    """A quantised weight: its state, the module that holds it, the parameter's name there."""

    state: LinearState
    owner: nn.Module
    parameter: str

    @property
    def weight(self) -> torch.Tensor:
        """The parameter as it is now."""
        return getattr(self.owner, self.parameter)

    def put(self, state: LinearState) -> None:
        """Give the weight another state."""
        if isinstance(self.owner.nvfp4, dict):
            self.owner.nvfp4 = {**self.owner.nvfp4, self.parameter: state}  # type: ignore[assignment]
        else:
            self.owner.nvfp4 = state  # type: ignore[assignment]


def quantized_weights(model: nn.Module) -> dict[str, WeightHandle]:
    """Every quantised weight of a model, each once, in conversion order.

    By the name of its layer; of stacked experts by the name of the parameter.
    """
    # ``nvfp4`` is a state, or for stacked experts one per parameter
    handles = {}
    for name, module in model.named_modules():
        state = vars(module).get("nvfp4")
        if isinstance(state, LinearState):
            handles[name] = WeightHandle(state, module, "weight")
        elif isinstance(state, dict):
            stacks = {parameter: s for parameter, s in state.items() if isinstance(s, LinearState)}
            for parameter, of_stack in stacks.items():
                handles[f"{name}.{parameter}" if name else parameter] = WeightHandle(
                    of_stack, module, parameter
                )
    return dict(sorted(handles.items(), key=lambda item: item[1].state.noise.layer))


def states(model: nn.Module) -> dict[str, LinearState]:
    """The state of every quantised weight, named and ordered as in ``quantized_weights``."""
    return {name: handle.state for name, handle in quantized_weights(model).items()}


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context each weight is quantised once.

    For generation, or the micro-batches of one optimizer step. No result changes. Ordinary in-place
    changes of a weight are noticed. A fused optimizer (``fused=True``), a write through ``.data``
    or a custom kernel leaves no trace: end the context before it, or call ``invalidate`` after it.
    """
    caches = [state.cache for state in states(model).values() if state.cache.mode is Mode.BYTES]
    for cache in caches:
        cache.mode = Mode.FIXED
    try:
        yield model
    finally:
        for cache in caches:
            cache.leave()


def invalidate(model: nn.Module) -> None:
    """Forget every quantised weight.

    Needed only inside ``fixed_weights``, after a write that leaves no trace.
    """
    for state in states(model).values():
        state.cache.forget()


def after_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> AfterStep:
    """Quantise converted weights now and after every ``optimizer.step()``, not in forwards.

    No result changes, whatever the recipe. It saves what forwards would spend: the quantisation
    where codes cannot be kept otherwise (on a GPU each forward quantises), on the CPU the look at
    every byte; with accumulation, of each micro-batch. On one CPU thread, two 2048^2 layers of
    search_eden and 64 tokens, a forward took 7.2 ms instead of 19.6 and a step 18.6 instead of 6.5:
    work is moved, and some is saved from two micro-batches on. The price is the codes between
    steps, 4.5 bits per weight. A skipped step (``GradScaler``) costs nothing.

    Changes of a weight in between are noticed if torch counts them, as in ``fixed_weights``: by
    ``load_state_dict`` and other in-place operations, or by giving it other memory. Writes through
    ``.data``, by a custom kernel or by the step of another fused optimizer are not: call ``renew``
    of what is returned, or ``nvfp4.invalidate``, or hand each optimizer in. Layers converted later
    need a call of their own. Operands with noise, torch.distributed and compiled graphs quantise in
    the forward as ever. ``remove()``, or leaving ``with after_step(...):``, ends it. Raises
    TypeError for an optimizer without step hooks, such as accelerate's wrapper: give the one
    inside.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(
        optimizer, "_optimizer_step_post_hooks"
    ):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer with step hooks, got {kind}")
    return AfterStep(optimizer, model)


class AfterStep:
    """What ``after_step`` set up; ``remove``, or leaving it as a context, ends it."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        # within ``fixed_weights``, or handed in by another optimizer, a cache has a mode already
        self._weights = list(quantized_weights(model).values())
        self._caches = [
            handle.state.cache for handle in self._weights if handle.state.cache.mode is Mode.BYTES
        ]
        for cache in self._caches:
            cache.mode = Mode.AFTER_STEP

        self._hook = optimizer.register_step_post_hook(self._stepped)
        self.renew()

    def renew(self) -> None:
        """Quantise every weight now, after a write that leaves no trace (such as ``.data``)."""
        _quantize_now(self._weights)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # read now: groups may be added
        changed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        _quantize_now([handle for handle in self._weights if id(handle.weight) in changed])

    def remove(self) -> None:
        """Forward passes quantise their weights again; what was kept is forgotten."""
        self._hook.remove()
        for cache in self._caches:
            cache.leave()
        self._caches = []

    def __enter__(self) -> AfterStep:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def _quantize_now(weights: list[WeightHandle]) -> None:
    """Quantise these weights as the next forward would.

    All magnitudes that layers share are forgotten first: a fused step leaves no trace on them.
    """
    for handle in weights:
        if handle.state.cache.group is not None:
            handle.state.cache.group.forget()

    # a weight on the meta device has no values yet
    for handle in weights:
        if not handle.weight.is_meta:
            handle.state.renew_codes(handle.weight)
