"""Builds nvfp4._cpu, the native CPU kernels: plain pybind11 and C++17, no torch at build time.

A failed build leaves a working package: everything then runs on the reference backend, and a warning says why.
"""

import os
import platform
import sys
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


class BuildExt(build_ext):
    """Compiles the files of an extension side by side, each with its own instruction set."""

    def build_extension(self, ext) -> None:
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
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
