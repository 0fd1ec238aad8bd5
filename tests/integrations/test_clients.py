"""Libraries that users bring: transformers and its Trainer, accelerate, TRL, PEFT, Lightning
Fabric, torch's own.

Each runs as its documentation says, on a Llama of a few thousand parameters, and is held to an
exact statement.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_floats_bitwise
from limits import HANG
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import environment

import nvfp4

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEARS = 14
IDS = torch.arange(3, 27).view(2, 12)
BATCH = {"input_ids": IDS, "labels": IDS}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["abcdef", "xyzzy", "hello", "nvfp"]


def optional(name: str) -> Any:
    """A library of the extra ``clients``, or a skip that says how to get it."""
    return pytest.importorskip(
        name, reason=f"{name} is not installed: pip install 'nvfp4[clients]'"
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def quiet(model: nn.Module, recipe: str = "search_eden", **kwargs: Any) -> nn.Module:
    return nvfp4.convert(model, recipe, seed=5, verbose=False, **kwargs)


def config(recipe: Any = "search_eden", **kwargs: Any) -> Any:
    return nvfp4.NVFP4TrainingConfig(recipe, seed=5, verbose=False, **kwargs)


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {layer.name: layer.reason for layer in nvfp4.report(model).layers}


def converted(model: nn.Module) -> list[str]:
    return [name for name, reason in reasons(model).items() if reason is None]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """The same names with the same bits."""
    assert got.keys() == want.keys()
    for name in want:
        assert_floats_bitwise(got[name], want[name], name)


def assert_all_moved(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert all(p.isfinite().all() for p in model.parameters())


def train_by_hand(model: nn.Module, steps: int = 2) -> dict[str, torch.Tensor]:
    """What a client's loop under BF16 autocast comes down to; the weights after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ordinary checkpoint on disk."""
    llama().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def tokenizer() -> Any:
    """One token a letter."""
    tokenizers = optional("tokenizers")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(LETTERS)}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, padding_side="left", **special
    )


# --- the quantization config


def test_importing_nvfp4_leaves_the_clients_alone() -> None:
    """Nothing of a client is imported until the config is asked for by name; other names are still
    an error."""
    clients = ("transformers", "accelerate", "peft", "trl", "lightning_fabric", "lightning")
    code = f"""
import sys, nvfp4
assert not {clients} & sys.modules.keys(), {clients} & sys.modules.keys()
assert nvfp4.NVFP4TrainingConfig("rtn").recipe == "rtn" and "transformers" in sys.modules
assert nvfp4.NVFP4TrainingConfig is nvfp4.integrations.transformers.NVFP4TrainingConfig
assert not hasattr(nvfp4, "NVFP4Config")
""".replace(str(clients), repr(set(clients)))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "recipe", ["quartet2", nvfp4.RECIPES["four_over_six"], nvfp4.RECIPES["nvidia"].to_dict()]
)
def test_config_is_plain_json(recipe: Any) -> None:
    """A config survives JSON, also with a recipe of one's own, and transformers finds its class by
    the method."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    first = config(recipe, exclude=["down_proj"], keep_last=0.15)
    again = AutoQuantizationConfig.from_dict(json.loads(first.to_json_string()))
    assert again == first
    assert type(again) is nvfp4.NVFP4TrainingConfig
    plain = recipe.to_dict() if isinstance(recipe, nvfp4.Recipe) else recipe
    assert again.recipe == json.loads(json.dumps(plain))


def test_config_refuses_what_it_does_not_know() -> None:
    """An unknown recipe, argument or method is an error where the config is made, not when a model
    is loaded."""
    with pytest.raises(ValueError, match="unknown recipe 'quartet3'; known: bf16"):
        nvfp4.NVFP4TrainingConfig("quartet3")
    with pytest.raises(TypeError, match="modules_to_not_convert"):
        nvfp4.NVFP4TrainingConfig(modules_to_not_convert=["lm_head"])
    with pytest.raises(ValueError, match="quant_method must be 'nvfp4_training', got 'fp8'"):
        nvfp4.NVFP4TrainingConfig(quant_method="fp8")


def test_from_pretrained_is_convert(folder: Path) -> None:
    """The same layers, state and bits as loading first and converting then; no mark of quantisation
    stays."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, quantization_config=config("quartet2", exclude="down_proj"))
    want = quiet(load(folder), "quartet2", exclude="down_proj")
    assert len(converted(model)) == LINEARS - SIZES["num_hidden_layers"]
    assert reasons(model) == reasons(want)
    states = (
        [layer.nvfp4 for layer in m.modules() if isinstance(layer, nvfp4.Linear)]
        for m in (model, want)
    )
    assert next(states) == next(states)
    assert_same(train_by_hand(model), train_by_hand(want))
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    # which transformers refuses for what it holds to be quantised
    assert model.half().dtype == torch.float16


