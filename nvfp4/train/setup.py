"""Everything a pretraining is made of, built from the config, in one process.

    processes -> tokenizer -> corpus -> windows of tokens -> model -> its recipe -> wrapped -> AdamW

Whatever can be refused is refused here, before the first step: a batch that the processes cannot
share, a text that is too short, a model that is not causal. The model is built and converted on the
CPU and then moved, so its weights do not depend on the device.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

from nvfp4.model.convert import convert
from nvfp4.numerics.rng import MODEL_BRANCH, fold_in
from nvfp4.recipes import Recipe
from nvfp4.run.corpus import load_corpus
from nvfp4.run.errors import TrainError
from nvfp4.run.folder import RunFolder
from nvfp4.run.log import Row
from nvfp4.run.model import build_model
from nvfp4.run.optim import adamw
from nvfp4.run.precision import conversion, without_emulation
from nvfp4.run.processes import accelerator_for
from nvfp4.run.progress import Reporter, number, rate
from nvfp4.run.tokens import load_tokenizer, pack
from nvfp4.train.config import PretrainConfig, sizes_of
from nvfp4.train.data import TrainWindows, held_out_windows
from nvfp4.train.parts import PretrainRun


class TextReporter(Reporter):
    """``step 120/300  loss 2.4132  lr 3.9e-03  norm 0.82  12.3k tok/s  0.61 GiB  eta 0:42``.

    A row that was evaluated also says the held-out bits per byte.
    """

    def figures(self, row: Row) -> list[str]:
        """What is shown of a row, before the time that is left."""
        width = len(str(self.steps))
        shown = [
            f"step {row['step']:{width}d}/{self.steps}",
            f"loss {number(row['loss'])}",
            f"lr {row['lr']:.2e}",
            f"norm {number(row['grad_norm'], 3)}",
            f"{rate(row['tokens_per_s'])} tok/s",
            f"{row['memory_gib']:.2f} GiB",
        ]
        return [*shown, f"held-out {number(row['val_bpb'])} bpb"] if "val_bpb" in row else shown


def prepare(config: PretrainConfig) -> PretrainRun:
    """Build a run from a resolved config: data, model converted to the recipe, optimiser.

    Touches no file of the run. ``TrainError`` for anything in the config that cannot work here.
    """
    accelerator = _accelerator(config)
    main = accelerator.is_main_process
    report = TextReporter(config.recipe, config.steps, config.log_every, main)

    # The text, as windows of tokens.
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    corpus = load_corpus(config)
    tokens, _ = pack(corpus.train, tokenizer)
    windows = TrainWindows(tokens, config.seq_len, config.batch, config.seed)
    held_out = held_out_windows(corpus.held_out, tokenizer, config.seq_len, config.eval_bytes)

    # The model, converted on the CPU, then moved and wrapped.
    source = sizes_of(config) if config.model is None else config.model
    model = build_model(source, tokenizer, config.seed, config.seq_len, config.recompute)
    with conversion(Recipe.from_name(config.recipe), config, main) as keywords:
        convert(model, seed=config.seed, **keywords)
    for note in without_emulation(model, accelerator.device, config.dtype):
        report.say(note)
    forward = accelerator.prepare(model)
    if config.compile:
        forward = torch.compile(forward)

    # Dropout, if a model from a folder has any: its own in each process, and the same in every run.
    torch.manual_seed(fold_in(config.seed, MODEL_BRANCH, accelerator.process_index))
    parts = (
        config,
        accelerator,
        report,
        RunFolder(config.out),
        model,
        forward,
        adamw(model, config),
    )
    return PretrainRun(*parts, corpus, tokenizer, windows, held_out)


def _accelerator(config: PretrainConfig) -> Accelerator:
    """The processes; ``TrainError`` if the batch cannot be dealt out to them."""
    accelerator = accelerator_for(config.device)
    count = accelerator.num_processes
    if config.batch % count:
        raise TrainError(f"batch: must be a multiple of the {count} processes, got {config.batch}")
    if config.batch // count % (config.micro_batch or 1):
        raise TrainError(
            f"micro_batch: must divide the {config.batch // count} sequences of one process "
            f"(batch {config.batch} "
            f"over {count} processes), got {config.micro_batch}"
        )
    return accelerator
