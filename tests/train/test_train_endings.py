"""How runs end when the machine ends them: full disks, kill -9, closed terminals, two runs in one
folder."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from limits import HANG
from matplotlib.figure import Figure
from safetensors import SafetensorError
from test_train_compare import config_of, report_of
from training import environment, run_cli, start_cli, steps_of, tiny, write_texts

from nvfp4 import cli
from nvfp4.run import checkpoint, log, model
from nvfp4.run.checkpoint import Snapshot
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import to_yaml
from nvfp4.run.files import write_picture
from nvfp4.run.folder import RunFolder
from nvfp4.run.plots import draw_comparison
from nvfp4.run.tokens import ByteTokenizer
from nvfp4.train.loop import pretrain

CLI = [sys.executable, "-m", "nvfp4.cli"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    config = tiny(tmp_path_factory.mktemp("finished") / "run", texts, steps=4, save_every=2)
    pretrain(config)
    return config


@pytest.fixture
def again(finished, tmp_path):
    """The finished run, copied and without its end."""
    shutil.copytree(finished.out, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    return dataclasses.replace(finished, out=str(tmp_path / "run"), resume=True)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wait_for(condition, child, seconds=HANG):
    until = time.monotonic() + seconds
    while time.monotonic() < until and not condition() and child.poll() is None:
        time.sleep(0.02)
    assert condition(), f"not reached; exit code {child.poll()}"


# A full disk


def bare_exception(*args, **kwargs):
    raise Exception("No space left on device (os error 28)")  # what tokenizers raises


def own_error(*args, **kwargs):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize(
    ("place", "raises"),
    [
        ("transformers.PreTrainedTokenizerFast.save_pretrained", bare_exception),
        ("transformers.PreTrainedModel.save_pretrained", own_error),
        ("transformers.PreTrainedModel.save_pretrained", full),
    ],
)
def test_a_disk_that_fills_in_the_export_is_one_sentence_and_the_run_goes_on(
    again, monkeypatch, place, raises
):
    monkeypatch.setattr(place, raises)
    shutil.rmtree(Path(again.out) / "export")
    with pytest.raises(
        TrainError,
        match=r"cannot export to .*export: .*No space left on device.*; make room and run",
    ):
        pretrain(again)
    assert not [path.name for path in Path(again.out).iterdir() if "export" in path.name]
    monkeypatch.undo()
    pretrain(again)
    assert (Path(again.out) / "export" / "tokenizer.json").is_file()


def test_an_error_of_ours_in_the_export_is_not_taken_for_a_full_disk(again, monkeypatch):
    monkeypatch.setattr(model, "_no_bars", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(again)


def test_a_disk_that_fills_in_a_picture_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    write_picture(Figure(), path)
    before = path.read_bytes()
    original = Figure.savefig

    def half(self, where, **options):
        original(self, where, **options)
        Path(where).write_bytes(Path(where).read_bytes()[:100])
        full()

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(
        TrainError, match=r"cannot draw .*x\.png: No space left on device; make room"
    ):
        write_picture(Figure(), path)
    assert (path.read_bytes(), [p.name for p in tmp_path.iterdir()]) == (before, ["x.png"])


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_log_that_cannot_be_opened_or_flushed_is_one_sentence(tmp_path, monkeypatch, call):
    writer = None if call == "open" else log.Log(tmp_path / "log.jsonl")
    monkeypatch.setattr(f"os.{call}", full)
    with pytest.raises(TrainError, match=r"cannot write .*log\.jsonl: No space left on device"):
        log.Log(tmp_path / "log.jsonl") if writer is None else writer.flush()


def test_every_size_of_a_small_disk_ends_in_a_sentence_and_goes_on_when_there_is_room(
    tmp_path, texts
):
    """A real file system of many sizes, from too small for the config to large enough for all:
    whatever write comes too late, and nothing else than the sizes of files decides which, there is
    no traceback and no half file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        sys.platform != "linux"
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", disk]).returncode
    ):
        pytest.skip("a small file system takes the right to mount one")
    said = set()
    try:
        config = tiny(
            disk / "run", texts, steps=2, warmup=0, save_every=0, sample_tokens=4, prompt="if"
        )
        for size in [4, 16, 40, 100, 200, 300, *range(330, 450, 12), 4000]:
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
            try:
                pretrain(dataclasses.replace(config, resume=True))
            except TrainError as error:
                said.add((str(error).split(str(disk))[0], "No space left on device" in str(error)))
            for path in (disk / "run").rglob("*") if (disk / "run").exists() else ():
                assert not path.name.startswith(".unfinished"), path
        assert (disk / "run" / "result.json").is_file()
        assert len(steps_of(disk / "run")) == 3
    finally:
        subprocess.run(["umount", disk], check=True)
    assert {("cannot write checkpoint ", True), ("cannot export to ", True)} <= said
    assert all(space for _, space in said), said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ECONNREFUSED])
