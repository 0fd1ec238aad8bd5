"""When a program has done what a test expects: by its output, or by its result.

    stdout    equal lines, white space at their ends and empty lines at the end apart
    result    equal JSON values: true is not 1, and numbers with a fraction may differ by 1e-9

Runs in the keeper, outside the walls, on what a judged process wrote: so it must hold for any text,
of any length, and any nesting.
"""

from __future__ import annotations

import math
from typing import Any

CLOSENESS = 1e-9
"""Relative or absolute difference up to which two numbers with a fraction are the same result."""


def passes(outcome: dict[str, Any], test: dict[str, Any]) -> bool:
    """Whether a program ended well and did what a test expects of it."""
    if outcome["stopped"] or outcome["status"] != 0:
        return False
    if "stdout" in test and lines(outcome["stdout"]) != lines(test["stdout"]):
        return False
    try:
        return "result" not in test or same(outcome["result"], test["result"])
    except RecursionError:  # nested too deeply to be looked at
        return False


def lines(text: str) -> list[str]:
    """Text without white space at the ends of its lines, and without empty lines at its end."""
    # No pattern: one that looks for white space before an end takes time with the square of the
    # white space elsewhere.
    stripped = "\n".join(line.rstrip() for line in text.split("\n"))
    return stripped.rstrip("\n").split("\n")


def same(a: Any, b: Any) -> bool:
    """Equality of two JSON values, numbers with a fraction up to ``CLOSENESS``."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, float) or isinstance(b, float):
        numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
        try:
            return numbers and math.isclose(a, b, rel_tol=CLOSENESS, abs_tol=CLOSENESS)
        except OverflowError:  # an integer beyond all numbers with a fraction
            return False
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)
