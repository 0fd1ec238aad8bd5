"""The comparison: one run for each recipe from the same start, three files, nothing done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import signal

import numpy as np
import pytest
from limits import until
from training import start_cli, steps_of, tiny, write_texts

from nvfp4.run import arms
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import to_yaml
from nvfp4.run.plots import draw_comparison, smooth, spread
from nvfp4.train import compare as comparing
from nvfp4.train.compare import compare, comparison, draw_over_seeds, plan, table
from nvfp4.train.config import CompareConfig, TrainConfig, resolve

RECIPES = ("bf16", "rtn", "quartet2")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


def config_of(out, texts, **changes) -> CompareConfig:
    base = tiny(out, texts)
    shared = {field.name: getattr(base, field.name) for field in dataclasses.fields(TrainConfig)}
    return CompareConfig(**{**shared, "recipes": RECIPES, "workers": 1, **changes})


def forking(arms, share, display) -> contextlib.AbstractContextManager:
    """In the place of ``starter``: runs of the tests' own fork server."""
    return contextlib.nullcontext(lambda arguments, output: start_cli(*arguments))


@pytest.fixture(scope="module")
def compared(tmp_path_factory, texts):
    """One comparison, each of its runs in a process."""
    out, said = tmp_path_factory.mktemp("compare") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(arms, "starter", forking)
        compare(config_of(out, texts))
    return out, said.getvalue()


def test_it_writes_one_table_one_picture_and_one_json(compared):
    out, said = compared
    assert {p.name for p in out.iterdir()} == {"compare.json", "compare.png", ".lock", *RECIPES}
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "compare.json").read_text())
    assert [run["recipe"] for run in report["runs"]] == list(RECIPES)
    for run in report["runs"]:
        row = next(
            text for text in said.splitlines() if f" {run['recipe']} " in text and "│" in text
        )
        assert f"{run['val_bpb']:.4f}" in row
        assert f"{run['train_loss']:.4f}" in row


def test_gaps_are_to_bf16_in_nats_and_percent(compared):
    runs = {
        run["recipe"]: run for run in json.loads((compared[0] / "compare.json").read_text())["runs"]
    }
    assert (runs["bf16"]["gap_nats"], runs["bf16"]["gap_percent"]) == (0, 0)
    for recipe in ("rtn", "quartet2"):
        run = runs[recipe]
        assert run["gap_nats"] == run["val_loss"] - runs["bf16"]["val_loss"] != 0
        assert run["gap_percent"] == pytest.approx(
            100 * (run["val_bpb"] - runs["bf16"]["val_bpb"]) / runs["bf16"]["val_bpb"]
        )
        assert run["gap_nats"] == pytest.approx(
            run["gap_percent"] / 100 * runs["bf16"]["val_bpb"] * math.log(2)
        )
        assert run["curve"]["step"] == list(range(1, 13))
        assert run["held_out"]["step"] == [0, 5, 10, 12]


def test_all_recipes_start_alike_and_see_the_same_batches(compared, texts):
    out, _ = compared
    starts = [steps_of(out / recipe)[1]["loss"] for recipe in RECIPES]
    # the same weights and batch; only the quantisation of the forward differs
    assert max(starts) - min(starts) < 0.02
    configs = [
        json.loads((out / recipe / "result.json").read_text())["config"] for recipe in RECIPES
    ]
    differing = {key for config in configs for key in config if config[key] != configs[0][key]}
    assert differing == {"out", "recipe"}


def test_finished_runs_are_not_done_again_and_a_missing_one_is(compared, texts, capsys):
    out, _ = compared
    before = {recipe: (out / recipe / "log.jsonl").stat().st_mtime_ns for recipe in RECIPES}
    first = json.loads((out / "compare.json").read_text())
    (out / "compare.json").unlink()
    assert compare(config_of(out, texts)) == first
    assert capsys.readouterr().out.count("finished before") == 3
    assert {recipe: (out / recipe / "log.jsonl").stat().st_mtime_ns for recipe in RECIPES} == before


def test_runs_of_another_config_are_named_before_any_run_starts(compared, texts, monkeypatch):
    monkeypatch.setattr(arms, "starter", None)
    with pytest.raises(
        TrainError, match=r"bf16 holds a run of another config: lr: 0.01, now 0.5; give --overwrite"
    ):
        compare(config_of(compared[0], texts, lr=0.5))


