"""One process or several, and what surrounds a run in each.

    accelerator_for   join the processes that torchrun started, or be the only one
    deterministic     kernels that repeat themselves
    process_group     leave the group before Python ends
    signal_of_any     one answer for all: a signal that any process got stops all of them
    stop_together     one end for all: what one process refuses, none waits for
    machine           what the last bits of a sum depend on, for a note on resume

``torchrun`` starts processes and says so in the environment; ``Accelerator`` joins them. Every
trainer begins here, so that none can start two runs where one was meant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

from nvfp4.run.errors import TrainError


class Alone:
    """One process on the CPU that trains by itself: the few methods of ``Accelerator`` it needs.

    The warm start of reinforcement learning runs so; other processes, if there are any, wait for
    it.
    """

    device = torch.device("cpu")
    num_processes, process_index, is_main_process = 1, 0, True

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """What all have: the tensor."""
        return tensor


Processes: TypeAlias = Accelerator | Alone


def accelerator_for(device: str) -> Accelerator:
    """The accelerator of this process; device: auto, cpu, cuda or mps.

    auto is the first accelerator, else the CPU; under a launcher of several processes it is cuda,
    else the CPU, since MPS cannot join them. ``TrainError`` if the device is not here, or if the
    processes that were started do not find each other: each would train alone, in one folder.
    """
    # MPS cannot join processes, so auto must not choose it under a launcher.
    launched = _launched_processes()
    on_cpu = device == "cpu" or (
        device == "auto" and launched > 1 and not torch.cuda.is_available()
    )
    accelerator = Accelerator(cpu=on_cpu)
    kind = accelerator.device.type
    if device not in ("auto", kind):
        raise TrainError(
            f"device: {device} was asked for, but only {kind} is here; give --device auto or {kind}"
        )
    # Fewer is an error. More is none: the accelerator also joins what mpirun has started.
    if accelerator.num_processes < launched:
        raise TrainError(
            f"device: {launched} processes were started, but on {kind} they do not find each "
            "other; start one, "
            f"or give --device cpu"
        )
    return accelerator


def signal_of_any(accelerator: Processes, received: int) -> int:
    """The largest of all processes' numbers: a signal that any got stops all at the same step."""
    if accelerator.num_processes == 1:
        return received
    return int(accelerator.gather(torch.tensor([received], device=accelerator.device)).max())


def gather_objects(accelerator: Processes, mine: list[Any]) -> list[Any]:
    """The objects of all processes, in the order of processes."""
    if accelerator.num_processes == 1:
        return mine
    return gather_object(mine)


@contextmanager
def stop_together(accelerator: Processes) -> Iterator[None]:
    """A ``TrainError`` within, in any process, is raised in all of them.

    For what one process may refuse and the others not. Without it they would go on to the next
    exchange and wait there for the one that has ended. All processes must enter, and whatever they
    exchange within, all must reach.
    """
    own: TrainError | None = None
    try:
        yield
    except TrainError as error:
        own = error
    every = gather_objects(accelerator, [None if own is None else str(own)])
    if own is not None:
        raise own
    first = next((reason for reason in every if reason is not None), None)
    if first is not None:
        raise TrainError(first)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic kernels within; a kernel that has no such form warns.

    The settings before come back afterwards.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if wanted:
        # what cuBLAS needs to repeat itself
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, we never read it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


@contextmanager
def process_group() -> Iterator[None]:
    """Leave a process group that the run made itself, once all processes are done.

    Its threads must end before Python does: they aborted the exit of a finished run.
    """
    ours = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    yield
    if ours and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # else a later run in this process finds a dead group
        AcceleratorState._reset_state(reset_partial_state=True)


def machine(accelerator: Processes) -> dict[str, Any]:
    """What the last bits of a sum may depend on."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def other_machine(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """A note for the user if these differ, or nothing."""
    comparable = {key: value for key, value in present.items() if key in saved}
    changed = [
        f"{key} {saved[key]}, now {value}"
        for key, value in comparable.items()
        if saved[key] != value
    ]
    if not changed:
        return []
    return [
        f"note: the checkpoint was written with {'; '.join(changed)}: the losses go on, but not "
        "to the last bit"
    ]


def _launched_processes() -> int:
    """Processes that a launcher (torchrun, accelerate) says it has started, 1 without one."""
    if "LOCAL_RANK" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE", "1"))
