"""Everything a run is made of, built from the config; what can be refused is refused here, before the first step."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from nvfp4.backends.registry import BackendUnavailable
from nvfp4.model.convert import convert
from nvfp4.model.selection import ConvertWarning
from nvfp4.numerics.rng import MODEL_BRANCH, fold_in
from nvfp4.run import checkpoint
from nvfp4.run.attention import without_emulation
from nvfp4.run.checkpoint import Snapshot
from nvfp4.run.corpus import Corpus, load_corpus
from nvfp4.run.errors import TrainError
from nvfp4.run.folder import RunFolder
from nvfp4.run.model import build_model
from nvfp4.run.optim import adamw
from nvfp4.run.processes import accelerator_for
from nvfp4.run.progress import Reporter
from nvfp4.run.tokens import Tokenizer, load_tokenizer, pack
from nvfp4.train.config import PretrainConfig
from nvfp4.train.data import HeldOut, TrainWindows, held_out_windows


@dataclass
class Run:
    """The objects of one run in one process. Only ``model``, ``optimizer`` and the log change while it trains."""

    config: PretrainConfig
    accelerator: Accelerator
    report: Reporter
    folder: RunFolder
    corpus: Corpus
    tokenizer: Tokenizer
    windows: TrainWindows
    held_out: HeldOut
    model: PreTrainedModel
    forward: Any
    optimizer: torch.optim.AdamW

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
        """Forward passes whose gradients make one update."""
        return self.config.batch // (self.rows * self.accelerator.num_processes)

    def autocast(self) -> AbstractContextManager:
        """The compute dtype, the same for every recipe."""
        if self.config.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)


def prepare(config: PretrainConfig) -> Run:
    """Build a run from a resolved config: data, model converted to the recipe, optimiser. Touches no file of the run.

    ``TrainError`` for anything in the config that cannot work here.
    """
    accelerator = _accelerator(config)
    report = Reporter(config.recipe, config.steps, config.log_every, accelerator.is_main_process)
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    corpus = load_corpus(config)
    tokens, _ = pack(corpus.train, tokenizer)
    windows = TrainWindows(tokens, config.seq_len, config.batch, config.seed)
    held_out = held_out_windows(corpus.held_out, tokenizer, config.seq_len, config.eval_bytes)
    source = config.sizes() if config.model is None else config.model
    model = build_model(source, tokenizer, config.seed, config.seq_len, config.recompute)
    model = _convert(model, config, accelerator.is_main_process)
    for note in without_emulation(model, accelerator.device, config.dtype):
        report.say(note)
    forward = accelerator.prepare(model)
    if config.compile:
        forward = torch.compile(forward)
    torch.manual_seed(fold_in(config.seed, MODEL_BRANCH, accelerator.process_index))
    optimizer = adamw(model, config)
    return Run(
        config,
        accelerator,
        report,
        RunFolder(config.out),
        corpus,
        tokenizer,
        windows,
        held_out,
        model,
        forward,
        optimizer,
    )


def open_folder(run: Run) -> Snapshot | None:
    """Make the run folder ready (main process) and give every process the snapshot to go on from, or None."""
    path: list[Any] = [None]
    snapshot = None
    if run.accelerator.is_main_process:
        found, notes = run.folder.open(run.config, run.corpus.sha256)
        for note in notes:
            run.report.say(note)
        if found is not None:
            path, snapshot = [found[0]], found[1]
    if run.accelerator.num_processes > 1:
        path = broadcast_object_list(path)
        if path[0] is not None and snapshot is None:
            snapshot = checkpoint.load(path[0], verify=False)  # the main process has read every byte
    return snapshot


def _accelerator(config: PretrainConfig) -> Accelerator:
    accelerator = accelerator_for(config.device)
    count = accelerator.num_processes
    if config.batch % count:
        raise TrainError(f"batch: must be a multiple of the {count} processes, got {config.batch}")
    if config.batch // count % (config.micro_batch or 1):
        raise TrainError(
            f"micro_batch: must divide the {config.batch // count} sequences of one process (batch {config.batch} "
            f"over {count} processes), got {config.micro_batch}"
        )
    return accelerator


def _convert(model: PreTrainedModel, config: PretrainConfig, main: bool) -> PreTrainedModel:
    quantized = config.recipe != "bf16"
    with warnings.catch_warnings():
        warnings.simplefilter("default" if quantized and main else "ignore", ConvertWarning)
        try:
            convert(
                model,
                config.recipe,
                seed=config.seed,
                include=config.include or None,
                exclude=config.exclude or None,
                keep_first=config.keep_first,
                keep_last=config.keep_last,
                backend=config.backend,
                strict=quantized,  # a run that is called NVFP4 must be
                verbose=main,
            )
        except (ValueError, BackendUnavailable) as error:
            raise TrainError(f"recipe {config.recipe}: {error}") from error
    return model
