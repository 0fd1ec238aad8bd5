"""G-Vendi: its limits, what it does not depend on, and the projection that makes it affordable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nvfp4.cli import main
from nvfp4.rl.gvendi import GVendiConfig, g_vendi, gradient_features, measure, project, signs
from nvfp4.rl.tasks.registry import load_task
from nvfp4.rl.tokens import Symbols
from nvfp4.rng import philox
from nvfp4.train.errors import TrainError


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=Symbols.vocab_size, max_position_embeddings=64, **sizes))


def examples(task: str, count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    words = Symbols()
    return [
        (words.encode(p.prompt), [*words.encode(p.answer), words.eos_id]) for p in load_task(task).problems(count, seed)
    ]


def test_limits() -> None:
    """Alike: 1; orthogonal: n. The eigenvalues are exact to 1e-15 or so, and their entropy is then good to 1e-12."""
    assert g_vendi(torch.ones(7, 5)) == pytest.approx(1.0, abs=1e-12)
    assert g_vendi(torch.ones(5, 7)) == pytest.approx(1.0, abs=1e-12)
    assert g_vendi(torch.eye(6, 9)) == pytest.approx(6.0, abs=1e-12)
    assert g_vendi(torch.eye(6).repeat(3, 1)) == pytest.approx(6.0, abs=1e-12)
    assert g_vendi(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(1.0, abs=1e-12)


def test_order_and_length_do_not_matter() -> None:
    """Nor does which of the two Gram matrices is taken: 5 rows of 8 and, with a zero column block, 8 columns of 5."""
    rows = torch.randn(12, 8)
    value = g_vendi(rows)
    assert 1 < value < 8
    assert g_vendi(rows[torch.randperm(12)]) == pytest.approx(value, rel=1e-12)
    # powers of two, so that only the sums round
    assert g_vendi(rows * 2.0 ** torch.arange(-6, 6)[:, None]) == pytest.approx(value, rel=1e-12)
    assert g_vendi(torch.cat([rows, torch.zeros(12, 8)], dim=1)) == pytest.approx(value, rel=1e-12)


def test_rows_without_direction_are_refused() -> None:
    with pytest.raises(ValueError, match="first that of example 1"):
        g_vendi(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="1 gradients are zero or not finite"):
        g_vendi(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]))


def test_signs_are_bits_of_philox() -> None:
    """One by one by the formula; any piece of rows is that of the whole; balanced and different for each seed."""
    whole = signs(9, 0, 50, 256)
    for p, d in ((0, 0), (0, 255), (3, 17), (49, 130)):
        index = p * 256 + d
        word = philox(9, index // 128, 5)[index % 128 // 32]
        assert whole[p, d] == 1 - 2 * (word >> index % 32 & 1)
    assert torch.equal(signs(9, 20, 31, 256), whole[20:31])
    assert whole.abs().eq(1).all()
    assert abs(whole.mean()) < 4 / whole.numel() ** 0.5
    assert not torch.equal(signs(10, 0, 50, 256), whole)


def test_projection_keeps_scalar_products() -> None:
    """Of unit vectors: to 5 / sqrt(dimensions), five standard deviations; longer than one piece; pieces do not show."""
    vectors = torch.nn.functional.normalize(torch.randn(6, 20_000), dim=1)
    got = project(vectors, seed=1)
    assert got.shape == (6, 1024)
    assert (got @ got.T - vectors @ vectors.T).abs().max() < 5 / 1024**0.5
    whole = vectors @ signs(1, 0, 20_000, 1024) / 32
    assert torch.allclose(got, whole, atol=1e-5)  # float32 sums of 20,000 terms in another order


def test_features_are_gradients() -> None:
    """Unprojected: what autograd gives for the sum of log P of the answer's tokens, and nothing else is touched."""
    model = tiny().train()
    prompt, answer = examples("sort", 1)[0]
    got = gradient_features(model, [(prompt, answer)], dimensions=None)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    (-model(ids, labels=labels).loss * len(answer)).backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(got[0], want, atol=1e-5 * float(want.abs().max()))


def test_a_mixture_is_more_diverse_than_one_task() -> None:
    """At equal numbers of examples; repeated examples add nothing; the projected value is near the unprojected one."""
    model = tiny()
    mixed = [e for task in ("sort", "addition", "countdown", "reverse") for e in examples(task, 6)]
    alone = examples("sort", 24)
    exact = {name: gradient_features(model, e, dimensions=None) for name, e in {"mixed": mixed, "alone": alone}.items()}
    values = {name: g_vendi(rows) for name, rows in exact.items()}
    assert values["mixed"] > 1.2 * values["alone"]
    for name, rows in exact.items():
        assert g_vendi(project(rows, seed=0)) == pytest.approx(values[name], rel=0.05)
    assert g_vendi(exact["alone"][:1].repeat(5, 1)) == pytest.approx(1.0, abs=1e-9)
    assert g_vendi(exact["alone"].repeat(2, 1)) == pytest.approx(values["alone"], rel=1e-9)


def test_measure_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same number as by hand, from a saved model and vocabulary."""
    model = tiny()
    model.save_pretrained(tmp_path)
    Symbols().save(tmp_path)
    want = g_vendi(gradient_features(model, [*examples("sort", 3), *examples("parity", 3)], dimensions=128))
    config = GVendiConfig(model=str(tmp_path), tasks=("sort", "parity"), count=3, dimensions=128)
    found = measure(config)
    assert found["all"] == pytest.approx(want)
    assert found["sort"] == pytest.approx(g_vendi(gradient_features(model, examples("sort", 3), dimensions=128)))
    out = tmp_path / "figures.json"
    command = ["gvendi", "--model", str(tmp_path), "--tasks", "sort", "parity", "--count", "3", "--dimensions", "128"]
    assert main([*command, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["g_vendi"] == found
    assert capsys.readouterr().out.splitlines()[-1] == f"G-Vendi {found['all']:8.2f} of at most 6   all"


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    """No model, no answer, options that the projection refuses: an error of one line each."""
    with pytest.raises(TrainError, match="model: expected the folder"):
        measure(GVendiConfig(model=str(tmp_path / "absent"), tasks=("sort",)))
    tiny().save_pretrained(tmp_path)
    Symbols().save(tmp_path)
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1+1=", "reward": {"regex": "2"}}\n')
    for task, count, dimensions, message in (
        (str(tmp_path / "bare.jsonl"), 2, 128, "has no answer"),
        ("sort", 2, 100, "multiple of 128"),
        ("sort", 0, 128, "at least one"),
        ("fill_in", 2, 128, "use bytes|not among"),
    ):
        with pytest.raises(TrainError, match=message):
            measure(GVendiConfig(model=str(tmp_path), tasks=(task,), count=count, dimensions=dimensions))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": []}, "at least one"),
        ({"examples": [([1], [])]}, "at least one token"),
        ({"examples": [([1], [2])], "dimensions": 100}, "multiple of 128"),
        ({"examples": [([1], [2])], "seed": -1}, "seed"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_features(tiny(), **arguments)