def test_from_pretrained_in_bfloat16_offloaded(folder: Path) -> None:
    """A device map wraps each forward; the layers are converted all the same and compute as without
    it."""
    optional("accelerate")
    load = transformers.AutoModelForCausalLM.from_pretrained
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
    }
    options = {"quantization_config": config(), "dtype": torch.bfloat16}
    spread = load(
        folder,
        device_map=places | {"model.norm": "cpu", "lm_head": "cpu"},
        offload_folder=folder,
        **options,
    )
    assert len(converted(spread)) == LINEARS
    assert any("forward" in vars(spread.get_submodule(name)) for name in converted(spread))
    with torch.no_grad():
        want = load(folder, **options)(**BATCH).logits
        assert want.dtype == torch.bfloat16
        assert torch.equal(spread(**BATCH).logits, want)


def test_43_what_is_saved_is_an_ordinary_checkpoint(folder: Path, tmp_path: Path) -> None:
    """43: the same files as the plain model's, config.json byte for byte, and transformers alone
    loads them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())
    train_by_hand(model)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == {path.name for path in folder.iterdir()}
    assert (saved / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    with nvfp4.disabled(model), torch.no_grad():
        torch.save(model.eval()(**BATCH).logits, tmp_path / "logits.pt")
    code = f"""
import sys, torch
sys.modules["nvfp4"] = None  # importing it raises
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved)!r})
assert {{type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)}} == {{torch.nn.Linear}}
tokens = torch.arange(3, 27).view(2, 12)
assert torch.equal(model(input_ids=tokens).logits, torch.load({str(tmp_path / "logits.pt")!r}))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert ran.returncode == 0, ran.stderr


# --- Trainer


def trainer(model: nn.Module, out: Path, steps: int) -> Any:
    """A Trainer that saves and evaluates every second step, with everything else at its default."""
    from nvfp4.integrations.trainer import NoiseCallback

    optional("accelerate")
    examples = [
        {"input_ids": row, "labels": row} for row in torch.arange(8 * 12).view(8, 12) % 29 + 3
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=examples,
        eval_dataset=examples[:4],
        callbacks=[NoiseCallback()],
    )


