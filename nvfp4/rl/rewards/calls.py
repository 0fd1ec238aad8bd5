"""What runs in the process of a call, behind the walls: a reward function, or the model's program.

Two kinds of process, never one for both:

    judging   runs the reward function of the user, which knows the answer, on the model's text as
              data
    judged    runs the model's text. It is given the text and its input and nothing else: no row, no
              expected answer, no file of the user's; and what it says is bytes, which somebody else
              judges

Descriptors: 0 input, 1 and 2 what is printed, 3 the channel to the keeper (frames of 4 bytes length
and JSON), 4 the work, a sealed file.

A reward function that has a parameter ``run`` is handed a function that starts a judged process
(``Runner``).
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import inspect
import json
import marshal
import numbers
import os
import random
import struct
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CHANNEL, WORK = 3, 4
LONGEST_REASON = 200
LONGEST_FRAME = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What a program did.

    stdout, stderr: text. result: what its function returned, as JSON has it. status: 0 if all went
    well; 1 after an exception; negative: the signal that ended it. stopped: the limit that it ran
    into, or None.
    """

    stdout: str = ""
    stderr: str = ""
    result: Any = None
    status: int | None = 0
    stopped: str | None = None


class Runner:
    """``run(program, stdin="")`` or ``run(program, call=name, arguments=[...])``: an Outcome.

    Each run has limits of its own (those of the call), and its time is not the caller's. At most
    100 runs per call.
    """

    def __call__(
        self,
        program: str,
        stdin: str = "",
        *,
        call: str | None = None,
        arguments: Sequence[Any] = (),
    ) -> Outcome:
        texts = isinstance(program, str) and isinstance(stdin, str)
        if not texts or not isinstance(call, (str, type(None))):
            raise TypeError("run: expected texts as program, stdin and call")
        wish = {"program": program, "stdin": stdin, "call": call, "arguments": list(arguments)}
        send(CHANNEL, {"run": wish})
        answer = receive(CHANNEL)
        if answer is None:
            raise RuntimeError("run: the keeper does not answer")
        if "error" in answer:
            raise ValueError(answer["error"])
        return Outcome(**answer)


def perform(judged: bool) -> None:
    """Do the work of this process and say what came of it."""
    random.seed(0)
    with open(WORK, "rb") as file:
        work = json.loads(file.read())
    if judged:
        perform_program(work)
        return
    answer = evaluate(work)
    with contextlib.suppress(ValueError, AttributeError):  # closed or replaced
        sys.stdout.flush()
    send(CHANNEL, {"ticket": work["ticket"], **answer})


def evaluate(work: dict[str, Any]) -> dict[str, Any]:
    """The value of the call's reward function, or the reason why there is none."""
    name = work["name"]
    space: dict[str, Any] = {
        "__name__": "reward",
        "__file__": name,
        "__builtins__": builtins,
    }
    if work["folder"]:
        sys.path.insert(0, work["folder"])
    try:
        exec(marshal.loads(base64.b64decode(work["code"])), space)
        function = space[work["function"]]
        wishes = {"run": Runner()} if wants_runner(function) else {}
        value = function(*work["arguments"], **wishes)
        if not isinstance(value, numbers.Real):
            wanted = "the reward must be a number in [0, 1]"
            return {"reason": f"{wanted}, got a {type(value).__name__}"}
        return {"value": float(value)}
    except MemoryError:
        space.clear()  # traceback and globals hold what filled the memory: now both are gone
    except BaseException as error:
        return {"reason": describe(error, name)}
    return {"reason": f"took more than {work['memory_mib']} MiB of memory"}


def wants_runner(function: Any) -> bool:
    """Whether a reward function has a parameter ``run``."""
    try:
        return "run" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def perform_program(work: dict[str, Any]) -> None:
    """Run the text of the model as a program; with ``call`` also a function of it.

    The function's result goes to the channel. An exception leaves by the exit status and standard
    error, as it would from Python.
    """
    sys.argv[:] = ["program.py"]
    space: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    status = 0
    try:
        exec(compile(work["program"], "program.py", "exec", dont_inherit=True), space)
        if work["call"]:
            result = space[work["call"]](*work["arguments"])
            send(CHANNEL, {"result": result})
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        status = 1
        with contextlib.suppress(BaseException):
            traceback.print_exc()

    # no exit handlers: they are the program's too
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status & 0xFF)


def describe(error: BaseException, name: str) -> str:
    """One line: the last line of ``name`` that ran, the kind, and the beginning of the message."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame.lineno for frame in frames if frame.filename == name]
    where = f"line {places[-1]}: " if places else ""
    try:
        text = str(error)
    except BaseException:
        text = "(its message cannot be read)"
    return f"{where}{type(error).__name__}: {text[:LONGEST_REASON]}"


def send(fd: int, value: Any) -> None:
    """Write one frame."""
    data = json.dumps(value).encode()
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> Any:
    """One frame, or None at the end."""
    head = read(fd, 4)
    return None if head is None else json.loads(read(fd, struct.unpack(">I", head)[0]) or b"null")


def read(fd: int, count: int) -> bytes | None:
    """``count`` bytes, or None at the end."""
    data = b""
    while len(data) < count:
        chunk = os.read(fd, count - len(data))
        if not chunk:
            return None
        data += chunk
    return data
