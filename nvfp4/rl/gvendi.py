"""G-Vendi: how many different things a set of examples would teach a model, by the directions of its gradients.

Prismatic Synthesis (arXiv 2505.20161): the gradient of log P(answer | prompt) for each example, projected at random,
normalised; exp of the Shannon entropy of the eigenvalues of G G^T / n. From 1 (all alike) to n (all orthogonal).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nvfp4.rl.tasks.registry import load_task
from nvfp4.rl.tokens import load_vocabulary
from nvfp4.rng import check_seed, philox
from nvfp4.train.errors import TrainError

DIMENSIONS = 1024
SIGNS = 5  # a stream of Philox, after those of the quantisers and the one that orders documents

_SIGNS_PER_COUNTER = 128
_CHUNK = 2**13  # parameters projected at a time: 32 MiB of signs
_HELD = 2**28  # bytes of gradients held between two projections


@dataclass(frozen=True)
class GVendiConfig:
    """Measure the diversity of problems as a model sees them.

    model: folder of a causal LM. tasks: names, files or classes, as ``load_task`` takes them; the problems of all of
    them are measured together. vocabulary: "symbols", "bytes" or the folder of a tokenizer; by default the model's own.
    """

    model: str
    tasks: tuple[str, ...]
    count: int = 128
    seed: int = 0
    dimensions: int = DIMENSIONS
    vocabulary: str | None = None


def measure(config: GVendiConfig) -> float:
    """G-Vendi of ``count`` problems of each task; ``TrainError`` for what does not load."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(config.model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TrainError(f"model: {config.model} does not load: {str(error).splitlines()[0]}") from error
    vocabulary = load_vocabulary(config.vocabulary or config.model)
    examples = []
    for name in config.tasks:
        task = load_task(name)
        for problem in task.problems(config.count, config.seed):
            answer = [*vocabulary.encode(problem.answer), vocabulary.eos_id]
            examples.append((vocabulary.encode(problem.prompt), answer))
        task.close()
    return g_vendi(gradient_features(model, examples, seed=config.seed, dimensions=config.dimensions))


def gradient_features(
    model: Any,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    seed: int = 0,
    dimensions: int | None = DIMENSIONS,
) -> torch.Tensor:
    """Projected gradients of log P(answer | prompt), float32 [n, dimensions]; dimensions None: unprojected, [n, P].

    model: a causal LM of transformers; its parameters that require gradients are the P, their ``grad`` is not touched.
    examples: (prompt ids, answer ids), neither empty. The time is n backward passes and 2 n P dimensions operations;
    the P x dimensions matrix of signs exists only in pieces. The features are a function of the seed, in [0, 2^64).
    """
    if not examples:
        raise ValueError("examples must be at least one")
    if dimensions is not None and (dimensions < _SIGNS_PER_COUNTER or dimensions % _SIGNS_PER_COUNTER):
        raise ValueError(f"dimensions must be a multiple of {_SIGNS_PER_COUNTER}, got {dimensions}")
    check_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    training = model.training
    model.eval()  # dropout would make directions of its own
    features = []
    try:
        held = max(1, _HELD // (4 * size))
        for start in range(0, len(examples), held):
            gradients = torch.stack([_gradient(model, parameters, *e) for e in examples[start : start + held]])
            features.append(gradients if dimensions is None else project(gradients, seed, dimensions))
    finally:
        model.train(training)
    return torch.cat(features)


def project(vectors: torch.Tensor, seed: int, dimensions: int = DIMENSIONS) -> torch.Tensor:
    """float32 [n, P] times a matrix of P x dimensions random signs, by sqrt(dimensions); float32 [n, dimensions].

    Sign (p, d) is bit b of word w of Philox counter (p dimensions + d) div 128 in stream ``SIGNS``, with 32 w + b the
    remainder: a function of (seed, p, d), whatever the pieces. Scalar products keep their means, and those of unit
    vectors get errors of about 1/sqrt(dimensions).
    """
    out = torch.zeros(len(vectors), dimensions, device=vectors.device)
    for start in range(0, vectors.shape[1], _CHUNK):
        stop = min(start + _CHUNK, vectors.shape[1])
        out += vectors[:, start:stop].float() @ signs(seed, start, stop, dimensions, vectors.device)
    return out / dimensions**0.5


def signs(seed: int, start: int, stop: int, dimensions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Rows ``start`` to ``stop`` of the matrix of signs: +1 or -1, float32 [stop - start, dimensions]."""
    per_row = dimensions // _SIGNS_PER_COUNTER
    counters = torch.arange(start * per_row, stop * per_row, device=device)
    words = torch.stack(philox(seed, counters, SIGNS), dim=-1)
    places = torch.arange(8, device=device)
    byte = torch.arange(256, device=device)
    table = 1.0 - 2.0 * ((byte[:, None] >> places) & 1).float()  # the eight signs of each byte, lowest bit first
    pieces = (words[..., None] >> (8 * torch.arange(4, device=device))) & 0xFF
    return table[pieces].view(stop - start, dimensions)


def g_vendi(features: torch.Tensor) -> float:
    """exp of the entropy of the eigenvalues of K = G G^T / n, G the normalised rows of ``features`` [n, D].

    A number from 1 to min(n, D), independent of the order and the lengths of the rows. Raises ValueError for rows that
    are zero, which have no direction, or not finite.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be [n, D] with n at least 1, got {tuple(features.shape)}")
    rows = features.double()
    lengths = rows.norm(dim=1)
    bad = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{len(bad)} gradients are zero or not finite, first that of example {bad[0]}: leave them out")
    rows = rows / lengths[:, None]
    # the smaller of the two Gram matrices: both have the same eigenvalues apart from zeros
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    eigenvalues = torch.linalg.eigvalsh(gram / len(rows)).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum()
    return float(torch.special.entr(shares).sum().exp())


def _gradient(model: Any, parameters: list[torch.Tensor], prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """float32 [P] of one example."""
    if not prompt or not answer:
        raise ValueError("an example needs a prompt and an answer of at least one token each")
    device = parameters[0].device
    ids = torch.tensor([[*prompt, *answer]], device=device)
    with torch.enable_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
        found = torch.autograd.grad(chosen.sum(), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).float().flatten() for p, g in zip(parameters, found, strict=True)]
    )
