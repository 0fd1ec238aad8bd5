"""The CUDA kernels compiled for the processor, over csrc/cuda/simt.h: nvfp4._cuda, but that it
takes CPU tensors."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pybind11
from filelock import FileLock

ROOT = Path(__file__).parents[2]
KERNELS = ("plain", "searched", "eden", "eden128", "fused", "scales", "mma_eden")
SOURCES = ["bind_cuda.cpp", "cuda/simt.cpp", *(f"cuda/{name}.cu" for name in KERNELS)]
NAME = "nvfp4_cuda_on_host"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
]
# for `make sanitize`; AddressSanitizer takes the stacks of fibres for errors, and test_cuda.py
# fences addresses
FLAGS += (
    ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    if os.environ.get("NVFP4_SANITIZE")
    else []
)
COMPILER = shutil.which("g++") or shutil.which("c++")


OBJECTS = SimpleNamespace(**runpy.run_path(str(ROOT / "csrc" / "objects.py")))


def _build() -> Path:
    """The library, of the sources as they are: compiled once, by whichever process of the tests
    comes first."""
    kind = hashlib.sha256(" ".join([sys.version, *FLAGS]).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"cuda_on_host_{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = [*FLAGS, "-DNVFP4_SIMT", f"-DNVFP4_MODULE={NAME}", *include]
    commands = {
        str(folder / f"{Path(source).stem}.o"): [
            str(COMPILER),
            *flags,
            "-x",
            "c++",
            "-c",
            str(ROOT / "csrc" / source),
        ]
        for source in SOURCES
    }

    with FileLock(folder / "lock"):
        OBJECTS.compile_changed(commands, workers=2)
        newest = max(Path(target).stat().st_mtime_ns for target in commands)
        if not library.exists() or library.stat().st_mtime_ns < newest:
            unfinished = library.with_suffix(".unfinished")
            subprocess.run(
                [str(COMPILER), *FLAGS, "-shared", *commands, "-o", str(unfinished)], check=True
            )
            unfinished.rename(library)  # at once: who has loaded the old one keeps it
    return library


@lru_cache(maxsize=1)
def load() -> ModuleType:
    """The module, built on first use."""
    spec = importlib.util.spec_from_file_location(NAME, _build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
