"""The config: what is refused and how it is said, files, the size dial, what may change on
resume."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from nvfp4.rl.config import RLConfig
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import (
    differences,
    free_on_resume,
    from_fields,
    read_config_file,
    saved_config,
    to_fields,
    to_yaml,
)
from nvfp4.train.config import CompareConfig, PretrainConfig, resolve


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps: expected greater than or equal to 1, got 0"),
        ({"steps": "many"}, "steps: expected a valid integer, got 'many'"),
        ({"steps": True}, "steps: expected a valid integer, got True"),
        ({"stepz": 3}, "stepz: no such field; did you mean steps?"),
        ({"qqq": 3}, "qqq: no such field; see --help"),
        ({"compile": 1}, "compile: expected a valid boolean, got 1"),
        ({"lr": "fast"}, "lr: expected a valid number"),
        ({"lr": float("nan")}, "lr: expected a finite number, got nan"),
        ({"lr": -1.0}, "lr: expected greater than 0, got -1.0"),
        ({"schedule": "linear"}, "schedule: expected 'wsd' or 'cosine', got 'linear'"),
        ({"holdout": 1.0}, "holdout: expected less than 1"),
        ({"data": "a.txt"}, "data: expected a valid tuple"),
        ({"batch": 8, "micro_batch": 3}, "micro_batch: must divide batch = 8, got 3"),
        ({"steps": 5, "warmup": 5}, "warmup: must be below steps = 5, got 5"),
        ({"width": 100, "heads": 3}, "heads: width / heads must be an even integer, got 100 / 3"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads: must divide heads = 4, got 3"),
        ({"model": "somewhere", "width": 64}, "width: somewhere brings its own sizes"),
        (
            {"recipe": "quartet"},
            "recipe: expected one of bf16, rtn, nvidia.*got 'quartet'; did you mean quartet2",
        ),
        (
            {"resume": True, "overwrite": True},
            "overwrite: deletes the run that --resume would go on with",
        ),
        ({"resume": True, "resume_from": "x"}, "resume_from: names one checkpoint"),
        ({"allow_changes": ["lr", "stepz"]}, "allow_changes: no such field: stepz"),
    ],
)
def test_wrong_values_are_named_with_what_was_expected(fields, message):
    with pytest.raises(TrainError, match=message):
        resolve(from_fields(PretrainConfig, fields, "file.yaml"))


def test_all_wrong_fields_are_named_at_once_and_the_file_too():
    with pytest.raises(TrainError, match=r"^run\.yaml: steps: .*; batch: "):
        from_fields(PretrainConfig, {"steps": 0, "batch": -1}, "run.yaml")


def test_values_given_in_python_are_checked_like_those_of_a_file():
    with pytest.raises(TrainError, match="steps: expected a valid integer, got '3'"):
        resolve(PretrainConfig(steps="3"))


def test_compare_needs_different_seeds_and_no_other_seed():
    with pytest.raises(TrainError, match="seeds: expected different numbers, got 3, 5, 3"):
        resolve(CompareConfig(seeds=(3, 5, 3)))
    with pytest.raises(TrainError, match="seed: 4 has no effect, since --seeds says which"):
        resolve(CompareConfig(seeds=(3, 5), seed=4))
    assert resolve(from_fields(CompareConfig, {"seeds": "3,5"}, "c.yaml")).seeds == (3, 5)


@pytest.mark.parametrize("recipes", [(), ("bf16", "bf16"), ("bf16", "fp8")])
def test_compare_needs_different_known_recipes(recipes):
    with pytest.raises(TrainError, match="recipes: expected"):
        resolve(CompareConfig(recipes=recipes))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # YAML 1.1 reads 1e-3 as text
        ("c.yaml", "steps: 30\nlr: 1e-3\ndata: [a.txt]\ncompile: true\n"),
        ("c.yml", "steps: 30\nlr: 0.001\ndata:\n- a.txt\ncompile: yes\n"),
        ("c.json", '{"steps": 30, "lr": 1e-3, "data": ["a.txt"], "compile": true}'),
        pytest.param(
            "c.toml", 'steps = 30\nlr = 1e-3\ndata = ["a.txt"]\ncompile = true\n', id="toml"
        ),
    ],
)
def test_files_of_every_kind_give_the_same_config(tmp_path, name, text):
    if name.endswith("toml"):
        pytest.importorskip("tomllib", reason="TOML needs Python 3.11")
    path = tmp_path / name
    path.write_text(text)
    expected = PretrainConfig(steps=30, lr=1e-3, data=("a.txt",), compile=True)
    assert from_fields(PretrainConfig, read_config_file(path), name) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "steps: [3", "is not valid yaml"),
        ("c.json", '{"steps": }', "is not valid json"),
        ("c.yaml", "- 3\n", "must hold fields with values, got a list"),
        ("c.ini", "steps = 3", "expected a .yaml, .yml, .toml or .json file"),
        ("c.yaml", b"\xff", "is not valid yaml"),
        ("absent.yaml", None, "cannot read .*absent.yaml: No such file"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TrainError, match=f"config: .*{message}"):
        read_config_file(path)


def test_a_resolved_config_survives_the_file_and_resolving_again(tmp_path):
    config = resolve(PretrainConfig(depth=3, data=("x", "ü"), keep_last=0.15, keep_first=1))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = from_fields(PretrainConfig, read_config_file(path), str(path))
    assert again == config
    assert resolve(again) == config
    assert type(again.keep_first) is int  # a count of blocks, not a share
    assert json.loads(json.dumps(to_fields(config))) == yaml.safe_load(to_yaml(config))


@pytest.mark.parametrize(
    ("depth", "width", "heads", "ffn", "lr"),
    [
        (1, 128, 2, 384, 0.4 / 128),
        (4, 256, 4, 768, 0.4 / 256),
        (12, 768, 12, 2048, 0.4 / 768),
        (32, 2048, 16, 5504, 0.4 / 2048),
    ],
)
def test_depth_sets_every_size_that_is_left_open(depth, width, heads, ffn, lr):
    config = resolve(PretrainConfig(depth=depth))
    assert (config.width, config.heads, config.kv_heads, config.ffn, config.lr) == (
        width,
        heads,
        heads,
        ffn,
        lr,
    )


def test_sizes_that_are_given_stay():
    config = resolve(
        PretrainConfig(depth=4, width=96, heads=6, kv_heads=2, ffn=100, lr=1.0, warmup=0)
    )
    assert (config.width, config.heads, config.kv_heads, config.ffn, config.lr) == (
        96,
        6,
        2,
        100,
        1.0,
    )
    assert config.warmup == 0


def test_differences_name_what_changes_a_loss_and_nothing_else():
    config = resolve(PretrainConfig())
    saved = to_fields(saved_config(config))
    assert differences(saved, config) == []
    free = dataclasses.replace(
        config, out="elsewhere", resume=True, keep=7, log_every=3, eval_every=1, prompt="x"
    )
    assert differences(saved, free) == []
    changed = dataclasses.replace(config, steps=700, recipe="rtn")
    assert differences(saved, changed) == ["steps: 1500, now 700", "recipe: 'quartet2', now 'rtn'"]
    assert differences(saved, dataclasses.replace(changed, allow_changes=("steps",))) == [
        "recipe: 'quartet2', now 'rtn'"
    ]


def test_what_may_change_on_resume_is_what_cannot_change_a_loss():
    """Word for word: a field that is marked by mistake would let two runs be mixed."""
    shared = {
        "out",
        "overwrite",
        "resume",
        "resume_from",
        "allow_changes",
        "device",
        "max_bad_steps",
        "keep",
    }
    shared |= {"log_every", "eval_every", "save_every", "export_dtype"}
    text = {"eval_bytes", "eval_batch", "final_eval_bytes", "sample_tokens", "prompt"}
    assert free_on_resume(PretrainConfig) == shared | text
    rollouts = {
        "strict",
        "check_every",
        "log_completions",
        "eval_problems",
        "eval_samples",
        "workers",
    }
    assert free_on_resume(RLConfig) == shared | rollouts | {"unsafe_rewards"}
