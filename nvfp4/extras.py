"""What is installed: the version, and which extra brings a package that is missing.

``pip install nvfp4`` brings what the library imports: torch, triton, numpy, rich. Everything else
belongs to an extra and is imported where it is used, so ``import nvfp4.train.loop`` without
accelerate raises ModuleNotFoundError. The command line and the lazy names of ``nvfp4`` turn that
error into what to install:

    nvfp4 pretrain needs accelerate, which is not installed: pip install 'nvfp4[train]'

``tests/test_packaging.py`` holds the table to pyproject.toml.
"""

from __future__ import annotations

import importlib.metadata

EXTRAS: dict[str, frozenset[str]] = {
    "train": frozenset(
        {
            "accelerate",
            "matplotlib",
            "pydantic",
            "safetensors",
            "tokenizers",
            "transformers",
            "tyro",
            "yaml",
        }
    ),
    "data": frozenset({"pyarrow"}),
    "clients": frozenset({"datasets", "lightning_fabric", "peft", "trl"}),
}
"""Extra -> the modules it brings, by the names they are imported under."""

RL_COMMANDS = frozenset({"rl", "gvendi", "prismatic"})
"""Commands whose extra is ``rl``, which brings what ``train`` brings."""


def what_to_install(error: ModuleNotFoundError, user: str) -> str | None:
    """The line that says what ``user`` (such as "nvfp4 pretrain") needs.

    None if no extra brings what is missing.
    """
    missing = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if missing in modules), None)
    if extra is None:
        return None
    if extra == "train" and user.rpartition(" ")[2] in RL_COMMANDS:
        extra = "rl"
    return f"{user} needs {missing}, which is not installed: pip install 'nvfp4[{extra}]'"


def installed_version() -> str:
    """The version in the installed metadata, which pyproject.toml alone decides.

    "0+unknown" for a checkout that is imported from its folder and was never installed.
    """
    try:
        return importlib.metadata.version("nvfp4")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
