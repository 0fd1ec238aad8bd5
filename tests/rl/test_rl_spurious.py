"""Rewards that know nothing of the right answer: what each of them gives, and that the loop gives
it."""

from __future__ import annotations

import pytest
import torch
from rl_runs import SEVENS, tiny

from nvfp4.rl.collect import TASK_REWARD, collect
from nvfp4.rl.config import resolve
from nvfp4.rl.samples import RAW_REWARD
from nvfp4.rl.setup import prepare
from nvfp4.rl.spurious import coin_rewards, format_rewards, majority_rewards
from nvfp4.rl.tasks.base import Problem
from nvfp4.rl.tasks.registry import load_task


def test_coins_fall_with_their_probability() -> None:
    """Of 20,000 coins; 0 and 1 are never and always; a prompt has its coins whoever holds it."""
    for share in (0.0, 0.1, 0.5, 1.0):
        found = coin_rewards(2500, 8, range(2500), 7, share)
        assert found.unique().tolist() == ([share] if share in (0.0, 1.0) else [0.0, 1.0])
        assert abs(float(found.mean()) - share) <= 4 * (share * (1 - share) / 20_000) ** 0.5
    whole = coin_rewards(6, 4, range(6), 3, 0.5).view(6, 4)
    assert torch.equal(coin_rewards(6, 4, [1, 3, 5], 3, 0.5).view(3, 4), whole[1::2])
    assert not torch.equal(coin_rewards(6, 4, range(6), 4, 0.5).view(6, 4), whole)


def test_popular_answers() -> None:
    """The most frequent of the candidates of a group, for all who have it; ties go to the first; no
    answer is none."""
    task = load_task("sort")
    texts = ["12", "12", "13", "", "", " 7 ", "8", "7", "8", "9"]
    groups = torch.tensor([4, 4, 4, 4, 4, 1, 1, 1, 1, 2])
    every = torch.ones(10, dtype=torch.bool)
    assert majority_rewards(task, texts, groups, every).tolist() == [1, 1, 0, 0, 0, 1, 0, 1, 0, 1]
    wrong = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
    assert majority_rewards(task, texts, groups, wrong).tolist() == [0, 0, 1, 0, 0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("sort", ["1", "99887"], ["", "1 2", "a", "1=2", "\u0663"]),
        ("parity", ["11011011=1", "=0"], ["", "11", "11=2", "1+1=1", "1=1=1=x"]),
        ("countdown", ["1+2", "3"], ["", "1+", "1=1", "x"]),
        ("fill_in", ["A", " B "], ["", "AB", "Z", "a"]),
    ],
)
def test_what_looks_like_an_answer(name: str, good: list[str], bad: list[str]) -> None:
    """Right or wrong does not matter; a completion that was cut is none."""
    task, problem = load_task(name), Problem("p", "q", {"numbers": [1], "target": 1})
    assert [task.well_formed(problem, text) for text in good] == [True] * len(good)
    assert [task.well_formed(problem, text) for text in bad] == [False] * len(bad)
    cut = torch.tensor([True] + [False] * (len(good) - 1))
    found = format_rewards(task, [problem] * len(good), good, cut)
    assert found.tolist() == [0.0] + [1.0] * (len(good) - 1)


@pytest.mark.parametrize("kind", ["random", "incorrect", "format", "majority"])
def test_the_loop_maximises_them_and_reports_the_task(kind: str, tmp_path) -> None:
    """What is maximised is the control, the verifier's word stays beside it."""
    share = {"random_share": 0.25} if kind == "random" else {}
    config = resolve(
        tiny(tmp_path, task=SEVENS, reward=kind, prompts=8, group=8, max_new_tokens=2, **share)
    )
    run = prepare(config)
    collected = collect(run, 0)
    samples = collected.samples
    verdict, raw = samples.extra[TASK_REWARD], samples.extra[RAW_REWARD]
    texts = [text.strip() for text in collected.texts]
    assert set(raw.tolist()) <= {0.0, 1.0}
    assert 0 < float(raw.mean()) < 1
    assert torch.equal(raw, samples.rewards)
    for group in samples.groups.unique().tolist():
        members = (samples.groups == group).nonzero().flatten().tolist()
        rewarded = {texts[i] for i in members if raw[i]}
        if kind in ("incorrect", "majority"):
            assert len(rewarded) <= 1
        if kind == "majority":
            counts = [sum(texts[k] == texts[i] for k in members) for i in members if texts[i]]
            assert all(sum(texts[k] == text for k in members) == max(counts) for text in rewarded)
    if kind == "incorrect":
        assert bool((verdict[raw == 1] < 1).all())
    if kind == "format":
        assert bool(
            (raw == torch.tensor([float(bool(text)) for text in texts]) * ~samples.truncated).all()
        )
    run.folder.release()
