"""Prompts as tokens and completions as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nvfp4.rl.rollout import Stops
from nvfp4.rl.tokens import LocalTokenizer, Vocabulary
from nvfp4.run.errors import TrainError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Text:
    """Both ways between text and ids; also what the rest of ``nvfp4.run`` takes for a tokenizer.

    Prompts begin with the begin-of-text token, if the tokenizer has one. chat: they go through its chat template, as
    one turn of the user. Completions end with the end-of-text token, or any other that ``stops`` says.
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
        return Stops(tuple(dict.fromkeys([self.separator, *more])), self.vocabulary.pad_id)

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt, at least one; ``TrainError`` if the vocabulary cannot spell it."""
        if self.chat:
            turns = [{"role": "user", "content": text}]
            return list(self._inner.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        return [*self._begin, *self._spelt(text)] or [self.separator]

    def answer(self, text: str) -> list[int]:
        """The ids of a demonstration, with its end."""
        return [*self._spelt(text), self.separator]

    def completion(self, ids: list[int]) -> str:
        """The text of a completion, without the token that ended it."""
        return self.vocabulary.decode(ids)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids (int32) of each text, without special tokens."""
        return [np.asarray(self._spelt(text), np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """``completion``."""
        return self.vocabulary.decode(ids)

    def save(self, folder: Path) -> None:
        """As a Hugging Face tokenizer."""
        self.vocabulary.save(folder)

    def _spelt(self, text: str) -> list[int]:
        try:
            return self.vocabulary.encode(text)
        except ValueError as error:
            raise TrainError(f"tokenizer: {error}") from error
