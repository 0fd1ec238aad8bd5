"""The house holds: rooms, sizes, one home for every concept. Each rule has a test of the rule
itself beside it.

The map is docs/architecture.md: its tree has a line per module and folder of the package, in the
order in which they
may import each other. Python is read through its syntax tree, nothing is imported. Tests are exempt
from sizes: they hold tables and prose.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nvfp4"
MAP = ROOT / "docs" / "architecture.md"
BESIDE = ("benchmarks", "tools", "examples")
"""Folders of Python beside the package."""

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_SHELF = 12

MAX_LEVELS = {"ops": 8, "layer": 11, "model": 12, "run": 12, "train": 14, "rl": 14, "bench": 14}
"""How high a module of that room may stand: 1 if it imports none of ours, else one above what it
imports, also inside a function. It only falls; docs/architecture.md says what stands on what."""

HIGHEST = max(MAX_LEVELS.values())
"""And of the rooms that are not named."""

PENDING_IMPORTS: dict[str, set[str]] = {}
"""Imports that still go up, by what is imported; each entry has to be needed."""

PENDING_NAMES: set[str] = set()
"""Class names that still mean several things; each entry has to be needed."""


def module_name(path: Path) -> str:
    """nvfp4/quantizers/rtn.py -> quantizers.rtn; a package's __init__ is the package;
    nvfp4/__init__.py is ''."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def map_of(text: str) -> list[str]:
    """The paths that the first fenced block of a page lists, folders with a slash at the end, in
    its order."""
    paths: list[str] = []
    folders: list[str] = []
    for line in text.split("```")[1].splitlines():
        entry = re.match(r"( *)(\S+) {2,}\S", line)
        if entry is None:
            continue
        depth = len(entry[1]) // 2
        folders[depth:] = [entry[2]] if entry[2].endswith("/") else []
        paths.append("".join(folders[:depth]) + entry[2])
    return paths


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path): path for path in FILES}
INSIDE = {name: path for name, path in MODULES.items() if name}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
ROOMS = [
    path.rstrip("/").removesuffix(".py")
    for path in map_of(MAP.read_text())
    if "/" not in path.rstrip("/")
]
"""From the ground up: a module imports from its own room or one before it."""

