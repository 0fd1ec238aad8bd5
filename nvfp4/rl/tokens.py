"""Vocabularies for the tasks, each with an end-of-text and a padding token: 32 symbols, bytes, or a local tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from nvfp4.run.errors import TrainError
from nvfp4.run.tokens import SEPARATOR, SEPARATOR_TEXT, ByteTokenizer, HuggingFaceTokenizer, byte_level_tokenizer

PAD, END = "<pad>", "."
SYMBOLS = (PAD, END, *"0123456789+-*/()=,>%:acdmnprsx")
"""32, so that the embedding is a whole number of blocks of 16; task letters at the end."""


class Vocabulary(Protocol):
    """vocab_size: number of ids; eos_id ends a completion; pad_id fills up. Texts never hold either of them."""

    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens; ValueError for a text that the vocabulary cannot spell."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text up to the first end-of-text token, without padding."""
        ...

    def save(self, folder: Path) -> None:
        """Write it so that ``AutoTokenizer.from_pretrained(folder)`` gives the same tokens, padding on the left."""
        ...


class Symbols:
    """One id for each of ``SYMBOLS``."""

    vocab_size = len(SYMBOLS)
    pad_id = SYMBOLS.index(PAD)
    eos_id = SYMBOLS.index(END)

    def encode(self, text: str) -> list[int]:
        unknown = next((c for c in text if c == END or c not in SYMBOLS), None)
        if unknown is not None:
            raise ValueError(f"{unknown!r} of {text[:40]!r} is not among the symbols {''.join(SYMBOLS[2:])}; use bytes")
        return [SYMBOLS.index(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(SYMBOLS[i] for i in _until(ids, self.eos_id) if i != self.pad_id)

    def save(self, folder: Path) -> None:
        vocab = {symbol: i for i, symbol in enumerate(SYMBOLS)}
        fast = FastTokenizer(models.WordLevel(vocab, unk_token=PAD))
        fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        fast.decoder = decoders.Fuse()
        _save(fast, folder, END, PAD)


class Bytes:
    """UTF-8 bytes as in pretraining, the document separator as end-of-text, one more id for padding, 272 in all."""

    eos_id = SEPARATOR
    pad_id = SEPARATOR + 1
    vocab_size = 272  # the next multiple of 16; the rest are never used

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return ByteTokenizer().decode(_until(ids, self.eos_id))

    def save(self, folder: Path) -> None:
        _save(byte_level_tokenizer().backend_tokenizer, folder, SEPARATOR_TEXT, PAD)


class LocalTokenizer:
    """A local Hugging Face tokenizer; without a padding token, its end-of-text token pads as well."""

    def __init__(self, path: str) -> None:
        self.inner = HuggingFaceTokenizer(path).inner
        if self.inner.eos_token_id is None:
            raise TrainError(f"tokenizer: {path} has no eos token to end completions; add one")
        self.eos_id: int = self.inner.eos_token_id
        self.pad_id: int = self.eos_id if self.inner.pad_token_id is None else self.inner.pad_token_id
        self.vocab_size = len(self.inner)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.inner(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        if self.pad_id != self.eos_id and self.pad_id in ids:  # which stands for unknown text, see Symbols.save
            raise ValueError(f"{text[:40]!r} has characters that the tokenizer does not know; use bytes")
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(_until(ids, self.eos_id), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        self.inner.save_pretrained(folder)


VOCABULARIES: dict[str, type[Symbols] | type[Bytes]] = {"symbols": Symbols, "bytes": Bytes}


def load_vocabulary(name: str) -> Vocabulary:
    """ "symbols", "bytes", or the folder of a local Hugging Face tokenizer; ``TrainError`` if it does not load."""
    return VOCABULARIES[name]() if name in VOCABULARIES else LocalTokenizer(name)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _save(fast: FastTokenizer, folder: Path, end: str, pad: str) -> None:
    fast.add_special_tokens([AddedToken(end, special=True, normalized=False), AddedToken(pad, special=True)])
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=end, pad_token=pad, padding_side="left").save_pretrained(
        folder
    )
