"""csrc/objects.py: what is compiled again, and what is not. setup.py: what it leaves where it could
not build."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from limits import HANG

from nvfp4.backends.native.extension import why_not_built

ROOT = Path(__file__).parents[2]
OBJECTS = SimpleNamespace(**runpy.run_path(str(ROOT / "csrc" / "objects.py")))
COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two files, of which one includes a header whose name has a blank."""
    (tmp_path / "a header.h").write_text("inline int one() { return 1; }\n")
    (tmp_path / "one.cpp").write_text('#include "a header.h"\nint f() { return one(); }\n')
    (tmp_path / "two.cpp").write_text("int g() { return 2; }\n")
    return tmp_path


def build(project: Path, *flags: str) -> list[str]:
    """Names of the objects that were compiled."""
    commands = {
        str(project / "out" / f"{name}.o"): [
            str(COMPILER),
            "-O0",
            *flags,
            "-c",
            str(project / f"{name}.cpp"),
        ]
        for name in ("one", "two")
    }
    return [Path(target).stem for target in OBJECTS.compile_changed(commands)]


def test_only_what_depends_on_a_change_is_compiled(project: Path) -> None:
    """A header, a source, a flag; not a file that was touched or is back as it was when it was last
    compiled."""
    header, two = project / "a header.h", project / "two.cpp"
    assert build(project) == ["one", "two"]
    assert build(project) == []

    os.utime(header, (1, 2**31))
    os.utime(two, (1, 2**31))
    assert build(project) == []

    text = header.read_text()
    header.write_text(text + "// more\n")
    header.write_text(text)
    assert build(project) == []
    header.write_text(text + "// more\n")
    assert build(project) == ["one"]
    two.write_text("int g() { return 3; }\n")
    assert build(project) == ["two"]

    assert build(project, "-DNAME=1") == ["one", "two"]
    assert build(project, "-DNAME=1") == []


def test_an_object_without_its_record_or_a_record_without_its_object_is_compiled(
    project: Path,
) -> None:
    """As a build that was killed leaves them, half a record too."""
    build(project)
    (project / "out" / "one.o").unlink()
    (project / "out" / "two.o.json").write_text('{"command": [')
    assert build(project) == ["one", "two"]
    (project / "out" / "one.o.json").unlink()
    assert build(project) == ["one"]


def test_a_failure_names_the_object_and_is_not_remembered_as_success(
    project: Path, capfd: pytest.CaptureFixture
) -> None:
    """Also where an older object lies there; the other file is compiled all the same."""
    build(project)
    text = (project / "one.cpp").read_text()
    (project / "one.cpp").write_text("int f( {\n")
    (project / "two.cpp").write_text("int g() { return 4; }\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"failed with 1 on .*one\.o"):
            build(project)
    assert "error" in capfd.readouterr().err
    (project / "one.cpp").write_text(text)
    assert build(project) == ["one"]


COMPILE = """#!/bin/sh
# a compiler whose objects are empty; as a linker it writes half a library where the file
# "breaks" is beside it
for word in "$@"; do
  case "$before" in -o) out="$word" ;; -MF) echo "out:" > "$word" ;; esac
  before="$word"
done
: > "$out"
case "$*" in *-shared*) [ ! -e "$0.breaks" ] || exit 1 ;; esac
"""


def test_what_could_not_be_built_says_why_and_looks_unbuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler, then a linker that breaks off: a warning, a reason beside the package, no
    extension."""
    tools, package = tmp_path / "tools", tmp_path / "lib" / "nvfp4"
    tools.mkdir()
    package.mkdir(parents=True)
    for name in ("CC", "CXX", "LDSHARED", "NVFP4_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("NVFP4_CUDA", "0")
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]

    def build() -> str:
        command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=True
        )
        return done.stderr

    assert "installed without native CPU kernels: there is no C++ compiler" in build()
    assert "there is no C++ compiler" in why_not_built("cpu", package)

    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin")
    names = {str(sysconfig.get_config_var(name)).split()[0] for name in ("CC", "CXX", "LDSHARED")}
    for name in names | {"g++"}:
        (tools / name).write_text(COMPILE)
        (tools / name).chmod(0o755)
        (tools / f"{name}.breaks").touch()
    assert "installed without native CPU kernels" in build()
    assert re.search("exit (code|status) 1", why_not_built("cpu", package)) is not None
    assert [path.name for path in package.glob("_cpu*") if "part" not in path.name] == [
        "_cpu_missing.txt"
    ]

    for broken in tools.glob("*.breaks"):
        broken.unlink()
    assert "CPU" not in build()
    assert why_not_built("cpu", package) == ""
    assert [path.suffix for path in package.glob("_cpu*")] == [".so"]
