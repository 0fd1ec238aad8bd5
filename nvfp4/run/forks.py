"""Runs forked from one process that has imported everything: a fork server, on Linux.

A fresh Python imports torch, transformers and accelerate for 6 seconds of two quiet cores before it
trains, and takes another one to end. A comparison on a CPU pays that once:

    comparison        fork server                            run
    start  ---------> imports, then for each order: fork --> a session of its own, nvfp4 ARGUMENTS
    poll   <--------- exit code <--------------------------- its end
    terminate ------> SIGTERM -----------------------------> finishes the step, saves, ends

The server imports and computes nothing, so no thread of OpenMP lives in it that a fork would lose.
It is begun by ``exec`` with the environment of a run, since libgomp reads its variables as it is
loaded. Each of the two asks the kernel for SIGTERM at its own parent's death (``children.py``): the
server of a comparison that was killed passes it on, and a run whose server was killed obeys it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from nvfp4.run.children import end_with_parent, no_process, start_module

CLI = "nvfp4.cli"
"""The module whose ``main`` a run is."""


class ForkServer:
    """Starts runs one after the other, each forked from a process that has imported ``modules``.

    A context manager: leaving it ends the server, and tells a run that still lives to end; one that
    was told before ends at once (``signals.py``). Only on Linux, and only for runs on the CPU: what
    a driver of a GPU has begun does not survive a fork. environment: variables besides ours.
    """

    def __init__(self, *modules: str, environment: dict[str, str] | None = None) -> None:
        self.modules, self.environment = modules, environment

    def __enter__(self) -> ForkServer:
        orders, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), *self.modules]
            try:
                self.process = start_module(
                    __name__, arguments, self.environment, descriptors=(theirs.fileno(),)
                )
            except BaseException:
                orders.close()
                raise
        self.orders = orders
        return self

    def __exit__(self, *error: object) -> None:
        self.orders.close()
        self.process.terminate()
        self.process.wait()

    def start(self, arguments: list[str], output: Path | None = None) -> ForkedRun:
        """``nvfp4 ARGUMENTS`` in a session of its own.

        output: the file at whose end it writes its lines; None: they go where ours go. The run
        before must have ended.
        """
        return ForkedRun(self, {"arguments": arguments, "output": output and str(output)})


class ForkedRun:
    """A run of a fork server, as a ``subprocess.Popen`` is asked."""

    returncode: int | None = None

    def __init__(self, server: ForkServer, order: dict[str, Any]) -> None:
        self._server = server
        try:
            server.orders.sendall(json.dumps(order).encode() + b"\n")
        except OSError:  # the server is gone, and ``poll`` says so
            return

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that killed it; None while it runs."""
        return self._exit_code(socket.MSG_DONTWAIT)

    def wait(self) -> int:
        """The same, when it has ended."""
        code = self._exit_code(0)
        assert code is not None
        return code

    def terminate(self) -> None:
        """SIGTERM, through the server: it knows whether the run still lives."""
        if self.returncode is None:
            self._server.process.terminate()

    def _exit_code(self, flags: int) -> int | None:
        if self.returncode is not None:
            return self.returncode
        try:
            answer = self._server.orders.recv(64, flags)  # one small write, which nothing divides
        except BlockingIOError:
            return None
        except ConnectionError:
            answer = b""

        # No answer and an end: the server was killed. It takes its run with it.
        self.returncode = int(answer) if answer else self._server.process.wait() or 1
        return self.returncode


class _Server:
    """The other side: what the process does that ``ForkServer`` has started."""

    def __init__(self, orders: socket.socket) -> None:
        self.orders = orders
        self.child = 0
        self.stopped = False

    def serve(self) -> None:
        """Fork for each order, wait, tell the exit code; until nobody listens any more."""
        signal.signal(signal.SIGTERM, self._pass_on)
        with self.orders.makefile("rb") as lines:
            for line in lines:
                code = self._run(**json.loads(line))
                try:
                    self.orders.sendall(b"%d\n" % code)
                except OSError:
                    return

    def _run(self, arguments: list[str], output: str | None = None) -> int:
        ask = end_with_parent()

        # No signal between fork and the note of the child's number: it would reach nobody.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            with warnings.catch_warnings():
                # numpy's BLAS has threads, and sees to them at a fork itself
                warnings.simplefilter("ignore", DeprecationWarning)
                self.child = os.fork()
        except OSError as error:
            print(f"nvfp4: error: {no_process(error)}", file=sys.stderr, flush=True)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            return 1

        # The socket stays open in the run: whoever listens hears of its end, also where the server
        # was killed.
        if self.child == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if ask is not None:
                ask()
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            if output is not None:
                _write_to(output)
            _become(arguments)
        if self.stopped:
            os.kill(self.child, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

        _, status = os.waitpid(self.child, 0)
        self.child, self.stopped = 0, False
        return os.waitstatus_to_exitcode(status)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.child:
            with suppress(ProcessLookupError):  # waited for, and its number not forgotten yet
                os.kill(self.child, number)


def _write_to(output: str) -> None:
    """What this process prints goes to the end of that file; it ends if that cannot be."""
    try:
        file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        print(f"nvfp4: error: cannot write {output}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(1)
    for stream in (1, 2):
        os.dup2(file, stream)


def _become(arguments: list[str]) -> NoReturn:
    """Be ``nvfp4 ARGUMENTS``, and end without taking the interpreter down piece by piece."""
    code = 1
    try:
        sys.argv[1:] = arguments
        code = importlib.import_module(CLI).main(arguments)
    except SystemExit as end:  # as Python itself takes it: a number, nothing, or a last word
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        # what Python does at its end, except freeing all modules, which takes a second
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """``python -m nvfp4.run.forks DESCRIPTOR MODULE...``: the server."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    for module in (CLI, *sys.argv[2:]):
        importlib.import_module(module)
    _Server(orders).serve()
    os._exit(0)


if __name__ == "__main__":
    main()
