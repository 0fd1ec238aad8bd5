"""What a model's layers hold of earlier calls where a recipe delays amaxes: read, and put back.

``layer/delayed_amax.py`` says what that is. A checkpoint keeps it beside the noise state, as plain
numbers by layer; it is no part of the ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nvfp4.layer.delayed_amax import DelayedAmax
from nvfp4.model.fits import check_layers


def amaxes(model: nn.Module) -> dict[str, DelayedAmax]:
    """Those of each layer that has some, by name."""
    held = {}
    for name, module in model.named_modules():
        # experts, of which each would have one, have none
        state = vars(module).get("nvfp4")
        amax = getattr(state, "amax", None)
        if isinstance(amax, DelayedAmax) and state.recipe.delays_amax:
            held[name] = amax
    return held


def amax_state(model: nn.Module) -> dict[str, dict[str, list[float]]]:
    """What each layer holds of earlier calls, by name; empty unless a recipe has ``delayed_amax``.

    Plain numbers, exact in JSON: held, seen, exceeded and known (0 or 1) of the left and the right
    operand of fprop, dgrad and wgrad. exceeded: in how many calls the operand grew beyond the
    head-room and clipped. Waits for the device. A run resumes by it, ``noise_state`` and
    ``state_dict``.
    """
    return {name: amax.numbers() for name, amax in amaxes(model).items()}


def load_amax_state(model: nn.Module, state: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Restore ``amax_state``.

    Raises ValueError, and changes nothing, naming layers that are missing or unexpected.
    """
    here = amaxes(model)
    check_layers("amax", here, state)
    for name, amax in here.items():
        amax.load(state[name])
