"""What ends a run of reinforcement learning early: rewards that all fail, options that cannot act,
signals."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from rl_runs import FAILING, rows_of, tiny
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from training import run_cli, write_texts
from training import tiny as tiny_pretraining
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from nvfp4.numerics.torch_state import float64_device
from nvfp4.rl import learn as learning
from nvfp4.rl import rollout as rollouts
from nvfp4.rl import warmstart
from nvfp4.rl.collect import collect
from nvfp4.rl.config import resolve
from nvfp4.rl.evaluate import evaluate
from nvfp4.rl.learn import learn
from nvfp4.rl.loop import rl
from nvfp4.rl.objectives import advantages
from nvfp4.rl.objectives.delta import token_weights
from nvfp4.rl.objectives.lengths import excused, overlong_penalty
from nvfp4.rl.objectives.microcoder import MicroCoder
from nvfp4.rl.objectives.reasonmaxxer import chosen_groups
from nvfp4.rl.objectives.rover import Rover
from nvfp4.rl.setup import prepare
from nvfp4.rl.warmstart import warm_start
from nvfp4.run import log
from nvfp4.run.causal import check_causal
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import to_yaml
from nvfp4.run.model import build_model
from nvfp4.run.tokens import ByteTokenizer
from nvfp4.train import setup as pretraining
from nvfp4.train import step as pretraining_step
from nvfp4.train.config import PretrainConfig
from nvfp4.train.config import resolve as resolve_pretraining
from nvfp4.train.evaluate import evaluate as evaluate_text

TASKS = """
import numpy as np
from nvfp4.rl.tasks.base import Problem, Task
class Nan(Task):
    name, vocabulary = "nan", "symbols"
    def problem(self, rng): return Problem(f"{rng.integers(1000)}>", "1")
    def reward(self, problem, completion): return float("nan")
class Later(Nan):
    "Good until the third batch of rewards: two of the first evaluation, one of the first step."
    calls = 0
    def verdicts(self, problems, completions):
        self.calls += 1
        return super().verdicts(problems, completions)
    def reward(self, problem, completion): return 0.5 if self.calls <= 3 else float("nan")
