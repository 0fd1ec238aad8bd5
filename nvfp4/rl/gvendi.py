"""G-Vendi: how many different things examples would teach a model, by its gradients' directions.

Prismatic Synthesis (arXiv 2505.20161). For each example, the gradient of log P(answer | prompt):

    g_i [P]  --random projection-->  [D]  --length 1-->  rows of G [n, D]
    G-Vendi = exp(entropy of the eigenvalues of G G^T / n)

From 1 (all gradients alike) to n (all orthogonal).

The random matrix has P x 1024 signs, 64 GB as bits for a model of half a billion parameters, and
making them anew for each example would take longer than its gradient. So a sign is a product of
three:

    sign of the parameter                      P of them
    sign of (parameter mod 8192, dimension)    one table, 32 MiB, used again and again
    sign of (parameter div 8192, dimension)    P / 8192 x D

Any two signs are independent, and so are the products that the variance of a scalar product is made
of: it is that of a full matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nvfp4.numerics.rng import PARAMETER_STREAM, PIECE_STREAM, TABLE_STREAM, check_seed, philox
from nvfp4.rl.tasks.base import Problem
from nvfp4.rl.tasks.registry import load_task
from nvfp4.rl.vocabulary import Text, load_vocabulary
from nvfp4.run.errors import TrainError
from nvfp4.run.files import write_json

DIMENSIONS = 1024

Device = Literal["auto", "cpu", "cuda", "mps"]

_SIGNS_PER_COUNTER = 128
_ROWS = 2**13  # of the table of signs, and parameters of a piece: 32 MiB at 1024 dimensions
_TOGETHER = 2**7  # pieces projected at a time
_HELD = 2**28  # bytes of gradients held between two projections


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """Whose gradients are looked at, of which text, and how they are projected."""

    model: str
    """Folder of a local Hugging Face causal LM, e.g. the export/ or base/ of a run."""
    seed: int = 0
    """Seed of the problems and of the projection."""
    dimensions: int = DIMENSIONS
    """Of the projected gradients, a multiple of 128."""
    vocabulary: str | None = None
    """symbols, bytes, or the folder of a tokenizer; None: the model's own."""
    chat: bool = False
    """Put prompts through the tokenizer's chat template."""
    device: Device = "auto"
    """Device of model and gradients; auto: the first accelerator, else the CPU."""

    def load(self) -> tuple[Any, Text]:
        """The model on its device, and its texts; ``TrainError`` if something is not there."""
        model = load_on(self.model, self.device)
        return model, Text(load_vocabulary(self.vocabulary or self.model), self.chat)


@dataclass(frozen=True, kw_only=True)
class GVendiConfig(GradientOptions):
    """Measure how diverse the problems of tasks are, as a model sees them, before training."""

    tasks: tuple[str, ...]
    """Names, .jsonl files or classes, as --task of nvfp4 rl takes them; each is measured, and all
    together."""
    count: int = 128
    """Problems of each task."""
    out: str | None = None
    """Keep the figures in this JSON file."""


def measure(config: GVendiConfig) -> dict[str, float]:
    """G-Vendi of ``count`` problems of each task, by name, and of all together ("all", if several).

    ``TrainError`` for what does not load, and for tasks without answers: their gradients would say
    nothing.
    """
    if not config.tasks or config.count < 1:
        got = f"{config.tasks} and {config.count}"
        raise TrainError(f"tasks, count: expected at least one of each, got {got}")
    model, text = config.load()

    # each task by itself, then all together
    features = {}
    for name in dict.fromkeys(config.tasks):
        problems = draw_problems(name, config.count, config.seed)
        features[name] = features_of(name, problems, model, text, config.seed, config.dimensions)
    values = {name: g_vendi(rows) for name, rows in features.items()}
    if len(values) > 1:
        values["all"] = g_vendi(torch.cat(list(features.values())))
    return values


