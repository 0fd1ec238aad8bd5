"""Runs of a fork server: each ends as one that was started by itself would, and none alone."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from limits import HANG, until
from training import environment, steps_of, tiny, write_texts

from nvfp4.run import arms, checkpoint, forks, log
from nvfp4.run.arms import Arm, Display, SideBySide
from nvfp4.run.children import start
from nvfp4.run.fields import to_yaml
from nvfp4.run.folder import RunFolder
from nvfp4.run.forks import ForkServer, _Server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs are forked on Linux alone")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def server():
    """One for all tests but those that end it; one thread, as the tests' other children."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        with ForkServer("nvfp4.train.loop") as server:
            yield server


def endless(folder, texts) -> tuple[list[str], RunFolder]:
    """The arguments of a run that saves only when it is told to end, and its folder."""
    config = tiny(folder / "out", texts, steps=10**6, save_every=0, eval_every=0)
    (folder / "given.yaml").write_text(to_yaml(config))
    return ["pretrain", "--config", str(folder / "given.yaml")], RunFolder(config.out)


def pid_of(folder: RunFolder) -> int:
    return int((folder.root / ".lock").read_text().split()[1])


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_runs_end_with_their_own_exit_codes_one_after_the_other(server, tmp_path, texts):
    config = tiny(tmp_path / "out", texts)
    (tmp_path / "given.yaml").write_text(to_yaml(config))
    good = ["pretrain", "--config", str(tmp_path / "given.yaml")]
    for arguments, code in ((good, 0), (good, 1), (["pretrain", "--steps", "x"], 2), (["info"], 0)):
        run = server.start(arguments)
        assert run.wait() == run.poll() == run.returncode == code
    assert RunFolder(config.out).read_result() is not None
    assert not gone(server.process.pid)


