"""The objects of one pretraining, as a record: those of any run, its text and its windows.

    batch [batch, seq_len + 1] = processes x parts x rows: every process takes its sequences, and
    splits them into ``parts`` forward passes of ``rows`` sequences each

The gradients of all parts make one update.
"""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator

from nvfp4.run.corpus import Corpus
from nvfp4.run.parts import RunParts
from nvfp4.run.tokens import Tokenizer
from nvfp4.train.config import PretrainConfig
from nvfp4.train.data import HeldOut, TrainWindows


@dataclass
class PretrainRun(RunParts):
    """The objects of one pretraining in one process."""

    config: PretrainConfig
    accelerator: Accelerator
    corpus: Corpus
    tokenizer: Tokenizer
    windows: TrainWindows
    held_out: HeldOut

    @property
    def rows(self) -> int:
        """Sequences in one forward pass of one process."""
        return self.config.micro_batch or self.config.batch // self.accelerator.num_processes

    @property
    def eval_rows(self) -> int:
        """Sequences in one forward pass of an evaluation."""
        assert self.config.eval_batch is not None
        return self.config.eval_batch

    @property
    def parts(self) -> int:
        """Forward passes of one process whose gradients make one update: parts of its batch."""
        return self.config.batch // (self.rows * self.accelerator.num_processes)