def report(config: GVendiConfig) -> dict[str, float]:
    """``measure``, with a line printed for each figure, and a file if ``out`` is given."""
    values = measure(config)
    for name, value in values.items():
        count = config.count * (len(values) - 1 if name == "all" else 1)
        print(f"G-Vendi {value:8.2f} of at most {min(count, config.dimensions)}   {name}")
    if config.out is not None:
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
        write_json(Path(config.out), {"g_vendi": values, "config": fields})
    return values


def load_on(folder: str, device: Device) -> Any:
    """The causal LM of a folder on a device; ``TrainError`` if either is not there."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = next(name for name in here if here[name]) if device == "auto" else device
    if not here[kind]:
        raise TrainError(f"device: {kind} was asked for and is not here; give --device auto")

    from nvfp4.run.model import load_model  # --help needs no library of models

    model: torch.nn.Module = load_model(folder)
    return model.to(kind)


def draw_problems(name: str, count: int, seed: int) -> list[Problem]:
    """Problems of a task that all have an answer to take a gradient of, else ``TrainError``."""
    task = load_task(name)
    try:
        problems = task.problems(count, seed)
    except ValueError as error:
        raise TrainError(f"task {name}: {error}") from error
    finally:
        task.close()
    bare = next((problem for problem in problems if not problem.answer), None)
    if bare is not None:
        prompt = bare.prompt[:40]
        raise TrainError(f"task {name}: the problem {prompt!r} has no answer to take a gradient of")
    return problems


def features_of(
    name: str,
    problems: Sequence[Problem],
    model: Any,
    text: Text,
    seed: int,
    dimensions: int,
) -> torch.Tensor:
    """``gradient_features`` of problems, on the CPU; ``TrainError`` with the task's name."""
    examples = [(text.prompt(each.prompt), text.answer(each.answer)) for each in problems]
    try:
        features = gradient_features(model, examples, seed=seed, dimensions=dimensions).cpu()
        g_vendi(features)  # refuses gradients without a direction
    except ValueError as error:
        raise TrainError(f"task {name}: {error}") from error
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise TrainError(f"out of memory: {first}; give --device cpu") from error
    return features


