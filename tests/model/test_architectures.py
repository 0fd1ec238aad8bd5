"""Real architectures, tiny and built from their transformers configs: converted, trained for a
step, reverted.

What is converted is typed out for each, so that a change in transformers that moves matrices
elsewhere is noticed.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import nvfp4

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WIDTH, VOCABULARY, BLOCKS = 32, 64, 2
# none is padding: its embedding is 0, where RMSNorm multiplies gradients by 1000
IDS = torch.arange(3, 51).view(3, 16)
TOKENS = {"input_ids": IDS, "labels": IDS}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": WIDTH // 2,
    "max_position_embeddings": 32,
}
MAMBA = SPECIAL | {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "state_size": 8,
    "num_hidden_layers": BLOCKS,
    "expand": 2,
}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
DENSE = tuple(
    f"model.layers.{{}}.{name}"
    for name in (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)


def pixels() -> dict[str, torch.Tensor]:
    """Two images of 8 x 8, four patches each."""
    return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([1, 3])}


@dataclass(frozen=True)
class Architecture:
    """in_block: names of the converted linears, {} being the block; outside: converted elsewhere;
    kept: with reasons.

    elsewhere: classes that hold matrices in high precision, as the summary names them. factors:
    outputs of converted layers that multiply into the output of a block, as gate and up do; Mamba's
    layers have several outputs.
    """

    model: str
    config: str
    options: dict[str, object]
    in_block: tuple[str, ...]
    outside: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    factors: int = 7
    inputs: Callable[[], dict[str, torch.Tensor]] = lambda: TOKENS

    def build(self) -> nn.Module:
        """The model with random weights."""
        config = getattr(transformers, self.config)(**self.options)
        return getattr(transformers, self.model)(config)

    @property
    def converted(self) -> set[str]:
        return {name.format(block) for name in self.in_block for block in range(BLOCKS)} | set(
            self.outside
        )


ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM", "LlamaConfig", DECODER, DENSE, kept={"lm_head": "output_embedding"}
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM", "Qwen3Config", DECODER, DENSE, kept={"lm_head": "output_embedding"}
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "Gemma2Config", DECODER, DENSE, kept={"lm_head": "tied_to_embedding"}
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        DECODER,
        DENSE,
        kept={"lm_head": "tied_to_embedding"},
    ),
    # the experts are one three-dimensional parameter: they stay in high precision
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        DECODER | {"num_local_experts": 4},
        DENSE[: len(ATTENTION)],
        kept={"lm_head": "output_embedding"},
        elsewhere=("3-D expert parameter x 4",),
        factors=4,
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 5,
        },
        tuple(
            f"vit.layers.{{}}.{name}"
            for name in (*(f"attention.{side}_proj" for side in "qkvo"), "mlp.fc1", "mlp.fc2")
        ),
        outside=("classifier",),
        factors=6,
        inputs=pixels,
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        MAMBA | {"time_step_rank": 4},
        tuple(
            f"backbone.layers.{{}}.mixer.{name}"
            for name in ("in_proj", "x_proj", "dt_proj", "out_proj")
        ),
        kept={"lm_head": "tied_to_embedding"},
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        tuple(f"backbone.layers.{{}}.mixer.{name}" for name in ("in_proj", "out_proj")),
        kept={"lm_head": "output_embedding"},
        factors=6,
    ),
}

of_each = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


def gradients(
    model: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradient of every parameter by name."""
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@of_each
def test_what_is_converted(architecture: Architecture, capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly the linears in the table; the rest has a reason, and matrices that are no linear
    layer are named."""
    model = nvfp4.convert(architecture.build(), seed=0)
    layers = nvfp4.report(model).layers
    assert {layer.name for layer in layers if layer.reason is None} == architecture.converted
    assert {
        layer.name: layer.reason for layer in layers if layer.reason is not None
    } == architecture.kept
    summary = capsys.readouterr().out
    assert ("not_linear" in summary) == bool(architecture.elsewhere)
    assert all(kind in summary for kind in architecture.elsewhere)


@of_each
def test_a_step_of_training(architecture: Architecture) -> None:
    """The loss is finite, every weight moves, and the converted weights' gradients point where the
    plain model's do.

    Each factor on the way costs a relative squared error of 2 x 7.75e-3 in the forward and again in
    the backward pass (two operands of ``search_eden``, README), the last GEMM the same once more.
    Independent errors of a network that does not amplify them add up to no more than this sum; then
    cos >= 1 / sqrt(1 + error). That is asked of the mean
    over layers: q and k of a fresh model have gradients that nearly cancel, so that some are
    further off.
    """
    plain, inputs = architecture.build(), architecture.inputs()
    model = nvfp4.convert(copy.deepcopy(plain), seed=0, verbose=False)
    loss, got = gradients(model, inputs)
    _, want = gradients(plain, inputs)
    assert loss.isfinite()
    assert got.keys() == want.keys() == dict(model.named_parameters()).keys()
    weights = [f"{name}.weight" for name in architecture.converted]
    cosines = [
        torch.cosine_similarity(got[name].flatten(), want[name].flatten(), dim=0).item()
        for name in weights
    ]
    gemms = 2 * (BLOCKS * architecture.factors + len(architecture.outside)) + 1
    assert statistics.mean(cosines) > 1 / math.sqrt(1 + gemms * 2 * 7.75e-3)
    assert max(cosines) < 1 - 1e-4, (
        "closer to the plain gradient than 4 bits can come: nothing was quantised"
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in want if not want[name].any()}


@of_each
def test_revert_is_the_plain_model(architecture: Architecture) -> None:
    """In BF16: converted outputs differ, and after revert they equal to the last bit those from
    before."""
    model, inputs = architecture.build().bfloat16().eval(), architecture.inputs()
    inputs = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    with torch.no_grad():
        before = model(**inputs).logits
        nvfp4.convert(model, seed=0, verbose=False)
        assert not torch.equal(model(**inputs).logits, before)
        with nvfp4.disabled(model):
            assert torch.equal(model(**inputs).logits, before)
        nvfp4.revert(model)
        assert torch.equal(model(**inputs).logits, before)
    assert not any(isinstance(module, nvfp4.Linear) for module in model.modules())


def test_gpt2_says_that_conv1d_is_no_linear() -> None:
    """GPT-2's matrices live in Conv1D: the warning names and counts it, and the model stays
    bit-equal."""
    zero = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": BLOCKS,
        "n_head": 2,
        "n_positions": 32,
    }
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **SPECIAL, **zero))
    with pytest.warns(
        nvfp4.ConvertWarning, match=r"no layer was converted.*not_linear: Conv1D x \d"
    ):
        model = nvfp4.convert(copy.deepcopy(plain), seed=0, verbose=False)
    (loss, got), (expected, want) = gradients(model, TOKENS), gradients(plain, TOKENS)
    assert loss == expected
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_routed_experts_train_in_high_precision() -> None:
    """Mixtral in transformers 5: gate and experts are converted in no part, their gradients come
    all the same."""
    model = nvfp4.convert(ARCHITECTURES["mixtral"].build(), seed=0, verbose=False)
    experts = {
        name: module for name, module in model.named_modules() if name.endswith("mlp.experts")
    }
    assert len(experts) == BLOCKS
    assert not any(
        isinstance(module, nn.Linear) for e in experts.values() for module in e.modules()
    )
    _, got = gradients(model, TOKENS)
    assert all(
        got[f"{name}.{weight}"].any()
        for name in experts
        for weight in ("gate_up_proj", "down_proj")
    )
