"""One process or several: the accelerator of a run, what all agree on, and where float64 can live.

``torchrun`` starts processes and says so in the environment; ``Accelerator`` joins them. Both trainers
begin here, so that neither can start two runs where one was meant.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from nvfp4.run.errors import TrainError

if TYPE_CHECKING:  # seconds, and the objectives, which the command line names, take float64_device from here
    from accelerate import Accelerator


def accelerator_for(device: str) -> Accelerator:
    """The accelerator of this process; device: auto, cpu, cuda or mps.

    auto is the first accelerator, else the CPU; under a launcher of several processes it is cuda, else
    the CPU, since MPS cannot join them. ``TrainError`` if the device is not here, or if the processes
    that were started do not find each other: each would train alone, in one folder.
    """
    from accelerate import Accelerator

    wanted = _launched()
    on_cpu = device == "cpu" or (device == "auto" and wanted > 1 and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=on_cpu)
    kind = accelerator.device.type
    if device not in ("auto", kind):
        raise TrainError(f"device: {device} was asked for, but only {kind} is here; give --device auto or {kind}")
    if accelerator.num_processes < wanted:  # more is what another launcher, mpirun say, has started
        raise TrainError(
            f"device: {wanted} processes were started, but on {kind} they do not find each other; start one, "
            f"or give --device cpu"
        )
    return accelerator


def agreed(accelerator: Accelerator, received: int) -> int:
    """The largest of all processes' numbers: a signal that any got stops all at the same step."""
    if accelerator.num_processes == 1:
        return received
    return int(accelerator.gather(torch.tensor([received], device=accelerator.device)).max())


def float64_device(device: torch.device) -> torch.device:
    """Where float64 sums of values on ``device`` can be made: there, or on the CPU for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _launched() -> int:
    """Processes that a launcher (torchrun, accelerate) says it has started, 1 without one."""
    if "LOCAL_RANK" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE", "1"))
