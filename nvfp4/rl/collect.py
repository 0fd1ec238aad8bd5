"""The completions of one step: problems, rollouts, rewards; groups that teach nothing are replaced, if asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object

from nvfp4.model.weights import fixed_weights
from nvfp4.numerics.rng import COIN_BRANCH, DRAW_BRANCH, NORM_NOISE_BRANCH, PROBLEM_BRANCH, fold_in
from nvfp4.rl.batches import join
from nvfp4.rl.norm_noise import noisy_norms, sigma_at
from nvfp4.rl.objectives.advantages import has_spread
from nvfp4.rl.rollout import Sampling, rollout
from nvfp4.rl.samples import RAW_REWARD, Samples
from nvfp4.rl.setup import Run
from nvfp4.rl.spurious import coins, formatted, popular
from nvfp4.rl.tasks.base import Problem
from nvfp4.run.errors import TrainError

TASK_REWARD = "task_reward"
"""Key of ``Samples.extra``: the verifier's word [S], whatever is maximised."""


@dataclass(frozen=True)
class Collected:
    """samples: this process's, in groups. problems, texts: of each sample. drawn: completions that were drawn for it,
    over all processes. zero_std: share of groups of equal rewards, before any were replaced. reasons: of each sample,
    why its reward is 0 for want of a proper one, else None. failures: how often each reason came in this process, with
    samples that were replaced."""

    samples: Samples
    problems: list[Problem]
    texts: list[str]
    sampling: Sampling
    drawn: int
    zero_std: float
    sigma: float
    reasons: list[str | None]
    failures: Counter[str]


def collect(run: Run, step: int) -> Collected:
    """Draw completions with the weights as they are, for step ``step`` (0 for the first).

    Everything random is a function of (seed, step) and of the prompt's place in the step, so processes draw what one
    alone would draw. ``TrainError`` if ``max_batches`` rounds do not yield enough groups that the objective keeps.
    """
    config, accelerator = run.config, run.accelerator
    assert config.group is not None
    wanted = config.prompts // accelerator.num_processes * config.group
    sampling = run.sampling()
    parts: list[Samples] = []
    problems: list[Problem] = []
    texts: list[str] = []
    reasons: list[str | None] = []
    failures: Counter[str] = Counter()
    sigma = sigma_at(step, config.steps, config.aqn_stages, config.aqn_start, config.aqn_end)
    flat = seen = drawn = 0
    while len(problems) < wanted and drawn < config.max_batches:
        batch = _batch(run, step, drawn, sigma, sampling)
        drawn += 1
        failures += batch.failures
        rewarded = batch.samples.rewards, batch.samples.groups
        flat, seen = flat + int((~has_spread(*rewarded)).sum()), seen + len(batch.samples)
        kept = run.objective.keep(batch.samples).nonzero()[:, 0][: wanted - len(problems)]
        shaped = replace(batch.samples, rewards=run.objective.shape_rewards(batch.samples))
        parts.append(shaped.select(kept))
        problems += [batch.problems[i] for i in kept.tolist()]
        texts += [batch.texts[i] for i in kept.tolist()]
        reasons += [batch.reasons[i] for i in kept.tolist()]
    if len(problems) < wanted and failures.total() >= seen:
        raise TrainError(f"step {step + 1}: {all_failed(failures, seen)}")
    if len(problems) < wanted:
        raise TrainError(
            f"step {step + 1}: {drawn} rounds of {config.prompts} prompts gave {len(problems)} of {wanted} completions "
            f"that {config.objective} keeps; raise --max-batches or --group, or choose easier or harder problems"
        )
    flat, seen = _of_all_processes(run, flat, seen, failures, step)
    samples = join([part for part in parts if len(part)], run.stops.pad)
    return Collected(samples, problems, texts, sampling, seen, flat / seen, sigma, reasons, failures)