def test_a_run_that_fails_is_reported_with_its_recipe(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(arms, "starter", forking)
    absent = (str(tmp_path / "absent"),)
    config = config_of(tmp_path, texts, held_out_data=absent, holdout=TrainConfig.holdout)
    with pytest.raises(
        TrainError, match="the run of bf16 ended with exit code 1; its message is above"
    ):
        compare(config)


def test_a_signal_stops_the_run_with_a_checkpoint_and_the_same_command_goes_on(tmp_path, texts):
    config = config_of(
        tmp_path / "out", texts, recipes=("quartet2", "rtn"), steps=4000, save_every=0, eval_every=0
    )
    path = tmp_path / "given.yaml"
    path.write_text(to_yaml(config))
    run = start_cli("compare", "--config", str(path))
    log = tmp_path / "out" / "quartet2" / "log.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") > 3, run)
    run.send_signal(signal.SIGINT)
    run = run.finished()
    said = run.stdout + run.stderr
    assert run.returncode == 130, said
    assert "checkpoint saved" in said
    assert "run the same command again to go on" in said
    assert len(list((tmp_path / "out" / "quartet2" / "checkpoints").iterdir())) == 1


def test_side_by_side_each_line_has_its_runs_name_and_no_loss_changes(
    tmp_path, compared, texts, capsys
):
    """Two at a time, one thread each, from two fork servers: the losses of runs one by one."""
    config = config_of(tmp_path / "out", texts, workers=2)
    compare(config)
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert report["side_by_side"]["workers"] == 2
    assert "2 runs at a time" in said
    assert [run["recipe"] for run in report["runs"]] == list(RECIPES)
    assert said.index("--- quartet2") < said.index("--- bf16"), "the quickest is begun last"
    for run in report["runs"]:
        steps = [line for line in said.splitlines() if line.startswith(f"{run['recipe']}: step ")]
        assert f" 12/{run['steps']}" in steps[-1]
        assert (tmp_path / "out" / run["recipe"] / "output.txt").read_text().count("step ") >= 3
        alone = steps_of(compared[0] / run["recipe"])
        assert steps_of(tmp_path / "out" / run["recipe"]) == alone


def test_a_failure_side_by_side_names_its_run_and_stops_the_others(tmp_path, texts):
    absent = (str(tmp_path / "absent"),)
    config = config_of(
        tmp_path, texts, held_out_data=absent, holdout=TrainConfig.holdout, workers=2
    )
    with pytest.raises(TrainError, match=r"(quartet2|rtn) ended with exit code 1: .*absent"):
        compare(config)


@pytest.mark.parametrize(
    ("cores", "asked", "device", "share"),
    [
        (8, None, "cpu", (3, 2)),
        (2, None, "cpu", (2, 1)),
        (1, None, "cpu", (1, None)),
        (8, 1, "cpu", (1, None)),
        (2, 5, "cpu", (5, 1)),
        (8, None, "cuda", (1, None)),
        (8, 2, "cuda", (2, None)),
    ],
)
def test_cores_are_shared_by_the_runs(tmp_path, texts, monkeypatch, cores, asked, device, share):
    monkeypatch.setattr("torch.get_num_threads", lambda: cores)
    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
    grid = plan(resolve(config_of(tmp_path, texts)))
    grid = [
        dataclasses.replace(a, config=dataclasses.replace(a.config, device=device)) for a in grid
    ]
    found = arms.side_by_side(grid, asked)
    assert (found.workers, found.threads) == share


def test_run_configs_differ_in_recipe_and_folder_only(tmp_path, texts):
    config = resolve(config_of(tmp_path, texts, overwrite=True))
    a, b, _ = (arm.config for arm in plan(config))
    assert dataclasses.replace(b, recipe="bf16", out=a.out) == a
    assert not a.overwrite


def report_of(count: int, recipes: tuple[str, ...] = RECIPES) -> dict:
    steps = list(range(1, count + 1))
    runs = []
    for i, recipe in enumerate(recipes):
        losses = [None if step == 5 else 2 + 3 / step + 0.01 * i for step in steps]
        held_out = {"step": [0, count], "val_loss": [5.5, 2.5 + 0.01 * i], "val_bpb": [7.9, 3.6]}
        numbers = {
            "val_bpb": 3.6 + 0.01 * i,
            "gap_percent": 0.3 * i,
            "gap_nats": 0.01 * i,
            "val_loss": 2.5,
            "train_loss": None,
        }
        costs = {
            "parameters": 5,
            "steps": count,
            "val_bytes": 9,
            "tokens_per_s": 5.0,
            "seconds": 3.0,
            "peak_memory_gib": 0.1,
        }
        runs.append(
            {
                "recipe": recipe,
                "curve": {"step": steps, "loss": losses},
                "held_out": held_out,
                **numbers,
                **costs,
            }
        )
    return {"baseline": recipes[0], "runs": runs}


