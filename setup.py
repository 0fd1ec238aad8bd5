"""Builds nvfp4._cpu and nvfp4._cuda, the native kernels: plain pybind11 and C++17, no torch at build time.

A failed build leaves a working package: everything then runs on other backends, and a warning says why. The CUDA
kernels, minutes of work for nvcc, are built where there is nvcc and the driver of a GPU; NVFP4_CUDA=1 builds them
without a driver, NVFP4_CUDA=0 never. NVFP4_CPU=0 leaves the CPU's kernels out, for who only waits for the GPU's.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# Bit-exactness forbids FMA contraction; the other two only drop side effects that nothing here looks at.
COMMON = [
    "-O2",
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
]
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-O3", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
PER_FILE = {
    "csrc/cpu/portable.cpp": ["-O1"],  # vectors of four registers each: more optimising only costs build time
    "csrc/cpu/avx2.cpp": ["-mavx2"],
    "csrc/cpu/matmul.cpp": [*AVX512, "-mavx512bf16"],
    "csrc/cpu/avx512.cpp": AVX512,
}
# for `make sanitize`; they come after the flags of a file, so that -O1 wins
SANITIZE = (
    ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
    if os.environ.get("NVFP4_SANITIZE")
    else []
)
SOURCES = ["csrc/bind.cpp", "csrc/cpu/portable.cpp"]
if X86:
    SOURCES += ["csrc/cpu/avx2.cpp", "csrc/cpu/avx512.cpp", "csrc/cpu/matmul.cpp"]


CUDA_TARGETS = ("90a", "100a", "103a", "120a", "121a")
CUDA_SOURCES = [f"csrc/cuda/{name}.cu" for name in ("plain", "searched", "eden", "fused", "scales")]
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",  # as for the processor: no contraction, true quotients, subnormals kept
    "-prec-div=true",
    "-prec-sqrt=true",
    "-ftz=false",
    "--expt-relaxed-constexpr",
    "--compress-mode=size",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
]


def find_nvcc():
    """nvcc on PATH or under CUDA_HOME, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels here."""
    asked = os.environ.get("NVFP4_CUDA", "")
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    return asked != "0" and find_nvcc() is not None and (asked == "1" or has_driver)


class BuildExt(build_ext):
    """Compiles the files of an extension side by side, each with its own instruction set."""

    def build_extension(self, ext) -> None:
        if ext.name == "nvfp4._cuda":
            try:
                self.build_cuda(ext)
            except Exception as error:
                print(f"warning: nvfp4 is installed without CUDA kernels: {error}", file=sys.stderr)
            return
        compiler = self.compiler
        compile_one = compiler._compile

        def with_flags(obj, src, extension, cc_args, extra_postargs, pp_opts) -> None:
            compile_one(obj, src, extension, cc_args, [*extra_postargs, *PER_FILE.get(src, []), *SANITIZE], pp_opts)

        def compile_all(
            sources,
            output_dir=None,
            macros=None,
            include_dirs=None,
            debug=0,
            extra_preargs=None,
            extra_postargs=None,
            depends=None,
        ) -> list[str]:
            macros, objects, extra, pp_opts, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)
            with ThreadPoolExecutor(len(sources)) as pool:
                jobs = [pool.submit(with_flags, o, *build[o], cc_args, extra, pp_opts) for o in objects if o in build]
                for job in jobs:
                    job.result()
            return objects

        compiler.compile = compile_all
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"warning: nvfp4 is installed without native CPU kernels: {error}", file=sys.stderr)

    def build_cuda(self, ext) -> None:
        """One binary for all targets, linked with the static runtime: it loads where there is no driver."""
        nvcc, folder = find_nvcc(), Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in CUDA_TARGETS]
        include = [f"-I{path}" for path in (*ext.include_dirs, sysconfig.get_path("include"))]

        def compile_one(source) -> str:
            target = folder / f"{Path(source).name}.o"
            options = codes if source.endswith(".cu") else include
            subprocess.run([nvcc, *CUDA_FLAGS, *options, "-c", source, "-o", str(target)], check=True)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([nvcc, "-shared", "-cudart", "static", "-Xlinker=-s", *objects, "-o", str(library)], check=True)


extension = Pybind11Extension(
    "nvfp4._cpu",
    SOURCES,
    extra_compile_args=[
        *COMMON,
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ],
    depends=[str(path) for path in Path("csrc").rglob("*.h")],
    extra_link_args=["-fopenmp", *SANITIZE],
    optional=True,
)
cuda_extension = Pybind11Extension(
    "nvfp4._cuda",
    ["csrc/bind_cuda.cpp", *CUDA_SOURCES],
    depends=[str(path) for path in Path("csrc").rglob("*.h")],
    optional=True,
)
wanted = [extension] if os.environ.get("NVFP4_CPU") != "0" else []
wanted += [cuda_extension] if wants_cuda() else []
setup(ext_modules=wanted, cmdclass={"build_ext": BuildExt})
