"""Hugging Face transformers: a config that makes ``from_pretrained`` return a converted model.

    from_pretrained(folder, quantization_config=NVFP4TrainingConfig("quartet2"))
      -> empty model -> converted here -> checkpoint loaded as usual -> quantisation marks removed

The model that comes back is an ordinary one whose linear layers compute in NVFP4. To transformers
it is not quantised: its parameters are the checkpoint's, ``Trainer`` trains them without adapters,
and ``save_pretrained`` writes plain weights and no ``quantization_config``, so that whoever loads
them needs nothing but transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nvfp4.model.convert import convert
from nvfp4.recipes import Recipe, as_recipe

METHOD = "nvfp4_training"
"""The name in transformers; "nvfp4" alone means packed weights to those who serve models."""


@register_quantization_config(METHOD)
@dataclass
class NVFP4TrainingConfig(QuantizationConfigMixin):
    """``from_pretrained(..., quantization_config=NVFP4TrainingConfig("quartet2", ...))``.

    The fields are ``nvfp4.convert``'s arguments. recipe: a name, a ``Recipe`` or
    ``Recipe.to_dict()``; only the latter and names are kept, so that ``to_dict`` is ready for JSON.
    Raises ValueError for an unknown recipe or method.
    """

    recipe: str | Recipe | Mapping[str, Any] = "search_eden"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    keep_first: int | float = 0
    keep_last: int | float = 0
    backend: str = "auto"
    seed: int | None = None
    experts: bool = False
    strict: bool = False
    verbose: bool = True
    quant_method: str = field(default=METHOD, kw_only=True)  # type: ignore[assignment]  # theirs comes first

    def __post_init__(self) -> None:
        if self.quant_method != METHOD:
            raise ValueError(
                f"quant_method must be {METHOD!r}, got {self.quant_method!r}; leave it out"
            )
        if isinstance(self.recipe, Recipe):
            self.recipe = self.recipe.to_dict()
        self._recipe()

    def convert(self, model: nn.Module) -> nn.Module:
        """``nvfp4.convert(model, ...)`` with these arguments."""
        arguments = {name: value for name, value in asdict(self).items() if name != "quant_method"}
        return convert(model, **{**arguments, "recipe": self._recipe()})

    def _recipe(self) -> Recipe:
        return (
            Recipe.from_dict(self.recipe)
            if isinstance(self.recipe, Mapping)
            else as_recipe(self.recipe)
        )


@register_quantizer(METHOD)
class NVFP4TrainingQuantizer(HfQuantizer):
    """What ``from_pretrained`` calls: converts the empty model; weights load as usual."""

    quantization_config: NVFP4TrainingConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # before, because a device_map wraps the forward of each layer afterwards, and such a layer
        # would be kept
        return self.quantization_config.convert(model)

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Remove every mark of quantisation, on disk too, so that nothing demands adapters."""
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """True: weights are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: all parameters train."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: they train without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: as the plain model is."""
        return True
