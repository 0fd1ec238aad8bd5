"""The loop: what it learns, what it logs, what it refuses; a resumed run repeats the uninterrupted
one to the bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from limits import until
from rl_runs import FAILING, SEVENS, rows_of, tiny
from safetensors.torch import load_file
from training import start_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvfp4.rl import learn as learning
from nvfp4.rl import loop as loops
from nvfp4.rl.collect import collect
from nvfp4.rl.config import resolve
from nvfp4.rl.learn import learn
from nvfp4.rl.loop import Reinforcement, rl
from nvfp4.rl.objectives.registry import OBJECTIVES
from nvfp4.rl.setup import prepare
from nvfp4.rl.vocabulary import Symbols
from nvfp4.run import checkpoint, log
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import to_yaml
from nvfp4.run.loop import Loop

TIS = ("correction=token_truncate", "correction_high=1.0001")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with everything that has a state: a reference, an objective that controls its clip,
    noise on the norms."""
    out = tmp_path_factory.mktemp("rl") / "whole"
    config = tiny(
        out,
        objective="prorl",
        objective_options=("entropy_target=3.3", "reset_every=3", "kl_coef=0.01"),
        temperature=1.0,
        epochs=2,
        minibatches=2,
        micro_batch=3,
        aqn_stages=2,
        aqn_start=0.05,
    )
    return config, rl(config)


def test_resumed_is_uninterrupted_to_the_bit(finished, tmp_path):
    config, result = finished
    out = tmp_path / "again"
    shutil.copytree(config.out, out)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / "result.json").unlink()
    again = rl(dataclasses.replace(config, out=str(out), resume=True))
    assert rows_of(out) == rows_of(Path(config.out))
    for name in ("completions.jsonl",):
        assert log.read(out / name) == log.read(Path(config.out) / name)
    for group in ("model", "optimizer", "reference"):
        a, b = (
            load_file(f"{root}/checkpoints/step-00000004/{group}.safetensors")
            for root in (config.out, out)
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), group
    assert (again["after"], again["before"]) == (result["after"], result["before"])


def test_the_log_has_the_promised_figures(finished):
    config, result = finished
    rows = rows_of(Path(config.out))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    wanted = [
        *(
            "reward",
            "reward_std",
            "frac_reward_zero_std",
            "rewards/sort/mean",
            "rewards/random/std",
            "kl",
            "entropy",
        ),
        *(
            "completions/mean_length",
            "completions/clipped_ratio",
            "clip_ratio/low_mean",
            "clip_ratio/high_mean",
        ),
        *(
            "mismatch/token_mult_prob_error",
            "mismatch/gen_kl_error",
            "mismatch/max",
            "mismatch/same_shape",
        ),
        *("fp4/codes_changed", "grad_norm", "lr", "num_tokens", "samples_drawn", "loss"),
    ]
    assert not [name for name in wanted if name not in rows[1]]
    assert {"eval/pass@1", "eval/pass@2", "eval/pass@2/low", "eval/greedy"} <= rows[0].keys()
    assert all(row["mismatch/same_shape"] == 0 for row in rows[1:])
    assert [row["sampler_noise"] > 0 for row in rows[1:]] == [False, False, True, True]
    assert [row["mismatch/max"] > 0 for row in rows[1:]] == [False, False, True, True], (
        "only the sampler has the noise"
    )
    assert rows[1]["frac_reward_zero_std"] >= 0
    assert 0 < rows[1]["fp4/codes_changed"] < 1
    assert rows[1]["kl"] == 0, "the reference is the policy of the beginning"
    assert result["mismatch"]["same_shape"] == 0


def test_a_reset_makes_the_policy_its_reference(finished):
    """After step 3: the optimiser forgets, and in step 4 the KL to the new reference begins at
    exactly 0."""
    rows = {row["step"]: row for row in log.read(Path(finished[0].out) / "log.jsonl")}
    assert [step for step in rows if rows[step].get("reference_reset")] == [3]


