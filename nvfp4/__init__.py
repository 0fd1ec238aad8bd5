"""NVFP4 training: drop-in linear layers, one definition of the numerics, exact on every machine.

    import nvfp4

    nvfp4.convert(model)          # nn.Linear -> NVFP4, in place, same parameters and state_dict
    print(nvfp4.report(model))    # what runs in which recipe, on which backend; what not, and why

    q = nvfp4.quantize(x, "ms_eden", seed=1)
    q.codes, q.block_scale, q.global_scale, q.dequantize()

This file is the face of the package and defines nothing: the names below come from the rooms of
``docs/architecture.md``. What takes long to import (transformers, torch's tensors over processes)
is imported when its name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import nvfp4.backends.builtin  # noqa: F401 - they enter the table of the registry
from nvfp4.backends.registry import BackendUnavailable
from nvfp4.extras import installed_version, what_to_install
from nvfp4.layer.linear import Linear
from nvfp4.model.amax import amax_state, load_amax_state
from nvfp4.model.convert import convert, revert
from nvfp4.model.fuse import fuse, rms_norm_linear, swiglu_linear
from nvfp4.model.health import health, observe
from nvfp4.model.noise import load_noise_state, noise_state
from nvfp4.model.plain import dense_linears
from nvfp4.model.report import check, report
from nvfp4.model.selection import ConvertWarning
from nvfp4.model.switches import capturable, disabled, forward_precision, share_amax
from nvfp4.model.weights import after_step, fixed_weights, invalidate
from nvfp4.numerics.hadamard import Rotation, rotate
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import dequantize, explain, matmul, quantize
from nvfp4.quantizers.registry import QUANTIZERS
from nvfp4.recipes import RECIPES, W4A16, Recipe

if TYPE_CHECKING:  # what __getattr__ imports on first use
    from nvfp4.backends.machine import info
    from nvfp4.integrations.transformers import NVFP4TrainingConfig
    from nvfp4.model.distributed import expert_parallel, fp4_all_gather, share_noise

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
    "amax_state",
    "capturable",
    "check",
    "convert",
    "dense_linears",
    "dequantize",
    "disabled",
    "expert_parallel",
    "explain",
    "fixed_weights",
    "forward_precision",
    "fp4_all_gather",
    "fuse",
    "health",
    "info",
    "invalidate",
    "load_amax_state",
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
    "share_noise",
    "swiglu_linear",
]


def __getattr__(name: str) -> Any:
    lazy = {
        # so that `python -m nvfp4.backends.machine` does not find itself imported already
        "info": "nvfp4.backends.machine",
        # these take a part of a second to import, and transformers takes several
        "expert_parallel": "nvfp4.model.distributed",
        "fp4_all_gather": "nvfp4.model.distributed",
        "share_noise": "nvfp4.model.distributed",
        "NVFP4TrainingConfig": "nvfp4.integrations.transformers",
    }
    if name == "__version__":
        return installed_version()
    if name not in lazy:
        raise AttributeError(f"module 'nvfp4' has no attribute {name!r}")
    try:
        globals()[name] = getattr(import_module(lazy[name]), name)
    except ModuleNotFoundError as error:
        line = what_to_install(error, f"nvfp4.{name}")
        if line is None:
            raise
        raise ModuleNotFoundError(line, name=error.name) from error
    return globals()[name]
