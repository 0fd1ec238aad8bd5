"""The options of each command as tables, for docs/options.md.

    <!-- options: pretrain -->      in the page, for docs/site.py, which ``make docs`` calls

An option is a field of the command's dataclass, and the text below the field is what ``--help``
says of it. The page takes both from there, so nothing is written twice and nothing gets old.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nvfp4.cli import RUNNERS

COMMANDS: dict[str, type] = {kind.__name__.lower(): kind for kind in RUNNERS}

_PLACE = re.compile(r"<!-- options: (\w+) -->")


def filled(text: str) -> str:
    """A page with the table of each command that it marks; KeyError for a command that there is
    not."""
    return _PLACE.sub(lambda place: table(COMMANDS[place[1]]), text)


def table(kind: type) -> str:
    """A row per option: as it is given, its default, and what ``--help`` says of it."""
    rows = [
        (f"`{spelling(kind, field)}`", default(field), re.sub(r"([|<*_])", r"\\\1", sentence))
        for field, sentence in options(kind)
    ]
    if not rows:
        return "It has none."
    lines = [("option", "default", "meaning"), ("---", "---", "---"), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def options(kind: type) -> Iterator[tuple[Field[Any], str]]:
    """The fields of a command, each with the text below it in the class that states it last."""
    sentences: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, below in zip(tree.body, [*tree.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                sentences[ast.unparse(statement.target)] = " ".join(below.value.value.split())
    for field in fields(kind):
        yield field, sentences.get(field.name, "")


def spelling(kind: type, field: Field[Any]) -> str:
    """``--schedule {wsd,cosine}``; an argument without a name, such as bench's, is its choices."""
    hint = get_type_hints(kind)[field.name]
    choices = [name for name in get_args(hint) if name] if get_origin(hint) is Literal else []
    listed = "{" + ",".join(choices) + "}" if choices else ""
    name = "" if "Positional" in str(field.type) else f"--{field.name}".replace("_", "-")
    return f"{name} {listed}".strip()


def default(field: Field[Any]) -> str:
    """The default as the command line takes it."""
    if field.default is MISSING:
        return "must be given"
    value = field.default
    if value is None or value in ((), ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"
