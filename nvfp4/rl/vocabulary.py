"""Between texts and token ids: vocabularies, prompts as ids, and how long both are.

Three vocabularies, each with an end-of-text and a padding token that no text can hold:

    symbols    32 characters: digits, operators and the letters that name tasks
    bytes      UTF-8, as in pretraining, 272 ids
    FOLDER     a local Hugging Face tokenizer

``Text`` puts one of them to use, both ways:

    prompt      [begin-of-text] + ids, or the chat template with one turn of the user
    answer      ids + end-of-text: a demonstration
    completion  ids up to the first end-of-text -> the text that a task's verifier sees

Where the config leaves sizes open, they come from the task's problems (``task_lengths``,
``completion_tokens``, ``context_tokens``): the task knows how long its answers are, and a user
should not have to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from nvfp4.numerics.rng import LENGTH_BRANCH, fold_in
from nvfp4.rl.samples import Stops
from nvfp4.rl.tasks.base import Problem, Task
from nvfp4.run.errors import TrainError
from nvfp4.run.tokens import (
    SEPARATOR,
    SEPARATOR_TEXT,
    ByteTokenizer,
    HuggingFaceTokenizer,
    byte_level_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAD, END = "<pad>", "."
SYMBOLS = (PAD, END, *"0123456789+-*/()=,>%:acdmnprsx")
"""32, so that the embedding is a whole number of blocks of 16; task letters at the end."""

DRAWN = 256
"""Problems of a task that are looked at for their lengths."""

LEAST_NEW, LEAST_LOCAL = 8, 64
"""Tokens that a completion may have at least: of a new model, which knows the task alone, and of
one that may think."""

_SEED = fold_in(0, LENGTH_BRANCH)  # of those problems, whatever the run's
_CONTEXT_STEP = 32  # a context is a multiple of this many tokens


class Vocabulary(Protocol):
    """vocab_size: number of ids; eos_id ends a completion; pad_id fills up. Texts hold neither."""

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
        """Write it for ``AutoTokenizer.from_pretrained``: the same tokens, padding on the left."""
        ...


class Symbols:
    """One id for each of ``SYMBOLS``."""

    vocab_size = len(SYMBOLS)
    pad_id = SYMBOLS.index(PAD)
    eos_id = SYMBOLS.index(END)

    def encode(self, text: str) -> list[int]:
        """One id per character; ValueError names one that is no symbol."""
        unknown = next((c for c in text if c == END or c not in SYMBOLS), None)
        if unknown is not None:
            known = "".join(SYMBOLS[2:])
            where = f"{unknown!r} of {text[:40]!r}"
            raise ValueError(f"{where} is not among the symbols {known}; use bytes")
        return [SYMBOLS.index(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        """The symbols up to the end, without padding."""
        return "".join(SYMBOLS[i] for i in _until(ids, self.eos_id) if i != self.pad_id)

    def save(self, folder: Path) -> None:
        """As a Hugging Face tokenizer of single characters."""
        vocab = {symbol: i for i, symbol in enumerate(SYMBOLS)}
        fast = FastTokenizer(models.WordLevel(vocab, unk_token=PAD))
        fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        fast.decoder = decoders.Fuse()
        _save(fast, folder, END, PAD)


class Bytes:
    """UTF-8 bytes as in pretraining; the document separator ends a text, one more id pads."""

    eos_id = SEPARATOR
    pad_id = SEPARATOR + 1
    vocab_size = 272  # the next multiple of 16; the rest are never used

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes, ids 0 to 255."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """The text up to the separator; invalid UTF-8 becomes U+FFFD."""
        return ByteTokenizer().decode(_until(ids, self.eos_id))

    def save(self, folder: Path) -> None:
        """As pretraining's byte tokenizer, with a padding token."""
        _save(byte_level_tokenizer().backend_tokenizer, folder, SEPARATOR_TEXT, PAD)


