"""NVFP4 training: drop-in linear layers, one definition of the numerics, exact on every machine.

import nvfp4

nvfp4.convert(model)                # nn.Linear -> NVFP4, in place, same parameters, same state_dict
print(nvfp4.report(model))          # what runs in which recipe on which backend, and why the rest was kept
q = nvfp4.quantize(x, "ms_eden", seed=1)
q.codes, q.block_scale, q.global_scale, q.dequantize()
"""

from typing import Any

from nvfp4.after_step import after_step
from nvfp4.backends.registry import BackendUnavailable
from nvfp4.convert import ConvertWarning, convert, disabled, forward_precision, revert, share_amax
from nvfp4.dense import dense_linears
from nvfp4.diagnostics import check, health, observe, report
from nvfp4.fusion import fuse, rms_norm_linear, swiglu_linear
from nvfp4.hadamard import Rotation, rotate
from nvfp4.linear import Linear
from nvfp4.ops import dequantize, explain, matmul, quantize
from nvfp4.qtensor import QTensor
from nvfp4.quantizers.registry import QUANTIZERS
from nvfp4.recipes import RECIPES, W4A16, Recipe
from nvfp4.weights import capturable, fixed_weights, invalidate, load_noise_state, noise_state

__version__ = "0.1.0"

__all__ = [
    "QUANTIZERS",
    "RECIPES",
    "W4A16",
    "BackendUnavailable",
    "ConvertWarning",
    "Linear",
    "NVFP4TrainingConfig",
    "QTensor",
    "Recipe",
    "Rotation",
    "after_step",
    "capturable",
    "check",
    "convert",
    "dense_linears",
    "dequantize",
    "disabled",
    "explain",
    "fixed_weights",
    "forward_precision",
    "fuse",
    "health",
    "info",
    "invalidate",
    "load_noise_state",
    "matmul",
    "noise_state",
    "observe",
    "quantize",
    "report",
    "revert",
    "rms_norm_linear",
    "rotate",
    "share_amax",
    "swiglu_linear",
]


def __getattr__(name: str) -> Any:
    if name == "info":  # on first use, so that `python -m nvfp4.info` does not find itself imported already
        from nvfp4.info import info

        globals()["info"] = info
        return info
    if name == "NVFP4TrainingConfig":  # on first use, because transformers takes seconds to import
        from nvfp4.integrations.transformers import NVFP4TrainingConfig

        globals()["NVFP4TrainingConfig"] = NVFP4TrainingConfig
        return NVFP4TrainingConfig
    raise AttributeError(f"module 'nvfp4' has no attribute {name!r}")
