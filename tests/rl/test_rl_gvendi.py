"""G-Vendi: its limits, what it does not depend on, and the projection that makes it affordable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nvfp4.cli import main
from nvfp4.numerics.rng import philox
from nvfp4.rl.gvendi import GVendiConfig, Projection, g_vendi, gradient_features, measure
from nvfp4.rl.prismatic import PrismaticConfig, grow, in_sparse, kmeans
from nvfp4.rl.tasks.registry import load_task
from nvfp4.rl.vocabulary import Symbols
from nvfp4.run.errors import TrainError


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=Symbols.vocab_size, max_position_embeddings=64, **sizes)
    )


def examples(task: str, count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    words = Symbols()
    return [
        (words.encode(p.prompt), [*words.encode(p.answer), words.eos_id])
        for p in load_task(task).problems(count, seed)
    ]


def test_limits() -> None:
    """Alike: 1; orthogonal: n. The eigenvalues are exact to 1e-15 or so, and their entropy is then
    good to 1e-12."""
    assert g_vendi(torch.ones(7, 5)) == pytest.approx(1.0, abs=1e-12)
    assert g_vendi(torch.ones(5, 7)) == pytest.approx(1.0, abs=1e-12)
    assert g_vendi(torch.eye(6, 9)) == pytest.approx(6.0, abs=1e-12)
    assert g_vendi(torch.eye(6).repeat(3, 1)) == pytest.approx(6.0, abs=1e-12)
    assert g_vendi(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(1.0, abs=1e-12)


def test_order_and_length_do_not_matter() -> None:
    """Nor does which of the two Gram matrices is taken: 5 rows of 8 and, with a zero column block,
    8 columns of 5."""
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


def matrix(seed: int, size: int, dimensions: int) -> torch.Tensor:
    """The signs of a projection, found by projecting unit vectors."""
    return Projection(seed, dimensions)(torch.eye(size)) * dimensions**0.5


def test_signs_are_bits_of_philox() -> None:
    """One by one by the formula, products of three bits; balanced; other ones for each seed."""

    def bit(stream: int, index: int) -> int:
        return philox(9, index // 128, stream)[index % 128 // 32] >> index % 32 & 1

    vectors = torch.zeros(3, 20_000)
    places = (0, 8191, 17_017)
    for row, place in enumerate(places):
        vectors[row, place] = 1.0
    found = Projection(9, 256)(vectors) * 16
    for row, p in enumerate(places):
        for d in (0, 130, 255):
            flips = bit(6, p) ^ bit(5, p % 8192 * 256 + d) ^ bit(7, p // 8192 * 256 + d)
            assert found[row, d].item() == pytest.approx(1 - 2 * flips)
    whole = matrix(9, 300, 256).round()
    assert whole.abs().eq(1).all()
    assert abs(whole.mean()) < 4 / whole.numel() ** 0.5
    assert not torch.equal(matrix(10, 300, 256).round(), whole)


def test_projection_keeps_scalar_products() -> None:
    """Of unit vectors: to 5 / sqrt(dimensions), five standard deviations, also where they share
    rows of the table."""
    vectors = torch.nn.functional.normalize(torch.randn(6, 20_000), dim=1)
    got = Projection(1)(vectors)
    assert got.shape == (6, 1024)
    assert (got @ got.T - vectors @ vectors.T).abs().max() < 5 / 1024**0.5
    same_row = torch.zeros(2, 20_000)
    same_row[0, 5] = same_row[1, 5 + 8192] = 1.0
    got = Projection(1)(same_row)
    assert abs(got[0] @ got[1]) < 5 / 1024**0.5


def test_the_error_is_that_of_a_full_matrix() -> None:
    """Over 400 seeds: the mean of a scalar product is right, and its variance is (1 + c^2 - 2 sum
    of a^2 b^2) / D, as
    for independent signs. Standard errors: of the mean sqrt(variance / 400), of the variance 7
    %."""
    a, b = (torch.nn.functional.normalize(torch.randn(3 * 8192), dim=0) for _ in range(2))
    b = torch.nn.functional.normalize(a + b, dim=0)
    a[8192 : 2 * 8192] = a[:8192]  # the same rows of the table, with equal weights
    products = []
    for seed in range(400):
        x, y = Projection(seed, 128)(torch.stack((a, b)))
        products.append(float(x @ y))
    found = torch.tensor(products, dtype=torch.float64)
    exact = float(a @ b)
    variance = (float(a @ a * (b @ b)) + exact**2 - 2 * float((a**2 * b**2).sum())) / 128
    assert abs(found.mean() - exact) < 4 * (variance / 400) ** 0.5
    assert found.var().item() == pytest.approx(variance, rel=0.28)


def test_features_are_gradients() -> None:
    """Unprojected: what autograd gives for the sum of log P of the answer's tokens, and nothing
    else is touched."""
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
    """At equal numbers of examples; repeated examples add nothing; the projected value is near the
    unprojected one."""
    model = tiny()
    mixed = [e for task in ("sort", "addition", "countdown", "reverse") for e in examples(task, 6)]
    alone = examples("sort", 24)
    exact = {
        name: gradient_features(model, e, dimensions=None)
        for name, e in {"mixed": mixed, "alone": alone}.items()
    }
    values = {name: g_vendi(rows) for name, rows in exact.items()}
    assert values["mixed"] > 1.2 * values["alone"]
    for name, rows in exact.items():
        assert g_vendi(Projection(0)(rows)) == pytest.approx(values[name], rel=0.05)
    assert g_vendi(exact["alone"][:1].repeat(5, 1)) == pytest.approx(1.0, abs=1e-9)
    assert g_vendi(exact["alone"].repeat(2, 1)) == pytest.approx(values["alone"], rel=1e-9)


def test_measure_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same number as by hand, from a saved model and vocabulary."""
    model = tiny()
    model.save_pretrained(tmp_path)
    Symbols().save(tmp_path)
    want = g_vendi(
        gradient_features(model, [*examples("sort", 3), *examples("parity", 3)], dimensions=128)
    )
    config = GVendiConfig(model=str(tmp_path), tasks=("sort", "parity"), count=3, dimensions=128)
    found = measure(config)
    assert found["all"] == pytest.approx(want)
    assert found["sort"] == pytest.approx(
        g_vendi(gradient_features(model, examples("sort", 3), dimensions=128))
    )
    out = tmp_path / "figures.json"
    command = [
        "gvendi",
        "--model",
        str(tmp_path),
        "--tasks",
        "sort",
        "parity",
        "--count",
        "3",
        "--dimensions",
        "128",
    ]
    assert main([*command, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["g_vendi"] == found
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"G-Vendi {found['all']:8.2f} of at most 6   all"
    )


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
            measure(
                GVendiConfig(model=str(tmp_path), tasks=(task,), count=count, dimensions=dimensions)
            )


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


def test_devices_and_chat(tmp_path: Path) -> None:
    """A device and a chat template that are not there are named; a template changes what is
    measured."""
    tiny().save_pretrained(tmp_path)
    Symbols().save(tmp_path)
    config = GVendiConfig(model=str(tmp_path), tasks=("sort",), count=3, dimensions=128)
    if not torch.cuda.is_available():
        with pytest.raises(TrainError, match="device: cuda was asked for and is not here"):
            measure(replace(config, device="cuda"))
    with pytest.raises(TrainError, match="chat: the tokenizer has no chat template"):
        measure(replace(config, chat=True))
    settings = tmp_path / "tokenizer_config.json"
    fields = json.loads(settings.read_text())
    settings.write_text(
        json.dumps({**fields, "chat_template": "{{ messages[0]['content'] }}{{ '=' }}"})
    )
    assert measure(replace(config, chat=True)) != measure(config)


def test_kmeans_finds_planted_clusters() -> None:
    """Three bundles of directions, of 12, 7 and 2: found from any seed, and the sparse one is the
    last."""
    bundles = [torch.eye(8)[i] + 0.1 * torch.randn(n, 8) for i, n in ((0, 12), (1, 7), (2, 2))]
    rows = torch.nn.functional.normalize(torch.cat(bundles).double(), dim=1)
    for seed in range(5):
        centres, member = kmeans(rows, 3, seed)
        assert sorted(torch.bincount(member).tolist()) == [2, 7, 12]
        torch.testing.assert_close(centres.norm(dim=1), torch.ones(3, dtype=torch.float64))
        assert in_sparse(rows, rows[[0, 12, 19, 20]], 3, 0.3, seed) == [2, 3]
        assert in_sparse(rows, rows[[0, 12, 19, 20]], 3, 0.67, seed) == [1, 2, 3]
    same = torch.nn.functional.normalize(torch.ones(4, 8).double(), dim=1)
    # all are in one cluster, and it is not the sparse one
    assert in_sparse(same, same, 3, 0.3, 0) == []


def test_what_is_sparse_adds_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pool of sorting and candidates of which an eighth is something else: what is kept is new,
    readable as a task, and raises G-Vendi more than as many of the candidates as they come."""
    tiny().save_pretrained(tmp_path)
    Symbols().save(tmp_path)
    mixed = [
        *load_task("sort").problems(70, 1),
        *load_task("countdown").problems(5, 1),
        *load_task("modular").problems(5, 1),
    ]
    lines = [json.dumps({"prompt": p.prompt, "answer": p.answer}) for p in mixed]
    (tmp_path / "candidates.jsonl").write_text("\n".join(lines))
    (tmp_path / "pool.jsonl").write_text("\n".join([*lines[:30], lines[70], lines[75]]))
    config = PrismaticConfig(
        model=str(tmp_path),
        pool=str(tmp_path / "pool.jsonl"),
        candidates=str(tmp_path / "candidates.jsonl"),
        out=str(tmp_path / "kept.jsonl"),
        count=60,
        keep=12,
        draw=60,
        clusters=8,
        sparse_share=0.5,
        dimensions=256,
    )
    grown = grow(config)
    assert grown.before < grown.at_random < grown.after
    command = [
        "prismatic",
        *(f"--{key}={value}" for key, value in vars(config).items() if value not in (None, False)),
    ]
    assert (
        main(
            [part.replace("_", "-", 1) if part.startswith("--sparse") else part for part in command]
        )
        == 0
    )
    assert f"kept {len(grown.kept)} problems" in capsys.readouterr().out
    again = load_task(str(tmp_path / "kept.jsonl")).problems(40, 0)
    assert {p.prompt for p in again} <= {p.prompt for p in grown.kept}
    pool = {p.prompt for p in load_task(config.pool).problems(60, 0)}
    assert not pool & {p.prompt for p in grown.kept}
    assert len({p.prompt for p in grown.kept}) == len(grown.kept) <= 12
    for fields, message in (
        ({"keep": 0}, "keep: expected at least 1, got 0"),
        ({"sparse_share": 0.0}, "sparse_share: expected above 0"),
        (
            {
                "pool": "sort",
                "candidates": str(tmp_path / "pool.jsonl"),
                "model": str(tmp_path / "no"),
            },
            "model: expected",
        ),
    ):
        with pytest.raises(TrainError, match=message):
            grow(replace(config, **fields))
