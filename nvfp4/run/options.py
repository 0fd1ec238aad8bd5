"""The options that every trainer has, as frozen dataclasses in groups.

    FolderOptions   out, overwrite                  QuantOptions   keep_first ... backend
    ModelOptions    model, architecture, sizes      OptimOptions   steps, lr ... max_bad_steps
    ComputeOptions  seed, device, dtype, ...        CadenceOptions log_every ... export_dtype
    ResumeOptions   resume, resume_from, allow_changes             (for runs that may go on)
    DataOptions     data, held_out_data, text_field, holdout       (for runs that read text)

A trainer's config inherits ``RunConfig`` (the first three lines) or ``ResumableConfig`` (the fourth
as well), states a field again where its default or its sentence differs, and adds what only it
knows. The sentence below a field is its text in ``--help``; here they are pretraining's.

The fields are data: the command line, the config file, config.yaml in the run folder and the
comparison with a checkpoint's config all come from them (``fields.py``).

A range stands in the type of a field (``Count``, ``Share``). ``Free`` marks a field that cannot
change what is learnt, so that a run may be resumed with another value. Floats are not strict, since
YAML 1.1 reads 1e-3 as text, and they are finite, so that no schedule turns into NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field

from nvfp4.run.errors import TrainError

T = TypeVar("T")

FREE = object()
"""In the ``Annotated`` type of a field: a run may be resumed with another value."""

Free = Annotated[T, FREE]

# The vocabulary of ranges. strict: True and 1.0 are no counts, and 1 is no flag.
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]

# Names and seeds may come as one text with commas (a shell, a TOML file) or as a list (YAML).
Names = tuple[str, ...]


def _split_at_commas(value: Any) -> Any:
    """ "a,b" or ["a,b", "c"] as a flat list; anything else is left for pydantic to refuse."""
    names = [value] if isinstance(value, str) else value
    return (
        [part for name in names for part in name.split(",")]
        if all(isinstance(n, str) for n in names)
        else value
    )


Listed = Annotated[Names, BeforeValidator(_split_at_commas)]
"""Names as bf16,rtn or bf16 rtn."""


def _split_numbers(value: Any) -> Any:
    return tuple(int(part) for part in value.split(",")) if isinstance(value, str) else value


Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_split_numbers)]


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Where a run keeps what it writes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    out: Free[str] = "runs/run"
    """Run folder."""
    overwrite: Free[Flag] = False
    """Delete what an earlier run left in --out and start again."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is trained: one of a folder, or a new one of these sizes."""

    model: str | None = None
    """Folder of a local Hugging Face causal LM to go on training; None: a new model from the fields
    below."""
    architecture: Literal["llama", "qwen3"] = "llama"
    """Architecture of a new model."""
    depth: Count = 2
    """Size dial of a new model: layers; sets width, heads, ffn and lr where they are left open."""
    width: Count | None = None
    """Hidden size; None: 64 * depth, rounded up to a multiple of 128."""
    heads: Count | None = None
    """Attention heads; None: width / 64 up to width 1024, else width / 128."""


