"""Every example runs, as a reader would run it, and prints what it promises."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import children
import pytest
from training import environment

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMISES = {
    "convert_a_model.py": "the same weights in high precision",
    "look_at_a_quantiser.py": "4.50 bits",
    "pretrain_tiny.py": "",
    "rl_own_task.py": "held-out pass@1:",
    "train_with_hf_trainer.py": "loaded with transformers alone",
}


def test_every_example_is_listed_here() -> None:
    """A new example is run too."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISES)


LONG = "rl_own_task.py"
"""25 s of a core: whole in make test-all, with fewer updates in make test."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n == LONG else ())
        for n, promise in PROMISES.items()
        if promise
    ],
)
def test_example_runs(name: str) -> None:
    """Exit code 0 and the promised line; pretrain_tiny is run by test_cli."""
    ran = children.script(EXAMPLES / name, environment())
    assert ran.returncode == 0, ran.stderr
    assert PROMISES[name] in ran.stdout


def test_the_long_example_runs_with_fewer_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its own code, and of the trainer's what two updates of each kind reach."""
    spec = importlib.util.spec_from_file_location("rl_own_task", EXAMPLES / LONG)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    train, fewer = example.rl, {"warm_steps": 2, "steps": 2, "eval_problems": 4, "eval_samples": 2}
    monkeypatch.setattr(example, "rl", lambda config: train(dataclasses.replace(config, **fewer)))
    assert example.main(tmp_path / "run")["steps"] == 2
    assert PROMISES[LONG] in capsys.readouterr().out
