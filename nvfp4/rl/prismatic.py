"""Prismatic Synthesis: grow a set of problems where it is sparse, as a model's gradients see it.

arXiv 2505.20161, one round:

    pool      [N, D] directions of gradients, clustered by spherical k-means
    draw      new candidates, those that are known left out, their directions [M, D]
    keep      the candidates whose nearest centre is that of a cluster with few members
    join      what was kept belongs to the pool of the next round

until ``keep`` problems are kept or ``rounds`` are over. The paper's new problems are written by a
language model from examples of sparse clusters, and a majority of its answers is taken for the
right one; here they are drawn from any task, whose answers are right, so nothing has to be
generated or voted on. Ours: the number of clusters and what counts as sparse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4.numerics.rng import CANDIDATE_BRANCH, fold_in
from nvfp4.rl.gvendi import GradientOptions, draw_problems, features_of, g_vendi
from nvfp4.rl.tasks.base import Problem
from nvfp4.run.errors import TrainError
from nvfp4.run.files import write_text

_ITERATIONS = 50


@dataclass(frozen=True, kw_only=True)
class PrismaticConfig(GradientOptions):
    """Grow a set of problems where it is sparse."""

    pool: str
    """Task of the problems that are there: what --task of nvfp4 rl takes."""
    candidates: str
    """Task that new problems are drawn from."""
    out: str
    """File of the kept problems, one JSON object per line, as --task takes it."""
    count: int = 128
    """Problems of the pool."""
    keep: int = 64
    """New problems that are wanted."""
    draw: int = 128
    """Candidates of a round."""
    rounds: int = 8
    """Rounds at most."""
    clusters: int = 16
    """Clusters of the set in each round."""
    sparse_share: float = 0.5
    """Share of the clusters, those with the fewest members, whose candidates are kept."""
    seed: int = 0
    """Seed of the problems, the projection and the clusters."""


@dataclass(frozen=True)
class Grown:
    """What came of it.

    kept: problems. before, after: G-Vendi of the pool, and of pool and kept ones. at_random: of the
    pool with as many of the candidates as they came.
    """

    kept: list[Problem]
    before: float
    after: float
    at_random: float


def grow(config: PrismaticConfig) -> Grown:
    """Do the rounds; ``TrainError`` for what does not load, or if nothing new is sparse."""
    _check(config)
    model, text = config.load()

    def directions(name: str, problems: Sequence[Problem]) -> torch.Tensor:
        """Gradients of length 1, float64 [len(problems), D]."""
        rows = features_of(name, problems, model, text, config.seed, config.dimensions)
        return torch.nn.functional.normalize(rows.double(), dim=1)

    pool = draw_problems(config.pool, config.count, config.seed)
    rows = start = directions(config.pool, pool)
    known = {problem.prompt for problem in pool}
    kept: list[Problem] = []
    came: list[torch.Tensor] = []
    for number in range(config.rounds):
        # candidates that nobody has seen, each once
        seed = fold_in(config.seed, CANDIDATE_BRANCH, number)
        candidates = draw_problems(config.candidates, config.draw, seed)
        unknown = {p.prompt: p for p in candidates if p.prompt not in known}
        fresh = list(unknown.values())
        if not fresh:
            continue
        new = directions(config.candidates, fresh)
        came.append(new)

        # Only those that land where the set is thin; the set grows, so clusters are made anew.
        cluster_seed = fold_in(config.seed, number)
        sparse = in_sparse(rows, new, config.clusters, config.sparse_share, cluster_seed)
        joining = sparse[: config.keep - len(kept)]
        kept += [fresh[i] for i in joining]
        known |= {fresh[i].prompt for i in joining}
        rows = torch.cat((rows, new[joining]))
        if len(kept) == config.keep:
            break

    if not kept:
        tried = f"{config.rounds} rounds of {config.draw}"
        raise TrainError(f"candidates: none of {tried} is new and in a sparse cluster")
    plain = torch.cat((start, torch.cat(came)[: len(kept)]))
    return Grown(kept, g_vendi(start), g_vendi(rows), g_vendi(plain))


def report(config: PrismaticConfig) -> Grown:
    """Grow, write the kept problems, print the figures."""
    grown = grow(config)
    lines = []
    for problem in grown.kept:
        row = {"prompt": problem.prompt, "answer": problem.answer}
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text(Path(config.out), "".join(f"{line}\n" for line in lines))

    print(f"kept {len(grown.kept)} problems in {config.out}")
    with_them = f"{grown.after:.2f} with them, {grown.at_random:.2f} with any as many"
    print(f"G-Vendi {grown.before:.2f} of the pool, {with_them}")
    return grown


def in_sparse(
    pool: torch.Tensor,
    new: torch.Tensor,
    clusters: int,
    share: float,
    seed: int,
) -> list[int]:
    """Which rows of ``new`` [M, D] fall into the ``share`` of the clusters with the fewest members.

    pool: [N, D], which is clustered by k-means; all rows of length 1. Among clusters of equal size
    the earlier ones count as sparser.
    """
    centres, member = kmeans(pool, min(clusters, len(pool)), seed)
    sizes = torch.bincount(member, minlength=len(centres))  # [clusters]
    count = max(1, round(share * len(centres)))
    fewest = torch.argsort(sizes, stable=True)[:count]
    nearest = (new @ centres.T).argmax(dim=1)  # [M]
    return torch.isin(nearest, fewest).nonzero().flatten().tolist()


def kmeans(rows: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spherical k-means: centres of length 1 [count, D], and the cluster of each row [N].

    rows: of length 1, [N, D]. The first centre is drawn, each further one is the row that is
    farthest from all before it. A cluster that loses all of its rows keeps its centre.
    """
    rows = rows.double()

    # Farthest-first: centres that begin far apart do not share a dense region.
    generator = torch.Generator().manual_seed(seed >> 1)
    first = int(torch.randint(len(rows), (1,), generator=generator))
    starts = [first]
    nearest = rows @ rows[first]  # [N], cosine to the nearest centre so far
    for _ in range(count - 1):
        starts.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, rows @ rows[starts[-1]])

    # centres to means, rows to centres, until no row moves
    centres = rows[starts].clone()  # [count, D]
    member = (rows @ centres.T).argmax(dim=1)
    for _ in range(_ITERATIONS):
        sums = torch.zeros_like(centres).index_add(0, member, rows)  # [count, D]
        lengths = sums.norm(dim=1, keepdim=True)
        centres = torch.where(lengths > 0, sums / lengths.clamp(min=1e-300), centres)
        again = (rows @ centres.T).argmax(dim=1)
        if torch.equal(again, member):
            break
        member = again
    return centres, member


def _check(config: PrismaticConfig) -> None:
    for name in ("count", "keep", "draw", "rounds", "clusters"):
        value = getattr(config, name)
        if value < 1:
            raise TrainError(f"{name}: expected at least 1, got {value}")
    if not 0 < config.sparse_share <= 1:
        raise TrainError(f"sparse_share: expected above 0 and at most 1, got {config.sparse_share}")
