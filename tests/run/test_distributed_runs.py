"""Both trainers in processes as torchrun starts them: no device named, more processes than
problems, one evaluation."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import children
import pytest
import torch
from rl_runs import rows_of
from rl_runs import tiny as tiny_rl
from safetensors.torch import load_file
from training import CLI, environment, steps_of, tiny, write_texts

from nvfp4.rl import collect as collecting
from nvfp4.rl.config import resolve as resolve_rl
from nvfp4.rl.loop import rl
from nvfp4.run import checkpoint, state
from nvfp4.run.checkpoint import Snapshot
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import to_yaml
from nvfp4.run.loop import Loop
from nvfp4.run.processes import accelerator_for, stop_together
from nvfp4.train.loop import pretrain

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what auto means without a GPU")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


def two_processes(command: str, given: Path, *options: str) -> str:
    run = children.processes(2, CLI, [command, "--config", str(given), *options], environment())
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("process(es)") == run.stdout.count("2 process(es)") == 1
    return run.stdout


def given(tmp_path: Path, config) -> Path:
    path = tmp_path / f"{Path(config.out).name}.yaml"
    path.write_text(to_yaml(config))
    return path


@no_gpu
def test_pretraining_on_two_processes_without_a_device_is_one_run_and_evaluates_as_one_does(
    tmp_path, texts
):
    """Without a GPU it was two trainings of one process each, which fought for the folder.

    nvidia has one scale per activation tensor. Before the first update, the held-out loss is the
    same to the bit for micro-batches of 1, 2 and 8 on one process and for two processes; it used to
    differ in the third digit.
    """
    losses = []
    for name, micro in (("one", 1), ("two", 2), ("eight", 8)):
        shared = {
            "recipe": "nvidia",
            "batch": 8,
            "micro_batch": micro,
            "steps": 4,
            "save_every": 2,
            "device": "auto",
        }
        config = tiny(tmp_path / name, texts, **shared)
        pretrain(config)
        losses.append(steps_of(tmp_path / name)[0]["val_loss"])
    together = replace(config, out=str(tmp_path / "together"), micro_batch=2)
    two_processes("pretrain", given(tmp_path, together))
    losses.append(steps_of(tmp_path / "together")[0]["val_loss"])
    assert losses == losses[:1] * 4

    # The main process reads and checks the checkpoint, the other maps it: they go on alike.
    shutil.copytree(tmp_path / "together", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000004")
    (tmp_path / "again" / "result.json").unlink()
    said = two_processes(
        "pretrain", given(tmp_path, replace(together, out=str(tmp_path / "again"))), "--resume"
    )
    assert "resuming from" in said
    assert steps_of(tmp_path / "again") == steps_of(tmp_path / "together")
    last = [
        load_file(tmp_path / run / "checkpoints/step-00000004/model.safetensors")
        for run in ("again", "together")
    ]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


@no_gpu
def test_reinforcement_learning_on_two_processes_logs_what_all_did(tmp_path):
    """One problem to evaluate and two processes: the second has none. The share of groups of equal
    rewards, which was that of the first process, is that of one process alone, as are all figures
    of the evaluation."""
    config = tiny_rl(
        tmp_path / "one",
        group=2,
        steps=2,
        save_every=0,
        eval_problems=1,
        device="auto",
        check_every=0,
    )
    rl(config)
    two_processes("rl", given(tmp_path, resolve_rl(replace(config, out=str(tmp_path / "two")))))
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert {k: v for k, v in one[0].items() if k.startswith("eval/")} == {
        k: v for k, v in two[0].items() if k.startswith("eval/")
    }
    names = ("frac_reward_zero_std", "samples_drawn", "num_tokens", "reward")
    assert [one[1][name] for name in names] == [two[1][name] for name in names]


def test_what_was_drawn_is_counted_over_processes_which_may_draw_unequally(monkeypatch):
    """Dynamic sampling: this process took one round of 8 samples, the other three; 4 and 20 were in
    flat groups."""
    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2))
    monkeypatch.setattr(
        "nvfp4.run.processes.gather_object", lambda mine: [*mine, (20, 24, Counter({"x": 24}))]
    )
    assert collecting._of_all_processes(run, 4, 8, Counter(), 0) == (24, 32)
    with pytest.raises(
        TrainError, match=r"step 1: every reward of 32 completions failed, .*: x \(32 times\)"
    ):
        collecting._of_all_processes(run, 4, 8, Counter({"x": 8}), 0)


OTHERS = SimpleNamespace(num_processes=2, is_main_process=False)


def other_says(monkeypatch, reason: str | None) -> list[Any]:
    """The exchange of two processes, of which the other one gives ``reason``; what ours gave."""
    given: list[Any] = []

    def gather_object(mine: list[Any]) -> list[Any]:
        given.extend(mine)
        return [reason, *mine]

    monkeypatch.setattr("nvfp4.run.processes.gather_object", gather_object)
    return given


def test_what_one_process_refuses_ends_all_of_them(monkeypatch):
    """It raised in the one, and the others waited at the next exchange."""
    given = other_says(monkeypatch, "out: full")
    with pytest.raises(TrainError, match=r"^out: full$"), stop_together(OTHERS):
        pass
    with pytest.raises(TrainError, match=r"^mine$"), stop_together(OTHERS):
        raise TrainError("mine")
    assert given == [None, "mine"]  # told, so that the other one ends too
    other_says(monkeypatch, None)
    with stop_together(OTHERS):
        pass


def test_a_rollout_that_cannot_go_on_in_one_process_tells_the_others(monkeypatch):
    """Log-probabilities that are not finite, say, or too few groups that teach something."""
    given = other_says(monkeypatch, None)
    config = SimpleNamespace(
        group=2, prompts=4, steps=9, max_batches=3, aqn_stages=0, aqn_start=0.0, aqn_end=0.0
    )
    run = SimpleNamespace(accelerator=OTHERS, config=config, sampling=lambda: None)

    def lost(*args: Any) -> None:
        raise TrainError("the model's log-probabilities are NaN or Inf")

    monkeypatch.setattr(collecting, "_round", lost)
    with pytest.raises(TrainError, match="NaN or Inf"):
        collecting.collect(run, 0)
    assert given == ["the model's log-probabilities are NaN or Inf"]


@pytest.mark.parametrize("place", ["_open_folder", "_save"])
def test_a_folder_that_the_main_process_cannot_use_ends_the_others(monkeypatch, place):
    """It alone opens the folder and saves."""
    other_says(monkeypatch, "out: another process is training in it")
    monkeypatch.setattr(state, "capture", lambda *args: Snapshot({}, {}))
    monkeypatch.setattr("nvfp4.run.loop.machine", lambda accelerator: {})
    monkeypatch.setattr("nvfp4.run.loop.saved_fields", lambda config: {})
    loop = Loop.__new__(Loop)
    loop.training = SimpleNamespace(data_sha256="", state=dict)
    loop.parts = SimpleNamespace(accelerator=OTHERS, model=None, optimizer=None)
    loop.config, loop.step, loop.bad_in_a_row = None, 1, 0
    with pytest.raises(TrainError, match="another process is training"):
        getattr(loop, place)()


def test_only_the_main_process_copies_the_model_when_one_is_saved():
    """Each of eight processes used to hold 12 bytes per parameter in the host's memory at every
    checkpoint."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    others = state.capture(
        model, optimizer, SimpleNamespace(is_main_process=False, num_processes=1), {"step": 1}
    )
    assert others.tensors == {}
    main = state.capture(
        model, optimizer, SimpleNamespace(is_main_process=True, num_processes=1), {"step": 1}
    )
    assert {name: len(group) for name, group in main.tensors.items()} == {
        "model": 2,
        "optimizer": 6,
        "random": 1,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped")
def test_a_second_reader_neither_reads_nor_copies_the_tensors(tmp_path, monkeypatch):
    """What the main process has verified is mapped by the others: the memory is that of the page
    cache, once."""
    tensors = {"model": {"w": torch.arange(1_000_000, dtype=torch.float32)}}
    path = checkpoint.save(tmp_path, Snapshot({"step": 1}, tensors), keep=1)
    monkeypatch.setattr(checkpoint, "sha256", lambda file: 1 / 0)
    loaded = checkpoint.load(path, verify=False)
    assert torch.equal(loaded.tensors["model"]["w"], tensors["model"]["w"])
    where = loaded.tensors["model"]["w"].data_ptr()
    maps = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "model.safetensors" in line
    ]
    assert any(
        int(line.split("-")[0], 16) <= where < int(line.split("-")[1].split()[0], 16)
        for line in maps
    )
    with pytest.raises(ZeroDivisionError):
        checkpoint.load(path)


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    """A launcher's two processes on a device that cannot join them: MPS, say."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(device=torch.device("mps"), num_processes=1)
    monkeypatch.setattr("nvfp4.run.processes.Accelerator", lambda cpu: alone)
    with pytest.raises(
        TrainError, match="device: 2 processes were started, but on mps they do not find each other"
    ):
        accelerator_for("mps")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert accelerator_for("mps") is alone
    monkeypatch.delenv("LOCAL_RANK")
    alone.num_processes = 4  # found by the variables of MPI, which names no LOCAL_RANK
    assert accelerator_for("mps") is alone
