"""The judge's side of a worker, outside the walls: hands out work, watches, compares.

    trainer  --calls-->  keeper  --start, kill-->  zygote  --fork-->  one process per call or run
             <-verdict-          <---ended-------                     (judging or judged, calls.py)
                         keeper  <------------- bytes --------------- that process

**Whom it believes.** The keeper never runs code of a call. From a judged process it takes bytes, up
to a limit, which it compares with what a test expects; the expectation is never sent behind the
walls. From a process that runs a reward function it takes one frame with the ticket of the call, or
wishes for runs of programs; anything else that comes scores 0. What a process says of its walls
counts only as long as nothing of a call can have run in it (``zygote.STANDING``).

**Time** is the keeper's own: a tick of the clock counts for a quarter of a second at most, so a
machine that stood still, or a process that was stopped and goes on, does not use up anybody's
limit.

**Frames** are 4 bytes of length and JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nvfp4.rl.rewards import kernel, zygote
from nvfp4.rl.rewards.calls import LONGEST_FRAME, describe, receive, send
from nvfp4.rl.rewards.outcomes import passes

SLICE = 0.05  # seconds between looks at the clock
TICK = 0.25  # seconds that one look counts for at most
LONGEST_ANSWER = 1000  # characters of a reason
MOST_RUNS = 100  # of programs, by one reward function in one call
MOST_WISHES = 2 * MOST_RUNS  # beyond MOST_RUNS a wish is refused; who still asks is ended here

Answer = dict[str, Any]


class Clock:
    """Seconds that passed while somebody looked."""

    def __init__(self) -> None:
        self.last, self.elapsed = time.monotonic(), 0.0

    def tick(self) -> float:
        """Seconds since the clock was made, without those in which nobody looked."""
        now = time.monotonic()
        self.elapsed += min(now - self.last, TICK)
        self.last = now
        return self.elapsed


class ZygoteLost(Exception):
    """It ended, so nothing is known of what ran."""


class TrainerGone(Exception):
    """Nobody waits for answers any more."""


@dataclass
class Process:
    """One running call or run: the keeper's ends, and what came over them.

    number: the zygote's name for it. out, err, channel: descriptors; said: what came over each.
    status: its exit code once it has ended. standing: whether it said, before anything else, that
    its walls are up.
    """

    number: int
    out: int
    err: int
    channel: int
    said: dict[int, bytes] = field(default_factory=dict)
    status: int | None = None
    standing: bool = False

    def unwalled(self) -> str | None:
        """Why its walls could not be put up, so that nothing ran."""
        if self.standing:
            return None
        frame = next(frames(self.said[self.channel]), None)
        if not frame or "walls" not in frame:
            return None
        return f"the sandbox cannot be put up: {frame['walls']}"

    def close(self) -> None:
        """Close the keeper's ends."""
        for fd in (self.out, self.err, self.channel):
            os.close(fd)


