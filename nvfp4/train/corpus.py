"""Text as documents: where they come from, in which order, which are held out, and the hash that identifies them all.

A document is a text file, a line of a JSONL file or a row of a Parquet file. Whether it is held out depends on its
relative name alone, so adding files never moves another document, and two machines with the same files agree.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nvfp4.train.config import TrainConfig
from nvfp4.train.errors import TrainError

# site-packages is not the standard library. Tests are left out because distributions ship Python with or without
# them, and because some of their files are deliberately not UTF-8 or not Python.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet",)


@dataclass(frozen=True)
class Document:
    """name: relative path, with ``:line`` or ``:row`` for JSONL and Parquet; text: as read, never empty."""

    name: str
    text: str

    @property
    def draw(self) -> float:
        """A number in [0, 1) from the SHA-256 of the name: below the holdout share, the document is held out."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") / 2**64

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """train in sorted order of files; held_out in order of their draw, so that any first few are a fair sample."""

    train: list[Document]
    held_out: list[Document]
    sha256: str

    def __str__(self) -> str:
        size = [sum(d.size for d in documents) / 1e6 for documents in (self.train, self.held_out)]
        return (
            f"corpus: {len(self.train)} documents ({size[0]:.2f} MB) to train on, {len(self.held_out)} "
            f"({size[1]:.2f} MB) held out, sha256 {self.sha256}"
        )


def load_corpus(config: TrainConfig) -> Corpus:
    """Read, split and hash the documents of ``data`` and ``held_out_data``; ``TrainError`` names what cannot be used.

    All text is held in memory. Empty documents are passed over. Of a corpus that is one single document, the last
    ``holdout`` share of its characters is held out; if the hash holds out no document at all, the one with the smallest
    draw is.
    """
    files = find_files(config.data, "data") if config.data else standard_library_files()
    documents = _read_all(files, config.text_field)
    digest = _digest(documents)
    if config.held_out_data:
        held_out = _read_all(find_files(config.held_out_data, "held_out_data"), config.text_field)
        shared = {d.text for d in documents} & {d.text for d in held_out}
        if shared:
            name = next(d.name for d in held_out if d.text in shared)
            raise TrainError(
                f"held_out_data: {len(shared)} documents are also in data (first: {name}); remove them from one"
            )
        return Corpus(documents, sorted(held_out, key=lambda d: d.draw), _digest([*documents, *held_out]))
    if len(documents) == 1:
        return Corpus(*_cut(documents[0], config.holdout), digest)
    by_draw = sorted(documents, key=lambda d: d.draw)
    held_out = [d for d in by_draw if d.draw < config.holdout] or by_draw[:1]
    names = {d.name for d in held_out}
    train = [d for d in documents if d.name not in names]
    if not train:
        raise TrainError(f"holdout: {config.holdout} of {len(documents)} documents leaves none to train on; lower it")
    return Corpus(train, held_out, digest)


def find_files(patterns: tuple[str, ...], field: str) -> list[tuple[str, Path]]:
    """(relative name, path) of every file that the files, folders and globs name, each file once, sorted by name.

    The name is relative to the folder, to the fixed part of the glob, or to the file's own folder. ``field`` names the
    config field in the ``TrainError`` for a pattern that matches nothing.
    """
    found: dict[Path, str] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            root, paths = path, sorted(p for p in path.rglob("*") if not _hidden(p.relative_to(path)))
        elif glob.has_magic(str(path)) and not path.exists():
            root = Path(*_until_magic(path.parts))
            paths = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        else:
            root, paths = path.parent, [path]
            if not path.exists():
                raise TrainError(f"{field}: no such file: {pattern}")
        files = [p for p in paths if p.is_file()]
        if not files:
            raise TrainError(f"{field}: no file matches {pattern}; give files, folders or globs (quoted for the shell)")
        for file in files:
            found.setdefault(file.resolve(), file.relative_to(root).as_posix())
    return sorted((name, path) for path, name in found.items())


def standard_library_files() -> list[tuple[str, Path]]:
    """(relative name, path) of the .py files of the running Python's standard library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


def _until_magic(parts: tuple[str, ...]) -> list[str]:
    fixed = []
    for part in parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_all(files: list[tuple[str, Path]], text_field: str) -> list[Document]:
    return [document for name, path in files for document in _read(name, path, text_field) if document.text]


def _read(name: str, path: Path, text_field: str) -> Iterator[Document]:
    try:
        if path.suffix in PARQUET:
            yield from _read_parquet(name, path, text_field)
        elif path.suffix in JSONL:
            yield from _read_jsonl(name, path, text_field)
        else:
            yield Document(name, _decode(path.read_bytes(), str(path)))
    except OSError as error:
        raise TrainError(f"data: cannot read {path}: {error.strerror or error}") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TrainError(
            f"data: {where} is not UTF-8 text (byte 0x{raw[error.start]:02X} at offset {error.start}); "
            f"convert it or leave it out"
        ) from None


def _read_jsonl(name: str, path: Path, text_field: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}, line {number}"
            line = _decode(raw, where).strip()
            if not line:
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TrainError(
                    f"data: {where} is not JSON ({error.msg} at column {error.colno}); repair or remove it"
                ) from None
            if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                has = f"the fields {', '.join(map(repr, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
                raise TrainError(f"data: {where} has no text in field {text_field!r}, but {has}; set --text-field")
            yield Document(f"{name}:{number}", row[text_field])


def _read_parquet(name: str, path: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise TrainError(f"data: reading {path} needs pyarrow; run: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise TrainError(
                    f"data: {path} has no column {text_field!r}, but {', '.join(columns)}; set --text-field"
                )
            kind = file.schema_arrow.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise TrainError(f"data: column {text_field!r} of {path} must hold strings, it holds {kind}")
            row = 0
            for batch in file.iter_batches(columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield Document(f"{name}:{row}", text or "")
                    row += 1
    except pyarrow.ArrowException as error:
        raise TrainError(f"data: {path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _cut(document: Document, holdout: float) -> tuple[list[Document], list[Document]]:
    at = round(len(document.text) * (1 - holdout))
    if not 0 < at < len(document.text):
        raise TrainError(
            f"data: {document.name} has {len(document.text)} characters, too few to hold out {holdout} of them"
        )
    head, tail = document.text[:at], document.text[at:]
    return [Document(document.name, head)], [Document(f"{document.name}@{at}", tail)]


def _digest(documents: list[Document]) -> str:
    if not documents:
        raise TrainError("data: all files are empty; give files with text")
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