OUTSIDE = [path for folder in BESIDE for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES = [
    *FILES,
    *sorted(
        path
        for suffix in ("*.h", "*.cpp", "*.cu", "*.cuh")
        for path in (ROOT / "csrc").rglob(suffix)
    ),
    *OUTSIDE,
]


def of_each(cases: Iterable[Any]) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """A rule as one test over many cases, which names every case that breaks it. As a test for each
    case they were a quarter of all tests here, and pytest takes milliseconds to begin and end
    one. A rule without a case would hold whatever the code is: it fails."""
    cases = [*cases]

    def decorate(rule: Callable[[Any], None]) -> Callable[[], None]:
        def check() -> None:
            assert cases, "no case that the rule could look at"
            broken = []
            for case in cases:
                try:
                    rule(case)
                except AssertionError as error:
                    broken.append(f"{case}: {error}".partition("\n")[0])
            assert not broken, "\n".join(broken)

        check.__name__, check.__doc__ = rule.__name__, rule.__doc__
        return check

    return decorate


by_file = of_each(SOURCES)
by_module = of_each(sorted(INSIDE))


def room(name: str) -> int:
    """The place of a module's room on the map; a module without one comes after all."""
    first = name.split(".")[0]
    return ROOMS.index(first) if first in ROOMS else len(ROOMS)


def imports(tree: ast.Module, name: str) -> Iterator[tuple[str, int]]:
    """Each module of ours that a module imports, with its line; '' is nvfp4/__init__.py. Relative
    ones too."""
    package = name if name in PACKAGES else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nvfp4":
                    yield alias.name.removeprefix("nvfp4").lstrip("."), node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parents = package.split(".")
                base = ".".join(
                    [*parents[: len(parents) - node.level + 1], node.module or ""]
                ).strip(".")
            elif node.module and node.module.split(".")[0] == "nvfp4":
                base = node.module.removeprefix("nvfp4").lstrip(".")
            else:
                continue
            for alias in node.names:  # `from package import module` is an import of the module
                full = f"{base}.{alias.name}".lstrip(".")
                yield (
                    (
                        full
                        if base in PACKAGES and (full in MODULES or alias.name.startswith("_"))
                        else base
                    ),
                    node.lineno,
                )


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file, read once."""
    return ast.parse(path.read_text(), str(path))


def test_the_map_is_the_house() -> None:
    """Every module and folder has its line in docs/architecture.md, and every line names one that
    exists."""
    drawn = map_of(MAP.read_text())
    files = {str(path.relative_to(PACKAGE)) for path in FILES if path.name != "__init__.py"} | {
        "__init__.py"
    }
    folders = {
        f"{path.parent.relative_to(PACKAGE)}/" for path in FILES if path.name == "__init__.py"
    } - {"./"}
    assert len(drawn) == len(set(drawn)), "a line stands twice"
    assert sorted(drawn) == sorted(files | folders), (
        f"compare with the tree in {MAP.relative_to(ROOT)}"
    )
    assert len(files) > 15


def test_maps_are_read() -> None:
    """The rule itself."""
    text = (
        "prose\n```\na/     one\n  b.py   two\n  c/   three\n    d.py  four\ne.py   "
        "five\n```\n```\nf.py   six\n```"
    )
    assert map_of(text) == ["a/", "a/b.py", "a/c/", "a/c/d.py", "e.py"]


def test_the_shelf_is_short() -> None:
    """At most a dozen rooms, a dozen files; and no public name of the package is a module's too."""
    rooms = [name for name in PACKAGES if name and "." not in name]
    files = [path.name for path in PACKAGE.glob("*.py")]
    assert len(rooms) <= MAX_SHELF
    assert len(files) <= MAX_SHELF
    public = next(
        ast.literal_eval(node.value)
        for node in parse(PACKAGE / "__init__.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert not set(public) & {name.split(".")[0] for name in INSIDE}, (
        "nvfp4.NAME would be a module or a function"
    )


@by_module
def test_imports_go_down(name: str) -> None:
    """Never from a room further down the map, and never from a package's __init__, which is a face
    and not a home."""
    for imported, line in imports(parse(INSIDE[name]), name):
        where = f"{INSIDE[name].relative_to(ROOT)}:{line}"
        assert imported not in PACKAGES, (
            f"{where} imports the package 'nvfp4.{imported}', name the module in it"
        )
        if imported.split(".")[-1].startswith("_"):
            continue  # compiled code lies below every room: it imports nothing
        assert imported in MODULES, f"{where} imports nvfp4.{imported}, which does not exist"
        if name in PENDING_IMPORTS.get(imported, ()):
            continue
        assert room(imported) <= room(name), f"{where} imports upward, from nvfp4.{imported}"


def test_no_import_is_pending_that_has_been_mended() -> None:
    """``PENDING_IMPORTS`` only shrinks."""
    for imported, names in PENDING_IMPORTS.items():
        for name in names:
            assert name in INSIDE, f"nvfp4.{name} is gone: take it out of PENDING_IMPORTS"
            found = {i for i, _ in imports(parse(INSIDE[name]), name)}
            assert imported in found, (
                f"nvfp4.{name} no longer imports {imported}: take it out of PENDING_IMPORTS"
            )


def test_no_circles() -> None:
    """Also within a room, and also through imports inside functions: whoever imports must be
    importable without us."""
    graph = {
        name: {i for i, _ in imports(parse(path), name) if i in MODULES}
        for name, path in INSIDE.items()
    }
    assert not find_circle(graph)


@pytest.mark.parametrize("folder", BESIDE)
def test_no_circles_beside_the_package(folder: str) -> None:
    """benchmarks/ and the like: their own modules, by their full names."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }
    graph = {
        name: {i for i in imports_of_any(parse(path)) if i in names} for name, path in names.items()
    }
    assert not find_circle(graph)
    assert paths


def imports_of_any(tree: ast.Module) -> Iterator[str]:
    """Every module, by its absolute name, that a file imports or may mean to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_class_names_mean_one_thing() -> None:
    """A class name stands once in the whole package."""
    homes: dict[str, list[str]] = defaultdict(list)
    for name, path in MODULES.items():
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name)
    several = {name: where for name, where in homes.items() if len(where) > 1}
    assert several.keys() <= PENDING_NAMES, {
        name: several[name] for name in several.keys() - PENDING_NAMES
    }
    assert several.keys() >= PENDING_NAMES, (
        f"take these out of PENDING_NAMES: {PENDING_NAMES - several.keys()}"
    )


def levels(graph: dict[str, set[str]]) -> dict[str, list[str]]:
    """For every name the longest chain of imports that ends in it, from the ground up."""
    chains: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in chains:
            below = (chain(imported) for imported in sorted(graph[name]))
            chains[name] = [*max(below, key=len, default=[]), name]
        return chains[name]

    for name in graph:
        chain(name)
    return chains


def test_the_house_is_low() -> None:
    """Who reads a module reads no more than so many others that stand on each other."""
    graph = {
        name: {i for i, _ in imports(parse(path), name) if i in INSIDE}
        for name, path in INSIDE.items()
    }
    longest = {
        room: max((c for n, c in levels(graph).items() if n.split(".")[0] == room), key=len)
        for room in {name.split(".")[0] for name in INSIDE}
    }
    high = {
        room: " <- ".join(chain)
        for room, chain in longest.items()
        if len(chain) > MAX_LEVELS.get(room, HIGHEST)
    }
    assert not high, high
    loose = {r: len(longest[r]) for r, most in MAX_LEVELS.items() if len(longest[r]) < most}
    assert not loose, f"lower than MAX_LEVELS says, which may fall: {loose}"


def test_every_case_that_breaks_a_rule_is_named() -> None:
    """The rule itself: the second and the third of four, each with its reason; what is no assertion
    ends it."""

    @of_each([1, 2, 3, 5])
    def rule(case: int) -> None:
        assert case in (1, 5), f"{10 * case} is no good"

    with pytest.raises(AssertionError, match=r"2: 20 is no good\n *3: 30 is no good"):
        rule()
    with pytest.raises(ZeroDivisionError):
        of_each([0])(lambda case: 1 / case)()
    of_each([1])(lambda case: None)()
    with pytest.raises(AssertionError, match="no case"):
        of_each([])(lambda case: None)()


def test_levels_are_counted() -> None:
    """The rule itself: of two ways down the longer one counts."""
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert levels(graph) == {"a": ["c", "b", "a"], "b": ["c", "b"], "c": ["c"]}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Names around a circle, or nothing."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for imported in sorted(graph.get(name, ())):
            if circle := visit(imported, [*trail, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


def test_circles_are_found() -> None:
    """The rule itself: a -> b -> c -> b."""
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_are_seen() -> None:
    """The rule itself: every form of import statement, also inside a function; third parties are
    not ours."""
    source = """
import numpy, nvfp4
import nvfp4.ops as ops
from nvfp4.numerics.formats import E2M1
from nvfp4.quantizers import rtn, QUANTIZERS
def f():
    from . import sr
    from ..ops import quantize
"""
    found = [name for name, _ in imports(ast.parse(source), "quantizers.base")]
    assert found == [
        "",
        "ops",
        "numerics.formats",
        "quantizers.rtn",
        "quantizers",
        "quantizers.sr",
        "ops",
    ]


def test_the_face_defines_nothing() -> None:
    """nvfp4/__init__.py: imports, dunder names, at most a lazy __getattr__. So are the other
    packages' __init__."""
    for name in PACKAGES:
        for node in parse(MODULES[name]).body:
            names = (
                [node.name]
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
                else []
            )
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            assert all(re.fullmatch(r"__\w+__", n) for n in names), (
                f"{MODULES[name]}:{node.lineno} defines {names}"
            )


@by_file
def test_files_are_short(path: Path) -> None:
    """Limits against sprawl, no targets."""
    lines = path.read_text().count("\n")
    assert lines <= MAX_FILE_LINES, f"{lines} lines, at most {MAX_FILE_LINES}: split it by concept"


@by_file
def test_functions_are_short(path: Path) -> None:
    """Docstring included. (C++ is left to its readers.)"""
    if path.suffix != ".py":
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, (
                f"{path.name}:{node.lineno} {node.name}() has {length} lines"
            )


@by_module
def test_no_environment_variables_below_run_and_cli(name: str) -> None:
    """Behaviour comes from arguments: what a run does can be read off its call."""
    if name.split(".")[0] in ("run", "train", "rl", "cli"):
        return
    for node in ast.walk(parse(INSIDE[name])):
        word = (
            node.attr
            if isinstance(node, ast.Attribute)
            else node.id
            if isinstance(node, ast.Name)
            else None
        )
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            word = next(
                (
                    alias.name
                    for alias in node.names
                    if alias.name in ("environ", "getenv", "putenv")
                ),
                None,
            )
        assert word not in ("environ", "getenv", "putenv"), (
            f"nvfp4.{name}:{getattr(node, 'lineno', '?')} reads os.{word}"
        )


GRID_TABLES = {
    "the E2M1 grid": (1, 1.5, 2, 3, 4, 6),
    "the E2M1 grid, doubled": (1, 2, 3, 4, 6, 8, 12),
    "the midpoints of E2M1": (0.75, 1.25, 1.75, 2.5, 3.5, 5),
}
TABLE_HOMES = ("nvfp4/numerics/formats.py", "csrc/formats.h")


def numbers(path_suffix: str, text: str) -> list[float]:
    """Numeric literals in the order of the source, without comments and strings."""
    if path_suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        literals = [token.string for token in tokens if token.type == tokenize.NUMBER]
        return [
            float(ast.literal_eval(literal)) for literal in literals if "j" not in literal.lower()
        ]
    code = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"", " ", text, flags=re.DOTALL)
    return [
        float(n)
        for n in re.findall(r"(?<![\w.])(\d+\.?\d*|\.\d+)(?=[fFuUlL]*\b|[fF])(?![\w.]*x)", code)
    ]


def table_in(found: list[float]) -> str | None:
    """The name of a grid table among these numbers, ascending or descending."""
    for label, table in GRID_TABLES.items():
        for wanted in (list(table), list(reversed(table))):
            if any(found[i : i + len(wanted)] == wanted for i in range(len(found))):
                return label
    return None


@by_file
def test_number_tables_live_in_formats(path: Path) -> None:
    """In the packages around us the E2M1 grid is typed out some 80 times, with four meanings of
    'nearest'."""
    if str(path.relative_to(ROOT)) in TABLE_HOMES:
        return
    table = table_in(numbers(path.suffix, path.read_text()))
    assert table is None, f"{path.name} writes out {table}; take it from {' or '.join(TABLE_HOMES)}"


def test_tables_are_found() -> None:
    """The rule itself, in both languages; prose and comments may quote the grid."""
    assert (
        table_in(numbers(".py", "x = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]")) == "the E2M1 grid"
    )
    assert (
        table_in(numbers(".h", "const float g[] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f};"))
        == "the E2M1 grid"
    )
    assert (
        table_in(numbers(".cu", "int8_t t[] = {0, 1, 2, 3, 4, 6, 8, 12};"))
        == "the E2M1 grid, doubled"
    )
    assert (
        table_in(numbers(".py", "if x < 5: pass\nbounds = (5.0, 3.5, 2.5, 1.75, 1.25, .75, .25)"))
        is not None
    )
    assert (
        table_in(numbers(".py", '"""0, 0.5, 1, 1.5, 2, 3, 4, 6"""  # 1, 1.5, 2, 3, 4, 6')) is None
    )
    assert (
        table_in(numbers(".h", "// 1, 1.5, 2, 3, 4, 6\n/* 1, 1.5, 2, 3, 4, 6 */ int x = 0x12;"))
        is None
    )


BANNED_WORDS = re.compile(r"(^|_)(utils?|helpers?|misc)(_|$)|^_*new_(?!_)|_v2$")


@by_module
def test_names_say_what_a_thing_is(name: str) -> None:
    """No utils, helper, new_ or v2: they name a place to put things, or a moment."""
    defined = [
        n.name
        for n in ast.walk(parse(INSIDE[name]))
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
    ]
    for word in [*name.split("."), *defined]:
        assert not BANNED_WORDS.search(word), f"nvfp4.{name}: {word}"


@by_module
def test_public_things_have_docstrings(name: str) -> None:
    """Modules, classes and functions without a leading underscore: at least the one sentence."""
    tree = parse(INSIDE[name])
    if not tree.body:
        return
    assert ast.get_docstring(tree), f"nvfp4.{name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), (
                f"nvfp4.{name}:{node.lineno} {node.name} has no docstring"
            )


@by_module
def test_public_methods_are_documented_and_typed(name: str) -> None:
    """Overrides too, which say what is their own; kernels of Triton have types of its compiler."""
    for holder in ast.walk(parse(INSIDE[name])):
        if not isinstance(holder, ast.Module | ast.ClassDef):
            continue
        if isinstance(holder, ast.ClassDef) and holder.name.startswith("_"):
            continue
        for node in holder.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            decorators = " ".join(ast.unparse(each) for each in node.decorator_list)
            where = f"nvfp4.{name}:{node.lineno} {node.name}"
            if ".setter" not in decorators:
                assert ast.get_docstring(node), f"{where} has no docstring"
            if "triton.jit" in decorators:
                continue
            everything = node.args
            arguments = [*everything.posonlyargs, *everything.args, *everything.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None]
            assert not set(bare) - {"self", "cls"}, f"{where} has no types for {bare}"
            assert node.returns is not None, f"{where} does not say what it returns"


def test_every_mutant_can_be_put_in() -> None:
    """Its text stands exactly once: a fault that no longer fits would end ``make mutants``."""
    from tools.mutants import misplaced

    assert misplaced(ROOT) == []