@dataclass
class Sizes:
    """What a new model is built from. kv_heads and ffn follow from the others where they are None.

    context: longest sequence, in tokens. ffn: 8/3 * width, rounded up to a multiple of 128: the
    three matrices of a gated MLP then have as many parameters as the two of a plain one with 4 *
    width. ``TrainError`` if heads do not fit.
    """

    architecture: Literal["llama", "qwen3"]
    depth: int
    width: int
    heads: int
    context: int
    kv_heads: int | None = None
    ffn: int | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        self.kv_heads = self.kv_heads or self.heads
        self.ffn = self.ffn or round_up(-(-8 * self.width // 3), 128)
        # even: rotary embeddings turn the columns of a head in pairs
        if self.width % self.heads or self.width // self.heads % 2:
            raise TrainError(
                f"heads: width / heads must be an even integer, got {self.width} / {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise TrainError(f"kv_heads: must divide heads = {self.heads}, got {self.kv_heads}")


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """Which linears are quantised, and where; the recipe itself belongs to the command."""

    keep_first: int | float = 0
    """Blocks at the start kept in high precision: a count, or if below 1 a share of them, rounded
    up."""
    keep_last: int | float = 0
    """Blocks at the end kept in high precision: a count, or if below 1 a share of them, rounded
    up."""
    include: Names = ()
    """Only linears whose names match one of these globs are converted; empty: all but the output
    embedding."""
    exclude: Names = ()
    """Linears whose names match one of these globs stay in high precision."""
    backend: str = "auto"
    """Backend of the NVFP4 layers; auto: the fastest that runs here."""
    delayed_amax: bool = False
    """Scale activations and gradients by their largest magnitude of the call before, so that they
    are read once."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Text to learn from, for those that do."""

    data: Names = ()
    """Text, JSONL or Parquet files, folders or globs; empty: the .py files of this Python's
    standard library."""
    held_out_data: Names = ()
    """Files, folders or globs for evaluation; empty: --holdout decides by document name."""
    text_field: str = "text"
    """JSONL field or Parquet column that holds the text."""
    holdout: Share = 0.03
    """Share of the documents held out, chosen by the SHA-256 of their relative path, so the same on
    every machine."""


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """AdamW and its learning rate."""

    steps: Count = 1500
    """Optimiser updates."""
    lr: Positive | None = None
    """Peak learning rate of AdamW; None: 0.4 / width for a new model, 2e-5 for --model."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """After the warm-up: constant then linear decay over the last --decay share (wsd), or
    cosine."""
    warmup: CountOrZero | None = None
    """Updates over which the learning rate rises linearly; None: a sixth of all, at most 1000."""
    decay: Fraction = 0.3
    """Share of all updates over which wsd decays."""
    min_lr: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: NotNegative | None = None
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    beta1: BelowOne = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: BelowOne = 0.95
    """AdamW's decay rate of the second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    clip: NotNegative = 1.0
    """Largest L2 norm of the gradient; 0: no clipping."""
    max_bad_steps: Free[Count] = 5
    """Updates in a row with a NaN or Inf loss or gradient, each skipped and counted, before the run
    stops."""


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where a run computes, in which precision, and from which seed."""

    seed: Seed = 0
    """Seed of the initial weights, the data order and the stochastic rounding."""
    device: Free[Literal["auto", "cpu", "cuda", "mps"]] = "auto"
    """Device; auto: the first accelerator, else the CPU. Under torchrun one process per device,
    data parallel."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype under autocast, the same for every recipe; weights and optimiser state are
    always float32."""
    deterministic: Flag = True
    """Deterministic kernels, so that a resumed run repeats the uninterrupted one to the last
    bit."""


@dataclass(frozen=True, kw_only=True)
class CadenceOptions:
    """What is due how often, and what is left at the end."""

    log_every: Free[Count] = 50
    """Updates between printed lines; log.jsonl has every update."""
    eval_every: Free[CountOrZero] = 150
    """Updates between evaluations on held-out text; 0: only at the end."""
    save_every: Free[CountOrZero] = 250
    """Updates between checkpoints; 0: only at the end."""
    keep: Free[Count] = 2
    """Newest checkpoints kept."""
    export_dtype: Free[Literal["bf16", "fp32"]] = "bf16"
    """Dtype of the exported Hugging Face model."""


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """How a run goes on from what it has saved."""

    resume: Free[Flag] = False
    """Go on from the newest good checkpoint in --out; from the start if there is none yet."""
    resume_from: Free[str | None] = None
    """Go on from exactly this checkpoint folder; an error if it is damaged or of another run."""
    allow_changes: Free[Names] = ()
    """Fields that may differ from the checkpoint's config on resume, e.g. steps lr; then it is
    another run."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    CadenceOptions, ComputeOptions, OptimOptions, QuantOptions, ModelOptions, FolderOptions
):
    """What every kind of run needs."""


@dataclass(frozen=True, kw_only=True)
class ResumableConfig(ResumeOptions, RunConfig):
    """Config of one run, which may go on from a checkpoint."""
