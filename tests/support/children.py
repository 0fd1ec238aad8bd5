"""Child processes that begin where everything is imported already.

A fresh Python imports torch, transformers and accelerate for seven seconds of a core before it runs
a line of ours, and each test of a run that is killed, stopped or spread over processes needs one or
more. Here one process imports them once and forks for every child (``multiprocessing.forkserver``
of Python's own library):

    pytest, or one of its workers          the fork server, begun at the first child        the
    child python(code, arguments) ---------> fork ------------------------------------------>
                                                                                        environment,
                                                                                        folder,
                                                                                        sys.argv,
                                                                                        output to
                                                                                        files, then
                                                                                        the code
    exit code, or minus the signal that killed it; what the files hold <--------------- its end

``processes`` starts several that find each other as those of torchrun do. What is different from
``python -c``: the modules are there, and standard input is empty. A test that is about the start of
a process, about its pipes, or about packages that must not be imported starts a real one.
"""

from __future__ import annotations

import atexit
import multiprocessing.forkserver
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed
from limits import HANG

IMPORTED = (
    "nvfp4.cli",
    "nvfp4.train.loop",
    "nvfp4.rl.loop",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "pytest",
)
"""What children share: the command line, both trainers, the model that most train, what parallel
ones are made of."""


class Child:
    """A process that runs ``code`` as ``python -c CODE ARGUMENTS`` would; polled as a
    ``subprocess.Popen`` is."""

    def __init__(
        self,
        code: str,
        arguments: list[str],
        environment: dict[str, str],
        folder: Path | None = None,
    ) -> None:
        self.arguments = arguments
        # removed without a word: a child that was killed or only polled is collected in the middle
        # of some later test, which may be about warnings
        files = tempfile.mkdtemp()
        self.forget = weakref.finalize(self, shutil.rmtree, files, ignore_errors=True)
        self.said = [str(Path(files) / name) for name in ("out", "err")]
        given = (code, arguments, environment, str(folder or Path.cwd()), *self.said)
        # a daemon: what a failed test leaves behind ends with pytest and is not waited for
        self.process: BaseProcess = _server(environment).Process(
            target=_run, args=given, daemon=True
        )
        self.process.start()

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it; None while it runs."""
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        """The same."""
        return self.process.exitcode

    @property
    def pid(self) -> int:
        """Its number."""
        assert self.process.pid is not None
        return self.process.pid

    def send_signal(self, number: int) -> None:
        """To it alone."""
        os.kill(self.pid, number)

    def output(self) -> str:
        """What it has printed so far."""
        return Path(self.said[0]).read_text() if Path(self.said[0]).exists() else ""

    def wait(self) -> int:
        """Its exit code; one that hangs is killed, and that is ``TimeoutExpired``."""
        self.process.join(HANG)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.arguments, HANG)
        return self.process.exitcode

    def finished(self) -> subprocess.CompletedProcess[str]:
        """Exit code, output and errors of one that ends by itself."""
        code, out, errors = self.wait(), self.output(), Path(self.said[1])
        said = errors.read_text() if errors.exists() else ""
        self.forget()
        return subprocess.CompletedProcess(self.arguments, code, out, said)


def python(
    code: str, arguments: list[str], environment: dict[str, str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -c CODE ARGUMENTS`` to its end; one that hangs is killed."""
    return Child(code, arguments, environment, folder).finished()


def script(
    path: Path, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """``python PATH ARGUMENTS`` to its end."""
    code = (
        "import runpy, sys\nsys.argv[:] = sys.argv[1:]\nrunpy.run_path(sys.argv[0], "
        "run_name='__main__')"
    )
    return python(code, [str(path), *arguments], environment)


def processes(
    count: int, code: str, arguments: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """So many at once, with what torchrun tells its processes, to their end: the first exit code
    that is not 0, and what all of them said. When one fails the others, who wait for it, are
    killed, as torchrun does."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = [
        Child(code, arguments, environment | torchrun_environment(rank, count, store.port))
        for rank in range(count)
    ]
    end, code_of_all = time.monotonic() + HANG, 0
    while any(child.process.is_alive() for child in children):
        code_of_all = code_of_all or next(
            (c.process.exitcode for c in children if c.process.exitcode), 0
        )
        if code_of_all or time.monotonic() > end:
            for child in children:
                child.process.kill()
        time.sleep(0.02)
    ended = [child.finished() for child in children]
    code_of_all = code_of_all or next((c.returncode for c in ended if c.returncode), 0)
    return subprocess.CompletedProcess(
        arguments, code_of_all, "".join(c.stdout for c in ended), "".join(c.stderr for c in ended)
    )


def torchrun_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What ``torchrun --standalone`` tells each process; the store on this port is ours in the
    place of its own."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "ROLE_RANK": str(rank),
        "GROUP_RANK": "0",
        "ROLE_NAME": "default",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ROLE_WORLD_SIZE": str(count),
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def _server(environment: dict[str, str]) -> multiprocessing.context.ForkServerContext:
    """The fork server, which imports in this environment: torch looks there for the number of its
    threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _run(
    code: str, arguments: list[str], environment: dict[str, str], folder: str, out: str, err: str
) -> None:
    """In the child: become what ``python -c`` would be, and run."""
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    # a shell that put pytest in the background ignores both
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[:] = ["-c", *arguments]
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        # multiprocessing leaves them out: coverage writes there what it has seen
        atexit._run_exitfuncs()
