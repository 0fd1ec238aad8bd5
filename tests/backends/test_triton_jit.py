"""What a GPU would ask Triton to compile is compiled, by the Triton of torch 2.10 and 2.11 and by
the newest.

The tests of the kernels run in a process of their own over a driver that launches nothing
(launches_nothing.py): every shape, dtype, stride and alignment of theirs, specialised as on a GPU.
``make test`` takes a case of each test to Triton's IR, ``make aot`` all of them to machine code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
OLD = ROOT / "build" / "triton-3.6"
FILES = [
    f"tests/backends/test_{name}.py"
    for name in ("triton", "triton_fused", "triton_gemm", "vectors")
]
ALL = os.environ.get("NVFP4_TEST_KERNELS") == "all"
"""Asked for by ``make aot``: every case, to machine code, which takes half an hour of a core and
Triton."""
NEWEST, OLDEST = "newest", "3.6"
CASES = [(OLDEST, 90), (NEWEST, 120)] if ALL else [(OLDEST, 100), (NEWEST, 100)]


def environment(version: str) -> dict[str, str]:
    """For a process that imports this Triton."""
    paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    if version == OLDEST:
        if not (OLD / "triton").is_dir():
            pytest.skip(
                "Triton 3.6 is not in build/triton-3.6: `make build/triton-3.6/.ready` installs it"
            )
        paths.insert(0, str(OLD))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.mark.timeout(4 * 3600 if ALL else 600)
@pytest.mark.parametrize(("version", "card"), CASES)
def test_what_gpu_tests_launch_compiles(version: str, card: int) -> None:
    """RMSNorm of one column, names of dtypes in constant tuples: none of it shows in the
    interpreter."""
    asked = {"NVFP4_TEST_CARD": str(card), "NVFP4_TEST_STAGE": "cubin" if ALL else "ir"}
    asked["NVFP4_TEST_SAMPLES"] = "0" if ALL else "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "launches_nothing",
        "-q",
        "-W",
        "ignore",
        *FILES,
    ]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "3600"]
    child = subprocess.run(
        command, env=environment(version) | asked, capture_output=True, text=True, cwd=ROOT
    )
    assert child.returncode == 0, child.stdout[-20000:] + child.stderr[-2000:]
    said = re.search(
        r"Triton (\S+), sm_(\d+): (\d+) kernels lowered, (\d+) known, (\d+) built, (\d+) l",
        child.stdout,
    )
    assert said is not None, child.stdout[-2000:]
    assert said[1].startswith("3.6") == (version == OLDEST)
    assert int(said[2]) == card
    assert int(said[3]) + int(said[4]) + int(said[5]) > 80, said[0]
    assert int(said[6]) > 150, said[0]


@pytest.mark.skipif(ALL, reason="`make aot` has compiled the whole list")
def test_few_kernels_become_machine_code_under_the_oldest(tmp_path: Path) -> None:
    """For the card where its compiler would fuse products and sums (FFMA2), which no other Triton
    does: nothing fused, flushed or spilled in what test_triton_aot.py compiles with the newest."""
    kept = tmp_path / "few.json"
    command = [sys.executable, "-m", "tools.aot", "--few", "--capabilities", "100", "--jobs", "1"]
    child = subprocess.run(
        [*command, "--json", kept],
        env=environment(OLDEST),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
    table = json.loads(kept.read_text())
    assert table["triton"].startswith("3.6")
    assert len(table["rows"]) >= 8


FAULTY = """
from typing import NamedTuple
import torch, triton, triton.language as tl
import launches_nothing
class Formula(NamedTuple):
    inner: str
@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    return x
@triton.jit
def named(x, F: tl.constexpr):
    tl.store(x, rounded(tl.load(x), F.inner))
@triton.jit
def one(x, count):
    tl.store(x, count.to(tl.float32))
driver = launches_nothing.Driver(90)
triton.runtime.driver.set_active(driver)
triton.compiler.compile = launches_nothing.ToIR(driver)
for kernel, argument in ((one, 2), (one, 1), (named, Formula("bfloat16"))):
    try:
        kernel[(1,)](torch.zeros(1), argument)
        print("compiles")
    except triton.CompilationError:
        print("does not")
"""


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (OLDEST, ["compiles", "does not", "does not"]),
        (NEWEST, ["compiles", "does not", "compiles"]),
    ],
)
def test_faults_of_specialisation_are_found(version: str, said: list[str], tmp_path: Path) -> None:
    """The rules themselves, on the two kernels that would have failed on the first GPU: a size that
    is 1, and an attribute of a constant tuple handed to another function."""
    script = tmp_path / "faults.py"
    script.write_text(FAULTY)
    child = subprocess.run(
        [sys.executable, script], env=environment(version), capture_output=True, text=True, cwd=ROOT
    )
    assert child.stdout.split("\n")[:3] == said, child.stdout + child.stderr
