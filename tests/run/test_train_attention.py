"""What the trainers change in a model on a CPU without BF16 instructions, and that nothing else is
changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import nvfp4
from nvfp4.layer import dense
from nvfp4.run import precision
from nvfp4.run.attention import attention_in
from nvfp4.run.precision import NAME, without_emulation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without BF16 instructions, whatever runs the tests."""
    for module in (dense, precision):
        monkeypatch.setattr(module, "EMULATED", frozenset({torch.bfloat16, torch.float16}))


def model(implementation: str = "sdpa") -> PreTrainedModel:
    """One block of width 32, two heads for queries and one for keys."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=torch.float32
    )


@pytest.mark.parametrize("masked", [False, True])
def test_attention_sums_in_float32_and_rounds_once(masked: bool) -> None:
    """Equal to sdpa of float32 copies, rounded; also under autocast, which would round its inputs
    again."""
    module = model().model.layers[0].self_attn
    q = torch.randn(3, 2, 10, 16).bfloat16()
    k, v = torch.randn(2, 3, 1, 10, 16).bfloat16()
    hidden = torch.rand(3, 1, 10, 10) < 0.3
    mask = torch.zeros(3, 1, 10, 10).masked_fill(hidden, -torch.inf).bfloat16() if masked else None
    wide = [t.float() for t in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    want = F.scaled_dot_product_attention(
        *wide, None if mask is None else mask.float(), is_causal=not masked
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = attention_in(torch.float32, module, q, k, v, mask)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.transpose(1, 2).bfloat16())


def test_a_model_is_changed_as_said() -> None:
    """Converted layers stay, the output embedding becomes a ``DenseLinear``, attention ours; the
    loss is BF16's."""
    torch.manual_seed(0)
    ids = torch.randint(40, (2, 12))
    plain, changed = model(), model()
    changed.load_state_dict(plain.state_dict())
    nvfp4.convert(changed, "bf16", verbose=False)
    (note,) = without_emulation(changed, CPU, "bf16")
    assert "8 linears" in note
    assert changed.config._attn_implementation == NAME
    assert type(changed.lm_head) is dense.DenseLinear
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [m(input_ids=ids, labels=ids).loss for m in (plain, changed)]
    assert abs(losses[0] - losses[1]) < 2**-6 * losses[0], (
        "BF16 keeps 8 bits, and nothing but their order changed"
    )
    losses[1].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in changed.parameters())


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "fp32"), ("meta", "bf16")])
def test_elsewhere_nothing_changes(device: str, dtype: str) -> None:
    """Float32 runs, and other devices."""
    untouched = model()
    assert without_emulation(untouched, torch.device(device), dtype) == []
    assert type(untouched.lm_head) is torch.nn.Linear
    assert untouched.config._attn_implementation == "sdpa"


def test_processors_with_bf16_keep_torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an attention that the user chose stays."""
    chosen = model("eager")
    assert without_emulation(chosen, CPU, "bf16")
    assert chosen.config._attn_implementation == "eager"
    monkeypatch.setattr(precision, "EMULATED", frozenset())
    assert without_emulation(model(), CPU, "bf16") == []
