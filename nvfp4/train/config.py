"""One typed config: every field of a run with its default and unit; files, checks, derived values, differences.

The fields are data: the command line, the config file, the saved config and the comparison of a checkpoint's config
with the present one all come from this dataclass. Ranges stand on the field,
rules between fields in ``_check_together``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BeforeValidator, ConfigDict, Field

from nvfp4.recipes import RECIPES
from nvfp4.run.errors import TrainError

Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
# Floats are not strict: YAML 1.1 reads 1e-3 as text. They are finite, so that no schedule turns into NaN.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Names = tuple[str, ...]


def _split_at_commas(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    return [part for name in names for part in name.split(",")] if all(isinstance(n, str) for n in names) else value


Listed = Annotated[Names, BeforeValidator(_split_at_commas)]  # bf16,rtn or bf16 rtn

BYTES = "bytes"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every kind of run needs. Construct it freely; ``resolve`` checks it and fills in what was left open."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    # Run folder
    out: str = "runs/pretrain"
    """Run folder: config.yaml, log.jsonl, checkpoints/, export/, sample.txt, result.json."""
    overwrite: Flag = False
    """Delete what an earlier run left in --out and start again."""

    # Model
    model: str | None = None
    """Folder of a local Hugging Face causal LM to go on training; None: a new model from the fields below."""
    architecture: Literal["llama", "qwen3"] = "llama"
    """Architecture of a new model."""
    depth: Count = 2
    """Size dial of a new model: layers; sets width, heads, ffn and lr where they are left open."""
    width: Count | None = None
    """Hidden size; None: 64 * depth, rounded up to a multiple of 128."""
    heads: Count | None = None
    """Attention heads; None: width / 64 up to width 1024, else width / 128."""
    kv_heads: Count | None = None
    """Key and value heads (grouped-query attention); None: as many as heads."""
    ffn: Count | None = None
    """Hidden size of the gated MLP; None: 8/3 * width, rounded up to a multiple of 128."""
    tie_embeddings: Flag = False
    """Use one matrix for the input and the output embedding of a new model."""

    # Quantisation (the recipe itself belongs to the command)
    keep_first: int | float = 0
    """Blocks at the start kept in BF16: a count, or if below 1 a share of them, rounded up."""
    keep_last: int | float = 0
    """Blocks at the end kept in BF16: a count, or if below 1 a share of them, rounded up."""
    include: Names = ()
    """Only linears whose names match one of these globs are converted; empty: all but the output embedding."""
    exclude: Names = ()
    """Linears whose names match one of these globs stay in BF16."""
    backend: str = "auto"
    """Backend of the NVFP4 layers; auto: the fastest that runs here."""

    # Data
    data: Names = ()
    """Text, JSONL or Parquet files, folders or globs; empty: the .py files of this Python's standard library."""
    held_out_data: Names = ()
    """Files, folders or globs for evaluation; empty: --holdout decides by document name."""
    text_field: str = "text"
    """JSONL field or Parquet column that holds the text."""
    tokenizer: str | None = None
    """Folder of a local Hugging Face tokenizer, or bytes (257 tokens); None: that of --model, without one bytes."""
    holdout: Share = 0.03
    """Share of the documents held out, chosen by the SHA-256 of their relative path, so the same on every machine."""
    seed: Seed = 0
    """Seed of the initial weights, the data order and the stochastic rounding."""

    # Batch
    seq_len: Annotated[int, Field(ge=2, strict=True)] = 128
    """Tokens in a sequence."""
    batch: Count = 8
    """Sequences in one optimiser update, over all processes and accumulation steps."""
    micro_batch: Count | None = None
    """Sequences in one forward pass of one process; the rest is accumulated; None: no accumulation."""
    steps: Count = 1500
    """Optimiser updates."""

    # Optimiser
    lr: Positive | None = None
    """Peak learning rate of AdamW; None: 0.4 / width for a new model, 2e-5 for --model."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """After the warm-up: constant then linear decay over the last --decay share (wsd), or cosine."""
    warmup: CountOrZero | None = None
    """Updates over which the learning rate rises linearly; None: a sixth of all, at most 1000."""
    decay: Fraction = 0.3
    """Share of all updates over which wsd decays."""
    min_lr: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    beta1: BelowOne = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: BelowOne = 0.95
    """AdamW's decay rate of the second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    clip: NotNegative = 1.0
    """Largest L2 norm of the gradient; 0: no clipping."""
    max_bad_steps: Count = 5
    """Updates in a row with a NaN or Inf loss or gradient, each skipped and counted, before the run stops."""

    # Compute
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto: the first accelerator, else the CPU. Under torchrun one process per device, data parallel."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype under autocast, the same for every recipe; weights and optimiser state are always float32."""
    compile: Flag = False
    """Compile the model with torch.compile."""
    recompute: Flag = False
    """Activation checkpointing: recompute each block in the backward pass to save memory."""
    deterministic: Flag = True
    """Deterministic kernels, so that a resumed run repeats the uninterrupted one to the last bit."""

    # Cadence
    log_every: Count = 50
    """Updates between printed lines; log.jsonl has every update."""
    eval_every: CountOrZero = 150
    """Updates between evaluations on held-out text; 0: only at the end."""
    eval_bytes: Count = 32768
    """Bytes of held-out text (UTF-8) in an evaluation during the run, of at least 16 documents if there are."""
    eval_batch: Count | None = None
    """Sequences in one forward pass of an evaluation, whatever --micro-batch and the processes are: with one scale per
    activation tensor the loss depends on it; None: as many as hold 2048 tokens, at least 1."""
    final_eval_bytes: CountOrZero = 131072
    """Bytes of held-out text (UTF-8) in the evaluation at the end; 0: all of it."""
    save_every: CountOrZero = 250
    """Updates between checkpoints; 0: only at the end."""
    keep: Count = 2
    """Newest checkpoints kept."""
    sample_tokens: CountOrZero = 300
    """Tokens of the text sample at the end; 0: none."""
    prompt: str | None = None
    """Prompt of the text sample; None: the first line of a held-out document."""
    export_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the exported Hugging Face model."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Config of ``nvfp4 pretrain``: one model, one recipe."""

    recipe: str = "quartet2"
    """Recipe of the linears: bf16, rtn, nvidia, four_over_six, tetrajet2, quartet2, search_eden or rl."""
    resume: Flag = False
    """Go on from the newest good checkpoint in --out; from the start if there is none yet."""
    resume_from: str | None = None
    """Go on from exactly this checkpoint folder; an error if it is damaged or of another run."""
    allow_changes: Names = ()
    """Fields that may differ from the checkpoint's config on resume, e.g. steps lr; then it is another run."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TrainConfig):
    """Config of ``nvfp4 compare``: the same run once for each recipe."""

    out: str = "runs/compare"
    """Folder of the comparison: compare.json, compare.png, and a run folder for each recipe. Finished runs are kept."""
    recipes: Listed = ("bf16", "nvidia", "quartet2", "search_eden")
    """Recipes to train (bf16, rtn, nvidia, four_over_six, tetrajet2, quartet2, search_eden, rl); gaps are to bf16."""


Config = TypeVar("Config", bound=TrainConfig)

# Fields that cannot change a loss: a run may be resumed with other values.
FREE_ON_RESUME = frozenset(
    (
        *("out", "resume", "resume_from", "overwrite", "allow_changes", "device", "log_every", "save_every", "keep"),
        *(
            "eval_every",
            "eval_bytes",
            "eval_batch",
            "final_eval_bytes",
            "max_bad_steps",
            "sample_tokens",
            "prompt",
            "export_dtype",
        ),
    )
)


def resolve(config: Config) -> Config:
    """The same config with every derived value filled in; ``TrainError`` naming each field that is wrong.

    width, heads, kv_heads, ffn and lr follow from depth. With ``model`` given its own config decides the sizes, so they
    must be left open.
    """
    config = _validated(type(config), dataclasses.asdict(config))
    _check_together(config)
    if isinstance(config, PretrainConfig | CompareConfig):
        _check_can_act(config)
    if isinstance(config, PretrainConfig):
        _check_recipe("recipe", config.recipe)
        _check_resume(config)
    if isinstance(config, CompareConfig):
        _check_recipes(config.recipes)
    if config.eval_batch is None:
        config = dataclasses.replace(config, eval_batch=max(1, 2048 // config.seq_len))
    if config.warmup is None:
        config = dataclasses.replace(config, warmup=min(1000, config.steps // 6))
    if config.model is not None:
        return dataclasses.replace(config, lr=2e-5 if config.lr is None else config.lr)
    width = config.width or _round_up(64 * config.depth, 128)
    heads = config.heads or max(1, width // (64 if width <= 1024 else 128))
    resolved = dataclasses.replace(
        config,
        width=width,
        heads=heads,
        kv_heads=config.kv_heads or heads,
        ffn=config.ffn or _round_up(-(-8 * width // 3), 128),
        # 0.4 / width fits the learning rates of GPT-3 (Brown et al. 2020, table 2.1): 768 -> 5.2e-4, 4096 -> 1.0e-4.
        lr=0.4 / width if config.lr is None else config.lr,
    )
    _check_sizes(resolved)
    return resolved


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The fields of a .yaml, .yml, .toml or .json file; ``TrainError`` if it is missing or malformed."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            fields = yaml.safe_load(text)
        elif path.suffix == ".json":
            fields = json.loads(text)
        elif path.suffix == ".toml":
            fields = _toml(text)
        else:
            raise TrainError(f"config: expected a .yaml, .yml, .toml or .json file, got {path}")
    except OSError as error:
        raise TrainError(f"config: cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise TrainError(f"config: {path} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise TrainError(f"config: {path} is not valid {path.suffix[1:]}: {' '.join(str(error).split())}") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise TrainError(f"config: {path} must hold fields with values, got a {type(fields).__name__}")
    return fields


def from_fields(kind: type[Config], fields: dict[str, Any], origin: str) -> Config:
    """A config of class ``kind`` from names and values; ``TrainError`` beginning with ``origin`` if wrong."""
    try:
        return _validated(kind, fields)
    except TrainError as error:
        raise TrainError(f"{origin}: {error}") from None


def to_fields(config: TrainConfig) -> dict[str, Any]:
    """Names and values of a config as JSON and YAML have them (lists for tuples)."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}


