"""Checkpoints: whole or absent, noticed when damaged, refused when of another run."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HANG
from safetensors.torch import save_file
from training import environment

from nvfp4.run import checkpoint, files
from nvfp4.run.checkpoint import DamagedCheckpoint, Snapshot
from nvfp4.run.errors import TrainError


def snapshot(step: int, size: int = 100) -> Snapshot:
    tensors = {
        "model": {"w": torch.arange(size, dtype=torch.float32) + step},
        "random": {"cpu.0": torch.arange(9)},
    }
    return Snapshot({"step": step, "config": {"lr": 0.1}}, tensors)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    values = torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45])
    saved = Snapshot(
        {"step": 3, "list": [1, None, 0.1]},
        {"a": {"x.y": values, "transposed": torch.eye(3)[:, :2].T}},
    )
    path = checkpoint.save(tmp_path, saved, keep=2)
    loaded = checkpoint.load(path)
    assert path.name == "step-00000003"
    assert loaded.state == saved.state
    assert torch.equal(loaded.tensors["a"]["x.y"].view(torch.int32), values.view(torch.int32))
    assert torch.equal(loaded.tensors["a"]["transposed"], torch.eye(3)[:, :2].T)


def test_the_newest_are_kept_and_nothing_else_remains(tmp_path):
    for step in (2, 10, 4, 11):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    assert [p.name for p in checkpoint.newest_first(tmp_path)] == ["step-00000011", "step-00000010"]
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000010", "step-00000011"}


def test_the_same_step_may_be_saved_again(tmp_path):
    checkpoint.save(tmp_path, snapshot(5, size=10), keep=1)
    path = checkpoint.save(tmp_path, snapshot(5, size=20), keep=1)
    assert checkpoint.load(path).tensors["model"]["w"].numel() == 20
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_what_a_killed_process_left_unfinished_is_cleared_away(tmp_path):
    (tmp_path / ".unfinished-step-00000007").mkdir(parents=True)
    (tmp_path / ".unfinished-step-00000007" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest_first(tmp_path) == []
    checkpoint.save(tmp_path, snapshot(8), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000008"]


@pytest.mark.parametrize("place", ["state", "tensors", "manifest", "sync", "rename"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(
    tmp_path, monkeypatch, place
):
    first = checkpoint.save(tmp_path, snapshot(1), keep=5)
    before = contents(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(tensors, path):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:50])
        full()

    write_json = files.write_json
    if place == "tensors":
        monkeypatch.setattr(checkpoint, "save_file", half)
    elif place == "sync":
        monkeypatch.setattr(checkpoint, "sync", full)
    elif place == "rename":
        monkeypatch.setattr(Path, "rename", full)
    else:
        name = {"state": "state.json", "manifest": "manifest.json"}[place]
        monkeypatch.setattr(
            checkpoint, "write_json", lambda p, v: full() if p.name == name else write_json(p, v)
        )
    with pytest.raises(
        TrainError,
        match=(
            r"cannot write checkpoint .*step-00000002: .*No space left.*last good "
            r".*step-00000001"
        ),
    ):
        checkpoint.save(tmp_path, snapshot(2), keep=5)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    assert torch.equal(
        checkpoint.load(first).tensors["model"]["w"], snapshot(1).tensors["model"]["w"]
    )


@pytest.mark.parametrize("recovery", ["at once", "at the next look", "at the next save"])
def test_the_checkpoint_that_another_of_its_step_should_replace_is_never_lost(
    tmp_path, monkeypatch, recovery
):
    """The second of two renames fails: the old one has stepped aside and the new one cannot take
    its place. Where the disk takes no rename at all after that, or the process is killed there, the
    next look at the folder puts it back."""
    checkpoint.save(tmp_path, snapshot(5, size=10), keep=5)
    before = contents(tmp_path)
    rename, renamed = Path.rename, []

    def second_fails(path, target):
        renamed.append(path)
        if len(renamed) == 2 or (len(renamed) > 2 and recovery != "at once"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(TrainError, match=r"cannot write .*step-00000005: .*output error"):
        checkpoint.save(tmp_path, snapshot(5, size=20), keep=5)
    assert len(renamed) >= 2
    monkeypatch.undo()
    if recovery == "at once":
        assert contents(tmp_path) == before
    elif recovery == "at the next look":
        assert checkpoint.newest_first(tmp_path) == [tmp_path / "step-00000005"]
        assert contents(tmp_path) == before
    else:
        checkpoint.save(tmp_path, snapshot(6), keep=5)
        assert {p.name for p in tmp_path.iterdir()} == {"step-00000005", "step-00000006"}
    assert checkpoint.load(tmp_path / "step-00000005").tensors["model"]["w"].numel() == 10


def test_a_replaced_checkpoint_that_was_not_deleted_goes_with_the_next_save(tmp_path):
    """Killed after both renames: the new one has the name, and the old one's is not given back."""
    checkpoint.save(tmp_path, snapshot(5, size=10), keep=5)
    (tmp_path / "step-00000005").rename(tmp_path / ".aside-step-00000005")
    checkpoint.save(tmp_path, snapshot(4), keep=5)  # puts it back
    (tmp_path / "step-00000005").rename(tmp_path / ".aside-step-00000005")
    (tmp_path / "step-00000005").mkdir()
    checkpoint._write(tmp_path / "step-00000005", snapshot(5, size=20))
    checkpoint.save(tmp_path, snapshot(6), keep=5)
    assert {p.name for p in tmp_path.iterdir()} == {f"step-0000000{n}" for n in (4, 5, 6)}
    assert checkpoint.load(tmp_path / "step-00000005").tensors["model"]["w"].numel() == 20


