"""csrc/objects.py: what is compiled again, and what is not."""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

OBJECTS = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "csrc" / "objects.py")))
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
        str(project / "out" / f"{name}.o"): [str(COMPILER), "-O0", *flags, "-c", str(project / f"{name}.cpp")]
        for name in ("one", "two")
    }
    return [Path(target).stem for target in OBJECTS.compile_changed(commands)]


def test_only_what_depends_on_a_change_is_compiled(project: Path) -> None:
    """A header, a source, a flag; not a file that was touched or is back as it was when it was last compiled."""
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


def test_an_object_without_its_record_or_a_record_without_its_object_is_compiled(project: Path) -> None:
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