def test_42_trainer_trains_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    """42: four steps lower the loss; resuming after two gives the same weights bit for bit;
    evaluation changes none."""
    start = llama()
    straight = trainer(quiet(copy.deepcopy(start)), tmp_path / "a", 4)
    straight.train()
    losses = [row["loss"] for row in straight.state.log_history if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert_all_moved(straight.model, parameters(start))
    trainer(quiet(copy.deepcopy(start)), tmp_path / "b", 2).train()
    resumed = trainer(quiet(copy.deepcopy(start)), tmp_path / "b", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(parameters(resumed.model), parameters(straight.model))
    assert set(nvfp4.noise_state(resumed.model).values()) == {4}
    before = parameters(straight.model)
    assert straight.evaluate()["eval_loss"] == straight.evaluate()["eval_loss"]
    assert_same(parameters(straight.model), before)
    assert set(nvfp4.noise_state(straight.model).values()) == {4}


def test_42_trainer_takes_what_from_pretrained_made(folder: Path, tmp_path: Path) -> None:
    """42: transformers asks for adapters on models that it holds to be quantised; not on ours."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    made = trainer(load(folder, quantization_config=config()), tmp_path / "a", 2)
    made.train()
    want = trainer(quiet(load(folder)), tmp_path / "b", 2)
    want.train()
    assert_same(parameters(made.model), parameters(want.model))
    plain = load(tmp_path / "a" / "checkpoint-2")
    assert not converted(plain)
    assert_same(parameters(plain), parameters(made.model))


# --- TRL


def trl_arguments(kind: str, out: Path, **options: Any) -> Any:
    common = {
        "output_dir": str(out),
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return getattr(optional("trl"), kind)(**common, **options)


def grpo(model: Any, out: Path, **options: Any) -> Any:
    """GRPO on the number of different letters, with a KL penalty, which needs a reference model."""
    arguments = trl_arguments(
        "GRPOConfig",
        out,
        beta=0.1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
    )
    return optional("trl").GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [
            float(len(set(completion))) for completion in completions
        ],
        args=arguments,
        train_dataset=optional("datasets").Dataset.from_dict({"prompt": WORDS}),
        processing_class=tokenizer(),
        **options,
    )


def kls(trainer: Any) -> list[float]:
    return [row["kl"] for row in trainer.state.log_history if "kl" in row]


@pytest.mark.parametrize("recipe", ["rl", "search_eden"])
def test_42_grpo_from_a_path_converts_the_reference_too(
    folder: Path, tmp_path: Path, recipe: str
) -> None:
    """42: policy and reference get the config; both round alike, so the KL is 0 at first, exactly,
    and not later."""
    run = grpo(str(folder), tmp_path / "out", quantization_config=config(recipe))
    assert len(converted(run.model)) == len(converted(run.ref_model)) == LINEARS
    reference = parameters(run.ref_model)
    run.train()
    first, second = kls(run)
    assert first == 0.0
    assert second > 0
    assert_all_moved(run.model, reference)
    assert_same(parameters(run.ref_model), reference)


@pytest.mark.parametrize("convert_reference", [False, True])
def test_42_grpo_of_a_model_needs_its_reference_converted(
    folder: Path, tmp_path: Path, convert_reference: bool
) -> None:
    """42: given a model, TRL loads the reference itself and plain: the KL is above 0 at once, until
    it is converted."""
    run = grpo(quiet(transformers.AutoModelForCausalLM.from_pretrained(folder)), tmp_path / "out")
    assert not converted(run.ref_model)
    if convert_reference:
        quiet(run.ref_model)
    run.train()
    assert (kls(run)[0] == 0.0) == convert_reference
    assert all(kl >= 0 for kl in kls(run))


def test_42_sft(folder: Path, tmp_path: Path) -> None:
    """42: SFTTrainer with a config, under BF16 autocast and activation checkpointing, its
    defaults."""
    run = optional("trl").SFTTrainer(
        model=str(folder),
        args=trl_arguments(
            "SFTConfig", tmp_path / "out", per_device_train_batch_size=2, max_length=16, bf16=True
        ),
        train_dataset=optional("datasets").Dataset.from_dict({"text": WORDS}),
        processing_class=tokenizer(),
        quantization_config=config("quartet2"),
    )
    assert len(converted(run.model)) == LINEARS
    before = parameters(run.model)
    run.train()
    assert run.args.bf16
    assert run.args.gradient_checkpointing
    assert_all_moved(run.model, before)
    assert set(nvfp4.noise_state(run.model).values()) == {2}


# --- accelerate


@pytest.fixture
def accelerator(tmp_path: Path) -> Iterator[Any]:
    """An Accelerator on the CPU under BF16; its state is global, so it is taken down afterwards."""
    accelerate = optional("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16", project_dir=str(tmp_path))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_42_accelerate(accelerator: Any, tmp_path: Path) -> None:
    """42: prepare(convert(model)) trains bit for bit as the loop by hand, and load_state brings the
    weights back."""
    plain = llama()
    want = train_by_hand(quiet(copy.deepcopy(plain)))
    model = quiet(plain)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        accelerator.backward(prepared(**BATCH).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert accelerator.unwrap_model(prepared) is model
    assert len(converted(model)) == LINEARS
    assert_same(parameters(model), want)
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert_same(parameters(model), want)


# --- PEFT


def on_grid(model: nn.Module, steps: int) -> None:
    """Round all parameters to multiples of 1/steps, so that sums and products of few of them are
    exact in float32."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * steps).round() / steps)


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """LoRA of rank 4 and scale 1 on two kinds of layers, A and B both random and on a grid."""
    peft = optional("peft")
    options = {"target_modules": ["q_proj", "down_proj"]} | options
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, **options)
    )
    on_grid(wrapped, 64)
    return wrapped


def test_13_adapters_before_or_after_convert() -> None:
    """13: base layers are converted and frozen, A and B are plain and train; both orders give the
    same bits."""
    base = llama()
    after = adapted(quiet(copy.deepcopy(base)))
    before = quiet(adapted(copy.deepcopy(base)))
    before.load_state_dict(after.state_dict())
    assert converted(before) == converted(after)
    assert len(converted(before)) == LINEARS
    assert sum(name.endswith("base_layer") for name in converted(before)) == 4
    assert {reasons(before)[name] for name in reasons(before) if ".lora_" in name} == {"adapter"}
    start = parameters(before)
    trained = train_by_hand(before)
    assert_same(train_by_hand(after), trained)
    moved = {name for name in trained if not torch.equal(trained[name], start[name])}
    assert moved == {name for name in trained if ".lora_" in name}


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_13_a_wrapped_output_embedding_is_kept(options: dict[str, Any]) -> None:
    """13, 7: the output embedding stays in high precision also inside the wrapper that PEFT puts
    around it."""
    for model in (adapted(quiet(llama()), **options), quiet(adapted(llama(), **options))):
        assert not [name for name in converted(model) if "lm_head" in name]