def test_a_finished_run_is_returned_and_not_overwritten(finished):
    config, result = finished
    assert rl(dataclasses.replace(config, resume=True)) == json.loads(json.dumps(result))
    with pytest.raises(TrainError, match="holds an earlier run"):
        rl(config)
    with pytest.raises(TrainError, match="group: 4, now 8"):
        rl(dataclasses.replace(config, group=8, resume=True))


def test_what_would_stop_a_run_stops_it_before_the_warm_start(finished, tmp_path):
    """A folder that cannot be written, one that holds a run (whose base/ stays), problems too few
    to hold any out."""
    (tmp_path / "file").write_text("")
    (tmp_path / "one.jsonl").write_text('{"prompt": "1>", "answer": "1"}\n')
    for fields, message in (
        ({"out": str(tmp_path / "file" / "run")}, "out: cannot write in"),
        ({"out": finished[0].out}, "holds an earlier run"),
        ({"task": str(tmp_path / "one.jsonl")}, "task jsonl: none of 1000 problems is"),
    ):
        with pytest.raises(TrainError, match=message):
            rl(dataclasses.replace(tiny(tmp_path / "new", warm_steps=3, warm_batch=4), **fields))
        assert not (tmp_path / "new" / "base").exists()
    assert not (Path(finished[0].out) / "base").exists()


def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_room(
    finished, tmp_path, monkeypatch
):
    """The second checkpoint finds no space: one clear error, the first stays whole, and the end is
    as without it."""
    original, calls = checkpoint._write, []

    def full(folder, snapshot):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder, snapshot)

    config = dataclasses.replace(finished[0], out=str(tmp_path / "full"))
    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(
        TrainError, match=r"No space left .* last good checkpoint is .*step-00000002"
    ):
        rl(config)
    monkeypatch.undo()
    rl(dataclasses.replace(config, resume=True))
    assert rows_of(tmp_path / "full") == rows_of(Path(finished[0].out))


def test_killed_at_any_moment_it_goes_on_to_the_same_end(finished, tmp_path):
    """SIGKILL as soon as the third step is in the log, between two checkpoints; resumed, all rows
    are the same."""
    out = tmp_path / "killed"
    given = tmp_path / "given.yaml"
    given.write_text(to_yaml(dataclasses.replace(resolve(finished[0]), out=str(out))))
    child = start_cli("rl", "--config", str(given))
    assert until(lambda: len(log.read(out / "log.jsonl")) >= 4, child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (out / "result.json").unlink(missing_ok=True)  # where the kill came after the end
    rl(dataclasses.replace(finished[0], out=str(out), resume=True))
    assert rows_of(out) == rows_of(Path(finished[0].out))


def test_the_export_needs_no_nvfp4(finished):
    """transformers alone loads weights and tokenizer, and they are those of the last checkpoint."""
    export = f"{finished[0].out}/export"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(export),
        AutoTokenizer.from_pretrained(export),
    )
    weights = load_file(f"{finished[0].out}/checkpoints/step-00000004/model.safetensors")
    assert torch.equal(model.state_dict()["lm_head.weight"], weights["lm_head.weight"])
    assert tokenizer("s52>")["input_ids"] == Symbols().encode("s52>")


def test_a_local_model_goes_on_with_its_own_tokenizer(finished, tmp_path):
    """--model FOLDER: sizes, tokenizer and end-of-text come from the folder, and the weights are
    where it begins."""
    export = f"{finished[0].out}/export"
    shared = {
        "depth": 4,
        "width": None,
        "heads": None,
        "context": None,
        "warm_steps": None,
        "lr": None,
    }
    shared |= {"steps": 1, "save_every": 0}
    result = rl(tiny(tmp_path / "a", model=export, recipe="w4a16", **shared))
    assert result["config"]["tokenizer"] == export
    assert (result["config"]["lr"], result["parameters"]) == (1e-6, finished[1]["parameters"])
    assert rows_of(tmp_path / "a")[1]["mismatch/max"] == 0


@pytest.mark.parametrize("recipe", ["bf16", "rl"])
def test_mixed_precision_runs_and_says_what_it_costs(tmp_path, recipe):
    """Autocast to BF16: sampler and trainer are still one function on equal shapes, and the cache
    is not exact."""
    run = prepare(resolve(tiny(tmp_path, dtype="bf16", recipe=recipe)))
    learned = learn(run, collect(run, 0).samples, 1.0, 1e-3, check=True)
    assert learned.shape_gap == 0
    assert 0 < learned.metrics["grad_norm"] < 100


