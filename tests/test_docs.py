"""README and docs/ are true: links, names, commands, options, code and figures.

No network and no builder is needed; ``make docs`` builds the site besides. A code block that cannot
run here says why in a comment before it, ``<!-- not run: reason -->``; names that a page's blocks
take for granted stand in a comment as well:

    <!-- setup
    model = torch.nn.Linear(8, 8)
    -->
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from limits import HANG

import nvfp4
from nvfp4.quantizers.registry import QUANTIZERS
from nvfp4.recipes import RECIPES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
FIGURES = runpy.run_path(str(DOCS / "figures.py"))

TO_ADD = {"nvfp4/quantizers/max_to_four.py", "nvfp4/rl/objectives/median.py"}
"""Files that docs/extend.md tells a reader to write."""

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced block. language: "" for none. line: of its first line of code. not_run: the reason,
    if it gives one."""

    language: str
    text: str
    line: int
    not_run: str | None


_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: ([^\n]+) -->\s*\Z")
_SETUP = re.compile(r"<!-- setup\n(.*?)-->", re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    found = []
    for fence in _FENCE.finditer(text):
        reason = _NOT_RUN.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start(2)) + 1
        found.append(Block(fence[1], fence[2], line, None if reason is None else reason[1]))
    return found


def prose(text: str) -> str:
    """The text without its blocks and comments."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.DOTALL)


def spans(text: str) -> list[str]:
    """Inline code of the prose."""
    return _CODE.findall(prose(text))


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown and GitHub make it of plain letters."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(text: str) -> set[str]:
    return {
        slug(heading) for heading in re.findall(r"^#+ (.+?)\s*$", prose(text), flags=re.MULTILINE)
    }


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere, each with what is wrong."""
    wrong = []
    for target in _LINK.findall(prose(text)):
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        if re.match(r"https?://", target):
            continue
        if path.startswith("/") or not file.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and (file.suffix != ".md" or anchor not in anchors(text_of(file))):
            wrong.append(f"{target}: no such heading")
    return wrong


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in shell blocks and in inline code; a comment ends one."""
    lines = [
        line for block in blocks(text) if block.language == "sh" for line in block.text.splitlines()
    ]
    for line in [*lines, *spans(text)]:
        if "..." not in line and re.match(
            r"(nvfp4|make|pip|python3?|torchrun|\.venv/bin/\w+) ", line
        ):
            yield shlex.split(line, comments=True)


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links name files and headings that exist."""
    assert not broken(page, text_of(page))


def test_broken_links_are_found(tmp_path: Path) -> None:
    """The rule itself."""
    (tmp_path / "other.md").write_text("# A `code` heading, 2\n")
    page = tmp_path / "page.md"
    right = (
        "[a](other.md) [b](other.md#a-code-heading-2) [c](#here)\n## Here\n```\n[x](no.md)\n```\n"
    )
    page.write_text(right + "[d](other.md#gone) [e](no.md) ![f](/x.png)\n")
    assert broken(page, text_of(page)) == [
        "other.md#gone: no such heading",
        "no.md: no such file",
        "/x.png: no such file",
    ]


@by_page
def test_named_files_exist(page: Path) -> None:
    """What looks like a path of this checkout, in inline code and in shell blocks, is one."""
    text = text_of(page)
    words = [word for words in commands(text) for word in words] + spans(text)
    paths = {
        word.rstrip("/")
        for word in words
        if re.fullmatch(r"(nvfp4|tests|benchmarks|examples|csrc|docs|tools)/\S+", word)
    }
    missing = {path for path in paths - TO_ADD if not any(ROOT.glob(path.partition(":")[0]))}
    assert not missing