def test_13_merge_and_unmerge() -> None:
    """13: merged, a layer computes with the sum, quantised anew; unmerged, with the base again; to
    the last bit."""
    model = quiet(adapted(llama())).eval()
    with torch.no_grad():
        apart = model(**BATCH).logits
        with model.disable_adapter():
            base = model(**BATCH).logits
        model.merge_adapter()
        merged = model(**BATCH).logits
        sums = {
            name: p
            for name, p in model.base_model.model.state_dict().items()
            if ".lora_" not in name
        }
        plain = llama()
        plain.load_state_dict({name.replace("base_layer.", ""): p for name, p in sums.items()})
        assert_floats_bitwise(merged, quiet(plain.eval())(**BATCH).logits, "merged")
        assert not torch.equal(merged, base)
        model.unmerge_adapter()
        assert_floats_bitwise(model(**BATCH).logits, apart, "unmerged")
        alone = model.merge_and_unload()
        assert_floats_bitwise(alone(**BATCH).logits, merged, "merged for good")
    assert len(converted(alone)) == LINEARS
    assert alone.state_dict().keys() == plain.state_dict().keys()


# --- Lightning Fabric


def test_fabric_plugin() -> None:
    """setup() converts with the plugin's arguments and trains bit for bit as the loop by hand."""
    fabric_module = optional("lightning_fabric")
    from nvfp4.integrations.lightning import NVFP4Precision

    plain = llama()
    want = train_by_hand(quiet(copy.deepcopy(plain), "quartet2", exclude="down_proj"))
    plugin = NVFP4Precision("quartet2", device="cpu", exclude="down_proj", seed=5, verbose=False)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    for _ in range(2):
        fabric.backward(model(**BATCH).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert len(converted(plain)) == LINEARS - SIZES["num_hidden_layers"]
    assert model(**BATCH).logits.dtype == torch.float32
    assert_same(parameters(plain), want)


# --- torch's own


def test_40_grad_scaler_skips_a_step_on_overflow() -> None:
    """40: under FP16 a scale too large makes gradients of converted layers infinite; the weights
    stay, the scale halves until they fit, and then all of them move."""
    model = quiet(llama())
    before = parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
    skipped = 0
    for _ in range(30):
        with torch.autocast("cpu", torch.float16):
            loss = model(**BATCH).loss
        scaler.scale(loss).backward()
        finite = all(p.grad.isfinite().all() for p in model.parameters())
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if finite:
            break
        assert not all(
            model.get_submodule(name).weight.grad.isfinite().all() for name in converted(model)
        )
        assert_same(parameters(model), before)
        assert scaler.get_scale() == scale / 2
        optimizer.zero_grad()
        skipped += 1
    assert 0 < skipped < 30
    assert_all_moved(model, before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_19_copies_of_a_real_model(how: str) -> None:
    """19: a copy trains on from the same bits and the same noise, apart from the original."""
    model = quiet(llama())
    train_by_hand(model, 1)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    start = parameters(model)
    trained = train_by_hand(twin)
    assert_same(parameters(model), start)
    assert_same(train_by_hand(model), trained)


def test_19_exponential_moving_average() -> None:
    """19: AveragedModel holds a converted copy whose weights are the average and which computes
    with them."""
    model = quiet(llama())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(model)  # the first call copies
    start = parameters(model)
    end = train_by_hand(model)
    average.update_parameters(model)
    assert len(converted(average)) == LINEARS
    got = parameters(average.module)
    # lerp's two products and a sum: three roundings of float32 on terms no larger than these
    for name in start:
        bound = 3 * 2.0**-24 * (start[name].abs() + end[name].abs())
        assert (
            (0.75 * start[name].double() + 0.25 * end[name] - got[name]).abs() <= bound
        ).all(), name
    fresh = quiet(llama())
    fresh.load_state_dict(got)
    with torch.no_grad():
        assert_floats_bitwise(
            average(**BATCH).logits, fresh(**BATCH).logits, "logits of the average"
        )