def test_a_signal_saves_and_the_run_goes_on(finished, tmp_path, monkeypatch):
    """SIGTERM in step 3: the step is finished, a checkpoint written; resumed it ends like the
    uninterrupted run."""
    original = loops.collect

    def collected(run, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, step)

    monkeypatch.setattr(loops, "collect", collected)
    config = dataclasses.replace(finished[0], out=str(tmp_path / "a"))
    with pytest.raises(
        Interrupted, match="stopped at step 3, checkpoint saved; go on with: nvfp4 rl --config"
    ):
        rl(config)
    monkeypatch.undo()
    result = rl(dataclasses.replace(config, resume=True, strict=False, log_every=1))
    assert rows_of(tmp_path / "a") == rows_of(Path(finished[0].out))
    assert result["after"] == finished[1]["after"]


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    """Loss and norm of the gradient, up to the order of float32 sums; padding and totals are where
    this goes wrong."""
    found = []
    for rows in (None, 5, 1):
        run = prepare(
            resolve(
                tiny(
                    tmp_path / str(rows), micro_batch=rows, objective_options=("aggregation=dapo",)
                )
            )
        )
        collected = collect(run, 0)
        learned = learn(run, collected.samples, 1.0, 1e-3, check=True)
        found.append((learned.metrics["grad_norm"], learned.metrics["entropy"], learned.shape_gap))
    assert found[1] == pytest.approx(found[0], rel=2e-5)
    assert found[2] == pytest.approx(found[0], rel=2e-5)
    assert found[0][0] > 0.01


def test_failed_rewards_are_logged_with_their_reasons_and_training_goes_on(tmp_path):
    """By count and reason for each step; the completions of each reason are kept, though only one
    is asked for."""
    rl(tiny(tmp_path, task=FAILING, reward="task", log_completions=1, steps=2))
    rows = rows_of(tmp_path)[1:]
    reasons = {"RuntimeError: a seven", "the reward must be a number in [0, 1], got nan"}
    assert {reason for row in rows for reason in row["rewards/failures"]} == reasons
    assert all(row["rewards/failed"] == sum(row["rewards/failures"].values()) for row in rows)
    shown = [row for row in log.read(tmp_path / "completions.jsonl") if "evaluation" not in row]
    assert {row.get("reason") for row in shown} >= reasons
    assert all(row["reward"] == 0 for row in shown if "reason" in row)


def test_a_foreign_sampler_is_measured_and_corrected(tmp_path):
    """The sampler in full precision on the weights of the NVFP4 policy, in every step: the mismatch
    is there, the
    corrections act on it, and equal shapes stay equal within the trainer. The same with the trainer
    as sampler: none.
    """
    run = prepare(resolve(tiny(tmp_path / "x", sampler_recipe="bf16", objective_options=TIS)))
    pairs = zip(run.model.named_parameters(), run.sampler.named_parameters(), strict=True)
    assert run.model is not run.sampler
    assert all(names == other and weight is shared for (names, weight), (other, shared) in pairs)
    rl(tiny(tmp_path / "foreign", sampler_recipe="bf16", objective_options=TIS, steps=2))
    rl(tiny(tmp_path / "own", objective_options=TIS, steps=2))
    foreign, own = (rows_of(tmp_path / name)[1:] for name in ("foreign", "own"))
    for row in foreign:
        assert row["mismatch/token_mult_prob_error"] > 1.001
        assert row["mismatch/same_shape"] == 0
        assert row["sampling/importance_sampling_ratio/min"] < 0.999
        assert row["sampling/importance_sampling_ratio/max"] < 1.00011
        assert 0 < row["is_oob_ratio"] < 1
    assert all(abs(row["sampling/importance_sampling_ratio/min"] - 1) < 1e-5 for row in own)
    assert all(row["is_oob_ratio"] == 0 for row in own)


