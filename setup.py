"""Builds nvfp4._cpu and nvfp4._cuda, the native kernels: plain pybind11 and C++17, no torch at
build time.

A failed build leaves a working package: everything then runs on other backends, and a warning says
why. The CUDA kernels, minutes of work for nvcc, are built where there is nvcc and the driver of a
GPU, for the GPUs there are; NVFP4_CUDA_TARGETS=90a,100a builds them for these, NVFP4_CUDA=1 without
a driver, NVFP4_CUDA=0 never. NVFP4_CPU=0 leaves the CPU's kernels out, for who only waits for the
GPU's.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# Bit-exactness forbids FMA contraction; the other two only drop side effects that nothing here
# looks at.
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
# of the loops that multiply: where the jump at a loop's end lies across 32 bytes, processors of
# Skylake's kin decode it anew each time (benchmarks/NOTES.md has what that is worth)
ALIGNED = "-falign-loops=32"
PER_FILE = {
    # reassociation keeps eight elements waiting for each other's codes, which spills: rtn 1.8 ->
    # 1.6 cycles per element
    "csrc/cpu/avx2.cpp": ["-O3", "-mavx2", "-mfma", "-fno-tree-reassoc"],
    "csrc/cpu/matmul_avx2.cpp": ["-O3", "-mavx2", "-mfma", "-mf16c", ALIGNED],
    "csrc/cpu/matmul_avx512.cpp": [*AVX512, ALIGNED],
    "csrc/cpu/matmul_avx512bf16.cpp": [*AVX512, "-mavx512bf16", ALIGNED],
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
    # the longest first, as they begin side by side
    SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("avx2", "avx512")] + SOURCES
    SOURCES += [f"csrc/cpu/matmul_{isa}.cpp" for isa in ("avx2", "avx512", "avx512bf16")]


OBJECTS = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "csrc" / "objects.py")))

# the lists of the CUDA kernels, from a file of the package that needs nothing of it
NATIVE = Path(__file__).parent / "nvfp4" / "backends" / "native"
CUDA = SimpleNamespace(**runpy.run_path(str(NATIVE / "cuda_targets.py")))
CUDA_FLAGS = [*CUDA.FLAGS, *CUDA.OF_A_LIBRARY]


def find_nvcc():
    """nvcc on PATH or under CUDA_HOME, or None."""
    return CUDA.find_nvcc(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"))


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are not to be built here, or None if they are."""
    asked = os.environ.get("NVFP4_CUDA", "")
    if asked == "0":
        return "NVFP4_CUDA=0 forbade it"
    if find_nvcc() is None:
        return "there is no nvcc on PATH or under CUDA_HOME"
    has_driver = (
        Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    )
    if asked == "1" or os.environ.get("NVFP4_CUDA_TARGETS") or has_driver:
        return None
    return (
        "there is no driver of a GPU, and neither NVFP4_CUDA=1 nor NVFP4_CUDA_TARGETS asked for it"
    )


class Compilers:
    """A process group for compilers, which ends when this process does, however that happens.

    nvcc starts others for minutes at a time; killing setup.py alone would leave them running. A
    watcher
    holds one end of a pipe: when the other end is gone, because we closed it or because we were
    killed, it ends its group.
    """

    def __enter__(self):
        watch = (
            "import os, signal\nos.setpgid(0, 0)\nprint(flush=True)\nos.read(0, 1)\nos.killpg(0, "
            "signal.SIGKILL)"
        )
        command = [sys.executable, "-c", watch]
        self.watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.watcher.stdout.readline()  # from here on there is a group to join
        return self

    def __exit__(self, *error) -> None:
        self.watcher.stdin.close()
        self.watcher.wait()
        self.watcher.stdout.close()

    def run(self, command) -> None:
        """Run one to its end; RuntimeError if it fails, having said why on standard error."""
        group = self.watcher.pid
        done = subprocess.run(command, preexec_fn=lambda: os.setpgid(0, group))
        if done.returncode != 0:
            raise RuntimeError(
                f"{Path(command[0]).name} failed with {done.returncode} on {command[-1]}"
            )