class Keeper:
    """Judges calls, one at a time; ``serve`` answers until there are no more.

    settings: those of ``walls.Walls``, and output_bytes.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.seconds: float = settings["seconds"]
        self.memory_mib: int = settings["memory_mib"]
        self.output_bytes: int = settings["output_bytes"]
        self.control, self.zygote, self.failures = zygote.start(settings)
        self.count = 0
        self.processes: dict[int, Process] = {}
        self.reports = b""
        self.requests = -1
        self.answers = -1
        if kernel.LIBC is not None:
            kernel.prctl(kernel.DUMPABLE, 0)

    def serve(self, requests: int, answers: int) -> None:
        """Say which walls stand, then judge calls."""
        self.requests, self.answers = requests, answers

        # a probe looks at the walls from inside
        process = self.start(zygote.PROBE, b"{}", b"")
        stopped = self.watch(process)
        frame = next(frames(process.said[process.channel]), None) or {}
        stands = frame.get("stands", [])
        process.close()
        why = [frame["walls"]] if "walls" in frame else [stopped] if stopped else []
        send(answers, {"stands": stands, "failures": [*self.failures, *why]})

        while (call := receive(requests)) is not None:
            answer = self.judge_tests(call) if "tests" in call else self.judge(call)
            if "reason" in answer:
                answer["reason"] = plain(answer["reason"])
            send(answers, answer)

    # Reward functions

    def judge(self, call: dict[str, Any]) -> Answer:
        """{"value": number} or {"reason": text} of a reward function."""
        # whoever answers without this has not read the work of this call
        ticket = secrets.token_hex(16)
        work = json.dumps({**call, "ticket": ticket, "memory_mib": self.memory_mib}).encode()
        process = self.start(zygote.JUDGING, work, b"")
        runs = 0

        def listen() -> str | None:
            """Serve wishes for runs as they come."""
            nonlocal runs
            # a frame that is no wish stays, and is judged at the end
            while (wish := self.take_wish(process)) is not None:
                runs += 1
                if runs > MOST_WISHES:
                    return f"asked for more than {MOST_WISHES} runs of programs"
                reply: Answer = {"error": f"run: at most {MOST_RUNS} programs a call"}
                if not is_program(wish):
                    wanted = "texts as program, stdin and call, and a list of arguments"
                    reply = {"error": f"run: expected {wanted}"}
                elif runs <= MOST_RUNS:
                    reply = self.run_program(wish)
                    send(self.answers, {"alive": True})
                if not give(process.channel, reply):
                    return "does not take the outcome of a run"
            return None

        stopped = self.watch(process, listen)
        said = process.said[process.channel]
        process.close()
        if stopped or (stopped := process.unwalled()):
            return {"reason": stopped}
        return self.answer(process.status, said, ticket)

    def take_wish(self, process: Process) -> dict[str, Any] | None:
        """The next wish for a run, if the channel begins with one that is complete."""
        said = process.said[process.channel]
        frame = next(frames(said), None)
        if frame is None or not isinstance(frame.get("run"), dict):
            return None
        process.said[process.channel] = said[4 + struct.unpack(">I", said[:4])[0] :]
        return dict(frame["run"])

    def answer(self, status: int | None, said: bytes, ticket: str) -> Answer:
        """What a process that ended said, if that is one frame of this call; else how it ended."""
        if status == -signal.SIGXCPU:
            return {"reason": self.over_processor_time()}
        if status is not None and status < 0:
            return {"reason": f"killed by {signal.Signals(-status).name}"}
        frame = next(frames(said), None)
        if frame is None:
            return {"reason": f"ended the process without a result (exit status {status})"}

        # the frame is all that was said, and its ticket is the one that only this call was given
        whole = len(said) == 4 + struct.unpack(">I", said[:4])[0]
        if not whole or frame.get("ticket") != ticket:
            return {"reason": "wrote into the channel of its verdict"}
        if isinstance(value := frame.get("value"), float):
            return {"value": value}
        return {"reason": str(frame.get("reason"))}

    def over_processor_time(self) -> str:
        """The reason of a process that the kernel ended for its processor time."""
        return f"took more than {math.ceil(self.seconds) + 1} s of processor time"

    # Programs of the model

    def judge_tests(self, call: dict[str, Any]) -> Answer:
        """1 if the program passes every test, else 0: that it fails is no failure of the reward."""
        for test in call["tests"]:
            program = {
                "program": call["program"],
                "stdin": test.get("stdin", ""),
                "call": test.get("call"),
                "arguments": test.get("arguments", []),
            }

            # the expectation stays here: only the program and its input go behind the walls
            outcome = self.run_program(program)
            if "error" in outcome:
                return {"reason": outcome["error"]}
            if not passes(outcome, test):
                return {"value": 0.0}
            send(self.answers, {"alive": True})
        return {"value": 1.0}

    def run_program(self, program: dict[str, Any]) -> Answer:
        """The fields of a ``calls.Outcome``, or {"error": ...}."""
        work = {key: program[key] for key in ("program", "call", "arguments")}
        try:
            stdin = program["stdin"].encode("utf-8", "surrogateescape")
            data = json.dumps(work).encode()
        except (UnicodeEncodeError, RecursionError) as error:  # half a character; lists too deep
            return {"error": f"run: cannot be handed over: {describe(error, '')}"}

        process = self.start(zygote.JUDGED, data, stdin)
        stopped = self.watch(process)
        said = process.said
        process.close()
        if unwalled := process.unwalled():
            return {"error": unwalled}
        frame = next(frames(said[process.channel]), None)
        if process.status == -signal.SIGXCPU:
            stopped = self.over_processor_time()
        return {
            "stdout": said[process.out].decode("utf-8", "replace"),
            "stderr": said[process.err].decode("utf-8", "replace"),
            "result": frame.get("result") if frame else None,
            "status": process.status,
            "stopped": stopped,
        }

    # Processes

    def start(self, kind: bytes, work: bytes, stdin: bytes) -> Process:
        """Have the zygote start a process with this work and input.

        kind: ``zygote.PROBE``, ``JUDGING`` or ``JUDGED``. Work and input are sealed files, so
        nothing in the process can change them for anybody.
        """
        self.count += 1
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        channel, channel_end = socket.socketpair()
        theirs = [sealed(stdin), out_end, err_end, channel_end.fileno(), sealed(work)]  # 0 to 4

        process = Process(self.count, out, err, channel.detach())
        for fd in (out, err, process.channel):
            os.set_blocking(fd, False)
            process.said[fd] = b""

        # its ends go to the zygote, and stay open there alone
        try:
            socket.send_fds(self.control, [zygote.COMMAND.pack(kind, self.count)], theirs)
        except OSError:
            raise ZygoteLost from None
        finally:
            channel_end.close()
            for fd in (theirs[0], out_end, err_end, theirs[4]):
                os.close(fd)
        self.processes[self.count] = process
        return process

    def watch(
        self,
        process: Process,
        listen: Callable[[], str | None] | None = None,
    ) -> str | None:
        """Read what a process says until it has ended; the limit that it ran into, if any.

        ``listen`` is called whenever something came over the channel, and the time of what it
        starts does not count. ``TrainerGone`` if nobody waits for the answer any more.
        """
        poller = select.poll()
        for fd in (*process.said, self.control.fileno()):
            poller.register(fd, select.POLLIN)
        if self.requests >= 0:
            poller.register(self.requests, 0)  # only its end

        clock, stopped = Clock(), None
        while process.status is None:
            # what there is to hear
            for fd, event in poller.poll(SLICE * 1000):
                if fd == self.requests:
                    if event & (select.POLLHUP | select.POLLERR):
                        raise TrainerGone
                elif fd == self.control.fileno():
                    self.hear()
                elif not drain(process, fd):
                    poller.unregister(fd)

            # wishes, whose runs have clocks of their own
            if listen is not None and stopped is None and process.said[process.channel]:
                started = self.count
                stopped = listen()
                if self.count > started:
                    clock.last = time.monotonic()

            stopped = stopped or self.over(process, clock.tick())
            if stopped and process.status is None:
                self.kill(process)

        # what was said between the last look and the end
        for fd in process.said:
            drain(process, fd)
        if listen is not None and stopped is None:
            stopped = listen()
        del self.processes[process.number]
        return stopped or self.over(process, 0.0)

    def over(self, process: Process, elapsed: float) -> str | None:
        """The limit that a process is beyond."""
        if len(process.said[process.out]) + len(process.said[process.err]) > self.output_bytes:
            return f"printed more than {self.output_bytes} bytes"
        if len(process.said[process.channel]) > LONGEST_FRAME:
            return f"returned more than {LONGEST_FRAME} bytes"
        return f"took more than {self.seconds:g} s" if elapsed > self.seconds else None

    def kill(self, process: Process) -> None:
        """End a process, and hear of it."""
        self.control.sendall(zygote.COMMAND.pack(zygote.KILL, process.number))
        while process.status is None:
            self.hear()

    def hear(self) -> None:
        """Take in reports of the zygote; raises ``ZygoteLost`` at their end."""
        data = self.control.recv(4096)
        if not data:
            raise ZygoteLost
        self.reports += data
        while len(self.reports) >= zygote.REPORT.size:
            number, status = zygote.REPORT.unpack(self.reports[: zygote.REPORT.size])
            self.reports = self.reports[zygote.REPORT.size :]
            if number in self.processes:
                self.processes[number].status = status


def is_program(wish: dict[str, Any]) -> bool:
    """Whether a wish for a run has what it takes; a process can put anything in it."""
    return (
        isinstance(wish.get("program"), str)
        and isinstance(wish.get("stdin"), str)
        and isinstance(wish.get("call"), (str, type(None)))
        and isinstance(wish.get("arguments"), list)
    )


def frames(said: bytes) -> Any:
    """The complete frames that are objects, up to the first that is anything else."""
    while len(said) >= 4:
        length = struct.unpack(">I", said[:4])[0]
        if length > len(said) - 4:
            return
        try:
            frame = json.loads(said[4 : 4 + length])
        except (ValueError, RecursionError):  # also of integers with too many digits
            return
        if not isinstance(frame, dict):
            return
        yield frame
        said = said[4 + length :]


def plain(reason: str) -> str:
    """A reason for terminal and log: no control characters, no half characters, not long."""
    shown = (each if each.isprintable() else ascii(each)[1:-1] for each in reason[:LONGEST_ANSWER])
    return "".join(shown)[:LONGEST_ANSWER]


def drain(process: Process, fd: int) -> bool:
    """Add what is there to what was said; False at the end."""
    while True:
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:  # a socket whose other end was closed with unread data
            return False
        if fd == process.channel and not process.standing and chunk.startswith(zygote.STANDING):
            process.standing, process.said[fd] = True, chunk[len(zygote.STANDING) :]
        else:
            process.said[fd] += chunk
        if not chunk or len(process.said[fd]) > LONGEST_FRAME:
            return bool(chunk)


def give(channel: int, reply: Answer) -> bool:
    """Hand a reply to a process that waits for it; False if it does not take it."""
    try:
        data = json.dumps(reply).encode()
    except RecursionError:  # nested so deeply that it could be parsed, but not written again here
        data = json.dumps({**reply, "result": None}).encode()

    # it has a second to take it: the channel is not to be left full
    data = struct.pack(">I", len(data)) + data
    clock = Clock()
    poller = select.poll()
    poller.register(channel, select.POLLOUT)
    while data and clock.tick() < 1.0:
        poller.poll(SLICE * 1000)
        try:
            data = data[os.write(channel, data) :]
        except BlockingIOError:
            continue
        except OSError:
            return False
    return not data


def sealed(data: bytes) -> int:
    """A descriptor from which ``data`` can be read, and nothing else done."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            file.seek(0)
            return os.dup(file.fileno())

    import fcntl

    fd = os.memfd_create("work", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    every = 0xF  # F_SEAL_SEAL, _SHRINK, _GROW, _WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, every)
    return fd


def main() -> None:
    """Settings: the first argument. Calls: standard input. Answers: standard output."""
    settings = json.loads(sys.argv[1])

    # keep both, with nothing in their place: what a library prints is no answer
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides what Ctrl-C ends
    try:
        keeper = Keeper(settings)
    except BaseException as error:
        send(answers, {"error": describe(error, "")})
        return
    with contextlib.suppress(TrainerGone, ZygoteLost, BrokenPipeError):
        keeper.serve(requests, answers)
