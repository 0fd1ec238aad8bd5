"""The update, the schedule, the held-out score and what a run writes."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import children
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from training import CLI, environment, steps_of, tiny, write_texts

from nvfp4.run import log
from nvfp4.run.corpus import Document
from nvfp4.run.errors import TrainError
from nvfp4.run.optim import adamw, decay_groups, learning_rates
from nvfp4.run.progress import duration, rate
from nvfp4.run.tokens import ByteTokenizer
from nvfp4.train import loop, step
from nvfp4.train.config import PretrainConfig, resolve
from nvfp4.train.data import held_out_windows
from nvfp4.train.evaluate import evaluate
from nvfp4.train.loop import pretrain
from nvfp4.train.setup import TextReporter, prepare


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


def run_of(tmp_path, texts, **changes):
    return prepare(resolve(tiny(tmp_path / "run", texts, **changes)))


# Learning rate and decay


def test_wsd_rises_stays_and_falls_without_a_wasted_step():
    config = resolve(PretrainConfig(steps=100, warmup=10, decay=0.2, lr=1.0))
    rates = [learning_rates(config)(i) for i in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - i / 20 for i in range(20)])
    assert min(rates) > 0


def test_cosine_follows_its_formula_down_to_the_minimum():
    config = resolve(PretrainConfig(steps=50, warmup=5, schedule="cosine", lr=2.0, min_lr=0.1))
    rates = [learning_rates(config)(i) for i in range(50)]
    for i in range(5, 50):
        half = 0.5 * (1 + math.cos(math.pi * (i + 1 - 5) / (51 - 5)))
        assert rates[i] == pytest.approx(2.0 * (0.1 + 0.9 * half))


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize(
    ("steps", "warmup", "decay"), [(1, 0, 0.0), (1, 0, 1.0), (3, 2, 1.0), (7, 0, 0.5)]
)
def test_short_runs_have_positive_rates_too(schedule, steps, warmup, decay):
    part = {"decay": decay} if schedule == "wsd" else {}  # of which cosine has none
    config = resolve(PretrainConfig(steps=steps, warmup=warmup, schedule=schedule, lr=1.0, **part))
    assert all(0 < learning_rates(config)(i) <= 1 for i in range(steps))


def test_norms_biases_and_embeddings_are_not_decayed(tmp_path, texts):
    for tied in (False, True):
        model = run_of(tmp_path, texts, tie_embeddings=tied, architecture="qwen3").model
        model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        decayed, plain = decay_groups(model, 0.1)
        names = {id(p): name for name, p in model.named_parameters()}
        assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
        free = {names[id(p)] for p in plain["params"]}
        assert {
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.layers.0.self_attn.q_norm.weight",
        } <= free
        held = {names[id(p)] for p in decayed["params"]}
        assert held == {n for n in names.values() if "_proj" in n and "up_proj" not in n} | (
            set() if tied else {"lm_head.weight"}
        )
    module = nn.Linear(2, 2)
    assert [id(p) for p in decay_groups(module, 0.1)[1]["params"]] == [id(module.bias)]


# The update


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path, texts):
    """In FP32 both sum the same 64 token gradients, in another order: at most 64 roundings of
    2^-24."""
    norms, weights = [], []
    for micro in (None, 2, 1):
        run = run_of(tmp_path, texts, dtype="fp32", micro_batch=micro)
        assert run.parts == {None: 1, 2: 2, 1: 4}[micro]
        row = step.update(run, 0, lr=1e-3)
        norms.append((row["loss"], row["grad_norm"]))
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert norms[1] == pytest.approx(norms[0], rel=64 * 2**-24)
    assert norms[2] == pytest.approx(norms[0], rel=64 * 2**-24)


def test_accumulation_over_equal_halves_is_exact(tmp_path, texts):
    """Twice the same rows: the halves' gradients are equal, a + a and division by 2 round
    nothing."""
    run = run_of(tmp_path, texts, dtype="fp32", batch=2, micro_batch=1)
    rows = run.windows.batch_at(0)[:1]
    run.windows.batch_at = lambda step: rows.expand(2, -1)
    whole = copy.deepcopy(run.model)
    step.update(run, 0, lr=1e-3)
    optimizer = adamw(whole, run.config)
    loss = nn.functional.cross_entropy(
        whole(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()
    )
    loss.backward()
    nn.utils.clip_grad_norm_(whole.parameters(), run.config.clip)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(run.model.parameters(), whole.parameters(), strict=True)
    )


def test_clipping_bounds_the_update_but_the_norm_is_logged_as_it_was(tmp_path, texts):
    free = step.update(run_of(tmp_path, texts, clip=0.0), 0, lr=1e-3)
    run = run_of(tmp_path, texts, clip=1e-3)
    seen = []
    run.optimizer.register_step_pre_hook(
        lambda *a: seen.append(nn.utils.get_total_norm([p.grad for p in run.model.parameters()]))
    )
    assert step.update(run, 0, lr=1e-3)["grad_norm"] == free["grad_norm"] > 0.1
    assert float(seen[0]) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, texts, monkeypatch, where):
    original = step.next_token_loss

    def poisoned(run, rows):
        loss = original(run, rows)
        poisoned.calls += 1
        if poisoned.calls != 3:
            return loss
        # An infinite gradient behind a finite loss: the derivative of sqrt at 0.
        return loss * float("nan") if where == "loss" else loss + torch.sqrt(loss - loss)

    poisoned.calls = 0
    monkeypatch.setattr(step, "next_token_loss", poisoned)
    result = pretrain(tiny(tmp_path / "run", texts, steps=5))
    rows = steps_of(tmp_path / "run")
    assert [rows[i]["skipped"] for i in range(1, 6)] == [False, False, True, False, False]
    assert (rows[3]["loss"] is None) == (where == "loss")
    assert rows[3]["grad_norm"] is None
    assert rows[4]["loss"] < rows[1]["loss"]
    assert result["skipped_steps"] == 1
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_skipped_step_changes_neither_weights_nor_moments(tmp_path, texts, monkeypatch):
    run = run_of(tmp_path, texts)
    step.update(run, 0, lr=1e-3)
    before = copy.deepcopy(
        list(run.model.parameters()) + [s["exp_avg"] for s in run.optimizer.state.values()]
    )
    monkeypatch.setattr(
        step,
        "next_token_loss",
        lambda run, rows: sum(p.sum() for p in run.model.parameters()) * float("inf"),
    )
    assert step.update(run, 1, lr=1e-3)["skipped"]
    after = list(run.model.parameters()) + [s["exp_avg"] for s in run.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_too_many_bad_steps_in_a_row_stop_the_run_with_advice(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(
        step,
        "next_token_loss",
        lambda run, rows: sum(p.sum() for p in run.model.parameters()) * float("nan"),
    )
    with pytest.raises(
        TrainError, match=r"NaN or Inf in 3 updates in a row, up to step 3; lower --lr or --clip"
    ):
        pretrain(tiny(tmp_path / "run", texts, max_bad_steps=3))
    assert sorted(steps_of(tmp_path / "run")) == [0, 1, 2, 3]


def test_running_out_of_memory_names_the_knobs(tmp_path, texts, monkeypatch):
    def full(run, step, lr):
        raise torch.OutOfMemoryError("tried to allocate 7 GiB")

    monkeypatch.setattr(loop, "update", full)
    with pytest.raises(
        TrainError, match="out of memory: tried to allocate 7 GiB; lower --micro-batch or --seq-len"
    ):
        pretrain(tiny(tmp_path / "run", texts))


def test_a_compiler_that_fails_names_the_off_switch(tmp_path, texts, monkeypatch):
    from torch._dynamo.exc import Unsupported

    def fail(run, step, lr):
        raise Unsupported("no C++ compiler")

    monkeypatch.setattr(loop, "update", fail)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    with pytest.raises(
        TrainError,
        match=r"compile: torch.compile failed here \(no C\+\+ compiler\); run with --no-compile",
    ):
        pretrain(tiny(tmp_path / "run", texts, compile=True))


# Held-out score


class Bigram(nn.Module):
    """logits of the next byte: 3 if it is the byte plus one, else 0; the separator predicts nothing
    in particular."""

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 257)
        logits.scatter_(-1, ((input_ids + 1) % 257).unsqueeze(-1), 3.0)
        return type("Output", (), {"logits": logits})


def test_bits_per_byte_by_hand():
    """abc, x: a and x follow the separator (byte 0 is what it expects), b and c are expected. Z =
    e^3 + 256."""
    held_out = held_out_windows(
        [Document("1", "abc"), Document("2", "x")], ByteTokenizer(), 4, limit=0
    )
    cpu = Accelerator(cpu=True)
    score = evaluate(Bigram(), held_out, 2, lambda: torch.autocast("cpu", enabled=False), cpu)
    z = math.exp(3) + 256
    nats = 2 * math.log(z) + 2 * (math.log(z) - 3)
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert (score.tokens, score.size) == (4, 4)
    assert score.loss == pytest.approx(nats / 4, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 4, rel=1e-6)


def test_bits_per_byte_counts_bytes_not_tokens():
    """A tokenizer of two-byte tokens halves the tokens of a text, not its bytes."""

    class Pairs(ByteTokenizer):
        def encode(self, texts):
            return [ids[::2] for ids in super().encode(texts)]

    held_out = held_out_windows([Document("1", "ab" * 10)], Pairs(), 4, limit=0)
    cpu = Accelerator(cpu=True)
    score = evaluate(Bigram(), held_out, 3, lambda: torch.autocast("cpu", enabled=False), cpu)
    assert (score.tokens, score.size) == (10, 20)
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / 20)


def test_evaluating_changes_nothing(tmp_path, texts):
    from nvfp4.model.noise import noise_state

    run = run_of(tmp_path, texts, recipe="quartet2")
    step.update(run, 0, lr=1e-3)
    before = (torch.get_rng_state(), noise_state(run.model), run.model.training)
    first = evaluate(run.model, run.held_out, run.rows, run.autocast, run.accelerator)
    assert evaluate(run.model, run.held_out, run.rows, run.autocast, run.accelerator) == first
    assert torch.equal(before[0], torch.get_rng_state())
    assert (noise_state(run.model), run.model.training) == before[1:]


# What a run writes and shows


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, pretrain(tiny(out, texts, recipe="quartet2", sample_tokens=12, prompt="if x"))


def test_the_run_folder_holds_everything(finished):
    out, result = finished
    names = {p.name for p in out.iterdir()}
    assert names == {
        "config.yaml",
        "log.jsonl",
        "checkpoints",
        "export",
        "sample.txt",
        "result.json",
        ".lock",
    }
    assert json.loads((out / "result.json").read_text()) == result
    assert (out / "sample.txt").read_text().startswith("if x")
    assert result["val_bytes"] == 512
    # bytes are tokens here
    assert result["val_bpb"] == pytest.approx(result["val_loss"] / math.log(2))
    assert result["val_bpb_bf16"] != result["val_bpb"]
    rows = log.read(out / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "val_bpb" in row] == [0, 5, 10, 12]
    assert result["train_loss"] == pytest.approx(sum(row["loss"] for row in rows[1:]) / 12)
    keys = {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "skipped",
        "tokens",
        "seconds",
        "tokens_per_s",
        "memory_gib",
    }
    assert set(rows[1]) == keys
    assert rows[12]["tokens"] == 12 * 4 * 16


def test_it_learns(finished):
    """From about 8 bits (257 equal chances) at the start; the words of the corpus need less than
    4."""
    rows = steps_of(finished[0])
    assert rows[0]["val_bpb"] > 7.5
    assert rows[12]["val_bpb"] < 5.5


def test_every_recipe_trains(tmp_path, texts):
    from nvfp4.recipes import RECIPES

    first = {}
    for recipe in RECIPES:
        result = pretrain(tiny(tmp_path / recipe, texts, recipe=recipe, steps=6))
        assert result["val_bpb"] < 7
        first[recipe] = steps_of(tmp_path / recipe)[1]["loss"]
    assert len(set(first.values())) > 4  # the recipes do compute differently
    # from the same weights on the same batch
    assert max(first.values()) - min(first.values()) < 0.02


def test_half_a_line_is_passed_over_and_rows_after_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [row["step"] for row in log.read(path)] == [1, 2, 3]
    log.cut(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    log.cut(tmp_path / "absent.jsonl", 2)


def test_a_full_disk_under_the_log_is_said(tmp_path, monkeypatch):
    writer = log.Log(tmp_path / "log.jsonl")
    monkeypatch.setattr("os.write", lambda descriptor, data: len(data) // 2)
    with pytest.raises(
        TrainError, match=r"cannot write .*log\.jsonl: no space left for a whole line; make room"
    ):
        writer.write({"step": 1})


def test_the_step_line_is_plain_where_there_is_no_terminal(capsys):
    report = TextReporter("x", steps=200, every=10)
    report.start(0)
    row = {
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_s": 12345.0,
        "memory_gib": 0.6,
        "seconds": 0.5,
        "skipped": False,
    }
    for number in range(1, 22):
        report.step({"step": number, "loss": 2.5, **row})
    report.step({"step": 22, "loss": None, **row, "skipped": True})
    report.step({"step": 23, "loss": 2.5, **row, "val_bpb": 3.25})
    report.close()
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "step   1/200  loss 2.5000  lr 1.00e-03  norm 0.500  12.3k tok/s  0.60 GiB  eta 1:40"
    )
    assert [text.split("/")[0] for text in lines] == [
        "step   1",
        "step  10",
        "step  20",
        "step  22",
        "step  23",
    ]
    assert "SKIPPED" in lines[3]
    assert "held-out 3.2500 bpb" in lines[4]


def test_numbers_for_people():
    assert [rate(v) for v in (12.3, 999.0, 1000.0, 45678.0)] == ["12", "999", "1.0k", "45.7k"]
    assert [duration(v) for v in (0, 59.6, 3599, 3600, 100000)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "27:46:40",
    ]
    skipped = {
        "step": 1,
        "loss": None,
        "lr": 1,
        "grad_norm": None,
        "tokens_per_s": 1,
        "memory_gib": 1,
    }
    assert TextReporter("x", 10, 1).figures(skipped)[1] == "loss nan"


# Devices and processes


def test_a_device_or_a_batch_that_cannot_be_is_refused(tmp_path, texts):
    with pytest.raises(TrainError, match="device: mps was asked for, but only"):
        run_of(tmp_path, texts, device="mps")
    with pytest.raises(TrainError, match="backend"):
        run_of(tmp_path, texts, backend="abacus", recipe="rtn")
    with pytest.raises(TrainError, match="keep_first must be"):
        run_of(tmp_path, texts, keep_first=1.5, recipe="rtn")


def test_two_processes_under_torchrun_train_the_same_run(tmp_path, texts):
    """Data parallel over gloo with no code changed: the same batches, so nearly the same losses."""
    config = tiny(tmp_path / "one", texts, steps=4, save_every=2)
    pretrain(config)
    path = tmp_path / "two.yaml"
    from nvfp4.run.fields import to_yaml

    path.write_text(to_yaml(dataclasses.replace(config, out=str(tmp_path / "two"))))
    for more in ([], ["--resume", "--steps", "6", "--allow-changes", "steps"]):
        run = children.processes(2, CLI, ["pretrain", "--config", str(path), *more], environment())
        assert run.returncode == 0, run.stdout + run.stderr
    assert "2 process(es)" in run.stdout
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert sorted(two) == list(range(7))
    for i in range(1, 5):
        # BF16 compute: a relative rounding of 2^-9 in each logit, of which the mean of 64 losses
        # averages most away
        assert two[i]["loss"] == pytest.approx(one[i]["loss"], rel=2**-9)