class LocalTokenizer:
    """A local Hugging Face tokenizer; without a padding token, its end-of-text token pads."""

    def __init__(self, path: str) -> None:
        self.inner = HuggingFaceTokenizer(path).inner
        if self.inner.eos_token_id is None:
            raise TrainError(f"tokenizer: {path} has no eos token to end completions; add one")
        self.eos_id: int = self.inner.eos_token_id
        pad = self.inner.pad_token_id
        self.pad_id: int = self.eos_id if pad is None else pad
        self.vocab_size = len(self.inner)

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens; ValueError for text that it does not know."""
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids: list[int] = self.inner(text, **plain)["input_ids"]
        if self.pad_id != self.eos_id and self.pad_id in ids:  # unknown text, see Symbols.save
            unknown = f"{text[:40]!r} has characters that the tokenizer does not know"
            raise ValueError(f"{unknown}; use bytes")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text up to the end token, without special tokens."""
        return str(self.inner.decode(_until(ids, self.eos_id), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """As it was loaded."""
        self.inner.save_pretrained(folder)


VOCABULARIES: dict[str, type[Symbols] | type[Bytes]] = {"symbols": Symbols, "bytes": Bytes}


def load_vocabulary(name: str) -> Vocabulary:
    """ "symbols", "bytes" or the folder of a tokenizer; ``TrainError`` if it does not load."""
    return VOCABULARIES[name]() if name in VOCABULARIES else LocalTokenizer(name)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _save(fast: FastTokenizer, folder: Path, end: str, pad: str) -> None:
    from transformers import PreTrainedTokenizerFast  # --help needs no library of models

    special = [AddedToken(end, special=True, normalized=False), AddedToken(pad, special=True)]
    fast.add_special_tokens(special)
    names = {"eos_token": end, "pad_token": pad, "padding_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(folder)


class Text:
    """Both ways between text and ids; also what the rest of the trainers takes for a tokenizer.

    Prompts begin with the begin-of-text token, if the tokenizer has one. chat: they go through its
    chat template, as one turn of the user. Completions end with the end-of-text token, or any other
    that ``stops`` says.
    """

    def __init__(self, vocabulary: Vocabulary, chat: bool = False) -> None:
        self.vocabulary, self.chat = vocabulary, chat
        self.vocab_size, self.separator = vocabulary.vocab_size, vocabulary.eos_id
        self._inner: Any = vocabulary.inner if isinstance(vocabulary, LocalTokenizer) else None
        if chat and getattr(self._inner, "chat_template", None) is None:
            raise TrainError("chat: the tokenizer has no chat template; leave out --chat")
        begin = getattr(self._inner, "bos_token_id", None)
        self._begin = [] if begin is None else [begin]

    def stops(self, model: PreTrainedModel) -> Stops:
        """What ends a completion: end-of-text, and what the model's generation config names."""
        named = getattr(model.generation_config, "eos_token_id", None)
        more = named if isinstance(named, list) else [] if named is None else [named]
        ids = dict.fromkeys([self.separator, *more])
        return Stops(tuple(ids), self.vocabulary.pad_id)

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt, at least one; ``TrainError`` if the vocabulary cannot spell it."""
        if self.chat:
            turns = [{"role": "user", "content": text}]
            template = self._inner.apply_chat_template
            return list(template(turns, add_generation_prompt=True, return_dict=False))
        return [*self._begin, *self._spell(text)] or [self.separator]

    def answer(self, text: str) -> list[int]:
        """The ids of a demonstration, with its end."""
        return [*self._spell(text), self.separator]

    def completion(self, ids: list[int]) -> str:
        """The text of a completion, without the token that ended it."""
        return self.vocabulary.decode(ids)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, without special tokens."""
        return [np.asarray(self._spell(text), np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of a completion: as ``completion``."""
        return self.vocabulary.decode(ids)

    def save(self, folder: Path) -> None:
        """Write the vocabulary as a Hugging Face tokenizer."""
        self.vocabulary.save(folder)

    def _spell(self, text: str) -> list[int]:
        try:
            return self.vocabulary.encode(text)
        except ValueError as error:
            raise TrainError(f"tokenizer: {error}") from error


def task_lengths(task: Task, text: Text) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest answer, with its end."""
    try:
        problems = task.problems(DRAWN, _SEED)
    except ValueError as error:
        raise TrainError(f"task {task.name}: {error}") from error
    answers = [text.answer(problem.answer) for problem in problems]
    return _longest_prompt(problems, text), max(map(len, answers))


def longest_prompt(task: Task, text: Text) -> int:
    """Tokens of the longest prompt: of all problems where they are listed, else of ``DRAWN``."""
    return _longest_prompt(task.listed() or task.problems(DRAWN, _SEED), text)


def _longest_prompt(problems: Sequence[Problem], text: Text) -> int:
    return max(len(text.prompt(problem.prompt)) for problem in problems)


def completion_tokens(answer: int, new: bool) -> int:
    """The length limit for answers of so many tokens.

    One more than the longest, so that a right one is never cut for want of room. new: the model is
    a new one, which knows the task alone.
    """
    return max(LEAST_NEW if new else LEAST_LOCAL, answer + 1)


def context_tokens(prompt: int, completion: int) -> int:
    """The context of a new model: room for a prompt half as long again, since longer may come."""
    tokens = prompt + prompt // 2 + completion
    return -(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP
