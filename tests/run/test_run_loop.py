"""The loop with a training of ten lines: what every training gets from it, without a model of
language."""

from __future__ import annotations

import dataclasses
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from nvfp4.run import log
from nvfp4.run.errors import Interrupted, TrainError
from nvfp4.run.fields import saved_fields
from nvfp4.run.folder import RunFolder
from nvfp4.run.loop import Training, due, finite, train
from nvfp4.run.optim import adamw, learning_rates
from nvfp4.run.options import ResumableConfig
from nvfp4.run.parts import RunParts
from nvfp4.run.processes import Alone
from nvfp4.run.progress import Reporter
from nvfp4.run.update import apply_gradients


@dataclass(frozen=True, kw_only=True)
class Regression(ResumableConfig):
    noise: float = 0.1


class Fit(Training):
    """A line through points that are drawn from the global random state, which a checkpoint must
    therefore hold."""

    command = "fit"
    unit = "fits"
    disturb: dict[int, object] = {}  # noqa: RUF012 - what happens in a step, for the tests

    def __init__(self, config):
        torch.manual_seed(config.seed)
        model = torch.nn.Linear(3, 1)
        super().__init__(
            RunParts(
                config=config,
                accelerator=Alone(),
                report=Reporter("fit", config.steps, config.log_every),
                folder=RunFolder(config.out),
                model=model,
                forward=model,
                optimizer=adamw(model, config),
            )
        )
        self.rate, self.seen = learning_rates(config), 0

    def step(self, step):
        factor = self.disturb[step]() if step in self.disturb else 1.0
        x = torch.randn(8, 3)
        loss = ((self.run.model(x)[:, 0] - x.sum(1)) ** 2).mean() * factor
        loss.backward()
        value = float(loss.detach())
        norm, done = apply_gradients(
            self.run.model, self.run.optimizer, self.rate(step), 1.0, value
        )
        self.seen += len(x)
        return {"loss": value, "grad_norm": norm, "skipped": not done, "seconds": 0.0}

    def state(self):
        return {"seen": self.seen}

    def load(self, snapshot):
        self.seen = snapshot.state["seen"]

    def finish(self):
        result = {"seen": self.seen, "config": saved_fields(self.run.config)}
        self.run.folder.write_result(result)
        return result


@pytest.fixture
def config(tmp_path):
    Fit.disturb = {}
    yield Regression(
        out=str(tmp_path / "a"), steps=9, lr=0.1, warmup=0, weight_decay=0.0, save_every=4
    )
    Fit.disturb = {}


def fit(config):
    return train(config, Fit, lambda result: f"{result['seen']} points", "fit fewer points")


def weights(config):
    return load_file(f"{config.out}/checkpoints/step-{config.steps:08d}/model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_and_resumed_is_uninterrupted_to_the_bit(config, tmp_path, number, request):
    """Weights, moments, random state and the training's own count; the log has every step once."""
    # A run obeys no signal that is ignored, as SIGHUP is under nohup and SIGINT in a script's
    # background.
    handler = signal.signal(number, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, handler))
    whole = fit(config)
    again = dataclasses.replace(config, out=str(tmp_path / "b"))
    Fit.disturb = {2: lambda: os.kill(os.getpid(), number) or 1.0}
    with pytest.raises(
        Interrupted, match=r"stopped at step 3, checkpoint saved; go on with: nvfp4 fit --config"
    ) as stop:
        fit(again)
    assert stop.value.signal_number == number
    Fit.disturb = {}
    torch.manual_seed(12345)
    result = fit(dataclasses.replace(again, resume=True))
    assert (result["seen"], whole["seen"]) == (72, 72)
    assert all(torch.equal(value, weights(config)[name]) for name, value in weights(again).items())
    rows = [log.read(RunFolder(each.out).log) for each in (config, again)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(10))


def test_a_finished_run_is_not_done_again_and_another_config_is_refused(config, capsys):
    fit(config)
    capsys.readouterr()
    assert fit(dataclasses.replace(config, resume=True))["seen"] == 72
    assert capsys.readouterr().out == f"{config.out} is finished: 72 points\n"
    with pytest.raises(TrainError, match=r"noise: 0\.1, now 0\.2"):
        fit(dataclasses.replace(config, resume=True, noise=0.2))
    with pytest.raises(TrainError, match="holds an earlier run"):
        fit(config)


def test_steps_that_are_not_finite_are_skipped_and_too_many_stop_the_run(config):
    Fit.disturb = {step: lambda: float("nan") for step in (1, 3, 4, 6, 7, 8)}
    with pytest.raises(
        TrainError, match=r"NaN or Inf in 3 fits in a row, up to step 9; lower --lr or --clip"
    ):
        fit(dataclasses.replace(config, max_bad_steps=3))
    rows = log.read(RunFolder(config.out).log)
    assert [row["step"] for row in rows[1:] if row["skipped"]] == [2, 4, 5, 7, 8, 9]
    assert {row["loss"] for row in rows[1:] if row["skipped"]} == {None}


def test_running_out_of_memory_says_what_to_lower_and_lets_go_of_the_folder(config):
    def full():
        raise torch.OutOfMemoryError("tried to allocate 7 GiB")

    Fit.disturb = {1: full}
    with pytest.raises(
        TrainError, match="out of memory: tried to allocate 7 GiB; fit fewer points"
    ):
        fit(config)
    RunFolder(config.out).lock()


def test_what_is_due_when():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, 0, 10)] == [10]
    assert [finite(value) for value in (1.5, float("inf"), float("nan"), 3, None)] == [
        1.5,
        None,
        None,
        3,
        None,
    ]


def test_a_branch_that_is_refused_leaves_its_folder_as_it_was(config, tmp_path):
    """So the same command, with the change allowed, goes on."""
    fit(config)
    source = f"{config.out}/checkpoints/step-00000008"
    branch = dataclasses.replace(config, out=str(tmp_path / "b"), resume_from=source, lr=0.05)
    with pytest.raises(TrainError, match="the checkpoint is of another config: lr"):
        fit(branch)
    assert os.listdir(branch.out) == [".lock"]

    # nor does a log that ends too early come along; put right, it does
    branch = dataclasses.replace(branch, allow_changes=("lr",))
    earlier = RunFolder(config.out).log
    whole = earlier.read_text()
    earlier.write_text(whole.partition("\n")[0] + "\n")
    with pytest.raises(TrainError, match="ends at step 0, the checkpoint is of step 8"):
        fit(branch)
    assert os.listdir(branch.out) == [".lock"]

    earlier.write_text(whole)
    fit(branch)
    assert [row["step"] for row in log.read(RunFolder(branch.out).log)] == list(range(10))
