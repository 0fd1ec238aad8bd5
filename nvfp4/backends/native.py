"""What the compiled extensions have in common: the numbers of their enums, and why one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"rtn": 0, "rtn_2d": 0, "sr": 1, "sr_te": 2, "four_over_six": 3, "scale_search": 4, "ms_eden": 5}
"""Numbers of ``enum class Rule`` and ``enum class Element`` in csrc/cpu/kernels.h."""


def load(name: str, kind: str, needs: str) -> tuple[ModuleType | None, str | None]:
    """The extension module ``name`` and None, or None and why it is missing. kind: of extension; needs: to build it."""
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        reason = "it was not built" if isinstance(error, ModuleNotFoundError) else f"it does not load: {error}"
        return None, f"the {kind} extension is missing, {reason}; reinstall with {needs}"