def _of_all_processes(run: Run, flat: int, seen: int, failures: Counter[str], step: int) -> tuple[int, int]:
    """Samples in groups of equal rewards and samples drawn, over all processes.

    ``TrainError`` if the reward of every sample failed: a step would be taken on nothing, and so would all that follow.
    """
    accelerator = run.accelerator
    mine = [(flat, seen, failures)]
    every = mine if accelerator.num_processes == 1 else gather_object(mine)
    flat, seen = sum(each[0] for each in every), sum(each[1] for each in every)
    failed: Counter[str] = sum((each[2] for each in every), Counter())
    if failed.total() >= seen:
        raise TrainError(f"step {step + 1}: {all_failed(failed, seen)}")
    return flat, seen


def all_failed(failed: Counter[str], count: int) -> str:
    """What a run that cannot be rewarded ends with; the most frequent reasons first."""
    reasons = "; ".join(f"{reason} ({times} times)" for reason, times in failed.most_common(3))
    return (
        f"every reward of {count} completions failed, so that nothing can be learnt: {reasons}; repair the rewards, "
        f"and go on from a checkpoint, if there is one, with --resume"
    )


def _batch(run: Run, step: int, batch: int, sigma: float, sampling: Sampling) -> Collected:
    """One round: this process's share of ``prompts`` groups, with raw rewards."""
    config = run.config
    assert config.group is not None
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    every = run.task.problems(config.prompts, fold_in(config.seed, PROBLEM_BRANCH, step, batch), held_out=False)
    numbers = list(range(rank, config.prompts, world))
    prompts = [run.text.prompt(every[number].prompt) for number in numbers]
    seed = fold_in(config.seed, DRAW_BRANCH, step, batch)
    noise = noisy_norms(run.sampler, sigma, fold_in(config.seed, NORM_NOISE_BRANCH, step))
    with torch.no_grad(), noise, fixed_weights(run.sampler), run.autocast():
        samples = rollout(run.sampler, prompts, numbers, config.group, sampling, run.stops, seed, config.rollout_rows)
    if not bool(torch.isfinite(samples.sampler_logprobs).all()):
        raise TrainError(f"step {step + 1}: the model's log-probabilities are NaN or Inf; lower --lr or --clip")
    problems = [every[number] for number in numbers for _ in range(config.group)]
    texts = completions(run, samples)
    task, reasons = rewards(run, problems, texts, samples.truncated.device)
    groups = samples.groups + batch * config.prompts
    if config.reward == "random":
        coin_seed = fold_in(config.seed, COIN_BRANCH, step, batch) >> 1
        raw = coins(config.prompts, config.group, numbers, coin_seed, config.random_share).to(task)
    elif config.reward == "format":
        raw = formatted(run.task, problems, texts, samples.truncated)
    elif config.reward in ("majority", "incorrect"):
        raw = popular(run.task, texts, groups, task < 1 if config.reward == "incorrect" else task >= 0)
    else:
        raw = task
    samples = replace(samples, groups=groups, rewards=raw, extra={TASK_REWARD: task, RAW_REWARD: raw})
    failures = Counter(reason for reason in reasons if reason is not None)
    return Collected(samples, problems, texts, sampling, 0, 0.0, sigma, reasons, failures)


def completions(run: Run, samples: Samples) -> list[str]:
    """The texts of completions, without what ended them."""
    rows, lengths = samples.ids[:, samples.prompt_length :].tolist(), samples.lengths.tolist()
    return [run.text.completion(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def rewards(
    run: Run, problems: list[Problem], texts: list[str], device: torch.device
) -> tuple[torch.Tensor, list[str | None]]:
    """The verifier's rewards, float32 [S], and the reasons of failed ones."""
    verdicts = run.task.verdicts(problems, texts)
    values = torch.tensor([verdict.reward for verdict in verdicts], dtype=torch.float32, device=device)
    return values, [verdict.reason for verdict in verdicts]