def gradient_features(
    model: Any,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    seed: int = 0,
    dimensions: int | None = DIMENSIONS,
) -> torch.Tensor:
    """Projected gradients of log P(answer | prompt), float32 [n, dimensions].

    model: a causal LM of transformers; its parameters that require gradients are the P, their
    ``grad`` is not touched. examples: (prompt ids, answer ids), neither empty. dimensions: None for
    unprojected gradients, [n, P]. The features are a function of the seed, in [0, 2^64). ValueError
    for empty examples and for dimensions that are no multiple of 128.

    The time is n backward passes and 2 n P dimensions operations, all on the model's device.
    """
    if not examples:
        raise ValueError("examples must be at least one")
    if dimensions is not None and (dimensions < 1 or dimensions % _SIGNS_PER_COUNTER):
        raise ValueError(f"dimensions must be a multiple of {_SIGNS_PER_COUNTER}, got {dimensions}")
    check_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    project = None
    if dimensions is not None:
        project = Projection(seed, dimensions, parameters[0].device)

    # as many gradients at a time as memory is to hold, then one projection of them all
    training = model.training
    model.eval()  # dropout would make directions of its own
    features = []
    try:
        held = max(1, _HELD // (4 * size))
        for start in range(0, len(examples), held):
            part = examples[start : start + held]
            gradients = torch.stack([_gradient(model, parameters, *each) for each in part])
            features.append(gradients if project is None else project(gradients))
    finally:
        model.train(training)
    return torch.cat(features)


class Projection:
    """float32 [n, P] times a matrix of P x ``dimensions`` random signs, by sqrt(dimensions).

    A function of (seed, parameter, dimension), whatever the pieces and the device. Scalar products
    keep their means, and those of unit vectors get errors of about 1/sqrt(dimensions).
    """

    def __init__(
        self,
        seed: int,
        dimensions: int = DIMENSIONS,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed, self.dimensions, self.device = seed, dimensions, device
        table = _signs(seed, TABLE_STREAM, 0, _ROWS * dimensions, device)
        self.table = table.view(_ROWS, dimensions)

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """float32 [n, dimensions]; vectors: [n, P] on the device of the projection."""
        count, size = vectors.shape
        out = torch.zeros(count, self.dimensions, device=self.device)
        step = _TOGETHER * _ROWS
        for start in range(0, size, step):
            stop = min(start + step, size)
            pieces = -(-(stop - start) // _ROWS)

            # sign of the parameter, times the table, times the sign of the piece
            flipped = torch.zeros(count, pieces * _ROWS, device=self.device)
            signs = self.of_parameters(start, stop)
            flipped[:, : stop - start] = vectors[:, start:stop].float() * signs
            products = flipped.view(count, pieces, _ROWS) @ self.table  # [n, pieces, D]
            first = start // _ROWS
            out += (products * self.of_pieces(first, first + pieces)).sum(dim=1)
        return out / self.dimensions**0.5

    def of_parameters(self, start: int, stop: int) -> torch.Tensor:
        """One sign for each parameter from ``start``, a multiple of 128, to ``stop``."""
        return _signs(self.seed, PARAMETER_STREAM, start, stop, self.device)

    def of_pieces(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, dimensions]."""
        first, last = start * self.dimensions, stop * self.dimensions
        signs = _signs(self.seed, PIECE_STREAM, first, last, self.device)
        return signs.view(stop - start, self.dimensions)


def _signs(
    seed: int,
    stream: int,
    start: int,
    stop: int,
    device: torch.device | str,
) -> torch.Tensor:
    """+1 or -1, float32 [stop - start]; start: a multiple of 128.

    Sign i is bit b of word w of Philox counter i div 128 of the stream, with 32 w + b the
    remainder.
    """
    first, last = start // _SIGNS_PER_COUNTER, -(-stop // _SIGNS_PER_COUNTER)
    counters = torch.arange(first, last, device=device)
    words = torch.stack(philox(seed, counters, stream), dim=-1)

    # the eight signs of each possible byte, lowest bit first, looked up by the bytes of the words
    places = torch.arange(8, device=device)
    byte = torch.arange(256, device=device)
    table = 1.0 - 2.0 * ((byte[:, None] >> places) & 1).float()
    pieces = (words[..., None] >> (8 * torch.arange(4, device=device))) & 0xFF
    return table[pieces].flatten()[: stop - start]


def g_vendi(features: torch.Tensor) -> float:
    """exp of the entropy of the eigenvalues of G G^T / n, G the normalised rows of ``features``.

    features: [n, D]. A number from 1 to min(n, D), independent of the order and the lengths of the
    rows. Raises ValueError for rows that are zero, which have no direction, or not finite.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must be [n, D] with n at least 1, got {tuple(features.shape)}")
    rows = features.double()
    lengths = rows.norm(dim=1)
    bad = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
    if bad:
        which = f"{len(bad)} gradients are zero or not finite, first that of example {bad[0]}"
        raise ValueError(f"{which}: leave them out")
    rows = rows / lengths[:, None]  # G, [n, D]

    # the smaller of the two Gram matrices: both have the same eigenvalues apart from zeros
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    eigenvalues = torch.linalg.eigvalsh(gram / len(rows)).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum()
    return float(torch.special.entr(shares).sum().exp())


def _gradient(
    model: Any,
    parameters: list[torch.Tensor],
    prompt: Sequence[int],
    answer: Sequence[int],
) -> torch.Tensor:
    """float32 [P] of one example; a parameter that the loss does not reach has zeros."""
    if not prompt or not answer:
        raise ValueError("an example needs a prompt and an answer of at least one token each")
    ids = torch.tensor([[*prompt, *answer]], device=parameters[0].device)
    with torch.enable_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()  # [answer, V]
        logprobs = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])  # [answer, 1]
        gradients = torch.autograd.grad(logprobs.sum(), parameters, allow_unused=True)
    pieces = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        pieces.append((torch.zeros_like(parameter) if gradient is None else gradient).float())
    return torch.cat([piece.flatten() for piece in pieces])
