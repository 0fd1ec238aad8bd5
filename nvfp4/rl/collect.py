"""The completions of one step: problems, rollouts, rewards, and groups that teach nothing replaced.

A round (``_round``), of which a step needs one, or several under dynamic sampling:

    seed, step, round  ->  ``prompts`` problems, of which process r takes r, r + world, ...
    problems           ->  prompts as ids  ->  rollout  ->  Samples [S, T], with the sampler's noise
    completions        ->  texts  ->  the task's verdicts  ->  rewards [S], or those of a control

A step (``collect``) adds rounds until it has S = prompts / processes x group completions:

    keep         the objective drops groups that say nothing, by their raw rewards
    shape        the objective's penalties are put on the rewards of the rest
    join         all to one width

Everything random is a function of (seed, step, round) and of the prompt's place in the step, so
processes draw what one alone would draw.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from nvfp4.model.weights import fixed_weights
from nvfp4.numerics.rng import COIN_BRANCH, DRAW_BRANCH, NORM_NOISE_BRANCH, PROBLEM_BRANCH, fold_in
from nvfp4.rl.norm_noise import noisy_norms, sigma_at
from nvfp4.rl.objectives.advantages import has_spread
from nvfp4.rl.parts import RLRun, all_failed
from nvfp4.rl.rollout import Sampling, rollout
from nvfp4.rl.samples import RAW_REWARD, Samples, join
from nvfp4.rl.spurious import coin_rewards, format_rewards, majority_rewards
from nvfp4.rl.tasks.base import Problem
from nvfp4.run.errors import TrainError
from nvfp4.run.processes import gather_objects, stop_together

TASK_REWARD = "task_reward"
"""Key of ``Samples.extra``: the verifier's word [S], whatever is maximised."""


@dataclass(frozen=True)
class Collected:
    """What one step learns from, in this process.

    samples: in groups. problems, texts: of each sample. sampling: how they were drawn, sigma: under
    what noise on the norms. reasons: of each sample, why its reward is 0 for want of a proper one,
    else None.

    With the samples that were replaced: drawn, how many completions over all processes; zero_std,
    the share of groups of equal rewards; failures, how often each reason came in this process.
    """

    samples: Samples
    problems: list[Problem]
    texts: list[str]
    sampling: Sampling
    drawn: int
    zero_std: float
    sigma: float
    reasons: list[str | None]
    failures: Counter[str]


def collect(run: RLRun, step: int) -> Collected:
    """Draw completions with the weights as they are, for step ``step`` (0 for the first).

    ``TrainError`` if ``max_batches`` rounds do not yield enough groups that the objective keeps, if
    the reward of every completion failed, or if the model's log-probabilities are not finite; in
    all processes, also if it was one of them that could not go on.
    """
    config = run.config
    assert config.group is not None
    needed = config.prompts // run.accelerator.num_processes * config.group

    # The objective may change temperature and limit between steps, and the noise follows the step.
    sampling = run.sampling()
    stages = (config.aqn_stages, config.aqn_start, config.aqn_end)
    sigma = sigma_at(step, config.steps, *stages)

    # rounds, until there are enough; one round where nothing is replaced
    parts: list[Samples] = []
    problems: list[Problem] = []
    texts: list[str] = []
    reasons: list[str | None] = []
    failures: Counter[str] = Counter()
    equal = drawn = rounds = 0
    with stop_together(run.accelerator):
        while len(problems) < needed and rounds < config.max_batches:
            batch = _round(run, step, rounds, sigma, sampling)
            rounds += 1

            # what came, before anything is replaced
            failures += batch.failures
            spread = has_spread(batch.samples.rewards, batch.samples.groups)
            equal += int((~spread).sum())
            drawn += len(batch.samples)

            # the objective keeps by raw rewards, and only then puts its penalties on them
            kept = run.objective.keep(batch.samples).nonzero()[:, 0][: needed - len(problems)]
            shaped = replace(batch.samples, rewards=run.objective.shape_rewards(batch.samples))
            parts.append(shaped.select(kept))
            problems += [batch.problems[i] for i in kept.tolist()]
            texts += [batch.texts[i] for i in kept.tolist()]
            reasons += [batch.reasons[i] for i in kept.tolist()]

        # what a user can put right: rewards that all fail, groups that all are alike
        if len(problems) < needed and failures.total() >= drawn:
            raise TrainError(f"step {step + 1}: {all_failed(failures, drawn)}")
        if len(problems) < needed:
            raise TrainError(
                f"step {step + 1}: {rounds} rounds of {config.prompts} prompts gave "
                f"{len(problems)} of {needed} completions that {config.objective} keeps; raise "
                f"--max-batches or --group, or choose easier or harder problems"
            )

    equal, drawn = _of_all_processes(run, equal, drawn, failures, step)
    samples = join([part for part in parts if len(part)], run.stops.pad)
    return Collected(
        samples=samples,
        problems=problems,
        texts=texts,
        sampling=sampling,
        drawn=drawn,
        zero_std=equal / drawn,
        sigma=sigma,
        reasons=reasons,
        failures=failures,
    )