def test_a_disk_that_fails_where_nobody_expects_it_is_one_sentence(monkeypatch, capsys, number):
    """In a library, say, or a temporary folder. Other errors of the system are ours to look at."""

    def fail(command):
        raise OSError(number, os.strerror(number), "/tmp/somewhere")

    monkeypatch.setitem(cli.RUNNERS, cli.Info, fail)
    if number == errno.ECONNREFUSED:
        with pytest.raises(ConnectionRefusedError):
            cli.main(["info"])
    else:
        assert cli.main(["info"]) == 1
        message = (
            f"nvfp4: error: {os.strerror(number)}: /tmp/somewhere; put that right and go on with "
            "--resume\n"
        )
        assert capsys.readouterr().err == message


# A model that is lost


@pytest.mark.parametrize(
    "changes", [{"lr": 1e30}, {"lr": 1e300}, {"eps": 1e-300}, {"weight_decay": 1e38}]
)
def test_a_model_whose_loss_is_no_number_ends_in_a_sentence_not_in_json(tmp_path, texts, changes):
    """The loss and gradient of the only update are fine, the weights after it are not."""
    config = tiny(tmp_path / "run", texts, steps=1, warmup=0, **changes)
    with pytest.raises(
        TrainError,
        match=r"the held-out loss is (nan|inf) after the last update.*the model is lost; lower",
    ):
        pretrain(config)
    rows = steps_of(tmp_path / "run")
    assert (rows[1]["skipped"], rows[1]["val_loss"], rows[1]["val_bpb"]) == (False, None, None)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_comparison_draws_evaluations_that_were_no_number(tmp_path):
    report = report_of(13)
    report["runs"][1]["held_out"]["val_loss"][0] = None
    draw_comparison(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "half \ud800"}, r"prompt: expected a text in UTF-8, got 'half \\ud800'"),
        ({"out": ""}, "out: expected the name of a folder, got ''"),
    ],
)
def test_texts_that_no_file_can_hold_and_empty_names_are_refused_at_once(
    tmp_path, texts, changes, message
):
    with pytest.raises(TrainError, match=message):
        pretrain(dataclasses.replace(tiny(tmp_path / "run", texts), **changes))