def test_the_systems_own_size_limit_is_met_like_a_full_disk(tmp_path):
    """A real failing write(2) inside safetensors, not a patched one."""
    checkpoint.save(tmp_path, snapshot(1), keep=5)
    before = contents(tmp_path)
    code = """
import resource, sys, torch
from pathlib import Path
from nvfp4.run import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = checkpoint.Snapshot({"step": 2}, {"model": {"w": torch.zeros(100_000)}})
try:
    checkpoint.save(Path(sys.argv[1]), big, keep=5)
except checkpoint.TrainError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert "cannot write checkpoint" in run.stdout, run.stdout + run.stderr
    assert "File too large" in run.stdout
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "model.safetensors",
            lambda b: b[:-1],
            "model.safetensors has [0-9]+ bytes, expected [0-9]+",
        ),
        (
            "model.safetensors",
            lambda b: b[:-1] + bytes([b[-1] ^ 1]),
            "model.safetensors does not match its SHA-256",
        ),
        ("state.json", lambda b: b[:5], "state.json has 5 bytes"),
        ("state.json", None, "state.json is missing"),
        ("random.safetensors", None, "random.safetensors is missing"),
        ("manifest.json", lambda b: b[:40], "manifest.json is cut off"),
        ("manifest.json", None, "manifest.json is missing"),
        ("manifest.json", lambda b: b"", "manifest.json is cut off"),
    ],
)
def test_damage_is_noticed_and_the_file_named(tmp_path, name, damage, message):
    checkpoint.save(tmp_path, snapshot(1), keep=5)
    path = checkpoint.save(tmp_path, snapshot(2), keep=5)
    if damage is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(damage((path / name).read_bytes()))
    with pytest.raises(
        DamagedCheckpoint,
        match=rf"step-00000002 is damaged: .*{message}.*--resume-from, e\.g\. .*-00000001",
    ):
        checkpoint.load(path)


def test_a_missing_folder_and_another_format_are_said(tmp_path):
    with pytest.raises(
        TrainError, match=r"no checkpoint at .*nowhere; expected a folder like checkpoints/step-"
    ):
        checkpoint.load(tmp_path / "nowhere")
    path = checkpoint.save(tmp_path, snapshot(1), keep=5)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(TrainError, match="has format 99, this version reads 1"):
        checkpoint.load(path)


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        TrainError, match=r"cannot write .*result\.json: No space left on device; make room"
    ):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
