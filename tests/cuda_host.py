"""The CUDA kernels compiled for the processor, over csrc/cuda/simt.h: nvfp4._cuda, but that it takes CPU tensors."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parent.parent
KERNELS = ("plain", "searched", "eden", "fused", "scales")
SOURCES = ["bind_cuda.cpp", "cuda/simt.cpp", *(f"cuda/{name}.cu" for name in KERNELS)]
NAME = "nvfp4_cuda_on_host"
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
# for `make sanitize`; AddressSanitizer takes the stacks of fibres for errors, and tests/test_cuda.py fences addresses
FLAGS += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"] if os.environ.get("NVFP4_SANITIZE") else []
COMPILER = shutil.which("g++") or shutil.which("c++")


def _folder() -> Path:
    """Where this version of the sources is built; another version gets another folder."""
    state = hashlib.sha256(" ".join([sys.version, *FLAGS]).encode())
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file():
            state.update(path.read_bytes())
    return ROOT / "build" / f"cuda_on_host_{state.hexdigest()[:12]}"


def _build(folder: Path) -> Path:
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = [*FLAGS, "-DNVFP4_SIMT", f"-DNVFP4_MODULE={NAME}", *include]
    with tempfile.TemporaryDirectory(dir=folder) as made, ThreadPoolExecutor(2) as pool:

        def compile_one(source: str) -> str:
            target = str(Path(made) / f"{Path(source).stem}.o")
            command = [str(COMPILER), *flags, "-x", "c++", "-c", str(ROOT / "csrc" / source), "-o", target]
            subprocess.run(command, check=True)
            return target

        objects = list(pool.map(compile_one, SOURCES))
        unfinished = Path(made) / library.name
        subprocess.run([str(COMPILER), *FLAGS, "-shared", *objects, "-o", str(unfinished)], check=True)
        unfinished.rename(library)  # at once, so that tests side by side never load half a library
    return library


@lru_cache(maxsize=1)
def load() -> ModuleType:
    """The module, built on first use."""
    spec = importlib.util.spec_from_file_location(NAME, _build(_folder()))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