def test_a_run_is_that_of_a_process_of_its_own_to_the_last_bit(server, tmp_path, texts):
    for name, begin in (("forked", server.start), ("own", start)):
        config = tiny(tmp_path / name, texts, recipe="quartet2")
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
        assert begin(["pretrain", "--config", str(tmp_path / f"{name}.yaml")]).wait() == 0
    assert steps_of(tmp_path / "forked") == steps_of(tmp_path / "own")
    weights = [tmp_path / name / "export" / "model.safetensors" for name in ("forked", "own")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_sigterm_reaches_the_run_which_saves_and_the_next_one_starts(server, tmp_path, texts):
    arguments, folder = endless(tmp_path, texts)
    run = server.start(arguments)
    until(lambda: len(log.read(folder.log)) > 3, run)
    assert run.poll() is None
    assert os.getsid(pid_of(folder)) == pid_of(folder)  # Ctrl-C on the terminal is not for it
    run.terminate()
    assert run.wait() == 143
    saved = checkpoint.newest_first(folder.checkpoints)
    assert [path.name for path in saved] == [f"step-{max(steps_of(folder.root)):08d}"]
    assert server.start(["info"]).wait() == 0


def test_kill_9_of_a_run_is_told_and_the_next_one_starts(server, tmp_path, texts):
    arguments, folder = endless(tmp_path, texts)
    run = server.start(arguments)
    until(lambda: len(log.read(folder.log)) > 3, run)
    os.kill(pid_of(folder), signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert server.start(["info"]).wait() == 0


def test_kill_9_of_the_server_ends_its_run_which_saves(tmp_path, texts):
    arguments, folder = endless(tmp_path, texts)
    with ForkServer() as own:
        run = own.start(arguments)
        until(lambda: len(log.read(folder.log)) > 3, run)
        pid = pid_of(folder)
        own.process.kill()
        assert run.wait() == -signal.SIGKILL
        end = time.monotonic() + HANG
        while not gone(pid) and time.monotonic() < end:
            time.sleep(0.02)
        assert gone(pid)
        assert len(checkpoint.newest_first(folder.checkpoints)) == 1
        assert own.start(["info"]).wait() == -signal.SIGKILL  # and no other run begins


def test_leaving_ends_a_run_that_still_lives_which_saves(tmp_path, texts):
    """As after a second Ctrl-C, when nobody waits for it any more."""
    arguments, folder = endless(tmp_path, texts)
    with ForkServer() as own:
        run = own.start(arguments)
        until(lambda: len(log.read(folder.log)) > 3, run)
        pid = pid_of(folder)
    assert gone(pid)
    assert len(checkpoint.newest_first(folder.checkpoints)) == 1


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        (SystemExit("no such file"), 1, "no such file\n"),
        (SystemExit(), 0, ""),
        (SystemExit(3), 3, ""),
    ],
)
def test_a_run_that_ends_python_ends_as_python_would(monkeypatch, capsys, end, code, words):
    """A text is the last word and code 1; nothing is 0."""

    def ends(arguments: list[str]) -> int:
        raise end

    class Over(BaseException):
        """Instead of the end of this process."""

    def over(code: int) -> None:
        raise Over(code)

    monkeypatch.setattr(sys, "argv", ["nvfp4"])
    monkeypatch.setattr(forks, "CLI", "stand_in")
    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(main=ends))
    monkeypatch.setattr(forks.threading, "_shutdown", lambda: None)
    monkeypatch.setattr(forks.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(os, "_exit", over)
    with pytest.raises(Over) as ended:
        forks._become([])
    assert ended.value.args == (code,)
    assert capsys.readouterr().err == words


def test_where_no_process_can_be_made_the_server_says_so_and_lives(monkeypatch, capsys):
    def full() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert _Server(theirs)._run(["info"]) == 1
    assert "cannot start a process: Resource temporarily unavailable" in capsys.readouterr().err
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_sigterm_may_come_when_the_run_has_just_been_waited_for():
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(["true"]) as ended:
        ended.wait()
        server = _Server(theirs)
        server.child = ended.pid
        server._pass_on(signal.SIGTERM, None)
    assert server.stopped


def test_lines_of_a_run_go_where_ours_go(capfd):
    with ForkServer() as own:
        assert own.start(["pretrain", "--steps", "x"]).wait() == 2
        assert own.start(["info"]).wait() == 0
    said = capfd.readouterr()
    assert "kernels on cpu" in said.out
    assert "--steps" in said.err


def test_a_server_that_cannot_import_says_so_and_is_a_failed_run(capfd):
    with ForkServer("nvfp4.no_such_module") as broken:
        assert broken.start(["info"]).wait() == 1
    assert "no_such_module" in capfd.readouterr().err


def test_lines_of_a_run_go_to_the_end_of_its_file(server, tmp_path):
    output = tmp_path / "output.txt"
    output.write_text("before\n")
    assert server.start(["pretrain", "--steps", "x"], output).wait() == 2
    said = output.read_text()
    assert said.startswith("before\n")
    assert "--steps" in said
    assert server.start(["info"], tmp_path / "absent" / "output.txt").wait() == 1
    assert server.start(["info"]).wait() == 0


@pytest.mark.parametrize(
    ("devices", "workers", "command", "servers"),
    [
        (("cpu", "cpu"), 1, "pretrain", 1),
        (("cpu",), 1, "pretrain", 0),  # one alone gains nothing
        (("cpu", "cpu"), 2, "pretrain", 0),  # nor does one per worker
        (("cpu", "cpu", "cpu"), 2, "pretrain", 2),
        (("cuda", "cuda"), 1, "pretrain", 0),
        (("cpu", "cpu"), 1, "rl", 0),
    ],
)
def test_runs_are_forked_where_several_follow_each_other_on_a_cpu(
    tmp_path, texts, monkeypatch, devices, workers, command, servers
):
    entered = []
    monkeypatch.setattr(ForkServer, "__enter__", lambda self: entered.append(self) or self)
    monkeypatch.setattr(ForkServer, "__exit__", lambda self, *error: None)
    grid = [
        Arm(str(i), command, tiny(tmp_path, texts, device=device), RunFolder(str(tmp_path)))
        for i, device in enumerate(devices)
    ]
    with arms.starter(grid, SideBySide(workers, 1), Display()):
        assert len(entered) == servers
    assert all(server.environment == {"OMP_NUM_THREADS": "1"} for server in entered)