def test_a_difference_on_equal_shapes_stops_the_run(tmp_path, monkeypatch):
    """The check can fail: a trainer that scores with another temperature is caught, unless that is
    wished."""
    config = resolve(tiny(tmp_path / "a"))
    run = prepare(config)
    samples = collect(run, 0).samples
    original = learning.score
    monkeypatch.setattr(
        learning, "score", lambda *args, **kwargs: original(args[0], args[1], 1.0001)
    )
    with pytest.raises(TrainError, match="sampler and trainer differ by up to"):
        learn(run, samples, 1.0, 1e-3, check=True)
    run.config = dataclasses.replace(config, strict=False)
    assert 0 < learn(run, samples, 1.0, 1e-3, check=True).shape_gap < 1e-2


@pytest.mark.parametrize("recipe", ["rl", "w4a16"])
def test_it_learns(tmp_path, recipe):
    """A model with random weights writes ever more sevens; with coins for rewards it does not."""
    shared = {
        "task": SEVENS,
        "steps": 12,
        "prompts": 8,
        "group": 8,
        "recipe": recipe,
        "save_every": 0,
        "lr": 2e-2,
    }
    rl(tiny(tmp_path / "task", reward="task", **shared))
    rewards = [row["reward"] for row in rows_of(tmp_path / "task")[1:]]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    if recipe == "rl":
        rl(tiny(tmp_path / "coins", **shared))
        shares = [row["rewards/sevens/mean"] for row in rows_of(tmp_path / "coins")[1:]]
        assert sum(shares[-3:]) / 3 < sum(shares[:3]) / 3 + 0.1


def test_dynamic_sampling_replaces_flat_groups_or_gives_up(tmp_path):
    """Groups of two equal coins go and others come, until each has both; rewards that are all 0 end
    in a message."""
    options = ("dynamic_sampling=true", "overlong_share=0")
    run = prepare(
        resolve(tiny(tmp_path / "a", objective="dapo", group=2, objective_options=options))
    )
    collected = collect(run, 0)
    rewards = collected.samples.extra["raw_reward"].view(4, 2)
    assert torch.equal(rewards.sum(dim=1), torch.ones(4))
    assert len(collected.samples.groups.unique()) == 4
    assert collected.zero_std > 0
    assert collected.drawn > 8
    config = tiny(
        tmp_path / "b",
        objective="dapo",
        reward="task",
        group=2,
        max_batches=2,
        objective_options=options,
    )
    with pytest.raises(
        TrainError, match=r"2 rounds of 4 prompts gave 0 of 8 completions that dapo keeps"
    ):
        rl(config)


def test_a_loss_that_is_not_finite_stops_in_time(tmp_path, monkeypatch):
    """Weights stay as they are, steps are counted as skipped, and the run says what to do."""
    loop = Loop(Reinforcement(prepare(resolve(tiny(tmp_path / "a", max_bad_steps=2)))))
    before = {name: value.clone() for name, value in loop.parts.model.state_dict().items()}
    objective = loop.parts.objective
    original = objective.loss

    def broken(*args):
        loss, metrics = original(*args)
        return loss * float("nan"), metrics

    monkeypatch.setattr(objective, "loss", broken)
    loop.one_step()
    with pytest.raises(TrainError, match="NaN or Inf in 2 steps in a row"):
        loop.one_step()
    after = loop.parts.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows_of(tmp_path / "a")[-1]["skipped"] is True


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_runs_in_the_loop(tmp_path, name):
    """Two updates on micro-batches: what each asks of the loop (logits, hidden states, a reference)
    is there."""
    shared = {
        "group": 4,
        "temperature": 1.0,
        "minibatches": 2,
        "micro_batch": 3,
        "eval_problems": 2,
        "steps": 2,
    }
    loop = Loop(Reinforcement(prepare(resolve(tiny(tmp_path / "a", objective=name, **shared)))))
    before = {key: value.clone() for key, value in loop.parts.model.state_dict().items()}
    loop.one_step()
    loop.one_step()
    rows = rows_of(tmp_path / "a")
    assert all(row["grad_norm"] > 0 and not row["skipped"] for row in rows)
    assert all(row["mismatch/max"] == 0 for row in rows)
    after = loop.parts.model.state_dict()
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )
