"""Config, command line and comparison: what is given is what runs, and what cannot run is refused
by name."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace
from typing import ClassVar

import children
import pytest
import torch
import torch.nn.functional as F
from rl_runs import SEVENS, Sevens, rows_of, tiny
from safetensors.torch import load_file
from training import CLI, environment

import nvfp4
from nvfp4 import cli
from nvfp4.recipes import W4A16, Gemm, Recipe, operand
from nvfp4.rl import compare as comparing
from nvfp4.rl import report as reporting
from nvfp4.rl import setup
from nvfp4.rl.config import PRESETS, RLConfig, make_objective, make_task, remarks, resolve
from nvfp4.rl.loop import rl
from nvfp4.rl.objectives.registry import OBJECTIVES
from nvfp4.rl.report import gates
from nvfp4.rl.tasks.registry import TASKS
from nvfp4.rl.vocabulary import Text, load_vocabulary
from nvfp4.rl.warmstart import MARK, warm_start
from nvfp4.run import arms, log
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import to_yaml


def test_a_saved_config_reads_back(tmp_path):
    config = resolve(
        tiny(
            tmp_path / "out",
            seeds=(1, 2),
            recipes=("bf16", "rl"),
            objective_options=("kl_coef=1e-3",),
        )
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert (
        cli._without_file(RLConfig, cli.parse(["rl", "--config", str(tmp_path / "config.yaml")]))
        == config
    )
    assert make_objective(config).kl_coef == 1e-3


def test_options_as_a_mapping_in_a_file(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps(
            {"task_options": {"shortest": 2}, "objective_options": {"clip_high": 0.3}, "epochs": 2}
        )
    )
    config = resolve(
        cli._without_file(RLConfig, cli.parse(["rl", "--config", str(tmp_path / "a.json")]))
    )
    assert (make_task(config).shortest, make_objective(config).clip_high) == (2, 0.3)


def test_a_preset_leaves_out_what_a_choice_makes_idle():
    """Of the model that it would make where one is given, and of its own objective where another is
    chosen."""
    given = cli.parse(["rl", "--preset", "sort", "--model", "a/folder"])
    assert given.context == RLConfig.context
    assert given.max_new_tokens == PRESETS["sort"]["max_new_tokens"]
    other = cli.parse(["rl", "--preset", "sort", "--objective", "rover"])
    assert (other.objective, other.objective_options) == ("rover", ())
    same = cli.parse(["rl", "--preset", "sort", "--objective", "grpo"])
    assert (same.context, tuple(same.objective_options)) == (32, ("aggregation=dapo",))


def test_a_preset_is_a_set_of_defaults():
    command = cli.parse(["rl", "--preset", "sort", "--steps", "5", "--seeds", "7"])
    assert (command.steps, command.seeds, command.max_new_tokens) == (5, (7,), 8)
    assert command.recipes == PRESETS["sort"]["recipes"]


def test_the_objective_has_a_say_where_the_config_is_open():
    assert (
        resolve(RLConfig(objective="dapo")).group,
        resolve(RLConfig(objective="prorl")).temperature,
    ) == (16, 1.2)
    assert (resolve(RLConfig(objective="dapo", group=4)).group, resolve(RLConfig()).group) == (4, 8)
    ssd, brorl = resolve(RLConfig(objective="ssd")), resolve(RLConfig(objective="brorl"))
    assert (ssd.temperature, ssd.top_p, ssd.top_k, ssd.lr) == (1.6, 0.8, 20, 1e-4)
    assert (brorl.micro_batch, brorl.rollout_rows, brorl.weight_decay) == (64, 1024, 0.01)
    own = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "lr": 3e-4,
        "weight_decay": 0.0,
        "minibatches": 1,
    }
    given = resolve(RLConfig(objective="dapo", **own))
    assert {name: getattr(given, name) for name in own} == own


@pytest.mark.parametrize(
    ("name", "prompts", "updates"),
    [
        ("grpo", 32, 1),
        ("dapo", 32, 16),
        ("dapo", 24, 12),
        ("dapo", 7, 7),
        ("dapo", 34, 2),
        ("rover", 6, 3),
    ],
)
def test_updates_per_rollout_are_the_authors_or_what_divides(name, prompts, updates):
    assert resolve(RLConfig(objective=name, prompts=prompts)).minibatches == updates


def test_a_language_model_has_the_authors_learning_rate(tmp_path):
    """And a new one that of the small models here, whatever the objective."""
    model = str(tmp_path)
    for name, lr in (("grpo", 1e-6), ("prorl", 2e-6), ("ssd", 5e-6)):
        given = {"objective": name, "model": model, "max_new_tokens": 64}
        assert resolve(RLConfig(**given)).lr == lr
        assert resolve(RLConfig(objective=name)).lr == 1e-4


IDLE = [
    ("grpo", "clip_high=0.28", {}, "clip_high cannot act: one update per rollout"),
    ("grpo", "dual_clip=3", {}, "dual_clip cannot act: one update per rollout"),
    ("prorl_v2", "clip_low=0.1", {}, "clip_low cannot act: one update per rollout"),
    (
        "prorl",
        "entropy_target=5.0",
        {"minibatches": 1},
        "entropy_target cannot act: one update per rollout",
    ),
    ("prorl_v2.1", "clip_high=0.3", {"minibatches": 4}, "clip_high cannot act: ratio is one"),
    ("prorl", "reset_stall=2", {}, "reset_stall cannot act: eval_every is 0"),
    ("prorl", "clip_high_max=0.5", {}, "clip_high_max cannot act: entropy_target is not given"),
    ("grpo", "truncated_scale=0.5", {}, "truncated_scale cannot act: truncated is keep, not scale"),
    ("prorl_v2", "overlong_share=0.2", {}, "overlong_share cannot act: truncated is scale"),
    ("grpo", "overlong_penalty=1", {}, "overlong_penalty cannot act: overlong_share is 0"),
    ("grpo", "correction_high=3", {}, "correction_high cannot act: correction none has no bound"),
    ("dapo", "kl=k2", {}, "kl cannot act: kl_coef is 0"),
    (
        "microcoder",
        "diversity_floor=0.3",
        {},
        "diversity_floor cannot act: there are no temperature_stages",
    ),
    ("reasonmaxxer", ("kl_coef=0", "kl=k3"), {}, "kl cannot act: kl_coef is 0"),
]


@pytest.mark.parametrize(("name", "option", "fields", "message"), IDLE)
def test_options_that_cannot_act_are_refused(name, option, fields, message):
    options = (option,) if isinstance(option, str) else option
    with pytest.raises(TrainError, match=f"objective_options: .*{message}"):
        resolve(RLConfig(objective=name, objective_options=options, **fields))


def test_the_same_options_where_they_act():
    for name, options, fields in (
        ("grpo", ("clip_high=0.28", "dual_clip=3"), {"minibatches": 2}),
        ("grpo", ("clip_high=0.28",), {"epochs": 2}),
        ("prorl", ("entropy_target=5.0", "clip_high_max=0.5"), {}),
        ("prorl", ("reset_stall=2",), {"eval_every": 5}),
        ("grpo", ("truncated=scale", "truncated_scale=0.5"), {}),
        ("grpo", ("kl_coef=0.1", "kl=k2"), {}),
    ):
        resolve(RLConfig(objective=name, objective_options=options, **fields))


def test_an_objective_that_would_be_another_is_refused():
    for name, other in (
        ("rover", "REINFORCE with a centred reward"),
        ("gspo", "grpo, since every ratio is still 1"),
    ):
        with pytest.raises(
            TrainError,
            match=f"minibatches: with 1 update per rollout {name} is {other}.*--epochs 2",
        ):
            resolve(RLConfig(objective=name, minibatches=1))
        resolve(RLConfig(objective=name, minibatches=1, epochs=2))


def test_fewer_updates_than_the_authors_do_are_remarked():
    (remark,) = remarks(resolve(RLConfig(objective="dapo", minibatches=1)))
    assert "one update per rollout, where the authors of dapo do 16" in remark
    for fields in ({"objective": "dapo"}, {"objective": "grpo"}, {"objective": "prorl_v2"}):
        assert remarks(resolve(RLConfig(**fields))) == []


def test_options_of_earlier_versions_name_the_new_ones(tmp_path, capsys):
    """On the command line, in a config file, in a run folder that is to go on; of objectives,
    too."""
    message = "truncated_reward is no longer an option: .*--objective-options truncated=scale"
    (tmp_path / "old.yaml").write_text("truncated_reward: 0.5\n")
    for arguments in (
        ["--truncated-reward", "0.5"],
        ["--truncated_reward=0.5"],
        ["--config", str(tmp_path / "old.yaml")],
    ):
        with pytest.raises(TrainError, match=message):
            cli.parse(["rl", *arguments])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("truncated_reward: 0.0\ntask: sort\n")
    config = tiny(tmp_path / "run", resume=True)
    with pytest.raises(
        TrainError,
        match=r"config.yaml is of an earlier version, whose truncated_reward is no longer",
    ):
        rl(config)
    with pytest.raises(
        TrainError,
        match=r"objective: self_distillation is no longer a name: give rejection_sampling",
    ):
        resolve(RLConfig(objective="self_distillation"))
    for name, option, new in (
        ("rover", "divide_by_std=true", "advantage=group_std"),
        ("reasonmaxxer", "problems=50", "problem_share="),
    ):
        with pytest.raises(
            TrainError, match=f"{option.partition('=')[0]} is no longer an option: give {new}"
        ):
            make_objective(RLConfig(objective=name, objective_options=(option,)))
    with pytest.raises(TrainError, match="kl_importance"):
        make_objective(RLConfig(objective_options=("kl_importance=true",)))


class Rare(Sevens):
    """1 for a completion that begins with a seven: many groups have none, so what replaces them is
    seen to."""

    name: ClassVar[str] = "rare"

    def reward(self, problem, completion):
        return float(completion.startswith("7"))


def test_any_two_objectives_differ_at_their_defaults(tmp_path):
    """Two steps of the real loop from equal weights, seeds and problems, all else as the objectives
    have it: no two end with the same weights. Three of them meet their authors' numbers only, not
    each other's: the group of brorl, the dynamic sampling of prorl_v2 against v2.1."""
    ends = {}
    for name in OBJECTIVES:
        out = tmp_path / name
        options = {"reasonmaxxer": ("entropy_gate=0.5",), "brorl": ()}.get(name, ())
        config = tiny(
            out,
            task=f"{__file__}:Rare",
            reward="task",
            objective=name,
            group=None,
            steps=2,
            lr=None,
        )
        fields = {
            "max_batches": 60,
            "save_every": 0,
            "eval_problems": 1,
            "eval_samples": 1,
            "check_every": 0,
        }
        rl(dataclasses.replace(config, objective_options=options, **fields))
        weights = load_file(out / "export" / "model.safetensors")
        ends[name] = torch.cat([weights[key].flatten().double() for key in sorted(weights)])
    for one, other in itertools.combinations(ends, 2):
        assert not torch.equal(ends[one], ends[other]), (one, other)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_as_it_comes(name):
    """Every answer fits the length limit with its end, every problem the context of a new model."""
    config = resolve(RLConfig(task=name))
    text = Text(load_vocabulary(config.tokenizer))
    problems = make_task(config).problems(300, 5)
    assert max(len(text.answer(problem.answer)) for problem in problems) <= config.max_new_tokens
    assert (
        max(len(text.prompt(problem.prompt)) for problem in problems) + config.max_new_tokens
        <= config.context
    )
    given = resolve(RLConfig(task=name, max_new_tokens=3, context=77))
    assert (given.max_new_tokens, given.context) == (3, 77)


