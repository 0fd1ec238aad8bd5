"""The end of a pretraining: last held-out score, text sample, export, result.json.

The held-out text is scored twice: as trained, and with the layers in BF16 (``disabled``). The
second says what the weights know, the first what a deployment in NVFP4 would see; their difference
is the noise of the forward. A score that is not a number stops here, before the export: nobody is
to find a lost model under the name of a finished run.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from nvfp4.model.switches import disabled
from nvfp4.run import log
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import saved_fields
from nvfp4.run.files import write_text
from nvfp4.run.model import export, sample
from nvfp4.run.progress import duration, rate
from nvfp4.train.data import held_out_windows
from nvfp4.train.evaluate import Score, evaluate
from nvfp4.train.parts import PretrainRun


def finish(run: PretrainRun) -> dict[str, Any]:
    """Score the held-out text, write sample and export, return the result.

    Scored as trained and with the layers in BF16. Loss is in nats per token, bpb in bits per UTF-8
    byte, memory in GiB; seconds are those of all updates, also those before a resume. {} in other
    processes than the main one.
    """
    config = run.config

    # The score, as trained and with the layers in BF16.
    held_out = held_out_windows(
        run.corpus.held_out, run.tokenizer, config.seq_len, config.final_eval_bytes
    )
    trained = evaluate(run.model, held_out, run.eval_rows, run.autocast, run.accelerator)

    # In BF16 there is nothing to switch off, so one evaluation serves both.
    plain = trained
    if config.recipe != "bf16":
        with disabled(run.model):
            plain = evaluate(run.model, held_out, run.eval_rows, run.autocast, run.accelerator)
    if not math.isfinite(trained.loss + plain.loss):
        raise TrainError(
            f"the held-out loss is {trained.loss:g} after the last update, {plain.loss:g} with "
            "the layers in BF16: the "
            "model is lost; lower --lr or --clip and go on from an earlier checkpoint in "
            f"{run.folder.checkpoints}: "
            f"--resume-from ... --allow-changes lr clip"
        )
    if not run.accelerator.is_main_process:
        return {}

    # What is left: a text, a model, the result.
    result = _result(run, trained, plain)
    run.report.say(summary(result))
    if config.sample_tokens:
        _sample(run)
    export(run.model, run.tokenizer, run.folder.export, config.export_dtype)
    run.report.say(f"exported to {run.folder.export} (loads with transformers alone)")
    run.folder.write_result(result)  # last: its presence says that the run is finished
    return result


def summary(result: dict[str, Any]) -> str:
    """One line of a result."""
    bf16 = (
        ""
        if result["recipe"] == "bf16"
        else f" ({result['val_bpb_bf16']:.4f} with the layers in BF16)"
    )
    loss = "none" if result["train_loss"] is None else f"{result['train_loss']:.4f}"
    return (
        f"{result['recipe']}: held-out {result['val_bpb']:.4f} bits per byte{bf16} on "
        f"{result['val_bytes']:,} bytes, "
        f"training loss {loss}, {rate(result['tokens_per_s'])} tok/s, "
        f"{duration(result['seconds'])}, "
        f"{result['peak_memory_gib']:.2f} GiB, {result['skipped_steps']} steps skipped"
    )


def _result(run: PretrainRun, trained: Score, plain: Score) -> dict[str, Any]:
    rows = [row for row in log.read(run.folder.log) if "seconds" in row]

    # One batch is noise: the mean of the last few is what people call the training loss.
    losses = [row["loss"] for row in rows[-log.LAST :] if row["loss"] is not None]
    return {
        "recipe": run.config.recipe,
        "steps": run.config.steps,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "train_loss": statistics.fmean(losses) if losses else None,
        "val_loss": trained.loss,
        "val_bpb": trained.bits_per_byte,
        "val_bpb_bf16": plain.bits_per_byte,
        "val_tokens": trained.tokens,
        "val_bytes": trained.size,
        **log.costs(rows, "seconds"),
        "corpus_sha256": run.corpus.sha256,
        "config": saved_fields(run.config),
    }


def _sample(run: PretrainRun) -> None:
    config, prompt = run.config, run.config.prompt
    if prompt is None:
        prompt = run.corpus.held_out[0].text.lstrip().split("\n")[0][:80] + "\n"
    with run.autocast():
        text = sample(run.model, run.tokenizer, prompt, config.sample_tokens, config.seed)

    # The file has the text as it is; a terminal gets no control characters of the model's.
    write_text(run.folder.sample, prompt + text)
    printable = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
        for c in f"{prompt}|{text}"
    )
    run.report.say(
        "sample (the prompt ends at the bar):\n"
        + "\n".join(f"    {line}" for line in printable.split("\n"))
    )