"""


def task_of(tmp_path: Path, name: str) -> str:
    (tmp_path / "tasks.py").write_text(TASKS)
    return f"{tmp_path / 'tasks.py'}:{name}"


# Rewards that fail


def test_a_run_whose_rewards_all_fail_ends_with_their_reasons(tmp_path):
    """It used to train to the end on nothing, with exit code 0."""
    path = tmp_path / "given.yaml"
    config = tiny(tmp_path / "run", task=task_of(tmp_path, "Nan"), reward="task")
    path.write_text(to_yaml(resolve(config)))
    child = run_cli("rl", "--config", str(path))
    assert child.returncode == 1, child.stdout + child.stderr
    why = (
        r"the reward must be a number in \[0, 1\], got nan \(16 times\); repair the rewards, and "
        r"go on"
    )
    assert child.stderr.startswith(
        "nvfp4: error: evaluation: every reward of 16 completions failed, so that nothing"
    )
    with pytest.raises(
        TrainError,
        match=f"every reward of 16 completions failed, so that nothing can be learnt: {why}",
    ):
        rl(dataclasses.replace(config, overwrite=True))


@pytest.mark.parametrize("reward", ["task", "random"])
def test_a_step_whose_rewards_all_fail_ends_the_run_before_its_update(tmp_path, reward):
    """Also with coins for rewards, which are the control of a run whose rewards do not fail."""
    config = tiny(tmp_path / "run", task=task_of(tmp_path, "Later"), reward=reward)
    with pytest.raises(
        TrainError, match=r"step 2: every reward of 16 completions failed, .*got nan \(16 times\)"
    ):
        rl(config)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 1]


def test_dynamic_sampling_says_that_rewards_fail_not_that_problems_are_hard(tmp_path):
    options = ("dynamic_sampling=true", "overlong_share=0")
    shared = {"objective": "dapo", "max_batches": 2, "objective_options": options}
    run = prepare(
        resolve(tiny(tmp_path / "run", task=task_of(tmp_path, "Nan"), reward="task", **shared))
    )
    with pytest.raises(TrainError, match="step 1: every reward of 32 completions failed"):
        collect(run, 0)


def test_failed_rewards_are_logged_with_their_reasons_and_training_goes_on(tmp_path):
    """By count in evaluations too, where some failed unseen."""
    rl(tiny(tmp_path, task=FAILING, reward="task", steps=1))
    first = log.read(tmp_path / "log.jsonl")[0]
    assert 0 < first["eval/failed"] < 16


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def __init__(self): raise RuntimeError('boo')", "task .*: RuntimeError: boo"),
        (
            "def problem(self, rng): raise RuntimeError('boo')",
            r"no problem can be made: RuntimeError: boo \(.*own\.py, line 3",
        ),
        (
            "def problem(self, rng): return None",
            "no problem can be made: AttributeError: 'NoneType'",
        ),
        ("def problem(self, rng): exit(3)", "no problem can be made: .*: 3"),
        (
            "def reward(self, problem, completion): sys.exit(3)",
            r"every reward of 16 completions failed.*SystemExit: 3",
        ),
    ],
)
def test_a_class_of_a_user_that_fails_is_named_with_its_line(tmp_path, body, message):
    """They came as tracebacks; sys.exit ended the run with the exit code of its choice."""
    (tmp_path / "own.py").write_text(
        f"import sys; from rl_runs import Sevens\nclass Own(Sevens):\n    {body}\n"
    )
    with pytest.raises(TrainError, match=message):
        rl(tiny(tmp_path / "run", task=f"{tmp_path / 'own.py'}:Own", reward="task"))
    (tmp_path / "exits.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(TrainError, match="cannot be imported: SystemExit: 3"):
        resolve(tiny(tmp_path / "run", task=f"{tmp_path / 'exits.py'}:Own"))


# The warm start


def stopped_at(monkeypatch, update: int, number: int) -> list[float]:
    """A signal in that update of the warm start; the losses of all that are done."""
    losses: list[float] = []
    original = warmstart.supervised_loss

    def watched(*args):
        loss = original(*args)
        losses.append(float(loss.detach()))
        if len(losses) == update:
            os.kill(os.getpid(), number)
        return loss

    monkeypatch.setattr(warmstart, "supervised_loss", watched)
    return losses


def test_a_warm_start_that_is_stopped_goes_on_to_the_last_bit(tmp_path, monkeypatch):
    """SIGTERM used to lose it: a third training loop, without handler and without checkpoint."""
    config = resolve(tiny(tmp_path / "a", warm_steps=7, warm_batch=4, save_every=0))
    whole = stopped_at(monkeypatch, 99, signal.SIGTERM)
    warm_start(config, tmp_path / "a" / "base")
    monkeypatch.undo()
    first = stopped_at(monkeypatch, 3, signal.SIGTERM)
    config = dataclasses.replace(config, out=str(tmp_path / "b"))
    with pytest.raises(
        Interrupted, match="stopped at update 3 of the warm start, checkpoint saved"
    ) as caught:
        rl(config)
    assert caught.value.signal_number == signal.SIGTERM
    monkeypatch.undo()
    rest = stopped_at(monkeypatch, 99, signal.SIGTERM)
    rl(config)  # the same command, without --resume: nothing of the run itself was there
    assert (len(first), len(rest)) == (3, 4)
    assert first + rest == whole
    a, b = (load_file(tmp_path / name / "base" / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert sorted(path.name for path in (tmp_path / "b").iterdir() if "base" in path.name) == [
        "base"
    ]


def test_a_warm_start_that_is_killed_goes_on_and_one_of_another_config_does_not(
    tmp_path, monkeypatch
):
    code = (
        "import os, signal\nfrom nvfp4.rl import warmstart\noriginal, calls = "
        "warmstart.supervised_loss, []\n"
    )
    code += (
        "def update(*args):\n    calls.append(1)\n    len(calls) == 6 and os.kill(os.getpid(), "
        "signal.SIGKILL)\n"
    )
    code += "    return original(*args)\nwarmstart.supervised_loss = update\n"
    config = tiny(tmp_path / "run", warm_steps=7, warm_batch=4, save_every=2, steps=1)
    (tmp_path / "given.yaml").write_text(to_yaml(resolve(config)))
    child = run_cli("rl", "--config", str(tmp_path / "given.yaml"), before=code)
    assert child.returncode == -signal.SIGKILL, child.stdout + child.stderr
    assert [path.name for path in (tmp_path / "run" / "base.unfinished").iterdir()] == [
        "step-00000004"
    ]
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for out, changes, left in (("other", {"warm_lr": 1e-3}, 7), ("run", {}, 3)):
        updates = stopped_at(monkeypatch, 99, signal.SIGTERM)
        changed = resolve(dataclasses.replace(config, out=str(tmp_path / out), **changes))
        warm_start(changed, tmp_path / out / "base")
        assert len(updates) == left
        monkeypatch.undo()


# Options that cannot act, sizes that cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"control": True, "reward": "task"},
            "control: True has no effect, since only a comparison has them: give --seeds or "
            "--recipes",
        ),
        ({"workers": 2}, "workers: 2 has no effect"),
        (
            {"recipes": ("bf16", "rl"), "recipe": "w4a16"},
            "recipe: 'w4a16' has no effect, since --recipes says which",
        ),
        ({"warm_lr": 1e-3}, "warm_lr: 0.001 has no effect, since there is no warm start"),
        ({"aqn_start": 0.5}, "aqn_start: 0.5 has no effect"),
        (
            {"schedule": "cosine", "decay": 0.5},
            "decay: 0.5 has no effect, since only the schedule wsd has such a part",
        ),
        ({"min_lr": 0.5}, "min_lr: 0.5 has no effect, since without --decay"),
        (
            {"objective": "prorl", "objective_options": ("reset_stall=2",)},
            "objective_options: reset_stall cannot act: eval_every is 0",
        ),
        (
            {"model": ".", "depth": 4, "width": None, "heads": None},
            "context: 32 has no effect, since --model brings",
        ),
        (
            {"model": ".", "depth": 2, "width": None, "heads": None, "context": None},
            "depth: 2 has no effect",
        ),
        (
            {
                "model": ".",
                "depth": 4,
                "width": None,
                "heads": None,
                "context": None,
                "warm_steps": 5,
            },
            "warm_steps: . is trained as it is, without a warm start",
        ),
    ],
)
def test_an_option_that_cannot_act_is_refused(tmp_path, fields, message):
    with pytest.raises(TrainError, match=f"^{message}"):
        resolve(tiny(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ".", "depth": 5}, "depth: 5 has no effect, since --model brings its own sizes"),
        ({"model": ".", "tie_embeddings": True}, "tie_embeddings: True has no effect"),
        ({"schedule": "cosine", "decay": 0.5}, "decay: 0.5 has no effect"),
        ({"decay": 0.0, "min_lr": 0.1}, "min_lr: 0.1 has no effect"),
        (
            {"held_out_data": ("x",), "holdout": 0.5},
            "holdout: 0.5 has no effect, since --held-out-data says",
        ),
    ],
)
def test_so_it_is_in_pretraining(fields, message):
    with pytest.raises(TrainError, match=f"^{message}"):
        resolve_pretraining(PretrainConfig(**fields))


STAGES = ("length_stages=[6,40]", "length_stage_steps=[0,2]", "dynamic_sampling=false")


def test_a_length_stage_beyond_the_context_is_refused_before_the_warm_start(tmp_path):
    """It used to end the run in the step in which the stage began. A context that is left open has
    room for it."""
    fields = {"objective": "prorl", "objective_options": STAGES, "warm_steps": 50, "warm_batch": 4}
    with pytest.raises(
        TrainError, match=r"context: a prompt and its completion may have \d+ tokens, .* at most 32"
    ):
        prepare(resolve(tiny(tmp_path / "run", **fields)))
    assert not (tmp_path / "run" / "base").exists()
    assert resolve(tiny(tmp_path / "run", **{**fields, "context": None})).context >= 64


def test_a_length_stage_beyond_the_context_of_a_given_model_is_refused(tmp_path):
    rl(tiny(tmp_path / "first", steps=1, save_every=0, eval_problems=2))
    export = str(tmp_path / "first" / "export")
    own = {
        "model": export,
        "depth": 4,
        "width": None,
        "heads": None,
        "context": None,
        "warm_steps": None,
        "lr": None,
    }
    with pytest.raises(
        TrainError, match=r"context: .*the model takes at most 32; lower .*length stages"
    ):
        prepare(resolve(tiny(tmp_path / "run", objective="prorl", objective_options=STAGES, **own)))


def test_a_prompt_of_a_file_that_is_too_long_is_refused_before_the_first_step(tmp_path):
    """One row of 2000: it used to end the run in the step that drew it."""
    rows = [f'{{"prompt": "{i}>", "answer": "1"}}' for i in range(2000)]
    rows[1234] = f'{{"prompt": "{"1" * 30}>", "answer": "1"}}'
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(
        TrainError, match=r"context: a prompt and its completion may have 37 tokens"
    ):
        prepare(resolve(tiny(tmp_path / "run", task=str(tmp_path / "rows.jsonl"))))


def test_evaluations_have_one_length_and_temperature_and_say_which(tmp_path):
    """The longest of all stages, before and after alike; they used to cut what a later stage had
    taught."""
    options = ("length_stages=[6,20]", "length_stage_steps=[0,1]", "dynamic_sampling=false")
    config = resolve(
        tiny(
            tmp_path,
            objective="prorl",
            objective_options=options,
            temperature=1.5,
            max_new_tokens=2,
        )
    )
    run = prepare(config)
    row, shown = evaluate(run)
    assert (row["eval/max_new_tokens"], row["eval/temperature"]) == (20, 1.5)
    assert row["eval/mean_length"] > 2
    run.objective._steps = 1
    assert evaluate(run) == (row, shown)


def test_a_run_that_learns_from_evaluations_keeps_them_on_resume(tmp_path):
    """eval_problems, eval_samples and eval_every are free for others."""
    options = ("reset_stall=2", "dynamic_sampling=false")
    fields = {
        "objective": "prorl",
        "objective_options": options,
        "temperature": 1.0,
        "steps": 2,
        "eval_every": 1,
    }
    config = tiny(tmp_path / "run", **fields, save_every=1)
    rl(config)
    for changes in ({"eval_problems": 4}, {"eval_samples": 1}, {"eval_every": 2}):
        name = next(iter(changes))
        with pytest.raises(TrainError, match=f"{name}: {getattr(config, name)}, now"):
            rl(dataclasses.replace(config, resume=True, **changes))
    rl(dataclasses.replace(config, resume=True, eval_problems=4, allow_changes=("eval_problems",)))


# Models


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_sees_the_future_is_refused_by_both_trainers(tmp_path):
    """A BERT loads as a causal LM; its loss falls to nothing. With fresh weights attention is
    weakest."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertLMHeadModel(BertConfig(vocab_size=272, **sizes)).save_pretrained(tmp_path / "bert")
        decoder = BertLMHeadModel(BertConfig(vocab_size=272, is_decoder=True, **sizes))
        mixture = MixtralForCausalLM(
            MixtralConfig(vocab_size=272, num_key_value_heads=2, num_local_experts=4, **sizes)
        )
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=272, **sizes))
    ByteTokenizer().save(tmp_path / "bert")
    message = (
        r"model: .*bert \(BertLMHeadModel\) is not causal: the logits of its first 8 tokens move "
        r"by .* give"
    )
    with pytest.raises(TrainError, match=message):
        build_model(str(tmp_path / "bert"), ByteTokenizer(), 0)
    own = {
        "model": str(tmp_path / "bert"),
        "depth": 4,
        "width": None,
        "heads": None,
        "context": None,
        "lr": None,
    }
    with pytest.raises(TrainError, match=message):
        prepare(resolve(tiny(tmp_path / "run", warm_steps=None, **own)))
    before = torch.get_rng_state()
    for model in (decoder, mixture, llama):
        check_causal(model.train(), "it")
        assert model.training
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        llama.model.norm.weight[3] = float("nan")
    with pytest.raises(
        TrainError, match="model: the logits of it are NaN; its weights are damaged"
    ):
        check_causal(llama, "it")


