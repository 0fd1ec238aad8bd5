"""The objects that a run is made of, as a record; who builds them is the trainer's ``setup``.

Steps, evaluations and the end of a run take this record and nothing else, so none of them has to
know how a model is built or converted. Each trainer adds its own: ``PretrainRun`` text and windows,
``RLRun`` task, objective, sampler and reference.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from nvfp4.run.folder import RunFolder
from nvfp4.run.log import Log
from nvfp4.run.options import ResumableConfig
from nvfp4.run.processes import Processes
from nvfp4.run.progress import Reporter


@dataclass
class RunParts:
    """The objects that every run is made of, in one process.

    Model, optimiser and logs change while it trains. forward: the model, wrapped to average
    gradients over processes. logs: open ones of ``folder.logs`` while the loop runs, none in other
    processes than the main one.
    """

    config: ResumableConfig
    accelerator: Processes
    report: Reporter
    folder: RunFolder
    model: PreTrainedModel
    forward: Any
    optimizer: torch.optim.Optimizer
    logs: list[Log] = field(default_factory=list, kw_only=True)

    def autocast(self) -> AbstractContextManager:
        """The compute dtype, the same for every recipe and for every model of the run."""
        if self.config.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)
