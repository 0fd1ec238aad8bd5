"""Pretraining as a training: a step is one update, and an evaluation where one is due.

    step s:  lr(s) -> update on windows of s (step.py) -> row -> held-out score, if due

All that it remembers is in weights, optimiser, random states and the number of the step: windows
and learning rate are functions of that number. So ``state`` and ``load`` of ``Training`` are not
needed here.
"""

from __future__ import annotations

import time
from typing import Any

from nvfp4.run.errors import TrainError
from nvfp4.run.log import Row
from nvfp4.run.loop import Training, due, train
from nvfp4.run.optim import learning_rates
from nvfp4.run.progress import memory_gib
from nvfp4.train.config import PretrainConfig, resolve
from nvfp4.train.evaluate import evaluate
from nvfp4.train.finish import finish, summary
from nvfp4.train.parts import PretrainRun
from nvfp4.train.setup import prepare
from nvfp4.train.step import update

OUT_OF_MEMORY = (
    "lower --micro-batch or --seq-len, or give --recompute; to go on from a checkpoint: --resume "
    "--allow-changes "
    "micro_batch recompute"
)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train as the config says and return what result.json holds.

    Under torchrun, one process of several. With ``resume`` a finished run of the same config is
    returned as it is. Raises ``TrainError`` for what the user can put right, and ``Interrupted``
    after a SIGINT, SIGTERM or SIGHUP was obeyed.
    """
    config = resolve(config)
    try:
        return train(config, lambda config: Pretraining(prepare(config)), summary, OUT_OF_MEMORY)
    except Exception as error:
        # Compilers fail in many ways, at the first step. The user can go on without one.
        if config.compile and type(error).__module__.startswith(
            ("torch._dynamo", "torch._inductor")
        ):
            reason = str(error).strip().splitlines()[0]
            raise TrainError(
                f"compile: torch.compile failed here ({reason}); run with --no-compile"
            ) from error
        raise


class Pretraining(Training):
    """Next tokens of a corpus; without a state of its own."""

    command = "pretrain"
    run: PretrainRun

    def __init__(self, run: PretrainRun) -> None:
        super().__init__(run)
        self.data_sha256 = run.corpus.sha256
        self.learning_rate = learning_rates(run.config)

    def remarks(self) -> list[str]:
        """What the corpus is."""
        return [str(self.run.corpus)]

    def first_row(self) -> Row:
        """The held-out loss, in nats per token and in bits per byte."""
        run = self.run
        score = evaluate(run.model, run.held_out, run.eval_rows, run.autocast, run.accelerator)
        return {"val_loss": score.loss, "val_bpb": score.bits_per_byte}

    def step(self, step: int) -> Row:
        """One update, and an evaluation if one is due.

        tokens: since the start of the run. seconds: of the update alone.
        """
        run, config = self.run, self.run.config
        began = time.perf_counter()
        row = update(run, step, self.learning_rate(step))
        seconds = time.perf_counter() - began

        tokens = config.batch * config.seq_len
        row |= {"tokens": (step + 1) * tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
        row["memory_gib"] = memory_gib(run.accelerator.device)
        return row | self.first_row() if due(step + 1, config.eval_every, config.steps) else row

    def finish(self) -> dict[str, Any]:
        """Held-out score, text sample, export, result.json."""
        return finish(self.run)
