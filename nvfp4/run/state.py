"""What a run must remember to go on to the last bit, taken from its live objects and put back.

    model       parameters and persistent buffers, each once even if two names reach it
    optimizer   AdamW's moments and step counts, as ``exp_avg.<parameter>`` and so on
    random      torch's generators, as ``cpu.<rank>`` and ``cuda.<rank>``
    noise       per converted layer, the number of backward passes it has finished: its next noise
                is a function of the layer's seed and of this number
    amax        where amaxes are delayed, what each converted layer holds of its last call: a list
                with an entry per process, since each scales by what it saw itself

The first three are groups of tensors. The others are plain and stand in state.json, beside what the
trainer says of itself. Moments are kept by the parameter's name and not by its place in the
optimiser, so a checkpoint does not depend on the order of ``named_parameters``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nvfp4.model.amax import amax_state, load_amax_state
from nvfp4.model.noise import load_noise_state, noise_state
from nvfp4.run.checkpoint import Snapshot
from nvfp4.run.errors import TrainError
from nvfp4.run.processes import Processes, gather_objects

Tensors = dict[str, torch.Tensor]


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Processes,
    state: dict[str, Any],
) -> Snapshot:
    """A snapshot of model, optimiser, random states of all processes and the layers' call counters.

    state: plain values to store beside them. A collective call: every process must make it, and the
    snapshot of the main process is the one to save. The others return no weights and no moments,
    since a copy per process would take the memory of as many models on one machine.
    """
    everybody = gather_objects(accelerator, [_random()])
    random = {
        f"{device}.{rank}": value
        for rank, states in enumerate(everybody)
        for device, value in states.items()
    }

    # Weights and moments are the same in every process, so the main one's suffice.
    state = {**state, "noise": noise_state(model)}
    amaxes = amax_state(model)
    if amaxes:
        state["amax"] = gather_objects(accelerator, [amaxes])
    if not accelerator.is_main_process:
        return Snapshot(state, {})
    moments = {
        f"{key}.{name}": value.cpu()
        for name, parameter in _trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    weights = {name: tensor.detach().cpu() for name, tensor in _weights(model).items()}
    return Snapshot(state, {"model": weights, "optimizer": moments, "random": random})


def restore(
    snapshot: Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Processes
) -> None:
    """Put a snapshot back; ``TrainError`` naming the tensors if it is of another model."""
    _restore_weights(snapshot, model, optimizer)

    # A warm start of an earlier version saved neither noise nor random states; it used none.
    load_noise_state(model, snapshot.state.get("noise", {}))
    # a process that the saved run did not have begins with what the first one held
    amaxes = snapshot.state.get("amax", [{}])
    place = accelerator.process_index
    load_amax_state(model, amaxes[place if place < len(amaxes) else 0])
    own = {
        k.partition(".")[0]: v
        for k, v in snapshot.tensors.get("random", {}).items()
        if k.endswith(f".{accelerator.process_index}")
    }
    if "cpu" in own:  # a process that the saved run did not have keeps its own random state
        torch.set_rng_state(own["cpu"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])


def _restore_weights(
    snapshot: Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put weights and moments back."""
    _check_same(_weights(model), snapshot.tensors["model"])
    with torch.no_grad():
        for name, tensor in _weights(model).items():
            tensor.copy_(snapshot.tensors["model"][name])

    # Back from "kind.name" to the optimiser's own form: numbered states in the order of its groups.
    moments: dict[str, Tensors] = {}
    for key, value in snapshot.tensors["optimizer"].items():
        kind, _, name = key.partition(".")
        # not the mapped file, which is deleted one day
        moments.setdefault(name, {})[kind] = value.clone()
    names = {parameter: name for name, parameter in _trainable(model).items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    states = {i: moments[name] for i, name in enumerate(order) if name in moments}
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _random() -> Tensors:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def _weights(model: nn.Module) -> Tensors:
    """Parameters and persistent buffers, each once even if two names reach it (tied embeddings)."""
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if name in saved}


def _check_same(model: Tensors, saved: Tensors) -> None:
    wrong = [f"{name}: in the checkpoint only" for name in saved.keys() - model.keys()]
    wrong += [f"{name}: missing from the checkpoint" for name in model.keys() - saved.keys()]
    wrong += [
        f"{name}: {list(saved[name].shape)} {saved[name].dtype} in the checkpoint, "
        f"{list(tensor.shape)} {tensor.dtype} in the model"
        for name, tensor in model.items()
        if name in saved and (saved[name].shape, saved[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise TrainError(
            f"the checkpoint is of another model: {'; '.join(sorted(wrong)[:5])}{more}"
        )