@by_page
def test_named_things_exist(page: Path) -> None:
    """``nvfp4.x.y`` in inline code is a module or what one holds."""
    found = {
        name
        for span in spans(text_of(page))
        for name in re.findall(r"(?<![\w./'])nvfp4(?:\.\w+)+", span)
    }
    assert not {name for name in found if not exists(name)}


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one; a module whose extra is missing
    here counts."""
    module, thing = "nvfp4", nvfp4
    for part in name.split(".")[1:]:
        module = f"{module}.{part}"
        if hasattr(thing, part):
            thing = getattr(thing, part)
            continue
        try:
            if importlib.util.find_spec(module) is None:
                return False
            thing = importlib.import_module(module)
        except ModuleNotFoundError as error:
            return (error.name or "nvfp4").partition(".")[0] != "nvfp4"
    return True


def test_things_that_do_not_exist_are_found() -> None:
    """The rule itself."""
    assert exists("nvfp4.Recipe.from_dict")
    assert exists("nvfp4.quantizers.registry.QUANTIZERS")
    assert not exists("nvfp4.quantisers")
    assert not exists("nvfp4.Recipe.from_dicts")


@by_page
def test_environment_variables_are_read_somewhere(page: Path) -> None:
    """``NVFP4_*`` occurs in code."""
    assert not set(re.findall(r"\bNVFP4_[A-Z_]+\b", text_of(page))) - variables()


@cache
def variables() -> frozenset[str]:
    files = [
        ROOT / "setup.py",
        ROOT / "Makefile",
        *(ROOT / "nvfp4").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]
    files = [file for file in files if file != Path(__file__)]
    return frozenset(re.findall(r"\bNVFP4_[A-Z_]+\b", "\n".join(text_of(file) for file in files)))


def test_the_api_page_lists_the_face() -> None:
    """Each public name once, and nothing that does not exist."""
    listed = re.findall(r"^::: (\S+)$", text_of(DOCS / "api.md"), flags=re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert sorted(name.removeprefix("nvfp4.") for name in listed if name.count(".") == 1) == sorted(
        nvfp4.__all__
    )
    assert not [name for name in listed if not exists(name)]


def test_tables_name_every_recipe_quantiser_and_objective() -> None:
    """The registries and the pages that describe them."""
    wanted = {name: f"| `{name}` |" for name in RECIPES}
    for page in ("recipes.md", "numerics.md"):
        assert not [name for name, row in wanted.items() if row not in text_of(DOCS / page)]
    assert not [name for name in QUANTIZERS if f"`{name}`" not in text_of(DOCS / "numerics.md")]
    # rtn_2d has no row of its own, as it is rtn on tiles
    rows = {name for _, name, *_ in FIGURES["_QUANTISERS"]}
    assert rows == QUANTIZERS.keys() - {"rtn_2d"}, "a line of _QUANTISERS in docs/figures.py"
    registry = pytest.importorskip("nvfp4.rl.objectives.registry")
    assert not [
        name
        for name in registry.OBJECTIVES
        if not re.search(rf"\b{re.escape(name)}\b", text_of(DOCS / "rl.md"))
    ]


def test_the_page_of_options_has_every_command_and_every_sentence() -> None:
    """``make docs`` fills docs/options.md in from the classes that are the commands."""
    pytest.importorskip("nvfp4.cli", reason="the command line needs tyro and pydantic")
    made = runpy.run_path(str(DOCS / "options.py"))
    page = text_of(DOCS / "options.md")
    marked = re.findall(r"^<!-- options: (\w+) -->$", page, flags=re.MULTILINE)
    assert {*marked, "info"} == made["COMMANDS"].keys()
    assert [f"## nvfp4 {name}" in page for name in made["COMMANDS"]] == [True] * 7
    for kind in made["COMMANDS"].values():
        rows = list(made["options"](kind))
        assert [field.name for field, _ in rows] == [field.name for field in fields(kind)]
        assert not [field.name for field, sentence in rows if not sentence]

    # a sentence is that of the class that states the field last; the spelling is the shell's
    filled = made["filled"](page)
    assert "<!-- options" not in filled
    assert "| `--seeds` |  | Train each recipe once per seed (0,1,2)" in filled
    assert "| `--schedule {wsd,cosine}` | `wsd` | After the warm-up" in filled
    assert "| `{roofline,all}` | `roofline` | roofline: bytes" in filled
    assert "| `--steps` | `1500` | Optimiser updates. |" in made["table"](
        made["COMMANDS"]["pretrain"]
    )
    assert "| `--steps` | `60` | Steps: rollouts" in made["table"](made["COMMANDS"]["rl"])


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs.yml lists the pages of the folder, and those that docs/site.py adds."""
    listed = re.findall(
        r"^ +- [\w ]+: (\S+\.md)$", text_of(ROOT / "mkdocs.yml"), flags=re.MULTILINE
    )
    added = {"index.md", "contributing.md", "changelog.md"}
    assert sorted(listed) == sorted({*added, *(page.name for page in DOCS.glob("*.md"))})