def test_a_context_that_is_too_small_is_refused(tmp_path):
    """Before the first update of the warm start, and before the first rollout of a model without
    one."""
    small = {
        "task": "sort",
        "context": 8,
        "max_new_tokens": 8,
        "device": "cpu",
        "width": 32,
        "depth": 1,
    }
    for warm in (3, 0):
        with pytest.raises(
            TrainError, match=r"context: a prompt and its completion may have .* at most 8"
        ):
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
        ({"reward": "format", "control": True}, "control: adds a run with random rewards"),
        ({"random_share": 0.3}, "random_share: only --reward random reads it"),
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
    """Half of the demonstrations are wrong: the loss falls to what they leave open; an equal config
    reuses it."""
    config = resolve(tiny(tmp_path, reward="task", warm_steps=60, warm_batch=32, task="reverse"))
    folder = warm_start(config, tmp_path / "base")
    # ln 32 = 3.47 before
    assert float(capsys.readouterr().out.split("loss")[-1].split()[0]) < 2.6 < 3.4
    before = (folder / MARK).stat().st_mtime_ns
    warm_start(config, tmp_path / "base")
    assert (folder / MARK).stat().st_mtime_ns == before
    warm_start(dataclasses.replace(config, warm_steps=1), tmp_path / "base")
    assert json.loads((folder / MARK).read_text())["warm_steps"] == 1


