"""pass@k on problems that training never sees, from samples and from the most likely completion.

All evaluations of a run are made alike, before, during and after it: at --eval-temperature (else that of
sampling) and with the longest limit that any stage of the objective has, since a policy that has learnt to
write long answers is not to be cut where it began. Both are in the row. Problems are dealt out to processes
in blocks that do not depend on how many processes there are: in recipes with one scale per activation tensor,
the rows of a forward decide about each other's codes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from nvfp4.model.weights import fixed_weights
from nvfp4.numerics.rng import EVALUATION_BRANCH, fold_in
from nvfp4.rl.collect import all_failed, completions, rewards
from nvfp4.rl.rollout import Sampling, rollout
from nvfp4.rl.setup import Run
from nvfp4.rl.statistics import average, distinct_correct, pass_rates
from nvfp4.rl.tasks.base import Problem
from nvfp4.run.errors import TrainError

_SEED = fold_in(0, EVALUATION_BRANCH)  # not the run's: all runs are measured on the same problems
_ROWS = 512  # completions drawn at a time where the config leaves it open
SHOWN = 8  # completions kept for people


def evaluate(run: Run) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures under "eval/": pass@k with the ends of its 95 % interval over problems, greedy, reward, distinct correct
    answers of a problem's samples, length, truncated; and a few completions.

    A completion is correct with a reward of 1. Every process draws for some of the problems and gets all figures.
    """
    config = run.config
    assert config.temperature is not None
    assert config.max_new_tokens is not None
    length = run.objective.longest_completion(config.max_new_tokens)
    problems = run.task.problems(config.eval_problems, _SEED, held_out=True)
    sampled = Sampling(length, config.eval_temperature or config.temperature)
    if config.eval_temperature is None:
        assert config.top_k is not None
        assert config.top_p is not None
        sampled = Sampling(length, config.temperature, config.top_k, config.top_p)
    drawn, failed = _drawn(run, problems, config.eval_samples, sampled)
    greedy, _ = _drawn(run, problems, 1, Sampling(length, 0.0))
    if failed.total() >= len(problems) * config.eval_samples:
        raise TrainError(f"evaluation: {all_failed(failed, failed.total())}")
    correct = drawn["reward"] >= 1
    ks = [k for k in (2**i for i in range(20)) if k <= config.eval_samples]
    row: dict[str, float] = {}
    for k, estimate in pass_rates(correct, ks).items():
        row |= {
            f"eval/pass@{k}": estimate.mean,
            f"eval/pass@{k}/low": estimate.low,
            f"eval/pass@{k}/high": estimate.high,
        }
    row["eval/greedy"] = float((greedy["reward"] >= 1).mean())
    row["eval/reward"] = average(drawn["reward"]).mean
    row["eval/distinct_correct"] = distinct_correct(drawn["text"].tolist(), correct).mean
    row["eval/mean_length"], row["eval/truncated"] = float(drawn["length"].mean()), float(drawn["truncated"].mean())
    row |= {
        "eval/failed": float(failed.total()),
        "eval/temperature": sampled.temperature,
        "eval/max_new_tokens": length,
    }
    shown = [
        {"prompt": problem.prompt, "answer": problem.answer, "completion": str(texts[0]), "reward": float(found[0])}
        for problem, texts, found in zip(problems[:SHOWN], drawn["text"], drawn["reward"], strict=False)
    ]
    return row, shown


def _drawn(
    run: Run, problems: list[Problem], size: int, sampling: Sampling
) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """reward, text, length and truncated of all processes, each [problems, size]; and why rewards failed.

    Prompts of like length are drawn together, ``rollout_rows`` completions (or 512) at a time.
    """
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    rows = run.config.rollout_rows or _ROWS
    prompts = [run.text.prompt(problem.prompt) for problem in problems]
    order = sorted(range(len(problems)), key=lambda number: len(prompts[number]))
    block = max(1, rows // size)
    blocks = [order[start : start + block] for start in range(0, len(order), block)]
    mine = [_block(run, problems, prompts, numbers, size, sampling, rows) for numbers in blocks[rank::world]]
    every = mine if world == 1 else gather_object(mine)
    failed: Counter[str] = sum((reasons for *_, reasons in every), Counter())
    places = np.argsort(np.concatenate([numbers for numbers, *_ in every]))
    names = ("reward", "text", "length", "truncated")
    return {name: np.concatenate([found[name] for _, found, _ in every])[places] for name in names}, failed


def _block(
    run: Run,
    problems: list[Problem],
    prompts: list[list[int]],
    numbers: list[int],
    size: int,
    sampling: Sampling,
    rows: int,
) -> tuple[list[int], dict[str, np.ndarray], Counter[str]]:
    """The numbers of some problems, the figures of their completions, and why rewards failed."""
    with torch.no_grad(), fixed_weights(run.model), run.autocast():
        chosen = [prompts[number] for number in numbers]
        samples = rollout(run.model, chosen, numbers, size, sampling, run.stops, _SEED, rows)
    texts = completions(run, samples)
    each = [problems[number] for number in numbers for _ in range(size)]
    found, reasons = rewards(run, each, texts, samples.ids.device)
    figures = {
        "reward": found.cpu().numpy().reshape(-1, size),
        "text": np.array(texts, dtype=object).reshape(-1, size),
        "length": samples.lengths.cpu().numpy().reshape(-1, size),
        "truncated": samples.truncated.cpu().numpy().reshape(-1, size),
    }
    return numbers, figures, Counter(reason for reason in reasons if reason is not None)
