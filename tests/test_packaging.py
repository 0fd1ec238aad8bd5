"""What is shipped: extras and the errors that name them, one version, the licence, files that
services read."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from limits import HANG

import nvfp4
from nvfp4.extras import EXTRAS, RL_COMMANDS, what_to_install

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CORE = {"torch", "triton", "numpy", "rich"}
DISTRIBUTIONS = {"yaml": "pyyaml", "lightning_fabric": "lightning-fabric"}
"""Modules whose distribution has another name."""


def requirements(field: str) -> set[str]:
    """Names of the distributions in a list of pyproject.toml, without versions and markers."""
    listed = re.search(rf"^{field} = \[(.*?)\]$", PYPROJECT, flags=re.DOTALL | re.MULTILINE)
    assert listed is not None, f"pyproject.toml has no {field}"
    return {re.split(r"[<>=\[;]", name)[0] for name in re.findall(r'"([^"]+)"', listed[1])}


def third_parties() -> dict[str, set[str]]:
    """Top-level modules that the package imports and neither it nor Python brings, with the files
    that do."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "nvfp4").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in (
                {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"nvfp4"}
            ):
                found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def test_the_core_dependencies_are_four() -> None:
    """And no extra repeats one of them."""
    assert requirements("dependencies") == CORE
    assert not CORE & set().union(*EXTRAS.values())


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_the_error_says(extra: str) -> None:
    """The table in nvfp4/extras.py is pyproject's."""
    assert {DISTRIBUTIONS.get(module, module) for module in EXTRAS[extra]} == requirements(extra)


def test_every_import_is_of_the_core_or_of_an_extra() -> None:
    """A package that nothing brings would be missing for whoever did as README says."""
    known = CORE | set().union(*EXTRAS.values())
    assert not {
        name: files
        for name, files in third_parties().items()
        if name not in known | {"lightning", "torchao"}
    }


def test_which_extra_is_named() -> None:
    """By what is missing, and by the command: rl's brings what train's does."""
    missing = ModuleNotFoundError("No module named 'yaml'", name="yaml.nodes")
    assert what_to_install(missing, "nvfp4 pretrain") == (
        "nvfp4 pretrain needs yaml, which is not installed: pip install 'nvfp4[train]'"
    )
    for command in RL_COMMANDS:
        assert str(what_to_install(missing, f"nvfp4 {command}")).endswith("'nvfp4[rl]'")
    assert str(what_to_install(ModuleNotFoundError(name="pyarrow"), "x")).endswith("'nvfp4[data]'")
    assert what_to_install(ModuleNotFoundError(name="nvfp4.no_such_module"), "x") is None
    assert what_to_install(ModuleNotFoundError(), "x") is None


_WITHOUT = """
import json, os, sys
import torch  # once, for all of them
folder = sys.argv[2]
for number, (missing, *arguments) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_WRONLY | os.O_CREAT, 0o600), stream)
    for name in missing.split(","):
        assert name not in sys.modules, name
        sys.modules[name] = None  # importing it raises ModuleNotFoundError
    sys.argv[1:] = arguments
    from nvfp4.__main__ import main
    sys.exit(main())
"""

LACKING = [
    ("tyro", "pretrain", "train"),
    ("pydantic", "compare", "train"),
    ("yaml", "rl", "rl"),
    ("tyro", "gvendi", "rl"),
]
"""A package, a command that needs it, and the extra that brings it."""

WITHIN = ("accelerate", "pretrain", "--steps", "1", "--out")
INFO = ("tyro,pydantic,yaml,transformers,accelerate,matplotlib", "info")


class Ran(NamedTuple):
    """What a command ended with and said."""

    code: int
    out: str
    errors: str


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[tuple[str, ...], Ran], Path]:
    """The command line in interpreters that lack some packages, by (packages, arguments); and the
    folder they ran in. They are forks of one that has imported torch, which alone takes 2.4 s."""
    folder = tmp_path_factory.mktemp("without")
    cases = [*((missing, command, "--help") for missing, command, _ in LACKING), WITHIN, INFO]
    given = [(*case, str(folder / "run")) if case == WITHIN else case for case in cases]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, json.dumps(given), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    ran = {}
    for number, (case, code) in enumerate(zip(cases, done.stdout.split(), strict=True)):
        said = [(folder / f"{number}.{stream}").read_text() for stream in (1, 2)]
        ran[case] = Ran(int(code), *said)
    return ran, folder


