"""Text to batches: what is refused, what is held out, and the order as a pure function of (seed,
step)."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from training import tiny, write_texts

from nvfp4.run.corpus import LEFT_OUT, Document, find_files, load_corpus, standard_library_files
from nvfp4.run.errors import TrainError
from nvfp4.run.tokens import (
    SEPARATOR,
    SEPARATOR_TEXT,
    ByteTokenizer,
    HuggingFaceTokenizer,
    byte_level_tokenizer,
    load_tokenizer,
    pack,
)
from nvfp4.train.config import PretrainConfig
from nvfp4.train.data import IGNORED, TrainWindows, held_out_windows, shuffle


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts")


def corpus_of(*data, **changes):
    return load_corpus(PretrainConfig(data=tuple(map(str, data)), **changes))


# What is refused


def test_missing_files_and_empty_globs_are_named(tmp_path, texts):
    with pytest.raises(TrainError, match=r"data: no such file: .*absent\.txt"):
        corpus_of(tmp_path / "absent.txt")
    with pytest.raises(TrainError, match=r"data: no file matches .*\*\.md"):
        corpus_of(texts / "*.md")
    with pytest.raises(TrainError, match=r"held_out_data: no such file: .*absent\.txt"):
        corpus_of(texts, held_out_data=(str(tmp_path / "absent.txt"),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainError, match=r"data: no file matches .*empty"):
        corpus_of(tmp_path / "empty")


@pytest.mark.parametrize("reason", ["Permission denied", "Input/output error"])
def test_an_unreadable_file_is_named(texts, monkeypatch, reason):
    def fail(self):
        raise OSError(5, reason)

    # root may read every file, so no mode bits here
    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(TrainError, match=rf"data: cannot read .*text00\.txt: {reason}"):
        corpus_of(texts)


def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode() + "caf\xe9".encode("latin-1"))
    with pytest.raises(TrainError, match=r"latin\.txt is not UTF-8 text \(byte 0xE9 at offset 5\)"):
        corpus_of(path)


def test_empty_files_are_passed_over_and_only_empty_files_refused(tmp_path, texts):
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.txt").touch()
    with pytest.raises(TrainError, match="data: all files are empty"):
        corpus_of(tmp_path / "void")
    assert corpus_of(texts, tmp_path / "void").sha256 == corpus_of(texts).sha256


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 3 is not JSON \(Unterminated string starting at at column 10\)"),
        (
            '{"body": "x"}',
            r"line 3 has no text in field 'text', but the fields 'body'; set --text-field",
        ),
        ('{"text": 7}', r"line 3 has no text in field 'text', but the fields 'text'"),
        ('["x"]', "line 3 has no text in field 'text', but a list"),
        (b'{"text": "\xff"}', r"line 3 is not UTF-8 text \(byte 0xFF at offset 10\)"),
    ],
)
def test_a_corrupt_jsonl_line_is_named_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    bad = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "one"}\n\n' + bad + b'\n{"text": "two"}\n')
    with pytest.raises(TrainError, match=rf"rows\.jsonl, {message}"):
        corpus_of(path)


def test_parquet_errors_name_file_and_column(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["a", "b"], "n": [1, 2]}), path)
    with pytest.raises(
        TrainError, match=r"rows\.parquet has no column 'text', but body, n; set --text-field"
    ):
        corpus_of(path)
    with pytest.raises(
        TrainError, match=r"column 'n' of .*rows\.parquet must hold strings, it holds int64"
    ):
        corpus_of(path, text_field="n")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TrainError, match=r"rows\.parquet is not a readable Parquet file"):
        corpus_of(path, text_field="body")


def test_too_little_text_for_one_sequence_is_said(tmp_path):
    with pytest.raises(
        TrainError,
        match="seq_len: training needs at least 64 tokens for sequences of 32, the text has 9",
    ):
        TrainWindows(np.zeros(9, np.uint16), seq_len=32, batch=1, seed=0)


# What is read


def test_jsonl_and_parquet_rows_are_documents(tmp_path):
    rows = [f"row {i} é" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    pq.write_table(pa.table({"body": [*rows, None, ""]}), tmp_path / "a.parquet")
    for name, first in (("a.jsonl", "a.jsonl:1"), ("a.parquet", "a.parquet:0")):
        corpus = corpus_of(tmp_path / name, text_field="body", holdout=0.2)
        together = {d.name: d.text for d in [*corpus.train, *corpus.held_out]}
        assert sorted(together.values()) == sorted(rows)
        assert together[first] == rows[0]


def test_names_are_relative_however_a_file_is_reached(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("x")
    (tmp_path / "a" / ".hidden").write_text("no")
    folder = str(tmp_path / "a")
    assert [name for name, _ in find_files((folder,), "data")] == ["b/x.txt"]
    assert [name for name, _ in find_files((f"{folder}/**/*.txt",), "data")] == ["b/x.txt"]
    assert [name for name, _ in find_files((f"{folder}/b/x.txt",), "data")] == ["x.txt"]
    # each file once
    assert len(find_files((folder, f"{folder}/b/x.txt", f"{folder}/b"), "data")) == 1


def test_the_default_corpus_is_the_standard_library_in_a_fixed_order():
    files = standard_library_files()
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert {"abc.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [
        name for name in names if LEFT_OUT & set(name.split("/")) or not name.endswith(".py")
    ]


# What is held out


def test_no_document_is_on_both_sides_and_none_is_lost(texts):
    corpus = corpus_of(texts, holdout=0.3)
    train, held_out = ({d.name for d in side} for side in (corpus.train, corpus.held_out))
    assert train
    assert held_out
    assert not train & held_out
    assert train | held_out == {path.name for path in texts.iterdir()}
    assert all(d.draw < 0.3 for d in corpus.held_out)
    assert all(d.draw >= 0.3 for d in corpus.train)


def test_the_split_depends_on_the_name_alone(tmp_path, texts):
    before = {d.name for d in corpus_of(texts, holdout=0.3).held_out}
    moved = tmp_path / "moved"
    texts.rename(moved)
    (moved / "another.txt").write_text("more text")
    assert {d.name for d in corpus_of(moved, holdout=0.3).held_out} - {"another.txt"} == before
    # printf text00.txt | sha256sum begins with d6c8c69f, so the draw does too; written down so that
    # no split ever moves
    assert f"{int(Document('text00.txt', '').draw * 2**32):08x}" == "d6c8c69f"


def test_held_out_bytes_never_reach_a_training_batch(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(chr(65 + i) * 200)  # a letter of its own for each file
    corpus = corpus_of(tmp_path, holdout=0.25)
    letters = {d.text[0] for d in corpus.held_out}
    tokens, _ = pack(corpus.train, ByteTokenizer())
    windows = TrainWindows(tokens, seq_len=8, batch=16, seed=0)
    seen = {
        chr(i)
        for step in range(3 * windows.count // 16)
        for i in windows.batch_at(step).flatten().tolist()
        if i != SEPARATOR
    }
    assert letters
    assert seen == {chr(65 + i) for i in range(20)} - letters


def test_a_single_document_gives_its_end_and_few_documents_give_one(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("é" * 90 + "z" * 10)
    corpus = corpus_of(path, holdout=0.1)
    assert ([d.text for d in corpus.train], [d.text for d in corpus.held_out]) == (
        ["é" * 90],
        ["z" * 10],
    )
    (tmp_path / "two.txt").write_text("second")
    few = corpus_of(tmp_path, holdout=0.001)
    assert len(few.train) == len(few.held_out) == 1
    assert few.held_out[0].draw < few.train[0].draw


def test_given_held_out_files_are_used_and_may_not_be_trained_on(tmp_path, texts):
    (tmp_path / "test.txt").write_text("held out")
    corpus = corpus_of(texts, held_out_data=(str(tmp_path / "test.txt"),))
    assert [d.text for d in corpus.held_out] == ["held out"]
    assert len(corpus.train) == 12
    with pytest.raises(
        TrainError, match=r"held_out_data: 1 documents are also in data \(first: text03\.txt\)"
    ):
        corpus_of(texts, held_out_data=(str(texts / "text03.txt"),))


def test_the_hash_notices_every_byte_and_every_name(texts):
    before = corpus_of(texts).sha256
    assert corpus_of(texts).sha256 == before
    path = texts / "text05.txt"
    path.write_text(path.read_text() + " ")
    changed = corpus_of(texts).sha256
    path.rename(texts / "text99.txt")
    assert len({before, changed, corpus_of(texts).sha256}) == 3


# The order


def test_the_permutation_is_the_one_it_always_was():
    """Written down once: a change here would silently change every run and break every resume."""
    assert shuffle(0, 0, 10).tolist() == [8, 9, 2, 7, 1, 0, 3, 5, 6, 4]
    assert sorted(shuffle(7, 3, 1000).tolist()) == list(range(1000))
    assert (
        shuffle(7, 3, 1000).tolist() != shuffle(7, 4, 1000).tolist() != shuffle(8, 4, 1000).tolist()
    )


def test_a_batch_is_a_pure_function_of_seed_and_step():
    tokens = np.arange(1000, dtype=np.uint16)
    windows = TrainWindows(tokens, seq_len=7, batch=6, seed=3)
    forwards = [windows.batch_at(step) for step in range(60)]
    fresh = TrainWindows(tokens, seq_len=7, batch=6, seed=3)
    for step in reversed(range(60)):  # another order, other caches
        shuffle.cache_clear()
        assert torch.equal(fresh.batch_at(step), forwards[step])
    other = TrainWindows(tokens, seq_len=7, batch=6, seed=4)
    assert not torch.equal(other.batch_at(0), forwards[0])


def test_an_epoch_shows_every_window_once_with_its_next_tokens():
    tokens = np.arange(200, dtype=np.uint16)
    windows = TrainWindows(tokens, seq_len=9, batch=3, seed=0)
    assert windows.count == 21
    for epoch in range(3):
        starts = np.concatenate([windows.starts(step) for step in range(7 * epoch, 7 * epoch + 7)])
        assert len(set(starts % 9)) == 1  # one offset an epoch
        assert sorted(starts // 9) == list(range(21))
        rows = windows.batch_at(7 * epoch)
        assert rows.shape == (3, 10)
        # consecutive tokens, each input with its target
        assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)
    offsets = {int(windows.starts(7 * epoch)[0] % 9) for epoch in range(20)}
    assert len(offsets) > 3  # window borders move from epoch to epoch


def test_a_batch_may_cross_epochs_and_even_hold_several():
    windows = TrainWindows(np.arange(40, dtype=np.uint16), seq_len=8, batch=10, seed=0)
    assert windows.count == 4
    starts = windows.starts(0)
    assert sorted(starts[:4] // 8) == sorted(starts[4:8] // 8) == [0, 1, 2, 3]


# Tokens and held-out windows


def test_documents_are_packed_between_separators():
    tokens, places = pack([Document("a", "ab"), Document("b", "é")], ByteTokenizer())
    assert tokens.tolist() == [SEPARATOR, 97, 98, SEPARATOR, 0xC3, 0xA9, SEPARATOR]
    assert places.tolist() == [0, 3, 6]
    assert tokens.dtype == np.uint16


def test_the_saved_byte_tokenizer_gives_the_same_ids(tmp_path):
    text = "é\x00 \r\n\t a  b" + SEPARATOR_TEXT + "".join(map(chr, range(32, 600)))
    ByteTokenizer().save(tmp_path)
    loaded = HuggingFaceTokenizer(str(tmp_path))
    assert (loaded.vocab_size, loaded.separator) == (257, SEPARATOR)
    assert (
        loaded.encode([text])[0].tolist()
        == ByteTokenizer().encode([text])[0].tolist()
        == list(text.encode())
    )
    assert loaded.decode(list(text.encode())) == ByteTokenizer().decode(list(text.encode())) == text
    assert ByteTokenizer().decode([0xC3, SEPARATOR, 65]) == "\N{REPLACEMENT CHARACTER}A"


def test_tokenizers_that_do_not_load_are_named(tmp_path):
    with pytest.raises(
        TrainError,
        match="tokenizer: expected the folder of a local Hugging Face tokenizer or 'bytes'",
    ):
        load_tokenizer("gpt2-not-here", None)
    with pytest.raises(TrainError, match=f"tokenizer: {tmp_path} does not load"):
        load_tokenizer(str(tmp_path), None)
    with pytest.raises(TrainError, match=f"tokenizer: {tmp_path} holds none; give --tokenizer"):
        load_tokenizer(None, str(tmp_path))
    bare = byte_level_tokenizer()
    bare.eos_token = bare.bos_token = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(TrainError, match="has no eos, bos or sep token"):
        load_tokenizer(str(tmp_path / "bare"), None)


@pytest.mark.parametrize("seq_len", [3, 8, 64])
def test_every_held_out_token_is_scored_once_after_the_one_before_it(seq_len):
    documents = [Document("a", "hello"), Document("b", "é"), Document("c", "x" * 30)]
    held_out = held_out_windows(documents, ByteTokenizer(), seq_len, limit=0)
    inputs, targets = held_out.inputs.flatten(), held_out.targets.flatten()
    scored = targets != IGNORED
    stream, _ = pack(documents, ByteTokenizer())
    text = b"".join(d.text.encode() for d in documents)
    assert bytes(targets[scored].tolist()) == text
    assert held_out.size == held_out.tokens == len(text)
    assert inputs[: len(stream) - 1].tolist() == stream[:-1].tolist()
    assert (
        held_out.inputs.shape
        == held_out.targets.shape
        == (-(-(len(stream) - 1) // seq_len), seq_len)
    )


def test_a_separator_spelt_out_in_the_text_is_text():
    held_out = held_out_windows(
        [Document("a", SEPARATOR_TEXT)], HuggingFaceTokenizerOfBytes(), 8, limit=0
    )
    assert held_out.tokens == held_out.size == len(SEPARATOR_TEXT)


def test_a_limit_takes_a_fair_share_of_each_document_at_character_borders():
    documents = [Document(str(i), "é" * 500) for i in range(40)]
    held_out = held_out_windows(documents, ByteTokenizer(), 64, limit=1600)
    assert held_out.size == held_out.tokens == 1600  # 16 documents, 100 bytes each
    odd = held_out_windows(documents, ByteTokenizer(), 64, limit=16 * 101)
    # 101 bytes cut a character, which is dropped; a 17th document fills up
    assert odd.size == 16 * 100 + 16
    single = held_out_windows(documents[:1], ByteTokenizer(), 64, limit=300)
    assert single.size == 300


class HuggingFaceTokenizerOfBytes(HuggingFaceTokenizer):
    """The saved form of the byte tokenizer without a folder."""

    def __init__(self):
        self.inner = byte_level_tokenizer()
        self.separator, self.vocab_size = SEPARATOR, 257


def test_the_tiny_config_of_these_tests_is_valid(tmp_path, texts):
    assert load_corpus(tiny(tmp_path, texts)).held_out
