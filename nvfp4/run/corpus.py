"""Text as documents: where they come from, in which order, which are held out, and one hash of all.

    files, folders, globs -> (relative name, path), sorted
      -> documents   a text file; a line of JSONL; a row of Parquet
      -> held out    where the first 8 bytes of SHA-256(name), / 2^64, are below holdout
      -> sha256      of all names and texts; checkpoints of another are refused

Whether a document is held out depends on its relative name alone, so adding files never moves
another document, and two machines with the same files agree.

Nothing is left out in silence. A folder that cannot be listed, a link that leads nowhere and a line
that is no text stop the run with their name: a corpus with a hole would train another model without
anybody knowing. ``glob``, ``rglob`` and ``os.walk`` all pass over folders without permission, so
this file walks with care.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4.extras import what_to_install
from nvfp4.run.errors import TrainError
from nvfp4.run.options import DataOptions

# site-packages is not the standard library. Tests are left out because distributions ship Python
# with or without them, and because some of their files are deliberately not UTF-8 or not Python.
LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)

JSONL = (".jsonl", ".ndjson")
PARQUET = (".parquet",)


@dataclass(frozen=True)
class Document:
    """A piece of text that is trained on, or held out, as a whole.

    name: relative path, with ``:line`` or ``:row`` for JSONL and Parquet. text: as read, never
    empty.
    """

    name: str
    text: str

    @property
    def draw(self) -> float:
        """A number in [0, 1) from the SHA-256 of the name: held out if below the holdout share."""
        return int.from_bytes(hashlib.sha256(_raw(self.name)).digest()[:8], "big") / 2**64

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """train: in sorted order of files. held_out: in order of their draw, so any first few are fair.

    sha256: of names and texts, those of ``held_out_data`` included.
    """

    train: list[Document]
    held_out: list[Document]
    sha256: str

    def __str__(self) -> str:
        size = [sum(d.size for d in documents) / 1e6 for documents in (self.train, self.held_out)]
        return (
            f"corpus: {len(self.train)} documents ({size[0]:.2f} MB) to train on, "
            f"{len(self.held_out)} "
            f"({size[1]:.2f} MB) held out, sha256 {self.sha256}"
        )


def load_corpus(config: DataOptions) -> Corpus:
    """Read, split and hash the documents of ``data`` and ``held_out_data``, all held in memory.

    ``TrainError`` names what cannot be used. Empty documents are passed over. Of a corpus that is
    one single document, the last ``holdout`` share of its characters is held out. If the hash holds
    out no document at all, the one with the smallest draw is.
    """
    files = find_files(config.data, "data") if config.data else standard_library_files()
    documents = _read_all(files, config.text_field)
    digest = _digest(documents)

    # Held out are files of their own, if given. The same text in both would score as learnt.
    if config.held_out_data:
        held_out = _read_all(find_files(config.held_out_data, "held_out_data"), config.text_field)
        shared = {d.text for d in documents} & {d.text for d in held_out}
        if shared:
            name = next(d.name for d in held_out if d.text in shared)
            raise TrainError(
                f"held_out_data: {len(shared)} documents are also in data (first: {name}); "
                "remove them from one"
            )
        return Corpus(
            documents, sorted(held_out, key=lambda d: d.draw), _digest([*documents, *held_out])
        )

    # Else the end of a document that is alone, since a name cannot split it.
    if len(documents) == 1:
        return Corpus(*_cut(documents[0], config.holdout), digest)

    # Else the documents whose names draw less than the share.
    by_draw = sorted(documents, key=lambda d: d.draw)
    held_out = [d for d in by_draw if d.draw < config.holdout] or by_draw[:1]
    names = {d.name for d in held_out}
    train = [d for d in documents if d.name not in names]
    if not train:
        raise TrainError(
            f"holdout: {config.holdout} of {len(documents)} documents leaves none to train on; "
            "lower it"
        )
    return Corpus(train, held_out, digest)


def find_files(patterns: tuple[str, ...], field: str) -> list[tuple[str, Path]]:
    """(relative name, path) of each file that files, folders and globs name, once, sorted by name.

    The name is relative to the folder, to the fixed part of the glob, or to the file's own folder.
    field: the option that a ``TrainError`` names when a pattern matches nothing or cannot be read.
    """
    names: dict[Path, str] = {}
    for pattern in patterns:
        try:
            root, files = _matching(Path(pattern).expanduser(), field, pattern)
            if not files:
                raise TrainError(
                    f"{field}: no file matches {pattern}; give files, folders or globs (quoted "
                    "for the shell)"
                )

            # By its real path, so that a file under two patterns or links is read once.
            for file in files:
                names.setdefault(file.resolve(), file.relative_to(root).as_posix())
        # a loop of links; a name with a zero byte; no such home
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TrainError(
                f"{field}: cannot look through {getattr(error, 'filename', None) or pattern}: "
                f"{reason}; "
                f"make it readable or leave it out"
            ) from error
    return sorted((name, path) for path, name in names.items())


def standard_library_files() -> list[tuple[str, Path]]:
    """(relative name, path) of the .py files of this Python's standard library, sorted by name.

    The corpus of last resort: every machine has it, and nothing is downloaded.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    try:
        for folder, below, files in os.walk(root, onerror=_refuse):
            # in place: os.walk goes into what is left in the list
            below[:] = [name for name in below if name not in LEFT_OUT]
            paths = [Path(folder, name) for name in files if name.endswith(".py")]
            modules += [(path.relative_to(root).as_posix(), path) for path in paths]
    except OSError as error:
        raise TrainError(
            f"data: cannot look through {error.filename} of the standard library: "
            f"{error.strerror}; give --data"
        ) from error
    return sorted(modules)


