"""The plain linears of a model, which stay in high precision: faster where torch emulates them.

A processor without BF16 instructions makes torch emulate BF16 linears, 5 to 40 times slower than
float32 (``layer/dense.py``, which computes them at float32's speed). ``dense_linears`` lets the
plain linears of a model compute that way; ``slow_linears`` says that some do not.
"""

from __future__ import annotations

from torch import nn

from nvfp4.backends.native.cpu import INSTRUCTIONS
from nvfp4.layer.dense import DenseLinear, is_emulated
from nvfp4.model.reclass import reclass, restore


def dense_linears(model: nn.Module, enabled: bool = True) -> list[str]:
    """Let the plain linears of ``model`` multiply by ``affine``, or no longer; returns their names.

    For what stays in high precision, such as the output embedding, and for models in BF16 without
    any recipe, on a processor without BF16 instructions. Changes the class of each ``nn.Linear`` in
    place, and nothing else; its subclasses are left alone. On any other device and dtype the layers
    then compute as before. ``nvfp4.convert`` converts them like any other, before or after.
    """
    # the class to the letter: a subclass has a forward of its own
    before = nn.Linear if enabled else DenseLinear
    linears = {name: module for name, module in model.named_modules() if type(module) is before}
    for module in linears.values():
        if enabled:
            reclass(module, DenseLinear)
        else:
            restore(module)
    return list(linears)


def slow_linears(model: nn.Module) -> str | None:
    """One line on the plain linears whose products torch emulates here, or None."""
    slow = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and is_emulated(module.weight)
    ]
    if not slow:
        return None
    dtype = str(slow[0].weight.dtype).removeprefix("torch.")
    names = ", ".join(INSTRUCTIONS[slow[0].weight.dtype])
    return (
        f"{len(slow)} linears stay torch's, which emulates {dtype} on a processor without {names}, "
        "many times slower than float32: nvfp4.dense_linears(model) computes them as fast as "
        "float32"
    )
