"""Extensions beside the sources: which are used."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from nvfp4.backends.native.extension import INTERFACE, load


def test_an_extension_from_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that moved on beside an extension that did not: said with its place, instead of
    failing in a call."""
    for made in ({}, {"interface": INTERFACE - 1}, {"interface": INTERFACE}):
        stale = types.ModuleType("nvfp4._stale")
        stale.__file__ = "/somewhere/_stale.so"
        vars(stale).update(made)
        monkeypatch.setitem(sys.modules, "nvfp4._stale", stale)
        module, reason = load("nvfp4._stale", "native", "a compiler")
        if made.get("interface") == INTERFACE:
            assert (module, reason) == (stale, None)
        else:
            assert module is None
            assert reason is not None
            assert "/somewhere/_stale.so" in reason
            assert "build it again, with a compiler" in reason


def test_the_interface_has_one_number() -> None:
    header = (Path(__file__).parents[2] / "csrc" / "interface.h").read_text()
    assert f"kInterface = {INTERFACE};" in header
