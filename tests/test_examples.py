"""Every example runs, as a reader would run it, and prints what it promises."""

from __future__ import annotations

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


@pytest.mark.parametrize("name", [name for name, promise in PROMISES.items() if promise])
def test_example_runs(name: str) -> None:
    """Exit code 0 and the promised line; pretrain_tiny is run by test_cli."""
    ran = children.script(EXAMPLES / name, environment())
    assert ran.returncode == 0, ran.stderr
    assert PROMISES[name] in ran.stdout
