"""The quantised weights of a model: which there are, how long their codes are kept, where their noise stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from nvfp4.layer.linear import Linear, LinearState


def layers(model: nn.Module) -> dict[str, Linear]:
    """The converted layers of a model by dotted name, each once, in conversion order."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return dict(sorted(found.items(), key=lambda item: item[1].nvfp4.noise.layer))


class Stored(NamedTuple):
    """A weight that is quantised: its state, the module that holds it and the name of the parameter there."""

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


def stored_weights(model: nn.Module) -> dict[str, Stored]:
    """Every quantised weight of a model, each once, in conversion order, by the name of its layer; of stacked experts
    by the name of the parameter."""
    found = {}
    for name, module in model.named_modules():
        state = vars(module).get("nvfp4")
        if isinstance(state, LinearState):
            found[name] = Stored(state, module, "weight")
        elif isinstance(state, dict):
            of_stack = {p: s for p, s in state.items() if isinstance(s, LinearState)}
            found |= {f"{name}.{p}" if name else p: Stored(s, module, p) for p, s in of_stack.items()}
    return dict(sorted(found.items(), key=lambda item: item[1].state.noise.layer))


def states(model: nn.Module) -> dict[str, LinearState]:
    """The state of every quantised weight of a model, named and ordered as in ``stored_weights``."""
    return {name: stored.state for name, stored in stored_weights(model).items()}


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context each weight is quantised once: for generation, or the micro-batches of one optimizer step.

    No result changes. Ordinary in-place changes of a weight are noticed. A fused optimizer (``fused=True``), a write
    through ``.data`` or a custom kernel leaves no trace: end the context before it, or call ``invalidate`` after it.
    """
    fixed = [state for state in states(model).values() if not state.keeps_weight]
    for state in fixed:
        state.keeps_weight = True
    try:
        yield model
    finally:
        for state in fixed:
            state.keeps_weight, state.weight_codes = False, None
            if state.shared is not None:  # versions tell nothing of what happens to weights out there
                state.shared.forget()


def invalidate(model: nn.Module) -> None:
    """Forget every quantised weight; needed only inside ``fixed_weights``, after a write that leaves no trace."""
    for state in states(model).values():
        state.weight_codes = None
        if state.shared is not None:
            state.shared.forget()


def capturable(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Keep the noise of each converted layer of ``model`` on the device of its weight, or (False) on the host again.

    Call it before a CUDA graph is captured, and before its warm-up: kernels then draw their seeds from the device's
    memory and the backward advances it there, so every replay makes new noise, the very noise that eager calls would
    make. Changes no result; costs one small kernel a forward or backward that has noise. Under ``torch.compile(mode=
    "reduce-overhead")`` too. Copies stay capturable, unpickled models do not; call it again when the model has moved.
    Reading ``noise_state`` then waits for the device. Returns ``model``; RuntimeError for weights on the meta device.
    """
    found = layers(model)
    for name, layer in found.items():
        if enabled and layer.weight.device.type == "meta":
            raise RuntimeError(
                f"{name or 'the layer'} has no memory yet: materialise the model, then make it capturable"
            )
    for layer in found.values():
        noise = layer.nvfp4.noise
        noise.place(noise.words, layer.weight.device if enabled else "cpu", enabled)
    return model


def noise_state(model: nn.Module) -> dict[str, int]:
    """Backward passes finished by each converted layer, by name; with ``state_dict`` it resumes bit for bit."""
    return {name: state.noise.calls for name, state in states(model).items()}


def load_noise_state(model: nn.Module, calls: Mapping[str, int]) -> None:
    """Restore ``noise_state``; KeyError-free: raises ValueError naming layers that are missing or unexpected."""
    found = states(model)
    if found.keys() != calls.keys():
        raise ValueError(
            f"noise state does not fit the model: missing {sorted(found.keys() - calls.keys())}, "
            f"unexpected {sorted(calls.keys() - found.keys())}; convert the model with the same options first"
        )
    for name, state in found.items():
        state.noise.calls = int(calls[name])
