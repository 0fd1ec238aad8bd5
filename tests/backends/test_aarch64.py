"""The kernels compiled for aarch64 (NEON) and run under emulation, against the same source on this
processor.

Debian's packages g++-aarch64-linux-gnu and qemu-user are all it takes; ``make aarch64`` says so.
Slow: two compilers and an emulated processor. ``make test`` has the same source on this processor,
in test_native.py.
"""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_code import instructions, missing, scalar_faults

ROOT = Path(__file__).parents[2]
TOOLS = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64", "g++")
# as in setup.py, without threads
FLAGS = [
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-static",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing(*TOOLS) is not None, reason=f"{missing(*TOOLS)}"),
]


def build(compiler: str, to: Path) -> Path:
    """tests/support/native_digests.cpp with the portable kernels, by ``compiler``."""
    sources = ["tests/support/native_digests.cpp", "csrc/cpu/portable.cpp", "-Icsrc"]
    if compiler == "g++":  # it knows of the other instruction sets, but does not run them
        sources.append("-DNVFP4_PORTABLE_ALONE")
    subprocess.run([compiler, *FLAGS, *sources, "-o", str(to)], cwd=ROOT, check=True)
    return to


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For aarch64 and for this processor."""
    folder = tmp_path_factory.mktemp("aarch64")
    with ThreadPoolExecutor(2) as pool:
        there = pool.submit(build, "aarch64-linux-gnu-g++", folder / "there")
        return there.result(), pool.submit(build, "g++", folder / "here").result()


def test_aarch64_computes_the_same_bytes(binaries: tuple[Path, Path]) -> None:
    """Codes, scales, globals, decoded numbers and fingerprints, over every rule, dtype, orientation
    and hard input."""
    commands = (["qemu-aarch64", str(binaries[0])], [str(binaries[1])])
    there, here = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for command in commands
    )
    assert len(here) > 300
    differing = [f"{a}\n  here: {b}" for a, b in zip(there, here, strict=True) if a != b]
    assert differing == []


def test_aarch64_kernels_are_vector_code(binaries: tuple[Path, Path]) -> None:
    """As on x86: nothing that runs per element compares floats one by one."""
    functions = instructions(binaries[0], "aarch64-linux-gnu-objdump")
    assert any("nvfp4::portable::EdenPass<true>::visit" in name for name in functions)
    assert list(scalar_faults(functions, "portable")) == []
