"""Builds the extensions on the machine at hand: the GPU's kernels for its card, then the CPU's.

    build      setup.py with NVFP4_CPU=0: every unit that needs ``_cuda`` waits for this
    build_cpu  setup.py with NVFP4_CUDA=0, beside everything else

One command for both would have ``_cuda`` wait for the CPU's kernels: setuptools copies extensions
into place when all of them are built, two minutes later.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from benchmarks.gpu.place import python
from benchmarks.gpu.processes import Job, Skip
from nvfp4.backends.native.cuda_targets import MISSING_FILE

ROOT = Path(__file__).parent.parent.parent


def build(job: Job) -> None:
    """``_cuda`` for the card at hand alone; nothing is fetched.

    The row says what came of it, as a fresh process sees it.
    """
    if importable("nvfp4._cuda") is None:
        job.add(module="_cuda", seconds=0.0, result="it was there already", said="-")
        return
    run_setup(job, "_cuda", {"NVFP4_CPU": "0", "NVFP4_CUDA": "1"})


def build_cpu(job: Job) -> None:
    """The CPU's kernels, at low priority beside everything else.

    No check needs them, and some tests use them.
    """
    if importable("nvfp4._cpu") is None:
        raise Skip("it was there already")
    os.nice(15)
    # why there is no _cuda, if there is none: this build knows nothing of it
    missing = ROOT / "nvfp4" / MISSING_FILE.format("cuda")
    reason = missing.read_text() if missing.exists() else None
    try:
        run_setup(job, "_cpu", {"NVFP4_CUDA": "0"})
    finally:
        missing.unlink(missing_ok=True)
        if reason is not None:
            missing.write_text(reason)


def run_setup(job: Job, module: str, environment: dict[str, str]) -> None:
    """Run setup.py in place with these variables; one row.

    Of the targets, setup.py takes the card at hand by itself; a rehearsal asks it for its version
    instead. Raises RuntimeError if the module cannot be imported afterwards.
    """
    began = time.monotonic()
    what = ["-q", "build_ext", "--inplace"] if job.settings.build else ["--version"]
    command = [*python(), "setup.py", *what]
    path = [os.environ.get("PATH", ""), *job.settings.place.toolboxes]  # nvcc may lie beside it
    environment = environment | {"PATH": os.pathsep.join(path)}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)

    words = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "warning" in line or "error" in line
    ]
    said = words[-1] if words else "-" if done.returncode == 0 else f"code {done.returncode}"
    fault = importable(f"nvfp4.{module}")
    result = "rehearsed, nothing was built" if not job.settings.build else fault or "built"
    job.add(module=module, seconds=round(time.monotonic() - began, 1), result=result, said=said)
    if job.settings.build and fault is not None:
        raise RuntimeError(f"{module} was not built: {fault}; {said}")


def importable(module: str) -> str | None:
    """None if a fresh process can import the extension, else the last line of its complaint.

    Without the package around it, which would import torch first.
    """
    folder, _, name = module.rpartition(".")
    command = [*python(), "-c", f"import sys; sys.path.insert(0, {folder!r}); import {name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