def test_a_comparison(tmp_path, monkeypatch, pictures):
    """Arms of every recipe and seed and a control, from one model; finished ones are kept; figures
    come together."""
    started = []

    def run_here(arm, display, begin):
        started.append(arm.name)
        rl(dataclasses.replace(arm.config, resume=True))
        return SimpleNamespace(
            poll=lambda: 0, returncode=0, terminate=lambda: None, wait=lambda: None
        )

    monkeypatch.setattr(arms, "_start", run_here)
    monkeypatch.setattr(reporting, "PROMPTS", 8)
    config = tiny(
        tmp_path,
        task=SEVENS,
        reward="task",
        steps=2,
        recipes=("bf16", "rl"),
        seeds=(3,),
        control=True,
    )
    report = comparing.compare(config)
    assert started == ["rl-seed3", "control-rl-seed3", "bf16-seed3"]
    assert (tmp_path / "compare.png").stat().st_size > 20_000
    assert all((tmp_path / name / "run.png").stat().st_size > 20_000 for name in started)
    assert json.loads((tmp_path / "compare.json").read_text())["runs"] == json.loads(
        json.dumps(report["runs"])
    )
    first = {run["name"]: run["curve"]["reward"][0] for run in report["runs"]}
    assert first["bf16-seed3"] == pytest.approx(first["rl-seed3"], abs=0.2), (
        "the same problems and the same uniforms"
    )
    gates = {gate["name"]: gate for gate in report["gates"]}
    assert gates["mismatch on equal shapes, largest"]["value"] == 0
    assert gates["token_mult_prob_error of one scale for all rows"]["value"] > 1.02
    comparing.compare(config)
    assert len(started) == 3