def test_the_name_of_a_model_on_a_hub_is_answered_with_the_model(tmp_path):
    """It used to say that the tokenizer was no local folder."""
    message = (
        r"^model: expected the folder of a local .*, got 'Qwen/Qwen3-0.6B'; nothing is "
        r"downloaded here: fetch it"
    )
    own = {
        "model": "Qwen/Qwen3-0.6B",
        "depth": 4,
        "width": None,
        "heads": None,
        "context": None,
        "lr": None,
    }
    with pytest.raises(TrainError, match=message):
        resolve(tiny(tmp_path / "run", warm_steps=None, **own))
    with pytest.raises(TrainError, match=message):
        pretraining.prepare(
            resolve_pretraining(PretrainConfig(model="Qwen/Qwen3-0.6B", device="cpu"))
        )


# Memory and devices


@pytest.mark.parametrize("changes", [{"micro_batch": 4}, {}], ids=["micro-batches", "one-forward"])
def test_no_second_graph_is_alive_while_learning(tmp_path, monkeypatch, changes):
    """Of all log-probabilities with a graph that the trainer has made, those of this very loss are
    the only ones left: not those that were compared with the sampler, and not those of the
    micro-batch before."""
    run = prepare(resolve(tiny(tmp_path, minibatches=1, **changes)))
    samples = collect(run, 0).samples
    made: list[weakref.ref] = []
    alive: list[int] = []
    score, loss = run.score, run.objective.loss

    def scored(*args):
        scores = score(*args)
        if scores.logprobs.requires_grad:
            made.append(weakref.ref(scores.logprobs))
        return scores

    def counted(*args):
        alive.append(sum(ref() is not None for ref in made))
        return loss(*args)

    monkeypatch.setattr(run, "score", scored)
    monkeypatch.setattr(run.objective, "loss", counted)
    learn(run, samples, 1.0, 1e-3, check=True)
    assert alive == [1] * (4 if changes else 1)
    assert len(made) == (5 if changes else 1)


