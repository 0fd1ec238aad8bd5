"""Config, command line and comparison: what is given is what runs, and what cannot run is refused by name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from limits import HANG
from rl_runs import SEVENS, rows_of, tiny
from training import environment

import nvfp4
from nvfp4 import cli
from nvfp4.recipes import W4A16, Gemm, Recipe, operand
from nvfp4.rl import ablation
from nvfp4.rl import compare as comparing
from nvfp4.rl.config import PRESETS, RLConfig, make_objective, make_task, resolve, to_yaml
from nvfp4.rl.gates import verdicts
from nvfp4.rl.loop import rl
from nvfp4.rl.tasks.registry import TASKS
from nvfp4.rl.text import Text
from nvfp4.rl.tokens import load_vocabulary
from nvfp4.rl.warmstart import MARK, warm_start
from nvfp4.train import log
from nvfp4.train.errors import TrainError
from nvfp4.train.progress import Reporter


def test_a_saved_config_reads_back(tmp_path):
    config = resolve(tiny(tmp_path / "out", seeds=(1, 2), recipes=("bf16", "rl"), objective_options=("kl_coef=1e-3",)))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert cli._without_file(RLConfig, cli.parse(["rl", "--config", str(tmp_path / "config.yaml")])) == config
    assert make_objective(config).kl_coef == 1e-3


def test_options_as_a_mapping_in_a_file(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"task_options": {"shortest": 2}, "objective_options": {"clip_high": 0.3}})
    )
    config = resolve(cli._without_file(RLConfig, cli.parse(["rl", "--config", str(tmp_path / "a.json")])))
    assert (make_task(config).shortest, make_objective(config).clip_high) == (2, 0.3)


def test_a_preset_is_a_set_of_defaults():
    command = cli.parse(["rl", "--preset", "sort", "--steps", "5", "--seeds", "7"])
    assert (command.steps, command.seeds, command.max_new_tokens) == (5, (7,), 8)
    assert command.recipes == PRESETS["sort"]["recipes"]


def test_the_objective_has_a_say_where_the_config_is_open():
    assert (resolve(RLConfig(objective="dapo")).group, resolve(RLConfig(objective="prorl")).temperature) == (16, 1.2)
    assert (resolve(RLConfig(objective="dapo", group=4)).group, resolve(RLConfig()).group) == (4, 8)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_as_it_comes(name):
    """Every answer fits the length limit with its end, every problem the context of a new model."""
    config = resolve(RLConfig(task=name))
    text = Text(load_vocabulary(config.tokenizer))
    problems = make_task(config).problems(300, 5)
    assert max(len(text.answer(problem.answer)) for problem in problems) <= config.max_new_tokens
    assert max(len(text.prompt(problem.prompt)) for problem in problems) + config.max_new_tokens <= config.context
    given = resolve(RLConfig(task=name, max_new_tokens=3, context=77))
    assert (given.max_new_tokens, given.context) == (3, 77)


def test_a_context_that_is_too_small_is_refused(tmp_path):
    """Before the first update of the warm start, and before the first rollout of a model without one."""
    small = {"task": "sort", "context": 8, "max_new_tokens": 8, "device": "cpu", "width": 32, "depth": 1}
    for warm in (3, 0):
        with pytest.raises(TrainError, match=r"context: a prompt and its completion may have .* at most 8"):
            rl(RLConfig(out=str(tmp_path), warm_steps=warm, overwrite=True, **small))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "sorting"}, "task: expected one of sort, .*, got 'sorting'"),
        ({"task_options": ("longest",)}, "task_options: expected name=value, got 'longest'"),
        ({"task_options": ("lengthiest=3",)}, "task sort: .*it takes"),
        ({"objective": "gpro"}, "objective: expected one of grpo, .*, got 'gpro'"),
        ({"recipe": "w4a4"}, "recipe: expected one of .*, rl, .*w4a16, got 'w4a4'"),
        ({"minibatches": 3}, "minibatches: must divide prompts = 32, got 3"),
        ({"warmup": 60}, "warmup: must be below steps = 60, got 60"),
        ({"aqn_stages": 1}, "aqn_stages: .* at least 2 are needed"),
        ({"sampler_recipe": "int4"}, "recipe: expected one of .*, got 'int4'"),
        ({"group": 1}, "group: expected greater than or equal to 2, got 1"),
        ({"top_p": 0.0}, "top_p: expected greater than 0, got 0.0"),
        ({"model": "m", "width": 64}, "width, heads: m brings its own sizes"),
        ({"reward": "random", "control": True}, "control: adds a run with random rewards"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(TrainError, match=message):
        resolve(RLConfig(**fields))


def test_an_unknown_option_of_the_objective_lists_all():
    with pytest.raises(TrainError, match=r"grpo has no clip_hihg; it takes .*clip_high=0.2"):
        make_objective(RLConfig(objective_options=("clip_hihg=0.3",)))
    with pytest.raises(TrainError, match=r"clip_high.*grpo takes"):
        make_objective(RLConfig(objective_options=("clip_high=much",)))


def test_the_warm_start_learns_and_is_made_once(tmp_path, capsys):
    """Half of the demonstrations are wrong: the loss falls to what they leave open; an equal config reuses it."""
    config = resolve(tiny(tmp_path, reward="task", warm_steps=60, warm_batch=32, task="reverse"))
    folder = warm_start(config, tmp_path / "base", Reporter("warm", 60, 20))
    assert float(capsys.readouterr().out.split("loss")[-1]) < 2.6 < 3.4  # ln 32 = 3.47 before
    before = (folder / MARK).stat().st_mtime_ns
    warm_start(config, tmp_path / "base", Reporter("warm", 60, 20))
    assert (folder / MARK).stat().st_mtime_ns == before
    warm_start(dataclasses.replace(config, warm_steps=1), tmp_path / "base", Reporter("warm", 1, 20))
    assert json.loads((folder / MARK).read_text())["warm_steps"] == 1


def test_a_comparison(tmp_path, monkeypatch):
    """Arms of every recipe and seed and a control, from one model; finished ones are kept; figures come together."""
    started = []

    def run_here(arm):
        started.append(arm.name)
        rl(dataclasses.replace(arm.config, resume=True))
        return SimpleNamespace(poll=lambda: 0, returncode=0, terminate=lambda: None, wait=lambda: None)

    monkeypatch.setattr(comparing, "_start", run_here)
    monkeypatch.setattr(ablation, "PROMPTS", 8)
    config = tiny(tmp_path, task=SEVENS, reward="task", steps=2, recipes=("bf16", "rl"), seeds=(3,), control=True)
    report = comparing.compare(config)
    assert started == ["rl-seed3", "control-rl-seed3", "bf16-seed3"]
    assert (tmp_path / "compare.png").stat().st_size > 20_000
    assert all((tmp_path / name / "run.png").stat().st_size > 20_000 for name in started)
    assert json.loads((tmp_path / "compare.json").read_text())["runs"] == json.loads(json.dumps(report["runs"]))
    first = {run["name"]: run["curve"]["reward"][0] for run in report["runs"]}
    assert first["bf16-seed3"] == pytest.approx(first["rl-seed3"], abs=0.2), "the same problems and the same uniforms"
    gates = {gate["name"]: gate for gate in report["gates"]}
    assert gates["mismatch on equal shapes, largest"]["value"] == 0
    assert gates["token_mult_prob_error of one scale for all rows"]["value"] > 1.02
    comparing.compare(config)
    assert len(started) == 3


def test_gates_fail_where_they_should():
    """A run that gains too little, another that loses breadth, a control that wins."""

    def run(recipe, reward, seed, *passes):
        names = ("eval/pass@1", "eval/pass@16")
        ends = {"before": dict(zip(names, passes[:2], strict=True)), "after": dict(zip(names, passes[2:], strict=True))}
        return {
            "recipe": recipe,
            "reward": reward,
            "seed": seed,
            **ends,
            "mismatch": {"same_shape": 0.0, "quantile_999": 0.0},
        }

    good = [run("bf16", "task", 0, 0.6, 1.0, 0.9, 1.0), run("rl", "task", 0, 0.6, 1.0, 0.88, 0.96)]
    control = run("rl", "random", 0, 0.6, 1.0, 0.1, 0.5)
    assert all(gate["passed"] for gate in verdicts([*good, control], []))
    bad = [good[0], run("rl", "task", 0, 0.6, 1.0, 0.7, 0.9), run("rl", "random", 0, 0.6, 1.0, 0.7, 1.0)]
    assert [gate["passed"] for gate in verdicts(bad, [])] == [False, False, False, False, True, True]


def test_w4a16():
    """y is x times what the weight's codes stand for; so is dx, in BF16 as in the recipe rl; dw is a plain layer's."""
    layer = torch.nn.Linear(64, 48)
    x, dy = torch.randn(20, 64, requires_grad=True), torch.randn(20, 48)
    weight = layer.weight.detach().clone()
    nvfp4.convert(layer, W4A16, include="*", seed=0, verbose=False)
    y = layer(x)
    y.backward(dy)
    decoded = nvfp4.quantize(weight, "four_over_six").dequantize()
    assert torch.equal(y, F.linear(x, decoded, layer.bias))
    assert not torch.equal(y, F.linear(x, weight, layer.bias))
    assert torch.equal(x.grad, (dy.bfloat16() @ decoded.bfloat16()).float())
    assert torch.equal(layer.weight.grad, dy.t() @ x.detach())
    with nvfp4.fixed_weights(layer), torch.no_grad():
        assert torch.equal(layer(x), y)
        assert torch.equal(layer(x), y)
    assert Recipe.from_key(W4A16.key) == W4A16
    with pytest.raises(ValueError, match="fprop quantises one operand only"):
        Recipe("x only", Gemm(operand("rtn"), operand(None)))


def test_two_processes_do_what_one_does(tmp_path):
    """Under torchrun: the same completions, and the same figures but for the order of float32 sums."""
    config = tiny(tmp_path / "two", task=SEVENS, reward="task", steps=3, objective="prorl_v2", group=4, temperature=1.0)
    config = dataclasses.replace(config, objective_options=("dynamic_sampling=false",))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "nvfp4.cli", "rl", "--config", str(tmp_path / "config.yaml")]
    child = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=HANG)
    assert child.returncode == 0, child.stderr
    rl(dataclasses.replace(config, out=str(tmp_path / "one")))
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in ("reward", "reward_std", "grad_norm", "loss", "entropy", "kl", "num_tokens", "eval/pass@1"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-6), (a["step"], name)
    first = [log.read(tmp_path / name / "completions.jsonl") for name in ("one", "two")]
    texts = [{(r["step"], r["prompt"], r["completion"]) for r in rows} for rows in first]
    assert len(texts[0] & texts[1]) >= 8