@by_page
def test_commands_are_taken(page: Path) -> None:
    """``nvfp4`` parses its arguments, ``make`` has the target, ``pip install`` the extra, ``python
    -m`` the module and its options."""
    wrong = [" ".join(words) for words in commands(text_of(page)) if not taken(words)]
    assert not wrong


def taken(words: list[str]) -> bool:
    """Whether a command of the documentation is one of ours, and right; others are let pass."""
    match words:
        case ["make", *targets]:
            names = {target for target in targets if "=" not in target}
            return names <= set(
                re.findall(r"^(\w[\w-]*):", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
            )
        case ["pip", "install", *packages]:
            extras = {
                name
                for part in re.findall(r"\[(.+)\]", " ".join(packages))
                for name in part.split(",")
            }
            return extras <= set(
                re.findall(r"^(\w+) = \[", text_of(ROOT / "pyproject.toml"), flags=re.MULTILINE)
            )
        case ["python" | "python3", "-m", module, *options]:
            spec = importlib.util.find_spec(module)
            source = "" if spec is None or spec.origin is None else text_of(Path(spec.origin))
            return spec is not None and all(
                f'"{option}"' in source for option in options if option.startswith("--")
            )
        case ["nvfp4", *arguments]:
            return parses(arguments)
    return True


def parses(arguments: list[str]) -> bool:
    cli = pytest.importorskip("nvfp4.cli", reason="the command line needs tyro and pydantic")
    if len(arguments) == 1:  # the name of a command, which may want options
        return arguments[0] in {kind.__name__.lower() for kind in cli.RUNNERS}
    if "--config" in arguments:  # a file that is not there
        at = arguments.index("--config")
        arguments = arguments[:at] + arguments[at + 2 :]
    try:
        cli.parse([argument for argument in arguments if argument != "--help"])
    except SystemExit:
        return False
    return True


@by_page
def test_options_exist(page: Path) -> None:
    """``--option`` in inline code is one of some command's."""
    cli = pytest.importorskip("nvfp4.cli", reason="the command line needs tyro and pydantic")
    names = {field.name for kind in cli.RUNNERS for field in fields(kind)}
    known = (
        names
        | {f"no_{name}" for name in names}
        | {
            "help",
            "write",
            "nproc_per_node",
        }
    )
    found = {
        option
        for span in spans(text_of(page))
        for option in re.findall(r"(?<!\S)--([a-z][\w-]*)", span)
    }
    assert not {option for option in found if option.replace("-", "_") not in known}


def test_wrong_commands_are_found() -> None:
    """The rule itself."""
    pytest.importorskip("nvfp4.cli")
    wrong = [
        "nvfp4 pretrain --stepz 3  # a comment",
        "make trian",
        "pip install '.[trian]'",
        "python3 -m benchmarks.on_gpu --cal 1",
        "nvfp4 inf ",
    ]
    right = [
        "nvfp4 pretrain --steps 3  # a comment",
        "make train ARGS='x'",
        "pip install '.[train,rl]'",
        "python3 -m benchmarks.on_gpu --call 1",
        "nvfp4 info ",
    ]
    for lines, verdict in ((wrong, False), (right, True)):
        text = "```sh\n" + "\n".join(lines[:4]) + f"\n```\n`{lines[4]}`\n"
        assert [taken(words) for words in commands(text)] == [verdict] * 5


def program(page: Path) -> str:
    """The Python blocks of a page as one file, on the lines they stand on; what is not run is only
    parsed."""
    text = text_of(page)
    lines = [""] * text.count("\n")
    for setup in _SETUP.finditer(text):
        first = text.count("\n", 0, setup.start(1))
        lines[first : first + setup[1].count("\n")] = setup[1].splitlines()
    for block in blocks(text):
        if block.language != "python":
            continue
        if block.not_run is not None:
            ast.parse(block.text)
            continue
        lines[block.line - 1 : block.line - 1 + block.text.count("\n")] = block.text.splitlines()
    return "\n".join(lines)


_RUN_ALL = """
import json, sys, traceback
failures = 0
for name, source in json.load(sys.stdin).items():
    try:
        exec(compile(source, name, "exec"), {"__name__": "__main__"})
    except Exception:
        failures += 1
        traceback.print_exc()
sys.exit(failures)
"""


def test_code_blocks_run() -> None:
    """All Python of README and docs/ as it stands, each page from its top, in a process of its own:
    pages that add a quantiser to a registry add it for nobody else."""
    pytest.importorskip(
        "transformers", reason="transformers is not installed: docs/convert.md converts a Llama"
    )
    programs = {str(page): program(page) for page in PAGES}
    assert sum(bool(source.strip()) for source in programs.values()) >= 6
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", _RUN_ALL],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=HANG,
    )
    assert ran.returncode == 0, ran.stderr


