"""Runs as child processes of a comparison: they get signals once, and do not outlive their parent.

A comparison that is stopped passes the signal on and waits. One that is killed (kill -9, out of
memory) can pass nothing on; on Linux the kernel then sends its children SIGTERM (PR_SET_PDEATHSIG),
and a run obeys that as usual: it finishes the step, saves and ends. Elsewhere the child trains on,
and its lock names it to whoever starts the same comparison again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from typing import IO

from nvfp4.run.errors import TrainError

# How long libgomp's threads spin before they sleep. By default they spin for milliseconds, which on
# cores that others use too turns every parallel region into a wait: two busy neighbours on two
# cores took a run of 0.5 M parameters from 36k tokens/s to below 1k. With this it keeps 20k, and
# alone it is as fast as before.
PATIENT = {"GOMP_SPINCOUNT": "1000"}

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def start(
    arguments: list[str], environment: dict[str, str] | None = None, output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """``nvfp4 ARGUMENTS`` as a child process in a session of its own.

    The session makes Ctrl-C on the terminal reach the parent alone. environment: variables besides
    those of this process and ``PATIENT``. output: where its lines go; None: where ours go.
    ``TrainError`` if no process can be started.
    """
    return start_module("nvfp4.cli", arguments, environment, output)


def start_module(
    module: str,
    arguments: list[str],
    environment: dict[str, str] | None = None,
    output: IO[bytes] | None = None,
    descriptors: Collection[int] = (),
) -> subprocess.Popen[bytes]:
    """``python -m MODULE ARGUMENTS``, likewise; descriptors: files that it finds open."""
    try:
        # preexec_fn is not safe beside threads: it calls only what was looked up before.
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            start_new_session=True,
            env={**PATIENT, **os.environ, **(environment or {})},
            stdout=output,
            stderr=output,
            pass_fds=descriptors,
            preexec_fn=end_with_parent(),
        )
    except OSError as error:
        raise TrainError(no_process(error)) from error


def no_process(error: OSError) -> str:
    """What is said where the kernel makes no process."""
    return f"cannot start a process: {error.strerror or error}; free some memory or processes"


def end_with_parent() -> Callable[[], None] | None:
    """What the child does between fork and exec: ask for SIGTERM at its parent's death.

    None where there is no such call. Everything is looked up here, before the fork: after it
    another thread's lock may be held for ever.
    """
    if sys.platform != "linux":
        return None
    try:
        prctl = ctypes.PyDLL(None).prctl
    except (OSError, AttributeError):
        return None
    parent, getppid, kill, own = os.getpid(), os.getppid, os.kill, os.getpid

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if getppid() != parent:  # it died before we asked
            kill(own(), signal.SIGTERM)

    return ask
