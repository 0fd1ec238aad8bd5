"""Files as people have them: unreadable, looping, half a character, too deep. One sentence names
each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training import run_cli, write_texts

from nvfp4.rl.tasks.jsonl import read_problems
from nvfp4.run.corpus import load_corpus
from nvfp4.run.errors import TrainError
from nvfp4.run.fields import read_config_file
from nvfp4.train.config import PretrainConfig

NOBODY = 65534
DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
LONG = '{"text": "x", "n": ' + "7" * 5000 + "}"


def corpus_of(*data, **changes):
    return load_corpus(PretrainConfig(data=tuple(map(str, data)), **changes))


@contextlib.contextmanager
def no_root() -> Iterator[None]:
    """The rights of an ordinary user: root may read every file, so permissions would not be
    tested."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(NOBODY)
    except OSError as error:
        pytest.skip(f"root may read every file, and this one may not become another user: {error}")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that everybody may enter, unlike pytest's; what is closed in it is opened again for
    its end."""
    folder = Path(tempfile.mkdtemp(prefix="nvfp4-test-"))
    folder.chmod(0o755)
    yield folder
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o755)
    shutil.rmtree(folder)


# Lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            r'{"text": "half \ud800 of it"}',
            r"has half a character, the lone surrogate \\ud800; repair or remove it",
        ),
        (r'{"text": "half \uDFFF of it"}', r"has half a character, the lone surrogate \\udfff"),
        (LONG, r"has an integer of too many digits; repair or remove it"),
        (DEEP, r"is nested too deeply; repair or remove it"),
    ],
    ids=["high-surrogate", "low-surrogate", "5000-digits", "100000-deep"],
)
def test_a_line_that_json_or_unicode_cannot_hold_is_named(tmp_path, line, message):
    """These came as UnicodeEncodeError, ValueError and RecursionError; both trainers read lines by
    one function."""
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(TrainError, match=rf"data: .*rows\.jsonl, line 2 {message}"):
        corpus_of(tmp_path / "rows.jsonl")
    (tmp_path / "problems.jsonl").write_text(line.replace('"text"', '"prompt"') + "\n")
    with pytest.raises(TrainError, match=rf"problems\.jsonl:1: {message.split(';')[0]}"):
        read_problems(tmp_path / "problems.jsonl")


def test_surrogates_that_make_a_character_are_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        r'{"text": "\ud83d\ude00 and \\ud800 spelt out"}' + '\n{"text": "two"}\n'
    )
    corpus = corpus_of(tmp_path / "rows.jsonl")
    assert "\N{GRINNING FACE} and \\ud800 spelt out" in {
        d.text for d in [*corpus.train, *corpus.held_out]
    }


def test_a_line_with_a_thousand_other_fields_gives_a_short_message(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({f"field{i}" * 50: i for i in range(1000)}) + "\n"
    )
    with pytest.raises(
        TrainError, match=r"has no text in field 'text', but the fields 'field0.*, \.\.\.; set"
    ) as caught:
        corpus_of(tmp_path / "rows.jsonl")
    assert len(str(caught.value)) < 3000


def test_a_parquet_column_that_is_not_utf8_is_named(tmp_path):
    """Arrow takes bytes for a string without looking."""
    raw = pa.array([b"fine", b"caf\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "rows.parquet")
    with pytest.raises(TrainError, match=r"rows\.parquet is not a readable Parquet file: .*0xe9"):
        corpus_of(tmp_path / "rows.parquet")


# Folders


@pytest.mark.parametrize(
    "pattern", ["", "*/*.txt", "**/*.txt"], ids=["folder", "glob", "recursive-glob"]
)
def test_a_folder_that_may_not_be_read_is_not_left_out(open_folder, pattern):
    write_texts(open_folder / "texts")
    write_texts(open_folder / "texts" / "closed", files=2)
    (open_folder / "texts" / "closed").chmod(0)
    root = open_folder / ("texts" if pattern != "*/*.txt" else "")
    with (
        no_root(),
        pytest.raises(TrainError, match=r"data: cannot look through .*texts.*: Permission denied"),
    ):
        corpus_of(root / pattern if pattern != "*/*.txt" else open_folder / "texts" / pattern)


def test_a_file_in_a_folder_that_may_not_be_entered_is_named(open_folder):
    write_texts(open_folder / "closed", files=2)
    (open_folder / "closed").chmod(0)
    with (
        no_root(),
        pytest.raises(
            TrainError, match=r"data: cannot look through .*text00\.txt: Permission denied"
        ),
    ):
        corpus_of(open_folder / "closed" / "text00.txt")
    (open_folder / "closed").chmod(0o755)
    (open_folder / "closed" / "text00.txt").chmod(0)
    with (
        no_root(),
        pytest.raises(TrainError, match=r"data: cannot read .*text00\.txt: Permission denied"),
    ):
        corpus_of(open_folder / "closed")


def test_a_closed_folder_that_no_pattern_looks_into_does_not_matter(open_folder):
    write_texts(open_folder / "texts")
    for name in (".git", "other"):
        (open_folder / "texts" / name).mkdir(mode=0)
    with no_root():
        assert len(corpus_of(open_folder / "texts" / "*.txt").train) > 8
        (open_folder / "texts" / "text00.txt").stat()
    (open_folder / "texts" / "other").rmdir()
    with no_root():
        assert len(corpus_of(open_folder / "texts").train) > 8


def test_links_may_loop_and_may_not_lead_nowhere(tmp_path):
    texts = write_texts(tmp_path / "texts")
    expected = corpus_of(texts).sha256
    (texts / "up").symlink_to(tmp_path)
    (texts / "again").symlink_to(texts / "again2")
    (texts / "again2").symlink_to(texts / "again")
    with pytest.raises(
        TrainError,
        match=r"data: .*(again2? is a link that leads to no file|loop|levels of symbolic)",
    ):
        corpus_of(texts)
    with pytest.raises(
        TrainError, match=r"data: .*(again is a link that leads to no file|loop|levels of symbolic)"
    ):
        corpus_of(texts / "again")
    (texts / "again").unlink()
    with pytest.raises(
        TrainError, match=r"data: .*again2 is a link that leads to no file; repair or remove it"
    ):
        corpus_of(texts)
    (texts / "again2").unlink()
    assert corpus_of(texts).sha256 == expected


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TrainError, match=r"data: no file matches .*pipe"):
        corpus_of(tmp_path / "pipe")
    with pytest.raises(TrainError, match=r"data: cannot look through .*: .*null (byte|character)"):
        corpus_of("a\0b")
    with pytest.raises(TrainError, match=r"data: .*File name too long"):
        corpus_of("x" * 300)
    with pytest.raises(TrainError, match=r"data: .*nobody-has-this-name"):
        corpus_of("~nobody-has-this-name/x.txt")


def test_a_name_that_is_not_utf8_is_a_name(tmp_path):
    texts = write_texts(tmp_path / "texts")
    name = os.fsencode(texts) + b"/caf\xe9.txt"
    try:
        Path(os.fsdecode(name)).write_text("coffee")
    except OSError as error:
        pytest.skip(f"this file system has no such names: {error}")
    assert len(corpus_of(texts).train) + len(corpus_of(texts).held_out) == 13


# Config files


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", "[" * 100_000, "nested too deeply"),
        ("c.yaml", "a: " + "[" * 5_000, "nested too deeply"),
        ("c.json", '{"steps": ' + "7" * 5000 + "}", "not valid json"),
        ("c.yaml", "1: 2", "1: no such field"),
        ("c.yaml", "[steps]: 2", "not valid yaml|no such field|must hold"),
        ("c.json", '{"out": "a\\u0000b"}', "out: .*null"),
    ],
)
def test_a_config_file_that_no_config_can_be_is_one_sentence(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    run = run_cli("pretrain", "--config", str(tmp_path / name), cwd=tmp_path)
    assert (run.returncode, run.stdout) == (1, ""), run.stderr[-2000:]
    assert "Traceback" not in run.stderr
    assert len(run.stderr) < 2000
    assert re.search(message, run.stderr), run.stderr


def test_a_config_folder_or_binary_is_named(tmp_path):
    (tmp_path / "c.yaml").mkdir()
    with pytest.raises(TrainError, match=r"config: cannot read .*Is a directory"):
        read_config_file(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainError, match=r"config: .*d\.yaml is not valid yaml"):
        read_config_file(tmp_path / "d.yaml")
    assert sys.getrecursionlimit() < 100_000