def _matching(path: Path, field: str, pattern: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files of one pattern, sorted.

    ``OSError`` for a folder that cannot be listed, ``TrainError`` for a file or a link that leads
    nowhere.
    """
    if path.is_dir():
        root, paths = path, _below(path)
    elif glob.has_magic(str(path)) and not os.path.lexists(path):
        root = Path(*_until_magic(path.parts))
        _refuse_unreadable_folders(path, root)
        paths = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    else:
        root, paths = path.parent, [path]
        try:
            # Not exists(), to which a folder that may not be searched is a file that is not there.
            path.lstat()
        except FileNotFoundError:
            raise TrainError(f"{field}: no such file: {pattern}") from None

    # A broken link is refused; folders and sockets among the matches are no documents.
    files = []
    for each in paths:
        if each.is_file():
            files.append(each)
        elif each.is_symlink() and not each.is_dir():
            raise TrainError(
                f"{field}: {each} is a link that leads to no file; repair or remove it"
            )
    return root, files


def _below(root: Path) -> list[Path]:
    """Everything under a folder but what is hidden, sorted.

    Links to folders are not followed, so none can loop.
    """
    paths = []
    for folder, below, names in os.walk(root, onerror=_refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(paths)


def _refuse(error: OSError) -> None:
    """Raise what ``os.walk`` would swallow: a folder that it cannot list."""
    raise error


def _refuse_unreadable_folders(path: Path, root: Path) -> None:
    """``OSError`` for a folder that ``path``, a glob, would look into and may not.

    ``glob`` passes over those without a word.
    """
    for end in range(len(root.parts), len(path.parts)):
        for folder in glob.iglob(str(Path(*path.parts[:end])), recursive=True):
            if os.path.isdir(folder):
                os.scandir(folder).close()


def _until_magic(parts: tuple[str, ...]) -> list[str]:
    """The parts of a path before the first with a wildcard."""
    fixed = []
    for part in parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _raw(name: str) -> bytes:
    """A relative name as bytes; those that are not UTF-8 on the disk are the ones there."""
    return name.encode("utf-8", "surrogateescape")


def _read_all(files: list[tuple[str, Path]], text_field: str) -> list[Document]:
    return [
        document
        for name, path in files
        for document in _read(name, path, text_field)
        if document.text
    ]


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
            f"data: {where} is not UTF-8 text (byte 0x{raw[error.start]:02X} at offset "
            f"{error.start}); "
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
                row = read_json(line)
            except ValueError as error:
                raise TrainError(f"data: {where} {error}; repair or remove it") from None

            # The message lists what is there: most often the field has another name.
            if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                has = (
                    f"the fields {_some(row)}"
                    if isinstance(row, dict)
                    else f"a {type(row).__name__}"
                )
                raise TrainError(
                    f"data: {where} has no text in field {text_field!r}, but {has}; set "
                    "--text-field"
                )
            yield Document(f"{name}:{number}", row[text_field])


def read_json(line: str) -> Any:
    r"""The value of a line of JSON; ``ValueError`` says what it is instead, whatever is wrong.

    A lone surrogate (``"\\ud800"``) is refused although JSON can spell it: no encoding and no
    tokenizer can.
    """
    try:
        row = json.loads(line)
        if "\\u" in line:  # the only way in for a surrogate: UTF-8 has none
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at column {error.colno})") from None
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half a character, the lone surrogate \\u{ord(error.object[error.start]):04x}"
        ) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    # Python reads no integer of thousands of digits, since that takes quadratic time
    except ValueError:
        raise ValueError("has an integer of too many digits") from None
    return row


def _some(names: Iterable[str], most: int = 20) -> str:
    """Names for a message, which must not become as long as the line."""
    shown = [repr(name)[:80] for name in itertools.islice(names, most + 1)]
    return ", ".join([*shown[:most], "..."] if len(shown) > most else shown)


def _read_parquet(name: str, path: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        line = what_to_install(error, f"reading {path}")
        if line is None:
            raise
        raise TrainError(f"data: {line}") from None
    try:
        # Only the one column is read, and its type is looked at before any of it is.
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise TrainError(
                    f"data: {path} has no column {text_field!r}, but {', '.join(columns)}; set "
                    "--text-field"
                )

            kind = file.schema_arrow.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise TrainError(
                    f"data: column {text_field!r} of {path} must hold strings, it holds {kind}"
                )

            # Batch by batch, and a null as an empty text, which is passed over like any other.
            row = 0
            for batch in file.iter_batches(columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield Document(f"{name}:{row}", text or "")
                    row += 1
    # Arrow believes that a string column holds UTF-8
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainError(f"data: {path} is not a readable Parquet file: {reason}") from error


def _cut(document: Document, holdout: float) -> tuple[list[Document], list[Document]]:
    """A single document as two: its text but for the last ``holdout`` share, and that share."""
    at = round(len(document.text) * (1 - holdout))
    if not 0 < at < len(document.text):
        raise TrainError(
            f"data: {document.name} has {len(document.text)} characters, too few to hold out "
            f"{holdout} of them"
        )
    head, tail = document.text[:at], document.text[at:]
    return [Document(document.name, head)], [Document(f"{document.name}@{at}", tail)]


def _digest(documents: list[Document]) -> str:
    """SHA-256 of names and texts, each after its length, so that no two corpora run together."""
    if not documents:
        raise TrainError("data: all files are empty; give files with text")
    digest = hashlib.sha256()
    for document in documents:
        for part in (_raw(document.name), document.text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