@pytest.mark.parametrize("count", [5, 13, 400])
@pytest.mark.parametrize("recipes", [("quartet2",), RECIPES, tuple(f"r{i}" for i in range(9))])
def test_the_picture_is_drawn_for_short_and_long_runs_skipped_steps_and_many_recipes(
    tmp_path, count, recipes
):
    draw_comparison(report_of(count, recipes), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert table(report_of(count, recipes)).row_count == len(recipes)


def test_smoothing_keeps_constants_and_passes_over_gaps():
    values = np.full(300, 2.5)
    values[[0, 17, 299]] = np.nan
    assert smooth(values) == pytest.approx(2.5)
    line = np.arange(300.0)
    assert smooth(line)[100:200] == pytest.approx(line[100:200])
    assert smooth(np.array([1.0])) == pytest.approx(1.0)


def test_labels_are_moved_apart_in_order():
    assert spread([1.0, 5.0], gap=1.0) == [1.0, 5.0]
    moved = spread([2.0, 2.0, 2.1], gap=1.0)
    assert sorted(moved) == moved
    assert np.diff(moved) == pytest.approx([1.0, 1.0], abs=1e-3)
    assert np.mean(moved) == pytest.approx(np.mean([2.0, 2.0, 2.1]))


def test_a_comparison_without_bf16_is_to_its_first_recipe(tmp_path, texts):
    config = config_of(tmp_path, texts, recipes=("rtn", "nvidia"))
    results = [
        {"recipe": r, "val_loss": 2.0 + i, "val_bpb": 3.0 + i} for i, r in enumerate(config.recipes)
    ]
    report = comparison(config, plan(config), results)
    assert report["baseline"] == "rtn"
    assert [run["gap_nats"] for run in report["runs"]] == [0.0, 1.0]


def test_seeds_are_compared_in_pairs(tmp_path, texts):
    """Each gap is to bf16 of the same seed; their mean is given with its standard error, by hand
    here."""
    config = resolve(config_of(tmp_path, texts, recipes=("bf16", "rtn"), seeds=(3, 5, 8)))
    grid = plan(config)
    assert [arm.name for arm in grid[2:5]] == ["bf16-seed8", "rtn-seed3", "rtn-seed5"]
    assert [(arm.config.recipe, arm.config.seed) for arm in grid[2:4]] == [("bf16", 8), ("rtn", 3)]
    losses = [2.0, 2.5, 3.0, 2.25, 2.625, 3.5]
    results = [
        {"recipe": arm.config.recipe, "val_loss": loss, "val_bpb": loss}
        for arm, loss in zip(grid, losses, strict=True)
    ]
    report = comparison(config, grid, results)
    assert [run["gap_nats"] for run in report["runs"]] == [0, 0, 0, 0.25, 0.125, 0.5]
    gap = report["paired"]["rtn"]
    assert gap["mean"] == pytest.approx(0.875 / 3)
    deviations = [each - 0.875 / 3 for each in (0.25, 0.125, 0.5)]
    assert gap["standard_error"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 2 / 3))
    assert gap["seeds"] == 3


def test_one_seed_alone_says_nothing_about_its_error_and_one_without_a_partner_does_not_count():
    found = arms.paired_gaps(
        {("bf16", 0): 1.0, ("rtn", 0): 1.5, ("rtn", 1): 9.0, ("sr", 1): 2.0}, "bf16"
    )
    assert found.keys() == {"rtn"}
    assert (found["rtn"]["mean"], found["rtn"]["seeds"]) == (0.5, 1)
    assert math.isnan(found["rtn"]["standard_error"])


def test_the_picture_over_seeds_is_of_means_and_each_gap_is_to_its_own_seed(tmp_path, monkeypatch):
    """Two seeds of each recipe: figures and curves are averaged place by place, a step that one
    skipped has none."""
    report = report_of(13)
    other = json.loads(json.dumps(report["runs"]))
    for run in other:
        run["curve"]["loss"] = [None if step == 3 else 4.0 for step in run["curve"]["step"]]
        run["val_bpb"] += 1
    both = {**report, "runs": [*report["runs"], *other]}
    drawn = []
    monkeypatch.setattr(comparing, "draw_comparison", lambda shown, path: drawn.append(shown))
    draw_over_seeds(both, tmp_path / "x.png")
    means = drawn[0]["runs"]
    assert [run["recipe"] for run in means] == list(RECIPES)
    for mean, one in zip(means, report["runs"], strict=True):
        assert mean["val_bpb"] == pytest.approx(one["val_bpb"] + 0.5)
        losses = zip(one["curve"]["loss"], mean["curve"]["loss"], one["curve"]["step"], strict=True)
        assert all(
            m is None if step in (3, 5) else m == pytest.approx((a + 4) / 2)
            for a, m, step in losses
        )
    monkeypatch.undo()
    draw_over_seeds(both, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