# Damaged folders


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("manifest.json", "[]", "manifest.json is not what was written"),
        ("manifest.json", '{"format": 1}', "manifest.json does not list files"),
        (
            "manifest.json",
            '{"format": 1, "files": {"state.json": 3}}',
            "manifest.json does not list files",
        ),
        ("manifest.json", "[" * 100_000, "manifest.json is cut off or not readable"),
    ],
)
def test_a_manifest_that_is_none_is_a_damaged_checkpoint(tmp_path, name, text, message):
    path = checkpoint.save(tmp_path, Snapshot({"step": 1}, {}), keep=1)
    (path / name).write_text(text)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=f"is damaged: {message}"):
        checkpoint.load(path)


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, Snapshot({"step": 1}, {}), keep=1)
    original = shutil.rmtree

    def busy(path, ignore_errors=False, **options):
        if "00000001" in str(path) and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "a file is open elsewhere", str(path))
        original(path, ignore_errors=ignore_errors, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert checkpoint.save(tmp_path, Snapshot({"step": 2}, {}), keep=1).name == "step-00000002"


def test_checkpoints_that_may_not_be_listed_are_not_taken_for_none(again, monkeypatch):
    """The run would begin anew and cut its log to nothing."""
    original = os.listdir

    def closed(path="."):
        if str(path).endswith("checkpoints"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    monkeypatch.setattr(os, "listdir", closed)
    with pytest.raises(
        TrainError, match=r"cannot look for checkpoints in .*checkpoints: Permission denied"
    ):
        pretrain(again)
    assert len(log.read(Path(again.out) / "log.jsonl")) == 5


@pytest.mark.parametrize("rest", ["", '{"st', "7\n", "{}\n"])
def test_the_last_row_of_a_log_that_another_process_writes(tmp_path, rest):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1}\n' + '{"step": 2, "text": "' + "x" * 70_000 + '"}\n' + rest
    )
    assert log.last_row(tmp_path / "absent.jsonl") is None
    found = log.last_row(tmp_path / "log.jsonl")
    assert found is None or found == {}  # a row longer than any of ours is not read
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + rest)
    assert log.last_row(tmp_path / "log.jsonl") == (
        None if rest == "7\n" else {} if rest == "{}\n" else {"step": 2}
    )


@pytest.mark.parametrize(
    ("text", "message"), [("", "is missing or empty"), ('{"step": 1}\n', "ends at step 1")]
)
def test_a_log_that_lost_its_rows_is_noticed_before_training_not_after(again, text, message):
    (Path(again.out) / "log.jsonl").write_text(text)
    with pytest.raises(
        TrainError, match=rf"log\.jsonl {message}, the checkpoint is of step 4: the log is damaged"
    ):
        pretrain(again)


def test_a_log_of_something_else_is_named(again):
    (Path(again.out) / "log.jsonl").write_text('{"step": 0}\n[1]\n')
    with pytest.raises(TrainError, match=r"log\.jsonl, line 2 is no row of a run's log"):
        pretrain(again)


@pytest.mark.parametrize("text", ["[]", "{}", "7", "[" * 100_000])
def test_a_result_that_is_none_is_no_result(again, text):
    (Path(again.out) / "result.json").write_text(text)
    assert pretrain(again)["steps"] == 4


def test_overwrite_deletes_all_or_refuses(again, monkeypatch):
    """A checkpoint of the earlier run that stays would be the newest of this one."""

    def refuse(path, ignore_errors=False, **options):
        if not ignore_errors:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(
        TrainError, match=r"overwrite: cannot delete .*checkpoints: Permission denied"
    ):
        pretrain(dataclasses.replace(again, resume=False, overwrite=True))


# Processes