@pytest.mark.parametrize(("missing", "command", "extra"), LACKING)
def test_a_command_names_the_extra_it_lacks(
    without: tuple, missing: str, command: str, extra: str
) -> None:
    """One line, code 1, no traceback."""
    if missing != "tyro":
        pytest.importorskip("tyro", reason="tyro is missed first")
    line = (
        f"nvfp4: error: nvfp4 {command} needs {missing}, which is not installed: pip install "
        f"'nvfp4[{extra}]'\n"
    )
    assert without[0][missing, command, "--help"] == Ran(1, "", line)


def test_a_package_that_is_missed_within_a_command(without: tuple) -> None:
    """accelerate is imported once the options are known to be right."""
    pytest.importorskip("transformers", reason="transformers is not installed here")
    pytest.importorskip("tyro", reason="tyro is not installed here")
    ran, folder = without
    assert (ran[WITHIN].code, ran[WITHIN].errors.splitlines()[-1:]) == (
        1,
        [
            "nvfp4: error: nvfp4 pretrain needs accelerate, which is not installed: pip install "
            "'nvfp4[train]'"
        ],
    )
    assert not (folder / "run").exists()


def test_a_parquet_file_names_the_extra_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trainers say it of a file in --data."""
    pytest.importorskip("pydantic", reason="pydantic is not installed here")
    from nvfp4.run.corpus import load_corpus
    from nvfp4.run.errors import TrainError
    from nvfp4.run.options import DataOptions

    file = tmp_path / "text.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # type: ignore[arg-type]
    with pytest.raises(TrainError) as raised:
        load_corpus(DataOptions(data=(str(file),)))
    assert str(raised.value) == (
        f"data: reading {file} needs pyarrow, which is not installed: pip install 'nvfp4[data]'"
    )


def test_info_needs_no_extra(without: tuple) -> None:
    """What is asked first on a machine where something is missing."""
    ran = without[0][INFO]
    assert (ran.code, ran.errors) == (0, "")
    assert "backend reference on cpu" in ran.out


def test_a_lazy_name_names_the_extra_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """``nvfp4.NVFP4TrainingConfig`` without transformers; the error keeps the module's name."""
    monkeypatch.delitem(vars(nvfp4), "NVFP4TrainingConfig", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "nvfp4.integrations.transformers", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    with pytest.raises(
        ModuleNotFoundError, match=r"NVFP4TrainingConfig needs transformers.*'nvfp4\[train\]'"
    ) as raised:
        nvfp4.NVFP4TrainingConfig  # noqa: B018
    assert str(raised.value.name).partition(".")[0] == "transformers"


def test_the_version_is_that_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyproject.toml is the only place that says it; a checkout that is not installed has none."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"nvfp4": "7.8.9"}[name])
    assert nvfp4.__version__ == "7.8.9"
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert nvfp4.__version__ == "0+unknown"
    version = re.search(r'^version = "(.+)"$', PYPROJECT, flags=re.MULTILINE)
    assert version is not None
    said = [
        path
        for path in (ROOT / "nvfp4").rglob("*.py")
        if f'"{version[1]}"' in path.read_text(encoding="utf-8")
    ]
    assert not said


def test_the_licence_is_apaches_to_the_letter() -> None:
    """As the Apache Software Foundation publishes it; pyproject names and ships it."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert 'license = "Apache-2.0"\nlicense-files = ["LICENSE"]' in PYPROJECT


def test_files_that_services_read() -> None:
    """Continuous integration runs the command that people type; citation and pre-commit are
    well-formed."""
    yaml = pytest.importorskip("yaml", reason="yaml is not installed here")
    workflow = yaml.safe_load(
        (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    )
    runs = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert runs == ["make test", "make docs", "make package"]
    assert all(
        re.search(rf"^{run.removeprefix('make ')}:", makefile, flags=re.MULTILINE) for run in runs
    )
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][
        0
    ]["hooks"]
    names = {"ruff-check", "ruff-format", "clang-format", "mypy", "docs"}
    assert {hook["id"] for hook in hooks} == names
