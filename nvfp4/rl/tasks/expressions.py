"""Values of arithmetic expressions: digits, + - * / and parentheses, and nothing else. No ``eval``.

    sum      = product { ("+" | "-") product }
    product  = atom { ("*" | "/") atom }
    atom     = "(" sum ")" | digits

The text is a model's, so it is bounded: what it may hold keeps numbers small and the recursion
shallow. Values are exact fractions.
"""

from __future__ import annotations

from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DIGITS = 9
MAX_DEPTH = 20
"""Bounds on what a model may write."""

_DIGITS = "0123456789"


class ExpressionError(ValueError):
    """The text is no expression, divides by zero, or is beyond the bounds."""


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and the numbers in it from left to right.

    Usual precedence, from the left; no signs or zeros before numbers, no spaces: one value has few
    spellings. ``ExpressionError`` for every other text.
    """
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"longer than {MAX_CHARACTERS} characters")
    parser = _Parser(text)
    value = parser.sum(0)
    if parser.at < len(text):
        raise ExpressionError(f"unexpected {text[parser.at]!r} at {parser.at}")
    return value, parser.numbers


class _Parser:
    """Recursive descent; at: how far the text is read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.numbers: list[int] = []

    def sum(self, depth: int) -> Fraction:
        value = self.term(depth)
        while sign := self.take("+-"):
            right = self.term(depth)
            value = value + right if sign == "+" else value - right
        return value

    def term(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while sign := self.take("*/"):
            right = self.atom(depth)
            if sign == "/" and right == 0:
                raise ExpressionError("division by zero")
            value = value * right if sign == "*" else value / right
        return value

    def atom(self, depth: int) -> Fraction:
        # a sum in parentheses, or a number
        if self.take("("):
            if depth == MAX_DEPTH:
                raise ExpressionError(f"more than {MAX_DEPTH} parentheses deep")
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise ExpressionError(f"no ) at {self.at}")
            return value

        start = self.at
        while self.take(_DIGITS):
            pass  # ``at`` moves on
        if not 0 < self.at - start <= MAX_DIGITS:
            raise ExpressionError(f"no number of at most {MAX_DIGITS} digits at {start}")
        if self.at - start > 1 and self.text[start] == "0":
            raise ExpressionError(f"a number with a leading 0 at {start}")
        self.numbers.append(int(self.text[start : self.at]))
        return Fraction(self.numbers[-1])

    def take(self, characters: str) -> str:
        """The next character if it is one of these, else ''."""
        following = self.text[self.at : self.at + 1]
        if not following or following not in characters:
            return ""
        self.at += 1
        return following