def test_gates_fail_where_they_should():
    """A run that gains too little, another that loses breadth, a control that wins."""

    def run(recipe, reward, seed, *passes):
        names = ("eval/pass@1", "eval/pass@16")
        ends = {
            "before": dict(zip(names, passes[:2], strict=True)),
            "after": dict(zip(names, passes[2:], strict=True)),
        }
        return {
            "recipe": recipe,
            "reward": reward,
            "seed": seed,
            **ends,
            "mismatch": {"same_shape": 0.0, "quantile_999": 0.0},
        }

    good = [run("bf16", "task", 0, 0.6, 1.0, 0.9, 1.0), run("rl", "task", 0, 0.6, 1.0, 0.88, 0.96)]
    control = run("rl", "random", 0, 0.6, 1.0, 0.1, 0.5)
    assert all(gate["passed"] for gate in gates([*good, control], []))
    bad = [
        good[0],
        run("rl", "task", 0, 0.6, 1.0, 0.7, 0.9),
        run("rl", "random", 0, 0.6, 1.0, 0.7, 1.0),
    ]
    assert [gate["passed"] for gate in gates(bad, [])] == [False, False, False, False, True, True]


def test_w4a16():
    """y is x times what the weight's codes stand for; so is dx, in BF16 as in the recipe rl; dw is
    a plain layer's."""
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
    """Under torchrun: the same completions, and the same figures but for the order of float32
    sums."""
    config = tiny(
        tmp_path / "two",
        task=SEVENS,
        reward="task",
        steps=3,
        objective="prorl_v2",
        group=4,
        temperature=1.0,
    )
    config = dataclasses.replace(config, objective_options=("dynamic_sampling=false",))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    child = children.processes(
        2, CLI, ["rl", "--config", str(tmp_path / "config.yaml")], environment()
    )
    assert child.returncode == 0, child.stderr
    rl(dataclasses.replace(config, out=str(tmp_path / "one")))
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in (
            "reward",
            "reward_std",
            "grad_norm",
            "loss",
            "entropy",
            "kl",
            "num_tokens",
            "eval/pass@1",
        ):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-6), (a["step"], name)
    first = [log.read(tmp_path / name / "completions.jsonl") for name in ("one", "two")]
    texts = [{(r["step"], r["prompt"], r["completion"]) for r in rows} for rows in first]
    assert len(texts[0] & texts[1]) >= 8


@pytest.mark.parametrize(
    ("prompts", "advice"), [(32, "or --minibatches 4$"), (30, "got 30; give other --prompts$")]
)
def test_updates_that_do_not_suit_the_processes_are_refused_with_some_that_do(
    prompts, advice, monkeypatch
) -> None:
    """Nobody chose the 16 updates of dapo's authors, and 8 processes have four groups each."""
    monkeypatch.setattr(setup, "accelerator_for", lambda device: SimpleNamespace(num_processes=8))
    with pytest.raises(
        TrainError, match=f"prompts: must be a multiple of minibatches x processes = .*{advice}"
    ):
        setup._accelerator(resolve(RLConfig(objective="dapo", prompts=prompts)))
