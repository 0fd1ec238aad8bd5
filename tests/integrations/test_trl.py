"""TRL's GRPO on converted models, by its own interface: what trains, what the reference is, what
the meter reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_floats_bitwise
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import nvfp4
from nvfp4.layer.linear import Linear
from nvfp4.rl.vocabulary import Symbols

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'nvfp4[clients]'")
datasets = pytest.importorskip(
    "datasets", reason="datasets is not installed: pip install 'nvfp4[clients]'"
)

from nvfp4.integrations.trl import (  # noqa: E402  # after the skip
    RECIPES_FILE,
    NVFP4GRPOTrainer,
    NVFP4Mixin,
    convert_like,
    load_recipes,
    save_recipes,
)

PROMPTS = [f"{a}+{b}>" for a in range(8) for b in range(8)]
METER = (
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint with its tokenizer, on disk as TRL wants its reference; weights large
    enough to round."""
    path = tmp_path_factory.mktemp("plain")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    torch.manual_seed(0)
    ids = {"eos_token_id": Symbols.eos_id, "pad_token_id": Symbols.pad_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=Symbols.vocab_size, max_position_embeddings=64, **sizes, **heads, **ids
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    Symbols().save(path)
    return path


def load(folder: Path, recipe: str | None = "rl", **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return (
        model if recipe is None else nvfp4.convert(model, recipe, seed=5, verbose=False, **options)
    )


def digits(completions: list[str], **_: Any) -> list[float]:
    """The share of digits among the characters: dense, so that a few steps move it."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def trainer(
    model: Any,
    folder: Path,
    out: Path,
    cls: type = NVFP4GRPOTrainer,
    more: Any = None,
    **options: Any,
) -> Any:
    settings = {
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": 8,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return cls(
        model=model,
        reward_funcs=digits,
        args=trl.GRPOConfig(output_dir=str(out), **{**settings, **options}),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **(more or {}),
    )


def rows(run: Any, key: str) -> list[float]:
    return [row[key] for row in run.state.log_history if key in row]


def converted(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Linear)]


def test_a_converted_model_learns(folder: Path, tmp_path: Path) -> None:
    """8 steps: every parameter moves and stays finite, classes stay, the reward rises, TRL's
    metrics are all there; sampler and trainer agree at every step."""
    model = load(folder)
    names = converted(model)
    assert len(names) == 14
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(
        model,
        folder,
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        beta=0.01,
    )
    run.train()
    assert converted(run.model) == names
    for name, p in run.model.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name
    rewards = rows(run, "reward")
    assert len(rewards) == 8
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    for key in (
        "loss",
        "grad_norm",
        "kl",
        "entropy",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/digits/mean",
    ):
        assert len(rows(run, key)) == 8, key
        assert all(math.isfinite(value) for value in rows(run, key)), key
    for key in METER:
        assert len(rows(run, key)) == 8, key
    # float32 with and without a cache: sums in another order. A tie in rounding may flip one code
    # in a million.
    assert max(rows(run, METER[0])) < 1e-5
    assert all(value == pytest.approx(1, abs=1e-5) for value in rows(run, METER[3]))


@pytest.mark.parametrize(("recipe", "agrees"), [("rl", True), (None, True), ("rtn", False)])
def test_the_meter_tells_recipes_apart(
    folder: Path, tmp_path: Path, recipe: str | None, agrees: bool
) -> None:
    """Row scales agree to rounding, as does the plain model; a scale from the whole batch does not:
    > .01 in places.

    Also at a temperature and with a cut, which are the sampler's business and no mismatch."""
    run = trainer(
        load(folder, recipe),
        folder,
        tmp_path,
        max_steps=1,
        temperature=1.5,
        top_k=10,
        learning_rate=0.0,
    )
    run.train()
    mean, largest, low, average, high = (rows(run, key)[0] for key in METER)
    assert 0 <= mean <= largest
    assert low <= average <= high
    # the ends of the ratio and the largest difference are of the same token
    assert math.exp(largest) == pytest.approx(max(high, 1 / low), rel=1e-5)
    assert (largest < 1e-4) if agrees else (largest > 0.01)


def test_the_meter_is_of_the_samples_that_were_drawn(folder: Path, tmp_path: Path) -> None:
    """Sampler log-probabilities from the hook, token by token, against a forward pass over the
    finished sequences; a trainer whose weights differ is noticed by as much as it differs."""

    class Kept(NVFP4GRPOTrainer):
        def _scored(self, output: dict[str, Any]) -> torch.Tensor:
            """As if the trainer gave each token half the probability."""
            return super()._scored(output) - math.log(2)

    run = trainer(load(folder), folder, tmp_path, cls=Kept, max_steps=1, learning_rate=0.0)
    run.train()
    mean, largest, low, _, high = (rows(run, key)[0] for key in METER)
    assert mean == pytest.approx(math.log(2), abs=1e-4)
    assert largest == pytest.approx(math.log(2), abs=1e-4)
    assert low == pytest.approx(0.5, abs=1e-4)
    assert high == pytest.approx(0.5, abs=1e-4)


def test_the_meter_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """With it, without, and with TRL's own trainer: the same weights to the last bit; the same log
    but for it."""
    weights, logs = [], []
    for cls, more in (
        (NVFP4GRPOTrainer, {}),
        (NVFP4GRPOTrainer, {"mismatch_meter": False}),
        (trl.GRPOTrainer, {}),
    ):
        run = trainer(load(folder), folder, tmp_path, cls=cls, more=more, max_steps=1)
        run.train()
        weights.append(dict(run.model.named_parameters()))
        logs.append({key for row in run.state.log_history for key in row})
    assert logs[1] == logs[2]
    assert logs[0] - logs[1] == set(METER)
    for name, p in weights[0].items():
        assert_floats_bitwise(p, weights[1][name], name)
        assert_floats_bitwise(p, weights[2][name], name)


@pytest.mark.parametrize("cls", [NVFP4GRPOTrainer, trl.GRPOTrainer])
def test_the_reference_rounds_like_the_policy(folder: Path, tmp_path: Path, cls: type) -> None:
    """At learning rate 0 the KL is exactly 0 with ours; with TRL's plain reference it is not: the
    negative control."""
    run = trainer(
        load(folder, exclude="down_proj"), folder, tmp_path, cls=cls, beta=0.1, learning_rate=0.0
    )
    assert converted(run.ref_model) == (converted(run.model) if cls is NVFP4GRPOTrainer else [])
    run.train()
    kls = rows(run, "kl")
    assert len(kls) == 2
    assert all(kl == 0.0 for kl in kls) if cls is NVFP4GRPOTrainer else all(kl > 1e-4 for kl in kls)


def test_it_mixes_into_other_trainers(folder: Path, tmp_path: Path) -> None:
    class Mine(NVFP4Mixin, trl.GRPOTrainer):
        pass

    run = trainer(load(folder), folder, tmp_path, cls=Mine, max_steps=1, beta=0.1)
    assert len(converted(run.ref_model)) == 14
    run.train()
    assert METER[0] in run.state.log_history[0]


def test_saved_models_load_as_they_were(folder: Path, tmp_path: Path) -> None:
    """``save_model`` writes plain weights and the recipes: loaded plain the logits differ, after
    ``load_recipes`` they are the same to the last bit, also of a model whose layers have different
    recipes."""
    model = load(folder, None)
    nvfp4.convert(
        model,
        {"mlp": "rl", "self_attn": "four_over_six"},
        exclude="layers.1.mlp",
        seed=5,
        verbose=False,
    )
    run = trainer(model, folder, tmp_path, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    stored = json.loads((tmp_path / "saved" / RECIPES_FILE).read_text())
    assert sorted(stored) == sorted(converted(run.model))
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        want = run.model.eval()(ids).logits
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        assert not torch.equal(again(ids).logits, want)
        assert load_recipes(again, tmp_path / "saved") is again
        assert_floats_bitwise(again(ids).logits, want, "logits")
        like = convert_like(
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval(), run.model
        )
        assert_floats_bitwise(like(ids).logits, want, "logits")


def test_what_cannot_be_converted_alike_is_an_error(folder: Path, tmp_path: Path) -> None:
    """A layer that the other model lacks; a plain policy asks for nothing; no file, no recipes."""
    policy = load(folder)
    other = load(folder, None)
    del other.model.layers[1]
    with pytest.raises(ValueError, match=r"7 layers .* are not there, first 'model.layers.1"):
        convert_like(other, policy)
    assert not converted(other)
    other = load(folder, None)
    torch.nn.utils.parametrizations.weight_norm(other.model.layers[0].mlp.down_proj)
    with pytest.raises(
        ValueError, match=r"1 layers .* cannot be converted, first 'model.layers.0.mlp.down_proj'"
    ):
        convert_like(other, policy)
    assert not converted(convert_like(load(folder, None), load(folder, None)))
    with pytest.raises(FileNotFoundError):
        load_recipes(other, tmp_path)
    save_recipes(load(folder, None), tmp_path)
    assert not converted(load_recipes(load(folder, None), tmp_path))
