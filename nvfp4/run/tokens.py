"""Text to tokens and back: bytes, or any local Hugging Face tokenizer.

    documents ab, c -> sep a b sep c sep      one stream, in the smallest dtype that holds the ids

Every document stands between separators, so a model sees where a text begins and, in sampling,
where to stop. Bytes need no training and no download: 256 ids and a separator, uint16 for the
stream. They are saved as an ordinary Hugging Face tokenizer (byte-level BPE without merges), so an
export loads without this package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from nvfp4.run.corpus import Document
from nvfp4.run.errors import TrainError

if TYPE_CHECKING:  # loading transformers takes seconds, for which ``--help`` need not wait
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BYTES = "bytes"
"""The name of ``ByteTokenizer``."""

SEPARATOR = 256
SEPARATOR_TEXT = "<|endoftext|>"
_BATCH = 256  # documents given to a Hugging Face tokenizer at a time


class Tokenizer(Protocol):
    """What a trainer needs of a tokenizer.

    vocab_size: number of ids. separator: the id that stands before every document.
    """

    vocab_size: int
    separator: int

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; invalid UTF-8 becomes U+FFFD, special tokens nothing."""
        ...

    def save(self, folder: Path) -> None:
        """Write it so that ``AutoTokenizer.from_pretrained(folder)`` gives the same tokens."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and a document separator, 256."""

    vocab_size = SEPARATOR + 1
    separator = SEPARATOR

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The UTF-8 bytes of each text, int32."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The bytes as text, without separators; invalid UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < SEPARATOR).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """As a byte-level Hugging Face tokenizer with the same ids."""
        byte_level_tokenizer().save_pretrained(folder)


class HuggingFaceTokenizer:
    """A local Hugging Face tokenizer, whose end-of-text token separates documents.

    Where it has none, the begin token or the separator does; ``TrainError`` without any.
    """

    def __init__(self, path: str) -> None:
        self.inner = _load(path)
        ends = (self.inner.eos_token_id, self.inner.bos_token_id, self.inner.sep_token_id)
        separator = next((i for i in ends if i is not None), None)
        if separator is None:
            raise TrainError(
                f"tokenizer: {path} has no eos, bos or sep token to put between documents; add one"
            )
        self.separator: int = separator
        self.vocab_size = len(self.inner)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids (int32) of each text; a special token that is spelt out stays text."""
        if not texts:
            return []
        # split_special_tokens: a text that spells out a special token is text, not the token
        encoded = self.inner(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self.inner.decode(ids, skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """As it was loaded."""
        self.inner.save_pretrained(folder)


def load_tokenizer(path: str | None, model: str | None) -> Tokenizer:
    """The tokenizer of a folder, of ``bytes``, else of the model's folder; without either, bytes.

    path: --tokenizer. model: --model. ``TrainError`` if a folder is missing or holds no tokenizer.
    """
    if model is not None:
        check_model_folder(model)
    if path is None and model is not None:
        if not any(
            (Path(model) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
        ):
            raise TrainError(
                f"tokenizer: {model} holds none; give --tokenizer with a folder, or bytes"
            )
        path = model
    return ByteTokenizer() if path in (None, BYTES) else HuggingFaceTokenizer(str(path))


def check_model_folder(path: str) -> None:
    """``TrainError`` if there is no such folder: the name of a model on a hub is not one."""
    if not os.path.isdir(path):
        raise TrainError(
            f"model: expected the folder of a local Hugging Face causal LM, got {path!r}; "
            "nothing is downloaded here: "
            f"fetch it first (hf download NAME --local-dir FOLDER) and give the folder"
        )


def pack(documents: list[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The ids [tokens] of separator, document, separator, ..., and the places of the separators.

    dtype: the smallest unsigned that holds the vocabulary, since a corpus is held in memory.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    separator = np.array([tokenizer.separator], dtype)
    pieces, places = [separator], [0]

    # Many texts per call, since fast tokenizers work on them in parallel.
    for start in range(0, len(documents), _BATCH):
        for ids in tokenizer.encode([d.text for d in documents[start : start + _BATCH]]):
            pieces += [ids.astype(dtype), separator]
            places.append(places[-1] + len(ids) + 1)
    return np.concatenate(pieces), np.array(places)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """The ids of ``ByteTokenizer`` as a Hugging Face tokenizer: byte-level BPE without merges."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # Byte-level BPE spells a byte as a printable character; its id here is the byte itself.
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(SEPARATOR_TEXT, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=SEPARATOR_TEXT, eos_token=SEPARATOR_TEXT
    )


def _load(path: str) -> PreTrainedTokenizerBase:
    if not Path(path).is_dir():
        raise TrainError(
            f"tokenizer: expected the folder of a local Hugging Face tokenizer or {BYTES!r}, got "
            f"{path!r}"
        )
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the library raises many kinds, OSError to KeyError
        raise TrainError(
            f"tokenizer: {path} does not load: {str(error).splitlines()[0]}"
        ) from error
    return loaded