def test_a_folder_in_use_names_the_process_and_a_failed_run_lets_go_of_it(
    tmp_path, texts, monkeypatch
):
    config = tiny(tmp_path / "run", texts, steps=2, warmup=0)
    other = RunFolder(config.out)
    other.lock()
    with pytest.raises(
        TrainError,
        match=rf"another process \(process {os.getpid()} on .*\) is training in .*; wait",
    ):
        pretrain(config)
    with pytest.raises(TrainError, match=rf"another process \(process {os.getpid()} on"):
        pretrain(config)  # the first refusal has not emptied the file
    other.release()
    monkeypatch.setattr("nvfp4.train.loop.update", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        pretrain(config)
    monkeypatch.undo()
    pretrain(dataclasses.replace(config, overwrite=True))
    assert kept.tb is not None  # and with it, in a notebook too, all objects of the run that failed


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        not Path(f"/proc/{pid}/stat").exists()
        or ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    )


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a child of its parent's death"
)
@pytest.mark.parametrize("recipes", [("bf16",), ("bf16", "rtn")])  # one is executed, two are forked
def test_kill_9_of_a_comparison_ends_its_run_which_saves_and_the_same_command_goes_on(
    tmp_path, texts, recipes
):
    """The child used to train on for hours, and the same command then only said that somebody
    trains there."""
    config = config_of(
        tmp_path / "out", texts, recipes=recipes, steps=3000, save_every=0, eval_every=0
    )
    (tmp_path / "given.yaml").write_text(to_yaml(config))
    command = ["compare", "--config", str(tmp_path / "given.yaml")]
    folder = RunFolder(str(tmp_path / "out" / "bf16"))
    parent = start_cli(*command)
    child = 0
    try:
        wait_for(lambda: len(log.read(folder.log)) > 3, parent)
        child = int((folder.root / ".lock").read_text().split()[1])
        assert child != parent.pid
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        until = time.monotonic() + HANG
        while time.monotonic() < until and alive(child):
            time.sleep(0.02)
        assert not alive(child)
        saved = checkpoint.newest_first(folder.checkpoints)
        assert [path.name for path in saved] == [f"step-{max(steps_of(folder.root)):08d}"]
        second = start_cli(*command)
        wait_for(lambda: "\nresuming from " in second.output(), second)
        second.send_signal(signal.SIGTERM)
        ended = second.finished()
        assert f"\nresuming from {saved[0]}" in ended.stdout
        assert ended.returncode == 143
    finally:
        for pid in (parent.pid, child):
            if pid and alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_two_comparisons_do_not_share_a_folder(tmp_path, texts):
    from nvfp4.train.compare import compare

    root = RunFolder(str(tmp_path / "out"))
    root.lock()
    with pytest.raises(TrainError, match=r"another process .* is training in"):
        compare(config_of(tmp_path / "out", texts))


def test_a_terminal_that_closes_saves_and_nohup_is_obeyed(tmp_path, texts):
    """SIGHUP used to end the process at once. Under nohup it is ignored, as before."""
    stop = "import os, signal\nfrom nvfp4.train import loop as place\noriginal = place.update\n"
    stop += (
        "def update(run, step, lr):\n    os.kill(os.getpid(), signal.SIGHUP) if step == 2 else "
        "None\n"
    )
    stop += "    return original(run, step, lr)\nplace.update = update\n"
    for name, before, code, step in (
        ("closed", "", 129, 3),
        ("nohup", "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n", 0, 12),
    ):
        (tmp_path / f"{name}.yaml").write_text(to_yaml(tiny(tmp_path / name, texts, save_every=0)))
        child = run_cli(
            "pretrain", "--config", str(tmp_path / f"{name}.yaml"), before=stop + before
        )
        assert child.returncode == code, child.stdout + child.stderr
        assert (
            checkpoint.newest_first(tmp_path / name / "checkpoints")[0].name == f"step-{step:08d}"
        )


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path, texts):
    """nvfp4 pretrain | head -1: rich would end the process without a checkpoint."""
    (tmp_path / "given.yaml").write_text(to_yaml(tiny(tmp_path / "run", texts, log_every=1)))
    command = [*CLI, "pretrain", "--config", str(tmp_path / "given.yaml")]
    child = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.readline()
    child.stdout.close()
    said = child.stderr.read()
    assert (child.wait(timeout=HANG), said) == (0, "")
    assert RunFolder(str(tmp_path / "run")).read_result()["steps"] == 12


def test_ctrl_c_in_the_export_leaves_nothing_half(again, monkeypatch):
    def interrupted(self, folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(ByteTokenizer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(again)
    assert not [path.name for path in Path(again.out).iterdir() if path.name.startswith(".export")]
