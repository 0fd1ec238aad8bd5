"""For which GPUs, from which files and with which options the CUDA kernels are built.

setup.py loads this file by its path, before the package can be imported and where there is no
torch; ``tools/cuda_build.py`` and the tests import it. So it uses the standard library alone, and
reads no environment: what a user asks for is an argument.

By default the kernels are built for the GPUs of the machine, some compiler minutes each; on a
machine without one, for every target that nvcc knows. A target is named as nvcc names it, without
its "sm_": "90a" is Hopper with the instructions that only Hopper has.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TARGETS = ("90a", "100a", "103a", "120a", "121a")
"""Hopper (H100, H200), B200, B300, RTX 50 and RTX PRO Blackwell, GB10."""

SOURCES = ("plain", "searched", "eden", "eden128", "mma_eden", "fused", "scales")
"""Files of csrc/cuda/, without their ``.cu``."""

OF_A_LIBRARY = (
    "--compress-mode=size",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
)
"""What setup.py adds to ``FLAGS``: device code is compressed, and host code as strict as the CPU's.
"""

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "-ftz=false",
    "--expt-relaxed-constexpr",
)
"""Products are rounded before they are added to, quotients correctly, and subnormals are kept."""

MISSING_FILE = "_{}_missing.txt"
"""A file in the package's folder, of "cpu" and "cuda": why these kernels were not built.

pip hides what setup.py prints; this is read later, by ``nvfp4.info`` and ``explain``.
"""


class Choice(NamedTuple):
    """targets: to build for; note: a sentence on why these, and what was left out."""

    targets: tuple[str, ...]
    note: str


def find_nvcc(cuda_home: str | None = None) -> str | None:
    """nvcc on PATH or below ``cuda_home``, or None."""
    at_home = shutil.which("nvcc", path=str(Path(cuda_home) / "bin")) if cuda_home else None
    return shutil.which("nvcc") or at_home


def present_capabilities() -> tuple[str, ...]:
    """Compute capabilities of the GPUs here, as the driver tells them ("9.0"), each once.

    Empty without a driver.
    """
    words = _said("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return tuple(dict.fromkeys(re.findall(r"^\s*(\d+\.\d)\s*$", words, re.MULTILINE)))


def known_targets(nvcc: str) -> tuple[str, ...]:
    """Those of ``TARGETS`` that this nvcc can compile for.

    It lists "sm_90" and means its variant "sm_90a" as well.
    """
    known = set(re.findall(r"\bsm_(\d+)\b", _said(nvcc, "--list-gpu-code")))
    return tuple(target for target in TARGETS if target.rstrip("a") in known)


def choose(asked: str | None, present: Iterable[str], known: Iterable[str]) -> Choice:
    """What to build.

    asked: the user's list, "90a,100a", or None; present: compute capabilities of the GPUs here;
    known: targets that nvcc knows. Raises ValueError, in words that name the list and what to do,
    if nothing is left or a name is unknown.
    """
    known, present = tuple(known), tuple(present)

    # what the user asks for, or the GPUs of this machine, or all
    if asked:
        words = [word for word in asked.replace(";", ",").split(",") if word.strip()]
        wanted = tuple(dict.fromkeys(_target(word) for word in words))
        note = "as NVFP4_CUDA_TARGETS says"
    elif present:
        here = {capability.replace(".", "") + "a" for capability in present}
        wanted = tuple(target for target in TARGETS if target in here)
        note = "the GPUs of this machine; NVFP4_CUDA_TARGETS chooses others"
        if not wanted:
            raise ValueError(
                f"the GPUs of this machine have compute capability {', '.join(present)}, and these "
                f"kernels are written for {_names(TARGETS)} (Triton's run from sm_80 on)"
            )
    else:
        wanted, note = (
            TARGETS,
            "there is no GPU to build for alone; NVFP4_CUDA_TARGETS chooses fewer",
        )

    # an older nvcc does not know the newest cards: build for the others
    unknown = [target for target in wanted if target not in known]
    left = tuple(target for target in wanted if target in known)
    if not left:
        raise ValueError(
            f"nvcc does not know {_names(unknown)}, only {_names(known) or 'older ones'}: update "
            "CUDA"
        )
    if unknown:
        note += f"; without {_names(unknown)}, which this nvcc does not know"
    return Choice(left, note)


def _target(word: str) -> str:
    """A name of a target as the user may write it: 90a, 90, sm_90a, 9.0."""
    target = word.strip().lower().removeprefix("sm_").replace(".", "").removesuffix("a") + "a"
    if target not in TARGETS:
        raise ValueError(
            f"NVFP4_CUDA_TARGETS names {word.strip()!r}; the kernels are written for "
            f"{', '.join(TARGETS)}"
        )
    return target


def _names(targets: Iterable[str]) -> str:
    return ", ".join(f"sm_{target}" for target in targets)


def _said(*command: str) -> str:
    """What a program prints, or nothing if there is none or it fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
