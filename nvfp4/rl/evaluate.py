"""pass@k on problems that training never sees, from samples and from the most likely completion."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from nvfp4.rl.collect import completions, rewards
from nvfp4.rl.rollout import Sampling, rollout
from nvfp4.rl.setup import Run
from nvfp4.rl.statistics import average, distinct_correct, pass_rates
from nvfp4.rng import fold_in
from nvfp4.weights import fixed_weights

_SEED = fold_in(0, 21)  # not the run's: all runs of a task are measured on the same problems with the same draws
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
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    problems = run.task.problems(config.eval_problems, _SEED, held_out=True)
    numbers = list(range(rank, len(problems), world))
    sampled = Sampling(config.max_new_tokens, config.eval_temperature or config.temperature)
    if config.eval_temperature is None:
        assert config.top_k is not None
        assert config.top_p is not None
        sampled = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    mine = [_drawn(run, problems, numbers, config.eval_samples, sampled)]
    mine += [_drawn(run, problems, numbers, 1, Sampling(config.max_new_tokens, 0.0))]
    parts = [mine] if world == 1 else gather_object([mine])
    order = np.argsort(np.concatenate([np.arange(r, len(problems), world) for r in range(world)]))
    drawn, greedy = ({key: np.concatenate([p[i][key] for p in parts])[order] for key in parts[0][i]} for i in (0, 1))
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
    shown = [
        {"prompt": problem.prompt, "answer": problem.answer, "completion": str(texts[0]), "reward": float(found[0])}
        for problem, texts, found in zip(problems[:SHOWN], drawn["text"], drawn["reward"], strict=False)
    ]
    return row, shown


def _drawn(run: Run, problems: list[Any], numbers: list[int], size: int, sampling: Sampling) -> dict[str, np.ndarray]:
    """reward, text, length and truncated, each [problems of this process, size]."""
    prompts = [run.text.prompt(problems[number].prompt) for number in numbers]
    with torch.no_grad(), fixed_weights(run.model), run.autocast():
        rows = run.config.rollout_rows or _ROWS
        samples = rollout(run.model, prompts, numbers, size, sampling, run.stops, _SEED, rows)
    texts = completions(run, samples)
    found, _ = rewards(run, [problems[number] for number in numbers for _ in range(size)], texts, samples.ids.device)
    return {
        "reward": found.cpu().numpy().reshape(-1, size),
        "text": np.array(texts, dtype=object).reshape(-1, size),
        "length": samples.lengths.cpu().numpy().reshape(-1, size),
        "truncated": samples.truncated.cpu().numpy().reshape(-1, size),
    }
