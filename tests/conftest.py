"""What every test gets: poisoned fresh memory, a seed of its own, reproducible hypothesis, reasons
for skips."""

from __future__ import annotations

import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import interpreting
import numpy as np
import pytest
import torch
from order import stretches

from nvfp4.backends.native.cpu import use_instruction_set
from nvfp4.backends.registry import BACKENDS

# the tests of a lesser processor; before any module asks what this one has
if "NVFP4_ISA" in os.environ:
    use_instruction_set(os.environ["NVFP4_ISA"])

hypothesis.settings.register_profile(
    "nvfp4",
    derandomize=True,  # a red test is red again
    deadline=None,  # a shared machine is slow now and then, and that is no bug
    database=None,
    max_examples=30,
)
hypothesis.settings.load_profile("nvfp4")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line(
        "markers", "slow: only in make test-all; what it covers is covered by others"
    )
    config.addinivalue_line(
        "markers", "interpreted: runs Triton kernels; without a GPU in a process that interprets"
    )
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # a skipped test always says why
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores already


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Tests of CUDA are skipped where there is none; what -m and -k leave is dealt to workers."""
    if not torch.cuda.is_available():
        reason = "no CUDA device: torch.cuda.is_available() is False"
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=reason))
    yield
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
        workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        items[:] = [item for stretch in stretches(items, workers) for item in stretch]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """What needs Triton's interpreter goes to the process that has it."""
    if not interpreting.is_elsewhere(pyfuncitem):
        return None
    interpreting.PROCESS.run(pyfuncitem.nodeid)
    return True


def pytest_unconfigure() -> None:
    interpreting.PROCESS.close()


OPTIONAL = (
    "pydantic",
    "tyro",
    "yaml",
    "matplotlib",
    "transformers",
    "accelerate",
    "trl",
    "peft",
    "datasets",
    "pyarrow",
    "lightning",
    "lightning_fabric",
)
"""Packages that trainers, their clients and plots need, and quantisers and layers do not."""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[Any]:
    """A file of tests whose room needs a package that is not installed here is skipped, by the
    package's name."""
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))
        if missing is not None and missing[1] in OPTIONAL:
            report.outcome = "skipped"
            report.longrepr = (
                str(collector.path),
                1,
                f"Skipped: {missing[1]} is not installed here",
            )
    return report


def pytest_report_header() -> str:
    cuda = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none, so no test on cuda is generated"
    )
    return f"nvfp4 backends: {', '.join(BACKENDS)}; CUDA device: {cuda}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``backend`` and ``device`` runs on every registered backend and every
    device there is."""
    if not {"backend", "device"} <= set(metafunc.fixturenames):
        return
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    cases = []
    for name, backend in BACKENDS.items():
        for device in devices:
            reason = backend.unavailable(torch.device(device))
            marks = [pytest.mark.cuda] if device == "cuda" else []
            marks += [pytest.mark.skip(reason=f"{name} on {device}: {reason}")] if reason else []
            cases.append(pytest.param(name, device, marks=marks, id=f"{name}-{device}"))
    metafunc.parametrize(("backend", "device"), cases)


POISON_BYTE = 0xA5
"""Integers from torch.empty are filled with this byte: no valid index, sign pattern or count by
luck."""


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill fresh memory with NaN, or with POISON_BYTE where the dtype has no NaN."""
    if tensor.is_meta or tensor.numel() == 0:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.is_contiguous():
        tensor.view(-1).view(torch.uint8).fill_(POISON_BYTE)
    return tensor


# torch remembers here which functions take a device; it has to see the real torch.empty
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its relatives hand out NaN, so an element nobody wrote cannot pass by
    luck."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def pictures() -> None:
    """Asked for by a test whose runs of reinforcement learning draw their pictures."""


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a few seconds draw none, which would take three quarters of their time."""
    finish = sys.modules.get("nvfp4.rl.finish")
    if finish is not None and "pictures" not in request.fixturenames:
        monkeypatch.setattr(finish, "draw_run", lambda *args: None)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that depends on the name of the test and of its file, and not on the folder that the
    file is in."""
    file, _, name = request.node.nodeid.partition("::")
    return zlib.crc32(f"tests/{file.rpartition('/')[2]}::{name}".encode())


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """Numbers for one test: the same on every run, different from every other test."""
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def torch_seed(seed: int) -> Iterator[Any]:
    """torch's own generator starts each test from its seed, and no test disturbs another.

    Not through ``torch.manual_seed``: where CUDA sleeps, it keeps a stack trace per call for later,
    1.4 ms each.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    yield
    torch.set_rng_state(before)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """torch's random numbers for one test, from its own seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def policy(generator: torch.Generator) -> Any:
    """A policy of a table of logits: four prompts, five places, four symbols; some files have one
    of other sizes.

    Here and not beside the tests of losses: a second ``conftest`` would take this module's name.
    """
    from rl_policy import TablePolicy

    return TablePolicy.random(prompts=4, length=5, symbols=4, generator=generator)
