"""info, and what importing the package costs: no GPU, no Triton, no transformers, no warning."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HANG

import nvfp4
from nvfp4.backends.machine import info as machine_info
from nvfp4.backends.registry import BACKENDS

ROOT = Path(__file__).parents[2]


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees no GPU and turns every warning of ours into an error."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=HANG,
        check=False,
    )


def test_info_states_facts() -> None:
    """Versions as installed, this machine, and for each backend and device "yes" or the backend's
    own reason."""
    facts = dict(line.split("  ", 1) for line in nvfp4.info().splitlines())
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    assert facts["torch"] == importlib.metadata.version("torch")
    assert facts["python"] == platform.python_version()
    assert platform.machine() in facts["cpu"]
    assert f"{torch.get_num_threads()} threads" in facts["cpu"]
    for name, backend in BACKENDS.items():
        assert facts[f"backend {name} on cpu"] == (
            backend.unavailable(torch.device("cpu")) or "yes"
        )
    assert facts["backend reference on cpu"] == "yes"


def test_info_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that cannot run says why, and a package that is missing is named so."""
    monkeypatch.setattr(
        BACKENDS["reference"], "unavailable", lambda device: f"no such thing on {device}"
    )

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    lines = [line.split("  ", 1) for line in nvfp4.info().splitlines()]
    facts = {key.strip(): value.strip() for key, value in lines}
    assert facts["backend reference on cpu"] == "no such thing on cpu"
    assert facts["torch"] == facts["triton"] == "not installed"


def test_the_backends_stand_in_their_order_whoever_asks_first() -> None:
    """Also for who imports the registry and nothing else: an empty table would skip most tests."""
    names = ["scaled_mm", "cuda", "triton", "cpu", "tensor_core", "reference"]
    assert list(BACKENDS) == names
    code = "from nvfp4.backends.registry import BACKENDS; print(*BACKENDS)"
    assert _python("-c", code).stdout.split() == names


def test_info_is_a_function() -> None:
    """``nvfp4.info`` is one, and no module can take its name."""
    importlib.import_module("nvfp4.backends.machine")
    assert nvfp4.info() == machine_info()
    with pytest.raises(AttributeError, match="has no attribute 'infos'"):
        nvfp4.infos  # noqa: B018


def test_python_m_info_prints_no_warning() -> None:
    """``python -m nvfp4.backends.machine`` prints the facts, nothing else, and warns of nothing."""
    done = _python("-W", "error::RuntimeWarning", "-m", "nvfp4.backends.machine")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("nvfp4 ")
    assert "backend reference on cpu" in done.stdout


_PROGRAM = """
import sys
for name in ("triton", "transformers", "pyarrow", "matplotlib"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
before = set(sys.modules)
import nvfp4
layer = nvfp4.convert(torch.nn.Linear(32, 16), verbose=False)
layer(torch.randn(3, 32)).sum().backward()
nvfp4.info(), str(nvfp4.report(layer))
assert not torch.cuda.is_initialized(), "importing or running on a CPU touched CUDA"
assert nvfp4.info().startswith("nvfp4")
came = {name.split(".")[0] for name in sys.modules.keys() - before}
print(*sorted(came - sys.stdlib_module_names))
"""


def test_import_is_light_and_needs_no_gpu() -> None:
    """46: import, convert, a training step, report and info work with no GPU and with Triton,
    transformers, pyarrow and matplotlib missing; beside torch's own packages only nvfp4 and rich
    are imported for it."""
    done = _python("-c", _PROGRAM)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) - {"torch"} == {"nvfp4", "rich"}


def test_all_is_there() -> None:
    """Every public name exists, and once."""
    assert len(set(nvfp4.__all__)) == len(nvfp4.__all__)
    assert all(getattr(nvfp4, name) is not None for name in nvfp4.__all__)