class NoFloat64(TorchDispatchMode):
    """A CPU without float64, as MPS is: an operation that gives one anywhere but on the device
    "meta" fails."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                assert value.device.type == "meta", f"{function} gives float64 on the device"
        return found


def test_sums_are_made_where_float64_is(tmp_path, monkeypatch):
    """MPS has none: the first step failed there. Here the CPU has none and the stand-in for it is
    the device "meta", whose numbers cannot be read, so that each ends where the sum would be
    read."""
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    text = pretraining.prepare(
        resolve_pretraining(tiny_pretraining(tmp_path / "p", write_texts(tmp_path / "texts")))
    )
    run = prepare(resolve(tiny(tmp_path, attention="sdpa")))  # what auto is on any device but a CPU
    samples = collect(run, 0).samples
    scores = run.score(run.model, samples, 1.0)
    samples = run.objective.prepare(
        dataclasses.replace(samples, old_logprobs=scores.logprobs.detach()), scores
    )
    for module in ("train.step", "train.evaluate", "rl.samples"):
        monkeypatch.setattr(
            f"nvfp4.{module}.float64_device", lambda device: torch.device("meta"), raising=False
        )
    calls = (
        lambda: pretraining_step.update(text, 0, 1e-3),
        lambda: evaluate_text(text.model, text.held_out, 2, text.autocast, text.accelerator),
        lambda: learning._update(run, samples, [None], 16, 1.0, 1e-3),
        lambda: rollouts.pick(
            torch.zeros(2, 5), rollouts.Sampling(4), rollouts.uniforms(0, torch.arange(2), 0)
        ),
    )
    for call in calls:
        with NoFloat64(), pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
            call()


def test_objectives_count_where_float64_is(monkeypatch):
    """The same of what objectives make of rewards, lengths and draws, before any loss."""
    for module in ("samples", "objectives.delta"):
        monkeypatch.setattr(
            f"nvfp4.rl.{module}.float64_device", lambda device: torch.device("meta")
        )
    rewards, groups, mask = (
        torch.tensor([1.0, 0.0, 1.0, 1.0]),
        torch.tensor([0, 0, 1, 1]),
        torch.ones(4, 3).bool(),
    )
    no, lengths = torch.zeros(4).bool(), torch.full((4,), 3)
    calls = (
        lambda: advantages.has_spread(rewards, groups),
        lambda: advantages.group_advantages(rewards, groups, divide_by_std=True),
        lambda: advantages.population_advantages(rewards, groups),
        lambda: advantages.leave_one_out_advantages(rewards, groups),
        lambda: advantages.normalise_over_batch(rewards, mask),
        lambda: token_weights(torch.randn(4, 2), rewards - 0.5, 1),
        lambda: overlong_penalty(lengths, 4, 0.5),
        lambda: excused(~no, no, no, MicroCoder()._draws(groups), 0.5),
        lambda: Rover()._batch_rates(rewards),
        lambda: chosen_groups(rewards, groups, lengths, no, 1),
    )
    for call in calls:
        with NoFloat64(), pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
            call()
