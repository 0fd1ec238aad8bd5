"""Lightning Fabric: a precision plugin that converts what ``fabric.setup`` is given.

    fabric = Fabric(plugins=NVFP4Precision("search_eden", device="cuda", exclude=["layers.0"]))
    model, optimizer = fabric.setup(model, optimizer)

Fabric asks its precision plugin for the model before it moves and wraps it, which is the right
moment to convert: parameters stay the same objects, so an optimizer that was made before still
holds them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from nvfp4.model.convert import convert
from nvfp4.recipes import Recipe

# Fabric comes within ``lightning`` and as ``lightning-fabric``; each has classes of its own and
# refuses the other's
_FABRIC = "lightning.fabric" if find_spec("lightning") else "lightning_fabric"
_MixedPrecision: Any = import_module(f"{_FABRIC}.plugins.precision").MixedPrecision


class NVFP4Precision(_MixedPrecision):
    """NVFP4 linear layers; the rest under autocast, as in Fabric's own mixed precision.

    recipe, options: ``nvfp4.convert``'s. device: where autocast applies, "cpu" or "cuda".
    precision: "bf16-mixed", or "16-mixed", which brings a gradient scaler. For weights in bfloat16
    convert the model yourself and let Fabric have ``precision="bf16-true"``. The optimizer may be
    made before or after, since parameters stay the same.
    """

    def __init__(
        self,
        recipe: str | Recipe = "search_eden",
        *,
        device: str,
        precision: str = "bf16-mixed",
        **options: Any,
    ) -> None:
        super().__init__(precision, device)
        self.recipe, self.options = recipe, options

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Called by ``fabric.setup``; layers that were converted before keep their recipe."""
        return convert(module, self.recipe, **self.options)