def lasting(config: PretrainConfig) -> PretrainConfig:
    """The config without what concerns one start of the run only, as it is saved beside the run."""
    return dataclasses.replace(config, resume=False, resume_from=None, overwrite=False, allow_changes=())


def to_yaml(config: TrainConfig) -> str:
    """A config as a YAML file that ``--config`` reads back."""
    return yaml.safe_dump(to_fields(config), sort_keys=False, allow_unicode=True)


def refuse_idle(config: Any, rules: tuple[tuple[str, bool, str], ...]) -> None:
    """``TrainError`` for an option that was given and cannot act: whoever gave it expects something of it.

    rules: names of fields, whether they are without effect in this config, and why. A field that has its default was
    not given.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for names, idle, why in rules:
        for name in names.split() if idle else ():
            value = getattr(config, name)
            if value != defaults[name]:
                raise TrainError(f"{name}: {value!r} has no effect, since {why}; leave it out")


def differences(saved: dict[str, Any], config: PretrainConfig, bound: frozenset[str] = frozenset()) -> list[str]:
    """``field: saved value, now value`` of fields that can change a loss, differ and are not in ``allow_changes``.

    bound: fields that are free as a rule and not in this run.
    """
    present = to_fields(config)
    ignored = (FREE_ON_RESUME - bound) | set(config.allow_changes)
    names = [name for name in {**saved, **present} if name not in ignored]
    return [
        f"{name}: {saved.get(name)!r}, now {present.get(name)!r}"
        for name in names
        if saved.get(name) != present.get(name)
    ]


def _validated(kind: type[Config], fields: dict[str, Any]) -> Config:
    try:
        config = pydantic.TypeAdapter(kind).validate_python(fields)
    except pydantic.ValidationError as error:
        raise TrainError("; ".join(_explain(kind, item) for item in error.errors(include_url=False))) from None
    if (
        getattr(config, "out", None) == ""
    ):  # the working folder, if nobody looks: a variable of the shell that was not set
        raise TrainError("out: expected the name of a folder, got ''")
    for name, value in vars(config).items():
        if any("\0" in text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)):
            raise TrainError(f"{name}: expected a text without null bytes, got {value!r}")
    try:
        (getattr(config, "prompt", None) or "").encode()
    except UnicodeEncodeError:
        raise TrainError(f"prompt: expected a text in UTF-8, got {config.prompt!a}") from None
    return config


def _explain(kind: type[TrainConfig], item: Any) -> str:
    name = str(item["loc"][0])
    known = [field.name for field in dataclasses.fields(kind)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        return f"{name}: no such field" + (f"; did you mean {close[0]}?" if close else "; see --help for the fields")
    expected = item["msg"].removeprefix("Input should be ")
    return f"{name}: expected {expected}, got {item['input']!r}"


def _check_together(config: TrainConfig) -> None:
    if config.micro_batch is not None and config.batch % config.micro_batch:
        raise TrainError(f"micro_batch: must divide batch = {config.batch}, got {config.micro_batch}")
    if config.warmup is not None and config.warmup >= config.steps:
        raise TrainError(f"warmup: must be below steps = {config.steps}, got {config.warmup}")
    if config.model is not None:
        sizes = [name for name in ("width", "heads", "kv_heads", "ffn") if getattr(config, name) is not None]
        if sizes:
            raise TrainError(f"{sizes[0]}: {config.model} brings its own sizes; leave out {', '.join(sizes)}")


def _check_can_act(config: TrainConfig) -> None:
    wsd = config.schedule == "wsd"
    rules = (
        ("architecture depth tie_embeddings", config.model is not None, "--model brings its own sizes"),
        ("holdout", bool(config.held_out_data), "--held-out-data says what is held out"),
        ("decay", not wsd, "only the schedule wsd has such a part"),
        ("min_lr", wsd and config.decay == 0, "without --decay the schedule wsd stays at its peak"),
    )
    refuse_idle(config, rules)


def _check_resume(config: PretrainConfig) -> None:
    if config.resume_from is not None and (config.resume or config.overwrite):
        raise TrainError("resume_from: names one checkpoint, so leave out --resume and --overwrite")
    if config.resume and config.overwrite:
        raise TrainError("overwrite: deletes the run that --resume would go on with; give one of the two")
    unknown = set(config.allow_changes) - {field.name for field in dataclasses.fields(config)}
    if unknown:
        raise TrainError(f"allow_changes: no such field: {', '.join(sorted(unknown))}; see --help for the fields")


def _check_recipes(names: tuple[str, ...]) -> None:
    for name in names:
        _check_recipe("recipes", name)
    if not names or len(set(names)) < len(names):
        raise TrainError(f"recipes: expected different names, at least one, got {', '.join(names) or 'none'}")


def _check_recipe(field: str, name: str) -> None:
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        raise TrainError(
            f"{field}: expected one of {', '.join(RECIPES)}, got {name!r}"
            + (f"; did you mean {close[0]}?" if close else "")
        )


def _check_sizes(config: TrainConfig) -> None:
    assert config.width is not None
    assert config.heads is not None
    assert config.kv_heads is not None
    if config.width % config.heads or config.width // config.heads % 2:
        raise TrainError(f"heads: width / heads must be an even integer, got {config.width} / {config.heads}")
    if config.heads % config.kv_heads:
        raise TrainError(f"kv_heads: must divide heads = {config.heads}, got {config.kv_heads}")


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:
        raise TrainError("config: TOML needs Python 3.11 or newer; write the file as YAML or JSON") from None
    return tomllib.loads(text)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
