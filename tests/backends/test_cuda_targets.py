"""For which GPUs the CUDA kernels are built, what is said where they are not, and that no compiler
outlives setup.py.

The compilers are scripts on PATH: what is tested is what setup.py asks of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from limits import HANG

from nvfp4.backends.native import cuda_targets
from nvfp4.backends.native.cuda_targets import TARGETS, choose
from nvfp4.backends.native.extension import why_not_built

ROOT = Path(__file__).parents[2]


def test_the_gpus_at_hand_are_built_for() -> None:
    """Each kind once, in our order; what nvcc does not know is left out and named."""
    assert choose(None, ["9.0"], TARGETS).targets == ("90a",)
    assert choose(None, ["12.0", "9.0"], TARGETS).targets == ("90a", "120a")
    assert choose(None, [], TARGETS).targets == TARGETS
    old = choose(None, [], ("90a", "100a", "120a"))
    assert old.targets == ("90a", "100a", "120a")
    assert "without sm_103a, sm_121a, which this nvcc does not know" in old.note


def test_the_users_list_comes_first() -> None:
    """However the names are written; the GPUs at hand do not count then."""
    for words in ("90a,100a", "sm_90a; sm_100a", "90, 10.0", "90a,90,100a,"):
        assert choose(words, ["12.0"], TARGETS).targets == ("90a", "100a")


@pytest.mark.parametrize(
    ("asked", "present", "known", "words"),
    [
        ("80", [], TARGETS, "NVFP4_CUDA_TARGETS names '80'; the kernels are written for 90a, 100a"),
        (
            None,
            ["8.0"],
            TARGETS,
            "compute capability 8.0, and these kernels are written for sm_90a",
        ),
        ("103a", [], ("90a",), "nvcc does not know sm_103a, only sm_90a: update CUDA"),
        (None, ["12.1"], (), "nvcc does not know sm_121a, only older ones: update CUDA"),
    ],
)
def test_what_cannot_be_built_says_why(asked, present, known, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose(asked, present, known)


def program(folder: Path, name: str, script: str) -> None:
    """An executable of this name that runs a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("NVFP4_CUDA", "NVFP4_CUDA_TARGETS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NVFP4_CPU", "0")
    return folder


def test_the_machine_is_asked(tools: Path) -> None:
    """nvidia-smi for the GPUs, nvcc for what it knows; a program that fails or is missing says
    nothing."""
    program(tools, "nvidia-smi", "printf '9.0\\n9.0\\n12.0\\n'")
    program(tools, "nvcc", "printf 'sm_75\\nsm_90\\nsm_100\\nsm_120\\n'")
    assert cuda_targets.present_capabilities() == ("9.0", "12.0")
    assert cuda_targets.known_targets(str(tools / "nvcc")) == ("90a", "100a", "120a")
    program(tools, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert cuda_targets.present_capabilities() == ()
    assert cuda_targets.known_targets(str(tools / "missing")) == ()


def setup_command(folder: Path) -> list[str]:
    built = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return [sys.executable, "setup.py", "-q", "build_ext", *built]


def test_a_build_that_fails_leaves_its_reason(tools: Path, tmp_path: Path, monkeypatch) -> None:
    """On standard error, and in a file beside the package, which the backend then reads out."""
    (tmp_path / "lib" / "nvfp4").mkdir(parents=True)
    program(
        tools,
        "nvcc",
        'case "$1" in --list-gpu-code) echo sm_90;; *) echo broken >&2; exit 3;; esac',
    )
    program(tools, "nvidia-smi", "echo 9.0")
    done = subprocess.run(
        setup_command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0
    assert "nvfp4: CUDA kernels for sm_90a (the GPUs of this machine" in done.stderr
    assert "nvfp4 is installed without CUDA kernels: nvcc failed with 3" in done.stderr
    said = why_not_built("cuda", tmp_path / "lib" / "nvfp4")
    assert said.startswith(" (when it was installed, nvcc failed with 3 on csrc/")
    assert why_not_built("cuda", tmp_path) == ""
    program(tools, "nvcc", 'case "$1" in --list-gpu-code) echo sm_100;; esac')
    subprocess.run(setup_command(tmp_path), cwd=ROOT, check=True, capture_output=True, timeout=HANG)
    assert "nvcc does not know sm_90a, only sm_100a: update CUDA" in why_not_built(
        "cuda", tmp_path / "lib" / "nvfp4"
    )


def test_killed_it_takes_its_compilers_along(tools: Path, tmp_path: Path, monkeypatch) -> None:
    """kill -9 of setup.py alone: the compilers that nvcc started end too, in a moment."""
    pids = tmp_path / "pids"
    monkeypatch.setenv("NVFP4_CUDA_TARGETS", "90a")
    program(
        tools,
        "nvcc",
        f'case "$1" in --list-gpu-code) echo sm_90;; *) sleep 1000 & echo $! >> {pids}; wait;; '
        "esac",
    )
    build = subprocess.Popen(setup_command(tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (pids.exists() and pids.read_text().strip()):
        assert build.poll() is None, "setup.py ended before it compiled"
        time.sleep(0.05)
    build.send_signal(signal.SIGKILL)
    build.wait()
    for pid in map(int, pids.read_text().split()):
        while alive(pid):  # the test's own time limit ends this, if nothing else does
            time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process runs still; one that nobody has waited for yet does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
