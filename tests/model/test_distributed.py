"""Several processes on one machine, over gloo; what each checks is in ``distributed_worker.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import children
import distributed_worker as worker
import pytest
import torch
from limits import HANG
from training import environment, run_checks, steps_of, tiny, write_texts

import nvfp4
from nvfp4.run.fields import to_yaml
from nvfp4.train.loop import pretrain

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python module in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def test_processes_are_told_what_torchrun_tells(tmp_path):
    """Every variable that it sets: what runs here in processes of ours runs under torchrun too."""
    script = tmp_path / "names.py"
    script.write_text("import json, os\nprint('told', json.dumps(dict(os.environ)))")
    run = launch(*TORCHRUN, "1", str(script))
    told = json.loads(run.stdout.partition("told ")[2])
    ours = children.torchrun_environment(0, 1, int(told["MASTER_PORT"]))
    of_the_agent = {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"}
    assert told.keys() - environment().keys() - of_the_agent == ours.keys()
    free = {"MASTER_ADDR", "TORCHELASTIC_RUN_ID"}
    assert {name: told[name] for name in ours.keys() - free} == {
        name: ours[name] for name in ours.keys() - free
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "two"
    return folder, run_checks("distributed_worker", folder, 2)


@pytest.fixture(scope="module")
def four(two):
    folder = two[0].parent / "four"
    return folder, run_checks("distributed_worker", folder, 4)


def verdict(results: dict[str, list[str | None]], name: str) -> None:
    errors = results.get(name, ["not reached: an earlier check failed"])
    assert not any(errors), "\n".join(
        f"process {rank}: {error}" for rank, error in enumerate(errors) if error
    )


@pytest.mark.parametrize("check", [check.__name__ for check in worker.CHECKS[2]])
def test_on_two_processes(two, check):
    """Every check that needs two processes; its docstring says what it proves."""
    verdict(two[1], check)


@pytest.mark.parametrize("check", [check.__name__ for check in worker.CHECKS[4]])
def test_on_four_processes(four, check):
    """Every check that needs four processes."""
    verdict(four[1], check)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_loads_on_one_and_on_four(two, four):
    """DCP: weights and momentum arrive to the bit, and one process that plays both ranks goes on to
    the bit."""
    alone = worker.net("search_eden")
    optimizer = worker.sgd(alone)
    worker.play(alone, optimizer, range(2), 2)
    torch.manual_seed(0)
    model = nvfp4.convert(worker.Net(), "search_eden", seed=worker.SEED, verbose=False)
    optimizer_of_model = worker.sgd(model)
    worker.load_full_state(two[0], model, optimizer_of_model)
    for rank in range(4):
        worker.assert_same(torch.load(four[0] / f"{rank}.pt"), worker.tensors(alone, optimizer))
    worker.assert_same(worker.tensors(model, optimizer_of_model), worker.tensors(alone, optimizer))
    assert nvfp4.noise_state(model) == nvfp4.noise_state(alone)
    losses = [
        worker.play(m, o, range(2, 4), 2)
        for m, o in ((alone, optimizer), (model, optimizer_of_model))
    ]
    assert losses[0] == losses[1]
    worker.assert_same(worker.tensors(model, optimizer_of_model), worker.tensors(alone, optimizer))


ACCELERATE = [
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(ACCELERATE, id="accelerate"),
        pytest.param([*TORCHRUN, "2", "-m"], id="torchrun", marks=pytest.mark.slow),
    ],
)
def test_the_loop_under_a_launcher_gives_the_losses_of_one_process(tmp_path, launcher):
    """Two sequences a step, each quantised by itself: a + b in both, so loss and norm are equal to
    the bit.

    rtn, since stochastic rounding differs between processes by design. torchrun is slow: accelerate
    starts its processes through it.
    """
    texts = write_texts(tmp_path / "texts")
    config = tiny(
        tmp_path / "one",
        texts,
        recipe="rtn",
        batch=2,
        micro_batch=1,
        steps=6,
        save_every=0,
        eval_every=0,
    )
    pretrain(config)
    one = steps_of(tmp_path / "one")
    path = tmp_path / "many.yaml"
    path.write_text(to_yaml(replace(config, out=str(tmp_path / "many"))))
    run = launch(*launcher, "nvfp4.cli", "pretrain", "--config", str(path))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 process(es)" in run.stdout
    many = steps_of(tmp_path / "many")
    for step in range(1, 7):
        assert (many[step]["loss"], many[step]["grad_norm"]) == (
            one[step]["loss"],
            one[step]["grad_norm"],
        ), step