class BuildExt(build_ext):
    """Compiles the files of an extension side by side, each with its own instruction set, and only
    what has changed."""

    def run(self) -> None:
        self.why_no, inplace = {"cuda": why_no_cuda()}, self.inplace
        if os.environ.get("NVFP4_CPU") != "0":
            self.why_no["cpu"] = None
        super().run()
        for kind, reason in self.why_no.items():
            self.say_why_no(kind, reason, inplace)

    def say_why_no(self, kind, reason, inplace) -> None:
        """On standard error, and beside the package, where ``nvfp4.info`` finds it: pip shows
        nobody the first."""
        if reason is not None:
            name = {"cpu": "native CPU", "cuda": "CUDA"}[kind]
            print(f"warning: nvfp4 is installed without {name} kernels: {reason}", file=sys.stderr)
        for folder in (
            Path(self.build_lib) / "nvfp4",
            *([Path(__file__).parent / "nvfp4"] if inplace else []),
        ):
            file = folder / CUDA.MISSING_FILE.format(kind)
            if reason is None:
                file.unlink(missing_ok=True)
            elif folder.is_dir():
                try:
                    file.write_text(reason + "\n")
                # a full disk is why nothing was compiled, and why this cannot be kept
                except OSError as error:
                    sys.exit(f"error: {file} cannot be written: {error.strerror}")

    def build_extension(self, ext) -> None:
        if ext.name == "nvfp4._cuda":
            try:
                self.build_cuda(ext)
            except Exception as error:
                self.why_no["cuda"] = str(error)
            return
        self.compiler.compile = self.compile_cpu
        self.compiler.link_shared_object = self.link_whole
        try:
            super().build_extension(ext)
        except FileNotFoundError as error:
            self.why_no["cpu"] = f"there is no C++ compiler: {error.filename} is not on PATH"
        except Exception as error:
            self.why_no["cpu"] = str(error)

    def compile_cpu(
        self,
        sources,
        output_dir=None,
        macros=None,
        include_dirs=None,
        debug=0,
        extra_preargs=None,
        extra_postargs=None,
        depends=None,
    ) -> list[str]:
        """In the place of the compiler's own ``compile``: what has changed, each file with its own
        flags."""
        compiler = self.compiler
        macros, objects, extra, defines, build = compiler._setup_compile(
            output_dir, macros, include_dirs, sources, depends, extra_postargs
        )
        cc_args = compiler._get_cc_args(defines, debug, extra_preargs)
        cxx = getattr(compiler, "compiler_so_cxx", compiler.compiler_so)
        commands = {
            target: [*cxx, *cc_args, source, *extra, *PER_FILE.get(source, []), *SANITIZE]
            for target, (source, _) in build.items()
        }
        OBJECTS.compile_changed(commands)
        return objects

    def link_whole(self, objects, path, *args, **options) -> None:
        """Under another name first: a linker that is killed leaves nothing that looks like an
        extension, and is new."""
        part = str(Path(path).with_suffix(".part.so"))
        type(self.compiler).link_shared_object(self.compiler, objects, part, *args, **options)
        os.replace(part, path)

    def build_cuda(self, ext) -> None:
        """One binary for the chosen targets, linked with the static runtime: it loads where there
        is no driver."""
        nvcc, folder = find_nvcc(), Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        asked = os.environ.get("NVFP4_CUDA_TARGETS")
        targets, note = CUDA.choose(asked, CUDA.present_capabilities(), CUDA.known_targets(nvcc))
        print(
            f"nvfp4: CUDA kernels for {', '.join(f'sm_{t}' for t in targets)} ({note})",
            file=sys.stderr,
        )

        cores = os.cpu_count() or 1
        threads = min(len(targets), cores)
        codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
        include = [f"-I{path}" for path in (*ext.include_dirs, sysconfig.get_path("include"))]

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        with Compilers() as compilers, ThreadPoolExecutor(max(1, cores // threads)) as pool:

            def compile_one(source) -> str:
                target = folder / f"{Path(source).name}.o"
                options = [*codes, f"--threads={threads}"] if source.endswith(".cu") else include
                compilers.run([nvcc, *CUDA_FLAGS, *options, "-o", str(target), "-c", source])
                return str(target)

            objects = list(pool.map(compile_one, ext.sources))
            compilers.run(
                [nvcc, "-shared", "-cudart", "static", "-Xlinker=-s", *objects, "-o", str(library)]
            )


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
    depends=["setup.py", *(str(path) for path in Path("csrc").rglob("*.h"))],
    extra_link_args=["-fopenmp", *SANITIZE],
    optional=True,
)
cuda_extension = Pybind11Extension(
    "nvfp4._cuda",
    ["csrc/bind_cuda.cpp", *(f"csrc/cuda/{name}.cu" for name in CUDA.SOURCES)],
    depends=[str(path) for path in Path("csrc").rglob("*.h")],
    optional=True,
)
wanted = [extension] if os.environ.get("NVFP4_CPU") != "0" else []
wanted += [cuda_extension] if why_no_cuda() is None else []
setup(ext_modules=wanted, cmdclass={"build_ext": BuildExt})
