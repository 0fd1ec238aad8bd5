"""The Makefile's set-up, with a Python that only writes down what it is asked for: order, failures,
and the call after; and the order in which workers take the tests.

Nothing is installed or compiled. The stand-in makes an environment whose Python is itself, and
fails or is slow where a file of the folder says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import order
import pytest
from limits import HANG

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

PYTHON = r"""#!/bin/sh
# a Python that is asked to do something: one line when it begins and one when it has ended, in the
# file "said"
work=$(cd "$(dirname "$0")" && while [ ! -e Makefile ]; do cd ..; done; pwd)
case "$*" in *"pip install"*)
  test -e "$work/.venv/has_pip" || { echo "No module named pip" >&2; exit 1; } ;; esac
case "$*" in
*"pip --version"*) test -e "$work/.venv/has_pip"; exit ;;
-c*) exit 0 ;;
*" venv "*)
  mkdir -p "$work/.venv/bin"
  for name in python ruff clang-format mypy; do cp "$0" "$work/.venv/bin/$name"; done
  if [ -e "$work/no_pip" ]; then rm "$work/no_pip"; exit 1; fi
  touch "$work/.venv/has_pip"; exit ;;
*"pip install"*clients*) did=clients ;;
*"pip install"*data,dev*) did=packages ;;
*"pip install"*triton*) did=triton ;;
*"pip install"*) did=tools ;;
*build_ext*) did=native ;;
*pytest*) did=pytest ;;
*) did=$(basename "$0") ;;
esac
[ -z "$PYTHONDONTWRITEBYTECODE" ] || echo "$did writes no bytecode" >> "$work/said"
echo "begin $did" >> "$work/said"
[ "$did" = pytest ] || sleep 0.2
if [ -e "$work/fails_$did" ]; then echo "no room for $did" >&2; exit 1; fi
if [ "$did" = native ]; then
  rm -f "$work/nvfp4/_cpu_missing.txt"
  [ ! -e "$work/no_compiler" ] || echo "no compiler" > "$work/nvfp4/_cpu_missing.txt"
fi
[ "$did" != triton ] || mkdir -p "$work/build/triton-3.6"
echo "end $did" >> "$work/said"
"""


class Checkout:
    """A folder with the Makefile, the files it looks at, and the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
            shutil.copy(ROOT / name, folder)
        (folder / "nvfp4").mkdir()
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)

    def make(self, *words: str) -> tuple[int, list[str], str]:
        """Exit code, what the stand-in did in this call, and what was said on standard error."""
        (self.folder / "said").write_text("")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            ["make", f"PYTHON={self.folder / 'python'}", *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        return done.returncode, (self.folder / "said").read_text().splitlines(), done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def ended(said: list[str]) -> list[str]:
    """What came to an end, in order."""
    return [line.removeprefix("end ") for line in said if line.startswith("end ")]


@pytest.mark.parametrize("jobs", ["-j1", "-j4"])
def test_one_pip_at_a_time_and_nothing_the_second_time(checkout: Checkout, jobs: str) -> None:
    """However many jobs are allowed: pip never runs twice beside itself in .venv, and packages come
    once."""
    code, said, _ = checkout.make(jobs, "test")
    assert code == 0
    assert sorted(ended(said)) == [
        "clang-format",
        "clients",
        "mypy",
        "native",
        "pytest",
        "ruff",
        "ruff",
        "tools",
        "triton",
    ]
    in_venv = [line for line in said if line.split()[1] in ("tools", "clients", "packages")]
    assert in_venv == ["begin tools", "end tools", "begin clients", "end clients"]
    again = set(ended(checkout.make(jobs, "test")[1]))
    assert again == {"ruff", "clang-format", "mypy", "pytest"}
    lint = sorted(ended(checkout.make(jobs, "lint")[1]))
    assert lint == ["clang-format", "mypy", "ruff", "ruff"]


def test_after_a_failure_the_same_call_goes_on(checkout: Checkout) -> None:
    """pip that ends with an error stops it, with a word on what to do; what was done is not done
    again."""
    failing = checkout.folder / "fails_clients"
    failing.touch()
    code, said, error = checkout.make("test")
    assert code == 2
    assert "no room for clients" in error
    assert "the same command goes on from there" in error
    assert "pytest" not in ended(said)

    failing.unlink()
    code, said, _ = checkout.make("test")
    assert code == 0
    assert "clients" in ended(said)
    assert "tools" not in ended(said)


def test_an_environment_without_pip_is_completed(checkout: Checkout) -> None:
    """As a stopped ``python -m venv`` leaves it: bin/python is there and cannot install
    anything."""
    (checkout.folder / "no_pip").touch()
    code, said, _ = checkout.make("lint")
    assert code == 2
    assert said == []
    assert (checkout.folder / ".venv" / "bin" / "python").exists()
    assert checkout.make("lint")[0] == 0


def test_kernels_that_could_not_be_compiled_are_tried_again(checkout: Checkout) -> None:
    """The tests run without them; each call tries anew, and the first that succeeds is the last
    that tries."""
    (checkout.folder / "no_compiler").touch()
    for _ in range(2):
        code, said, _ = checkout.make("test")
        assert code == 0
        assert {"native", "pytest"} <= set(ended(said))
    (checkout.folder / "no_compiler").unlink()
    assert "native" in ended(checkout.make("test")[1])
    assert "native" not in ended(checkout.make("test")[1])


def test_bytecode_is_written_whatever_the_environment_says(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of containers forbid it. pip writes none here, so each process would compile all that
    it imports, and the tests start hundreds."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    code, said, _ = checkout.make("test")
    assert code == 0
    assert "end pytest" in said
    assert not [line for line in said if "bytecode" in line]


class Collected(NamedTuple):
    """As much of a collected test as the order looks at."""

    path: Path
    number: int


def test_long_tests_begin_first_and_no_test_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers: what they get is what was collected, in stretches that xdist cuts at the same
    places, each with its long files in front, whole."""
    monkeypatch.setattr(order, "SECONDS", {"long.py": 50, "longer.py": 60, "e.py": 5, "f.py": 40})
    names = ["a.py", "long.py", "b.py", "e.py", "c.py", "longer.py", "d.py", "f.py"]
    items = [Collected(Path(name), number) for name in names for number in range(len(name) * 7)]

    dealt = order.stretches(items, 3)
    assert sorted(item for stretch in dealt for item in stretch) == sorted(items)
    assert [len(stretch) for stretch in dealt] == [93, 93, 94]
    begun = [list(dict.fromkeys(item.path.name for item in stretch)) for stretch in dealt]
    assert [files[0] for files in begun] == ["longer.py", "long.py", "f.py"]
    assert begun[2][1] == "e.py"
    for name in order.SECONDS:
        whole = [item for item in items if item.path.name == name]
        assert any(whole == [i for i in stretch if i.path.name == name] for stretch in dealt)
    assert order.stretches([], 2) == [[], []]


def test_files_that_are_said_to_be_long_are_there() -> None:
    """One that was renamed would be dealt with the short ones."""
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert order.SECONDS.keys() <= there
