"""In which precision each part of a run's model computes.

    conversion          the linears that the recipe converts: NVFP4
    without_emulation   on a CPU without BF16 instructions the rest, the output embedding and
                        attention: float32 sums, rounded once

On such a CPU torch emulates BF16 products. The product of two BF16 numbers is exact in float32, so
summing in float32 and rounding once is the same arithmetic, only faster. Forward and backward of
one attention layer with 8 x 2 heads, 128 tokens and 64 columns took

    AVX2      13 ms in BF16, 3.6 ms in float32, 3.9 ms as below
    AVX-512    9.2            3.4                4.0
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from nvfp4.backends.native.cpu import EMULATED
from nvfp4.backends.registry import BackendUnavailable
from nvfp4.model.plain import dense_linears
from nvfp4.model.selection import ConvertWarning
from nvfp4.recipes import Recipe
from nvfp4.run.attention import register_attention
from nvfp4.run.errors import TrainError
from nvfp4.run.options import QuantOptions

NAME = "nvfp4_float32"
"""Name in transformers of sdpa attention with float32 sums."""


@contextmanager
def conversion(recipe: Recipe, options: QuantOptions, verbose: bool) -> Iterator[dict[str, Any]]:
    """What a run tells ``convert``: its keywords but for ``seed``, to be called within.

    The recipe is among them, with delayed amaxes if ``options`` ask for these.

    verbose: say which linears are converted, and warn of those that cannot be. ``TrainError`` for
    options that do not fit, and for a recipe that quantises and finds nothing to quantise.
    """
    # A recipe without quantisation keeps every layer, of which nobody needs to be warned.
    with warnings.catch_warnings():
        warnings.simplefilter(
            "default" if recipe.quantized and verbose else "ignore", ConvertWarning
        )
        try:
            if options.delayed_amax and recipe.quantized:
                recipe = recipe.with_delayed_amax()
            yield {
                "recipe": recipe,
                "include": options.include or None,
                "exclude": options.exclude or None,
                "keep_first": options.keep_first,
                "keep_last": options.keep_last,
                "backend": options.backend,
                "strict": recipe.quantized,  # a run that is called NVFP4 must be
                "verbose": verbose,
            }
        except (ValueError, BackendUnavailable) as error:
            raise TrainError(f"recipe {recipe.name}: {error}") from error


def without_emulation(model: PreTrainedModel, device: torch.device, dtype: str) -> list[str]:
    """Compute the high-precision parts of ``model`` with float32 sums where this CPU emulates BF16.

    In place, of a converted model; nothing for another ``device``, or for a ``dtype`` of the config
    other than bf16. An attention other than sdpa stays as it is. Returns what was changed and why,
    a line for the user, or nothing.
    """
    if device.type != "cpu" or dtype != "bf16" or torch.bfloat16 not in EMULATED:
        return []

    # Linears that were converted see to it themselves; these are the rest.
    linears = dense_linears(model)
    if model.config._attn_implementation == "sdpa":
        register_attention(NAME, torch.float32)
        model.set_attn_implementation(NAME)
    return [
        f"this processor has no BF16 instructions: {len(linears)} linears in high precision, and "
        "attention, "
        f"multiply BF16 numbers in float32 and round once"
    ]