def _of_all_processes(
    run: RLRun,
    equal: int,
    drawn: int,
    failures: Counter[str],
    step: int,
) -> tuple[int, int]:
    """Samples in groups of equal rewards and samples drawn, over all processes.

    ``TrainError`` if the reward of every sample failed: a step would be taken on nothing, and so
    would all that follow.
    """
    every = gather_objects(run.accelerator, [(equal, drawn, failures)])
    equal, drawn = sum(each[0] for each in every), sum(each[1] for each in every)
    failed: Counter[str] = sum((each[2] for each in every), Counter())
    if failed.total() >= drawn:
        raise TrainError(f"step {step + 1}: {all_failed(failed, drawn)}")
    return equal, drawn


def _round(run: RLRun, step: int, number: int, sigma: float, sampling: Sampling) -> Collected:
    """One round: this process's share of ``prompts`` groups, with raw rewards."""
    config = run.config
    assert config.group is not None

    # every process draws all problems and keeps its own
    problem_seed = fold_in(config.seed, PROBLEM_BRANCH, step, number)
    every = run.task.problems(config.prompts, problem_seed, held_out=False)
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    mine = list(range(rank, config.prompts, world))
    prompts = [run.text.prompt(every[place].prompt) for place in mine]

    # the rollout; the noise, if any, is on the norms for as long as it lasts
    seed = fold_in(config.seed, DRAW_BRANCH, step, number)
    noise = noisy_norms(run.sampler, sigma, fold_in(config.seed, NORM_NOISE_BRANCH, step))
    with torch.no_grad(), noise, fixed_weights(run.sampler), run.autocast():
        samples = rollout(
            run.sampler,
            prompts,
            mine,
            config.group,
            sampling,
            run.stops,
            seed,
            config.rollout_rows,
        )
    if not bool(torch.isfinite(samples.sampler_logprobs).all()):
        what = "the model's log-probabilities are NaN or Inf"
        raise TrainError(f"step {step + 1}: {what}; lower --lr or --clip")

    # what the task says, and what is maximised
    problems = [every[place] for place in mine for _ in range(config.group)]
    texts = run.completions(samples)
    task, reasons = run.rewards(problems, texts, samples.truncated.device)

    # Numbers of groups that no other round of the step has.
    samples = replace(samples, groups=samples.groups + number * config.prompts)
    coin_seed = fold_in(config.seed, COIN_BRANCH, step, number) >> 1
    raw = _rewards_to_maximise(run, problems, texts, samples, task, mine, coin_seed)
    samples = replace(samples, rewards=raw, extra={TASK_REWARD: task, RAW_REWARD: raw})
    return Collected(
        samples=samples,
        problems=problems,
        texts=texts,
        sampling=sampling,
        drawn=0,
        zero_std=0.0,
        sigma=sigma,
        reasons=reasons,
        failures=Counter(reason for reason in reasons if reason is not None),
    )


def _rewards_to_maximise(
    run: RLRun,
    problems: list[Problem],
    texts: list[str],
    samples: Samples,
    task: torch.Tensor,
    places: list[int],
    coin_seed: int,
) -> torch.Tensor:
    """The rewards [S] that ``--reward`` says: the task's, or those of a control.

    task: the verifier's rewards [S]. places: of the prompts, in the step.
    """
    config = run.config
    assert config.group is not None
    if config.reward == "random":
        share = config.random_share
        return coin_rewards(config.prompts, config.group, places, coin_seed, share).to(task)
    if config.reward == "format":
        return format_rewards(run.task, problems, texts, samples.truncated)
    # A majority asks no verifier: rewards lie in [0, 1], so task >= 0 is every completion.
    if config.reward == "majority":
        return majority_rewards(run.task, texts, samples.groups, task >= 0)
    if config.reward == "incorrect":
        return majority_rewards(run.task, texts, samples.groups, task < 1)
    return task
