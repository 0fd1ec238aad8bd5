"""What the tests of losses share: a generator of the test's own seed, and a policy as a table of logits."""

from __future__ import annotations

import pytest
import torch
from rl_policy import TablePolicy


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def policy(generator: torch.Generator) -> TablePolicy:
    """Four prompts, five places, four symbols; a file that wants other sizes has a fixture of its own."""
    return TablePolicy.random(prompts=4, length=5, symbols=4, generator=generator)
