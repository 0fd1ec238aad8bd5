"""Batches as a pure function of (seed, step), and the held-out windows.

    tokens [n] -> count = (n - seq_len) div seq_len windows of seq_len + 1 tokens; one begins every
                  seq_len tokens, the first at the epoch's own offset in [0, seq_len)
    epoch e    -> a permutation of the windows, by sorting Philox words of (seed, e)
    step s     -> windows s * batch ... (s + 1) * batch - 1 of that order
               -> int64 [batch, seq_len + 1]

Each window has one token more than it trains on: columns 0 to seq_len - 1 are inputs, columns
1 to seq_len their targets. The offset moves the cuts, so no token is the first of its window in
every epoch, where it would have no context.

There is no state: resuming needs the number of the step alone, and any number of processes deals
the same windows out. Held-out text is cut into windows once; every token of it is a target once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from nvfp4.numerics.rng import ORDER_STREAM, fold_in, philox
from nvfp4.run.corpus import Document
from nvfp4.run.errors import TrainError
from nvfp4.run.tokens import Tokenizer, pack

IGNORED = -100  # target that no loss counts; the default of torch.nn.functional.cross_entropy
MAX_DOCUMENT_SHARE = 16
"""One document fills at most 1/16 of a short evaluation, so that it is not one file's loss."""


@lru_cache(maxsize=2)
def shuffle(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of range(count), int64, by sorting Philox words.

    The same on every machine and with every version of a library, as no library's shuffle promises.
    """
    # 63 bits per window as the key to sort by; ties, if there are any, keep their order
    high, low, _, _ = philox(fold_in(seed, epoch), torch.arange(count), ORDER_STREAM)
    return torch.argsort((high >> 1) << 32 | low, stable=True).numpy()


class TrainWindows:
    """Windows of ``seq_len + 1`` tokens in shuffled order; each epoch has its own order and offset.

    tokens: int [n]. Sequence s of the run (s = step * batch + row) is window ``s mod count`` of
    epoch ``s div count``. ``TrainError`` if the text is too short for one window.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch: int, seed: int) -> None:
        self.tokens, self.seq_len, self.batch, self.seed = tokens, seq_len, batch, seed
        self.count = (len(tokens) - seq_len) // seq_len  # whole windows at any offset below seq_len
        if self.count < 1:
            raise TrainError(
                f"seq_len: training needs at least {2 * seq_len} tokens for sequences of "
                f"{seq_len}, the text has "
                f"{len(tokens)}; lower --seq-len or give more --data"
            )

    def starts(self, step: int) -> np.ndarray:
        """Where in the tokens each sequence of a step begins, int64 [batch].

        A pure function of (seed, step).
        """
        sequences = np.arange(step * self.batch, (step + 1) * self.batch)
        starts = np.empty(self.batch, np.int64)

        # A batch may straddle the end of an epoch, so each part of it is looked up in its own.
        for epoch in np.unique(sequences // self.count):
            here = sequences // self.count == epoch
            offset = fold_in(self.seed, int(epoch), self.count) % self.seq_len
            starts[here] = (
                shuffle(self.seed, int(epoch), self.count)[sequences[here] % self.count]
                * self.seq_len
                + offset
            )
        return starts

    def batch_at(self, step: int) -> torch.Tensor:
        """The sequences of a step with their next tokens, int64 [batch, seq_len + 1]."""
        rows = self.starts(step)[:, None] + np.arange(self.seq_len + 1)  # [batch, seq_len + 1]
        return torch.from_numpy(self.tokens[rows].astype(np.int64))


@dataclass(frozen=True)
class HeldOut:
    """Held-out text ready to be scored: inputs and targets int64 [windows, seq_len].

    Every token of the text is a target exactly once. The separators between documents are inputs
    but no targets (``IGNORED``), as is padding: only text is scored, and only text is counted in
    ``size``, its bytes in UTF-8.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    size: int

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int((self.targets != IGNORED).sum())


def held_out_windows(
    documents: list[Document], tokenizer: Tokenizer, seq_len: int, limit: int
) -> HeldOut:
    """Windows over the first ``limit`` bytes (0: all) of held-out documents.

    With a limit each document gives at most a sixteenth of it (more if there are fewer than 16),
    cut at a character.
    """
    scored = documents if limit == 0 else _excerpts(documents, limit)
    size = sum(document.size for document in scored)

    # Each token is predicted from those before it: the token at place p of the stream is target
    # p - 1. Separators are not scored; the first one is no target anyway.
    tokens, separators = pack(scored, tokenizer)
    stream = torch.from_numpy(tokens.astype(np.int64))
    inputs, targets = stream[:-1], stream[1:].clone()
    targets[separators[1:] - 1] = IGNORED

    # Padding of the last window is ignored too.
    short = -len(inputs) % seq_len
    inputs = torch.nn.functional.pad(inputs, (0, short), value=tokenizer.separator)
    targets = torch.nn.functional.pad(targets, (0, short), value=IGNORED)
    return HeldOut(inputs.view(-1, seq_len), targets.view(-1, seq_len), size)


def _excerpts(documents: list[Document], limit: int) -> list[Document]:
    # The most bytes of one document; rounded up, so that all shares together reach the limit.
    share = -(-limit // min(len(documents), MAX_DOCUMENT_SHARE))

    # In the order of their draw, until the limit is used up.
    excerpts, left = [], limit
    for document in documents:
        # drops a split character
        text = document.text.encode()[: min(share, left)].decode("utf-8", errors="ignore")
        if text:
            excerpts.append(Document(document.name, text))
            left -= len(text.encode())
        if left <= 0:
            break
    return excerpts
