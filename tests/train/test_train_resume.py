"""A run that was killed, stopped or moved goes on to the last bit; what does not fit is refused by
name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from training import run_cli, steps_of, tiny, write_texts

from nvfp4.cli import main
from nvfp4.run import checkpoint
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import to_yaml
from nvfp4.train.loop import pretrain

KILL = """
import os, signal
import nvfp4.{module} as place
original = place.{name}
def last(*args, **kwargs):
    result = original(*args, **kwargs)
    if {when}:
        os.kill(os.getpid(), signal.{signal})
    return result
place.{name} = last
"""
AFTER_LOGGING_STEP_6 = KILL.format(
    module="run.log", name="Log.write", when="args[1]['step'] == 6", signal="SIGKILL"
)
INSIDE_CHECKPOINT_8 = KILL.format(
    module="run.checkpoint", name="save_file", when="'00000008' in str(args[1])", signal="SIGKILL"
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the child processes: the last bits of a sum may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def started_from_file(config, tmp_path, before):
    """Run the config through the command line in a process that ``before`` interferes with."""
    path = tmp_path / "given.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return run_cli("pretrain", "--config", str(path), before=before)


@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        ("bf16", AFTER_LOGGING_STEP_6),
        ("quartet2", AFTER_LOGGING_STEP_6),
        ("quartet2", INSIDE_CHECKPOINT_8),
    ],
    ids=["bf16-between-steps", "quartet2-between-steps", "quartet2-inside-a-checkpoint"],
)
def test_killed_and_resumed_equals_uninterrupted_to_the_last_bit(tmp_path, texts, recipe, place):
    whole = tiny(tmp_path / "whole", texts, recipe=recipe)
    expected = pretrain(whole)
    killed = dataclasses.replace(whole, out=str(tmp_path / "killed"))
    child = started_from_file(killed, tmp_path, place)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert checkpoint.newest_first(tmp_path / "killed" / "checkpoints")[0].name == "step-00000004"
    assert max(steps_of(tmp_path / "killed")) in (6, 8)
    result = pretrain(dataclasses.replace(killed, resume=True))
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")
    last = [tmp_path / run / "checkpoints" / "step-00000012" for run in ("whole", "killed")]
    for name in ("model", "optimizer", "random"):
        a, b = (load_file(path / f"{name}.safetensors") for path in last)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert (
        json.loads((last[0] / "state.json").read_text())["noise"]
        == json.loads((last[1] / "state.json").read_text())["noise"]
    )
    assert (result["val_loss"], result["val_bpb_bf16"]) == (
        expected["val_loss"],
        expected["val_bpb_bf16"],
    )


def test_the_layers_call_counters_are_what_makes_it_exact(tmp_path, texts, monkeypatch):
    """The test above can fail: without the counters the resumed run draws other noise."""
    whole = tiny(tmp_path / "whole", texts, recipe="quartet2", steps=6, save_every=4)
    pretrain(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    monkeypatch.setattr("nvfp4.run.state.load_noise_state", lambda model, calls: None)
    pretrain(dataclasses.replace(whole, out=str(tmp_path / "again"), resume=True))
    a, b = steps_of(tmp_path / "whole"), steps_of(tmp_path / "again")
    assert [a[step] == b[step] for step in range(1, 7)] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("kept", [True, False])
def test_delayed_amaxes_are_kept_in_checkpoints(tmp_path, texts, monkeypatch, kept):
    """With them a resumed run is exact; without them its first step looks for its own."""
    options = {"recipe": "rtn", "delayed_amax": True, "steps": 6, "save_every": 4}
    whole = tiny(tmp_path / "whole", texts, **options)
    pretrain(whole)
    saved = json.loads(
        (tmp_path / "whole" / "checkpoints" / "step-00000004" / "state.json").read_text()
    )
    (amaxes,) = saved["amax"]
    assert amaxes.keys() == saved["noise"].keys()
    assert all(held["held"][0] > 0 and held["known"][0] == 1 for held in amaxes.values())

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    if not kept:
        monkeypatch.setattr("nvfp4.run.state.load_amax_state", lambda model, amaxes: None)
    pretrain(dataclasses.replace(whole, out=str(tmp_path / "again"), resume=True))
    a, b = steps_of(tmp_path / "whole"), steps_of(tmp_path / "again")
    assert [a[step] == b[step] for step in range(1, 7)] == [True] * 4 + [kept] * 2


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, texts, name, code):
    config = tiny(tmp_path / "run", texts, save_every=0)
    stop = KILL.format(
        module="train.step",
        name="next_token_loss",
        when="args[0].windows.batch == 4 and step_is_7()",
        signal=name,
    )
    stop += "\ncalls = []\ndef step_is_7():\n    calls.append(1)\n    return len(calls) == 7\n"
    child = started_from_file(config, tmp_path, stop)
    assert child.returncode == code, child.stdout + child.stderr
    assert (
        "stopped at step 7, checkpoint saved; go on with: nvfp4 pretrain --config" in child.stderr
    )
    assert "Traceback" not in child.stderr
    command = child.stderr.split("go on with: nvfp4 ")[1].split()
    assert main(command) == 0
    assert sorted(steps_of(tmp_path / "run")) == list(range(13))


def test_a_signal_under_python_raises_interrupted_with_its_number(tmp_path, texts, monkeypatch):
    config = tiny(tmp_path / "run", texts)
    from nvfp4.train import loop

    original = loop.update

    def update(run, step, lr):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(run, step, lr)

    monkeypatch.setattr(loop, "update", update)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        pretrain(config)
    assert caught.value.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.newest_first(tmp_path / "run" / "checkpoints")[0].name == "step-00000003"


@pytest.fixture
def finished(tmp_path, texts):
    config = tiny(tmp_path / "run", texts, steps=6, save_every=2, keep=3)
    pretrain(config)
    return config


def test_resume_goes_back_past_a_damaged_checkpoint_and_says_so(tmp_path, finished, capsys):
    expected = steps_of(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(TrainError, match=r"step-00000006 is damaged: model.safetensors has"):
        pretrain(dataclasses.replace(finished, resume_from=str(newest.parent)))
    capsys.readouterr()
    pretrain(dataclasses.replace(finished, resume=True))
    said = capsys.readouterr().out
    assert "step-00000006 is damaged: model.safetensors has" in said
    assert "resuming from" in said
    assert "step-00000004" in said
    assert steps_of(tmp_path / "run") == expected
    checkpoint.load(newest.parent)  # written anew


def test_resume_with_no_good_checkpoint_left_is_an_error(tmp_path, finished):
    (tmp_path / "run" / "result.json").unlink()
    for path in checkpoint.newest_first(tmp_path / "run" / "checkpoints"):
        (path / "state.json").unlink()
    with pytest.raises(
        TrainError, match="All 3 checkpoints are damaged; start again with --overwrite"
    ):
        pretrain(dataclasses.replace(finished, resume=True))


def test_a_finished_run_is_not_done_again(tmp_path, finished, capsys):
    before = (tmp_path / "run" / "log.jsonl").stat().st_mtime_ns
    result = pretrain(dataclasses.replace(finished, resume=True))
    assert "is finished: bf16: held-out" in capsys.readouterr().out
    assert result["steps"] == 6
    assert (tmp_path / "run" / "log.jsonl").stat().st_mtime_ns == before


def test_an_earlier_run_is_neither_overwritten_nor_mixed_by_accident(tmp_path, finished):
    with pytest.raises(
        TrainError,
        match=r"out: .*run holds an earlier run \(config.yaml, log.jsonl, checkpoints, result",
    ):
        pretrain(finished)
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    pretrain(dataclasses.replace(finished, overwrite=True, steps=4))
    assert max(steps_of(tmp_path / "run")) == 4
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, "lr: 0.01, now 0.5"),
        ({"recipe": "quartet2"}, "recipe: 'bf16', now 'quartet2'"),
        ({"width": 64, "seed": 5}, r"width: 32, now 64; .*seed: 0, now 5"),
        (
            {"width": 64, "allow_changes": ("width",)},
            r"of another model: .*weight: \[\d+, 32\] torch.float32 in the check",
        ),
        (
            {"depth": 2, "allow_changes": ("depth",)},
            "of another model: .*layers.1.*: missing from the checkpoint",
        ),
    ],
)
def test_a_checkpoint_of_another_config_or_model_names_the_fields(finished, changes, message):
    with pytest.raises(TrainError, match=message):
        pretrain(dataclasses.replace(finished, resume=True, **changes))


def test_changed_text_is_noticed(tmp_path, finished):
    moved = write_texts(tmp_path / "changed")
    (moved / "text00.txt").write_text("something else")
    changed = dataclasses.replace(
        finished, resume=True, data=(str(moved),), allow_changes=("seed",)
    )
    with pytest.raises(TrainError, match="data: "):
        pretrain(changed)
    saved = dataclasses.replace(finished, out=str(tmp_path / "b"), data=(str(moved),))
    pretrain(saved)
    (tmp_path / "b" / "result.json").unlink()
    (moved / "text00.txt").write_text("changed once more")
    with pytest.raises(
        TrainError, match="the files have changed since the checkpoint: corpus sha256"
    ):
        pretrain(dataclasses.replace(saved, resume=True))


def test_a_run_can_branch_from_a_checkpoint_with_changes(tmp_path, finished):
    source = tmp_path / "run" / "checkpoints" / "step-00000004"
    branch = dataclasses.replace(
        finished,
        out=str(tmp_path / "branch"),
        resume_from=str(source),
        steps=8,
        allow_changes=("steps",),
    )
    pretrain(branch)
    ours, theirs = steps_of(tmp_path / "branch"), steps_of(tmp_path / "run")
    assert sorted(ours) == list(range(9))
    assert all(ours[step] == theirs[step] for step in range(5))
    with pytest.raises(TrainError, match=r"allow_changes: .*has checkpoints after step-00000004"):
        pretrain(dataclasses.replace(branch, out=finished.out))
    with pytest.raises(TrainError, match="holds another run than"):
        pretrain(branch)


def test_two_processes_do_not_train_in_one_folder(tmp_path, finished):
    from nvfp4.run.folder import RunFolder

    other = RunFolder(finished.out)
    other.lock()
    with pytest.raises(TrainError, match=r"another process \(process \d+ on .*\) is training in"):
        pretrain(dataclasses.replace(finished, overwrite=True))
