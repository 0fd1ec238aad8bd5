"""The model of a run: built or loaded, sampled from, exported.

    Sizes  -> a new Llama or Qwen3          (``build_model``)
    folder -> any local causal LM, tested for causality
    float32 weights on the CPU -> ``precision.py`` converts -> (the trainer moves and wraps it)
    ``export``: the same architecture with plain linears, which transformers loads without nvfp4

The weights are a function of (sizes, seed): every process and every recipe begins with the same.
That is why a model is built on the CPU, whose random numbers do not depend on the device, and why
the global random state is set within and put back.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.utils import logging

from nvfp4.run.causal import check_causal
from nvfp4.run.errors import TrainError
from nvfp4.run.files import sync
from nvfp4.run.options import Sizes
from nvfp4.run.tokens import Tokenizer, check_model_folder

ARCHITECTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    source: str | Sizes, tokenizer: Tokenizer, seed: int, longest: int = 2, recompute: bool = False
) -> PreTrainedModel:
    """A causal LM with float32 weights on the CPU, ready to train; a function of (source, seed).

    source: the folder of a local one, or the sizes of a new one. longest: tokens of the longest
    sequence it will see. recompute: activations in the backward pass. ``TrainError`` if it does not
    load, is not causal, or is too small for the tokenizer or the sequences. The global random state
    is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(source, Sizes):
            model = _new(source, tokenizer)
        else:
            model = load_model(source)
            check_causal(model, source)

    # A model from a folder may not suit the tokenizer and the sequences. An id or a place beyond
    # its tables would end in an index error, on a GPU in an assertion without a name.
    text = model.config.get_text_config()
    if text.vocab_size < tokenizer.vocab_size:
        raise TrainError(
            f"tokenizer: has {tokenizer.vocab_size} tokens, the model embeds only "
            f"{text.vocab_size}; "
            f"give the model's own tokenizer"
        )
    most = getattr(text, "max_position_embeddings", None)
    if most is not None and most < longest:
        raise TrainError(f"seq_len: the model takes at most {most} tokens, got {longest}")

    if recompute:
        # Renamed within transformers 5; the old name warns, the new one is missing before.
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    model.config.use_cache = False
    return model.train()


def sample(
    model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int
) -> str:
    """``tokens`` tokens that follow ``prompt``, drawn at temperature 0.8; the separator ends them.

    A text longer than the model's context goes on from its last half context. Leaves the global
    random state and the training mode as they were.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    ids = torch.tensor(
        [[tokenizer.separator, *tokenizer.encode([prompt])[0].tolist()]], device=model.device
    )

    # A model keeps its mode, and a run its random numbers: a sample must not change what is learnt.
    start, end = ids.shape[1], ids.shape[1] + tokens
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        model.eval()

        # One pass, unless the text outgrows the context: it then goes on from the last half.
        while ids.shape[1] < end and (ids.shape[1] == start or ids[0, -1] != tokenizer.separator):
            context = ids if ids.shape[1] < longest else ids[:, -(longest // 2) :]
            count = min(end - ids.shape[1], longest - context.shape[1])
            ids = torch.cat([ids, _continue(model, context, count, tokenizer.separator)], dim=1)
        model.train(training)
    return tokenizer.decode(ids[0, start:].tolist())


def export(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, dtype: str) -> None:
    """Write an ordinary Hugging Face folder (model and tokenizer), which needs no nvfp4 to load.

    dtype: of the weights, a key of ``DTYPES``. The folder appears complete or not at all; an older
    one is replaced. ``TrainError`` if it cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        settings = copy.deepcopy(model.config)
        settings.use_cache = True
        with torch.device("meta"):  # the same architecture with plain linears, without memory
            plain: Any = type(model)(settings)

        # Converted layers keep the keys of plain ones, so the weights need no translation.
        weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in model.state_dict().items()}
        with _no_bars():
            plain.to(DTYPES[dtype]).save_pretrained(temporary, state_dict=weights)
        tokenizer.save(temporary)
        for file in temporary.iterdir():
            sync(file)

        # Complete and on the disk: only now does it take the place of the older one.
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync(folder.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # On a full disk tokenizers raises a bare Exception, and safetensors an error of its own.
        if not (isinstance(error, OSError | SafetensorError) or type(error) is Exception):
            raise
        reason = getattr(error, "strerror", None) or error
        raise TrainError(
            f"cannot export to {folder}: {reason}; make room and run again with --resume"
        ) from error
    except BaseException:  # Ctrl-C: only a next export to this very folder would clean up
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _continue(
    model: PreTrainedModel, context: torch.Tensor, count: int, separator: int
) -> torch.Tensor:
    """At most ``count`` new tokens [1, n] after ``context`` [1, m]."""
    generate: Any = model.generate
    whole = generate(
        context,
        attention_mask=torch.ones_like(context),
        max_new_tokens=count,
        do_sample=True,
        temperature=0.8,
        use_cache=True,
        pad_token_id=separator,
        eos_token_id=separator,
    )
    return whole[:, context.shape[1] :]


def _new(sizes: Sizes, tokenizer: Tokenizer) -> PreTrainedModel:
    # begin and end are one id: a model that samples stops where a new document would begin
    settings = ARCHITECTURES[sizes.architecture](
        vocab_size=tokenizer.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.width // sizes.heads,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=sizes.tie_embeddings,
        bos_token_id=tokenizer.separator,
        eos_token_id=tokenizer.separator,
    )
    return AutoModelForCausalLM.from_config(
        settings, attn_implementation="sdpa", dtype=torch.float32
    )


def load_model(path: str) -> PreTrainedModel:
    """The causal LM in a local folder, float32, on the CPU; ``TrainError`` if it does not load."""
    check_model_folder(path)
    try:
        with _no_bars():
            return AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, local_files_only=True
            )
    except Exception as error:  # the library raises many kinds, OSError to KeyError
        raise TrainError(f"model: {path} does not load: {str(error).splitlines()[0]}") from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars: the run has its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
