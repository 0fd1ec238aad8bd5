"""How far the noise of a model's layers has come: read, and put back where a run resumes.

The noise of a layer is a function of its seed, its index in conversion order, and the number of
backward passes that it has finished (``layer/noise.py``). The first two come back with ``convert``;
the third is what a checkpoint keeps beside ``state_dict``, as plain integers by layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nvfp4.layer.noise import Noise
from nvfp4.model.fits import check_layers


def noises(model: nn.Module) -> dict[str, Noise]:
    """The noise of each quantised weight, named and ordered as in ``quantized_weights``."""
    named: dict[str, Noise] = {}
    for name, module in model.named_modules():
        # one state, or of stacked experts one per parameter
        state = vars(module).get("nvfp4")
        states = state if isinstance(state, dict) else {"": state}
        for parameter, each in states.items():
            noise = getattr(each, "noise", None)
            if isinstance(noise, Noise):
                named[".".join(part for part in (name, parameter) if part)] = noise
    return dict(sorted(named.items(), key=lambda item: item[1].layer))


def noise_state(model: nn.Module) -> dict[str, int]:
    """Finished backward passes of each layer, by name; a run resumes by it and ``state_dict``."""
    return {name: noise.calls for name, noise in noises(model).items()}


def load_noise_state(model: nn.Module, calls: Mapping[str, int]) -> None:
    """Restore ``noise_state``.

    Raises ValueError, and changes nothing, naming layers that are missing or unexpected.
    """
    # a layer with another counter would meet other noise than the run that was saved
    here = noises(model)
    check_layers("noise", here, calls)
    for name, noise in here.items():
        noise.calls = int(calls[name])