@by_page
def test_code_blocks_fit_into_a_file(page: Path) -> None:
    """Whoever pastes one into a file of this checkout finds ruff content with its width."""
    python = [block.text for block in blocks(text_of(page)) if block.language == "python"]
    assert not [line for text in python for line in text.splitlines() if len(line) > 100]


@pytest.mark.parametrize("page", ["README.md", "docs/convert.md"])
def test_what_is_not_run_says_why(page: str) -> None:
    """These two run whole: they are what a reader pastes first."""
    assert not [block for block in blocks(text_of(ROOT / page)) if block.not_run is not None]


@by_page
def test_figures_are_those_of_the_data(page: Path) -> None:
    """``python docs/figures.py --write`` brings a page up to date."""
    text = text_of(page)
    assert FIGURES["up_to_date"](text) == text


def test_the_headline_of_several_seeds_is_of_their_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps 1, 2, 3: their mean is 2 and its standard error 1 / sqrt 3; the smallest gap stands
    first."""
    report = json.loads(text_of(ROOT / "benchmarks" / "results" / "compare.json"))
    shared = {"parameters": 5e5, "steps": 10}
    report["runs"] = [
        {**shared, "recipe": recipe, "val_bpb": 2.0 + seed / 10, "gap_percent": gap}
        for seed in range(3)
        for recipe, gap in (("bf16", 0.0), ("nvidia", 2.5), ("rtn", 1.0 + seed))
    ]
    monkeypatch.setitem(FIGURES["headline"].__globals__, "_read", lambda name: report)
    said = FIGURES["headline"]()
    assert "**2.100 bits per byte in BF16; in NVFP4 +2.0 % (`rtn`), +2.5 % (`nvidia`).**" in said
    assert said.endswith("(Means of 3 seeds; the standard error of a gap is 0.6 % or less.)")


def test_stale_figures_are_found() -> None:
    """The rule itself: another number between the marks is replaced, text outside of them is
    not."""
    text = text_of(README)
    wrong = re.sub(r"\d\.\d{3} bits", "1.234 bits", text)
    assert wrong != text
    assert FIGURES["up_to_date"](wrong) == text


def test_the_front_page_opens_with_a_picture_a_number_and_two_commands() -> None:
    """At most 150 lines; exactly the two commands; ten lines of code or so."""
    text = text_of(README)
    assert text.count("\n") <= 150
    first = blocks(text)[0]
    assert [line.split("#")[0].split() for line in first.text.splitlines()] == [
        ["make", "train"],
        ["make", "test"],
    ]
    opening = text[: text.index(first.text)]
    assert opening.index("](benchmarks/results/compare.png)") < opening.index("bits per byte")
    code = next(block for block in blocks(text) if block.language == "python")
    assert (
        len([line for line in code.text.splitlines() if line and not line.startswith("import")])
        <= 10
    )
