"""pass@k on problems that training never sees, from samples and from the most likely completion.

All evaluations of a run are made alike, before, during and after it:

* the same problems and the same random numbers, whatever the seed of the run;
* at ``--eval-temperature``, else as in training;
* with the longest limit that any stage of the objective has, since a policy that has learnt to
  write long answers is not to be cut where it began. Temperature and limit are both in the row.

Problems are dealt out to processes in blocks that do not depend on how many processes there are: in
recipes with one scale per activation tensor, the rows of a forward decide about each other's codes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nvfp4.model.weights import fixed_weights
from nvfp4.numerics.rng import EVALUATION_BRANCH, fold_in
from nvfp4.rl.parts import RLRun, all_failed
from nvfp4.rl.rollout import Sampling, rollout
from nvfp4.rl.statistics import average, distinct_correct, pass_rates
from nvfp4.rl.tasks.base import Problem
from nvfp4.run.errors import TrainError
from nvfp4.run.processes import gather_objects, stop_together

_SEED = fold_in(0, EVALUATION_BRANCH)  # not the run's: all runs see the same problems and draws
_ROWS = 512  # completions drawn at a time where the config leaves it open
SHOWN = 8  # completions kept for people


@dataclass(frozen=True)
class _Drawn:
    """Completions of problems, each field [problems, size]; and why rewards failed."""

    reward: np.ndarray
    text: np.ndarray
    length: np.ndarray
    truncated: np.ndarray
    failed: Counter[str]


def evaluate(run: RLRun) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures under "eval/", and a few completions.

    Figures: pass@k with the ends of its 95 % interval over problems, greedy, reward, distinct
    correct answers of a problem's samples, length, truncated. A completion is correct with a reward
    of 1. Every process draws for some of the problems and gets all figures. ``TrainError`` if every
    reward failed.
    """
    # from samples, and from the most likely completion
    config = run.config
    problems = run.task.problems(config.eval_problems, _SEED, held_out=True)
    sampling = _sampling(run)
    length = sampling.max_new_tokens

    # Greedy completions beside the sampled ones: what the model would answer if asked once.
    drawn = _draw(run, problems, config.eval_samples, sampling)
    greedy = _draw(run, problems, 1, Sampling(length, 0.0))
    if drawn.failed.total() >= len(problems) * config.eval_samples:
        raise TrainError(f"evaluation: {all_failed(drawn.failed, drawn.failed.total())}")

    # pass@1, 2, 4, ... with the ends of their intervals
    correct = drawn.reward >= 1
    powers = [2**i for i in range(20)]
    rates = pass_rates(correct, [k for k in powers if k <= config.eval_samples])
    row: dict[str, float] = {}
    for k, estimate in rates.items():
        row[f"eval/pass@{k}"] = estimate.mean
        row[f"eval/pass@{k}/low"] = estimate.low
        row[f"eval/pass@{k}/high"] = estimate.high
    row |= {
        "eval/greedy": float((greedy.reward >= 1).mean()),
        "eval/reward": average(drawn.reward).mean,
        "eval/distinct_correct": distinct_correct(drawn.text.tolist(), correct).mean,
        "eval/mean_length": float(drawn.length.mean()),
        "eval/truncated": float(drawn.truncated.mean()),
        "eval/failed": float(drawn.failed.total()),
        "eval/temperature": sampling.temperature,
        "eval/max_new_tokens": length,
    }

    # the first completion of the first problems, for people
    first = zip(problems[:SHOWN], drawn.text[:, 0], drawn.reward[:, 0], strict=False)
    shown = [
        {
            "prompt": problem.prompt,
            "answer": problem.answer,
            "completion": str(text),
            "reward": float(reward),
        }
        for problem, text, reward in first
    ]
    return row, shown


def _sampling(run: RLRun) -> Sampling:
    """How the completions of an evaluation are drawn."""
    drawn, temperature = run.configured, run.config.eval_temperature
    length = run.objective.longest_completion(drawn.max_new_tokens)
    if temperature is not None:
        return Sampling(length, temperature)
    return replace(drawn, max_new_tokens=length)


def _draw(run: RLRun, problems: list[Problem], size: int, sampling: Sampling) -> _Drawn:
    """``size`` completions of each problem, of all processes.

    Prompts of like length are drawn together, ``rollout_rows`` completions (or 512) at a time.
    """
    # whole problems to a block, the same blocks for any number of processes
    rows = run.config.rollout_rows or _ROWS
    prompts = [run.text.prompt(problem.prompt) for problem in problems]
    order = sorted(range(len(problems)), key=lambda number: len(prompts[number]))
    block = max(1, rows // size)
    blocks = [order[start : start + block] for start in range(0, len(order), block)]

    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    mine = []
    with stop_together(run.accelerator):
        for numbers in blocks[rank::world]:
            drawn = _draw_block(run, problems, prompts, numbers, size, sampling, rows)
            mine.append((numbers, drawn))
    every = gather_objects(run.accelerator, mine)

    # back into the order of the problems
    places = np.argsort(np.concatenate([numbers for numbers, _ in every]))
    return _Drawn(
        reward=np.concatenate([drawn.reward for _, drawn in every])[places],
        text=np.concatenate([drawn.text for _, drawn in every])[places],
        length=np.concatenate([drawn.length for _, drawn in every])[places],
        truncated=np.concatenate([drawn.truncated for _, drawn in every])[places],
        failed=sum((drawn.failed for _, drawn in every), Counter()),
    )


def _draw_block(
    run: RLRun,
    problems: list[Problem],
    prompts: list[list[int]],
    numbers: list[int],
    size: int,
    sampling: Sampling,
    rows: int,
) -> _Drawn:
    """The completions of some problems, by their numbers."""
    # the number of a problem decides its random numbers, whoever draws it
    block_prompts = [prompts[number] for number in numbers]
    with torch.no_grad(), fixed_weights(run.model), run.autocast():
        samples = rollout(run.model, block_prompts, numbers, size, sampling, run.stops, _SEED, rows)

    # As in training: texts without their end, then the task's verdicts.
    texts = run.completions(samples)
    each = [problems[number] for number in numbers for _ in range(size)]
    values, reasons = run.rewards(each, texts, samples.ids.device)
    return _Drawn(
        reward=values.cpu().numpy().reshape(-1, size),
        text=np.array(texts, dtype=object).reshape(-1, size),
        length=samples.lengths.cpu().numpy().reshape(-1, size),
        truncated=samples.truncated.cpu().numpy().reshape(-1, size),
        failed=Counter(reason for reason in reasons if reason is not None),
    )
