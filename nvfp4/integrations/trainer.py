"""Hugging Face ``Trainer``, and TRL's: a callback for exact resumption; all else works as it is.

    nvfp4.convert(model, "quartet2", seed=0)
    trainer = Trainer(model=model, ..., callbacks=[NoiseCallback()])
    trainer.train(resume_from_checkpoint=True)

A converted layer's noise is a function of its seed and of the number of backward passes that it has
finished. Weights, optimiser and torch's random states are in a ``Trainer``'s checkpoint, these
counters are not: without them a resumed run would use the noise of the first steps once more. The
callback keeps them in trainer_state.json, where transformers puts whatever an ``ExportableState``
says.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from nvfp4.model.amax import amax_state, load_amax_state
from nvfp4.model.noise import load_noise_state, noise_state


class NoiseCallback(TrainerCallback, ExportableState):
    """``Trainer(..., callbacks=[NoiseCallback()])``: checkpoints hold the noise state.

    So resuming is bit for bit. The model has to be converted with the same arguments and the same
    ``seed`` before resuming.
    """

    model: nn.Module | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore what the checkpoint holds, if this is a resumption."""
        self.model = kwargs["model"]
        # a dict here, on resumption that of trainer_state.json
        stored: Any = state.stateful_callbacks
        attributes = stored.get(type(self).__name__, self.state())["attributes"]
        if attributes["calls"]:
            load_noise_state(self.model, attributes["calls"])
        if attributes.get("amaxes"):
            load_amax_state(self.model, attributes["amaxes"])

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps: the backward passes finished by each converted layer.

        And what it holds of its last call, if its recipe delays amaxes.
        """
        attributes: dict[str, Any] = {
            "calls": {} if self.model is None else noise_state(self.model)
        }
        if self.model is not None and (amaxes := amax_state(self.model)):
            attributes["amaxes"] = amaxes
        return {"args": {}, "attributes": attributes}
