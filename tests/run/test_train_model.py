"""The model: the same for the same seed, local folders, the export that needs no nvfp4."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from limits import HANG
from safetensors.torch import load_file
from training import environment, steps_of, tiny, write_texts
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from nvfp4.run.errors import TrainError
from nvfp4.run.model import build_model, sample
from nvfp4.run.tokens import ByteTokenizer, HuggingFaceTokenizer
from nvfp4.train.config import PretrainConfig, resolve, sizes_of
from nvfp4.train.loop import pretrain

SMALL = {"width": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "depth": 2, "seq_len": 16}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


def small(**changes):
    config = resolve(PretrainConfig(**{**SMALL, **changes}))
    return build_model(sizes_of(config), ByteTokenizer(), config.seed, config.seq_len)


def test_the_weights_are_a_function_of_the_seed_and_no_global_state_is_touched():
    state = torch.get_rng_state()
    first = small(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second, third = small(seed=3).state_dict(), small(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_sizes_are_those_of_the_config(architecture):
    model = small(architecture=architecture)
    settings = model.config
    assert type(model).__name__.lower().startswith(architecture)
    assert (settings.hidden_size, settings.num_attention_heads, settings.num_key_value_heads) == (
        32,
        4,
        2,
    )
    assert (settings.intermediate_size, settings.num_hidden_layers, settings.vocab_size) == (
        48,
        2,
        257,
    )
    assert settings._attn_implementation == "sdpa"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training
    assert small(tie_embeddings=True).lm_head.weight is not None
    tied = small(tie_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_recomputation_changes_no_number(tmp_path, texts):
    """For a stochastic recipe too: the recomputed forward meets the same noise."""
    losses = []
    for recompute in (False, True):
        out = tmp_path / str(recompute)
        pretrain(
            tiny(out, texts, steps=5, recompute=recompute, recipe="quartet2", eval_every=0, depth=2)
        )
        losses.append(steps_of(out))
    assert losses[0] == losses[1]


def test_a_sample_repeats_itself_and_leaves_the_random_state_alone():
    model, state = small(), torch.get_rng_state()
    first = sample(model, ByteTokenizer(), "def", 8, seed=1)
    assert sample(model, ByteTokenizer(), "def", 8, seed=1) == first
    assert sample(model, ByteTokenizer(), "def", 8, seed=2) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_sample_may_be_longer_than_the_context(recwarn):
    model = small(seq_len=16)
    with torch.no_grad():
        model.lm_head.weight[128:].fill_(0)
        model.lm_head.weight[:128] *= 100  # ASCII only, so a byte is a character
    assert len(sample(model, ByteTokenizer(), "a prompt that is itself longer", 50, seed=1)) == 50
    # a ResourceWarning is the garbage collector's, of an earlier test
    assert not [w for w in recwarn.list if w.category is not ResourceWarning]


def test_the_export_loads_where_there_is_no_nvfp4(tmp_path, texts):
    """In either dtype, in one process for both: it imports transformers anew, which takes
    seconds."""
    for dtype in ("bf16", "fp32"):
        out = tmp_path / dtype
        pretrain(
            tiny(out, texts, recipe="quartet2", steps=3, export_dtype=dtype, tie_embeddings=True)
        )
    code = """
import json, sys, torch
sys.modules["nvfp4"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("if x", return_tensors="pt")["input_ids"]
    logits = model(ids).logits.float().flatten()[:8].tolist()
    print(json.dumps([str(model.dtype), ids.tolist(), logits, type(model).__name__]))
"""
    folders = [tmp_path / dtype / "export" for dtype in ("bf16", "fp32")]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert run.returncode == 0, run.stderr
    loaded = [json.loads(line) for line in run.stdout.splitlines()]
    assert [kind for kind, *_ in loaded] == ["torch.bfloat16", "torch.float32"]
    for folder, (_, ids, logits, name) in zip(folders, loaded, strict=True):
        assert ids == [list(b"if x")]
        assert name == "LlamaForCausalLM"
        ours = AutoModelForCausalLM.from_pretrained(folder)
        assert ours(torch.tensor(ids)).logits.float().flatten()[:8].tolist() == pytest.approx(
            logits, abs=1e-2
        )

    # float32: the master weights, bit for bit
    saved = load_file(tmp_path / "fp32" / "checkpoints" / "step-00000003" / "model.safetensors")
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in saved.items())


def test_training_goes_on_from_an_export(tmp_path, texts):
    first = pretrain(tiny(tmp_path / "a", texts, steps=6))
    open_sizes = {"depth": 2, "width": None, "heads": None, "ffn": None}
    second = pretrain(
        tiny(
            tmp_path / "b",
            texts,
            steps=3,
            model=str(tmp_path / "a" / "export"),
            **open_sizes,
            lr=None,
        )
    )
    assert second["config"]["lr"] == 2e-5
    assert second["parameters"] == first["parameters"]
    assert steps_of(tmp_path / "b")[0]["val_loss"] == pytest.approx(first["val_loss"], abs=0.3)
    assert second["val_loss"] < first["val_loss"] + 0.05


def test_another_architecture_with_another_tokenizer_trains_and_resumes(tmp_path, texts):
    """GPT-2 has dropout, biases, learned positions and Conv1D instead of Linear: nothing here may
    depend on Llama."""
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    ByteTokenizer().save(folder)
    base = {
        "model": str(folder),
        "depth": 2,
        "width": None,
        "heads": None,
        "ffn": None,
        "recipe": "bf16",
        "steps": 6,
        "save_every": 3,
    }
    pretrain(tiny(tmp_path / "whole", texts, **base))
    half = tiny(tmp_path / "half", texts, **base)
    pretrain(half)
    import shutil

    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000006")
    (tmp_path / "half" / "result.json").unlink()
    import dataclasses

    pretrain(dataclasses.replace(half, resume=True))
    assert steps_of(tmp_path / "half") == steps_of(tmp_path / "whole")  # dropout included


def test_a_run_called_nvfp4_that_converts_nothing_is_refused(tmp_path, texts):
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    ByteTokenizer().save(folder)
    base = {"model": str(folder), "depth": 2, "width": None, "heads": None, "ffn": None}
    with pytest.raises(
        TrainError, match="recipe quartet2: no layer was converted: the model has 1 linear layers"
    ):
        pretrain(tiny(tmp_path / "run", texts, recipe="quartet2", **base))
    with pytest.raises(TrainError, match=r"recipe rtn: exclude 'layers.7' matches no linear layer"):
        pretrain(tiny(tmp_path / "run", texts, recipe="rtn", exclude=("layers.7",)))
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_is_refused(tmp_path, texts):
    with pytest.raises(
        TrainError,
        match="model: expected the folder of a local Hugging Face causal LM, got 'gpt2-far-away'",
    ):
        build_model("gpt2-far-away", ByteTokenizer(), 0)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TrainError, match=f"model: {tmp_path} does not load"):
        build_model(str(tmp_path), ByteTokenizer(), 0)
    folder = tmp_path / "small"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_positions=8, n_embd=16, n_layer=1, n_head=1)
    ).save_pretrained(folder)
    with pytest.raises(TrainError, match="tokenizer: has 257 tokens, the model embeds only 100"):
        build_model(str(folder), ByteTokenizer(), 0)
    ByteTokenizer().save(folder)
    tokenizer = HuggingFaceTokenizer(str(folder))
    tokenizer.vocab_size = 100
    with pytest.raises(TrainError, match="seq_len: the model takes at most 8 tokens, got 128"):
        build_model(str(folder), tokenizer, 0, longest=128)
