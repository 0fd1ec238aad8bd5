"""after_step: weights are quantised right after the optimiser changed them, so that no forward pays for it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from nvfp4.layer.shared_amax import SharedAmax
from nvfp4.model.weights import Stored, stored_weights


class AfterStep:
    """What ``after_step`` set up; ``remove``, or leaving it as a context, ends it."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._weights = list(stored_weights(model).values())
        self._mine = [stored for stored in self._weights if not stored.state.keeps_weight]
        for stored in self._mine:
            stored.state.keeps_weight = stored.state.renews_weight = True
        self._hook = optimizer.register_step_post_hook(self._stepped)
        self.renew()

    def renew(self) -> None:
        """Quantise every weight now: after a write that leaves no trace (through ``.data``, by a custom kernel)."""
        _quantize(self._weights)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        changed = {id(p) for group in optimizer.param_groups for p in group["params"]}  # read now: groups may be added
        _quantize([stored for stored in self._weights if id(stored.weight) in changed])

    def remove(self) -> None:
        """Forward passes quantise their weights again; what was kept is forgotten."""
        self._hook.remove()
        for stored in self._mine:
            stored.state.keeps_weight = stored.state.renews_weight = False
            stored.state.weight_codes = None
            if stored.state.shared is not None:
                stored.state.shared.forget()
        self._mine = []

    def __enter__(self) -> AfterStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def after_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> AfterStep:
    """Quantise the converted weights of ``model`` now and at the end of every ``optimizer.step()``, not in forwards.

    No result changes, whatever the recipe. It saves what forwards would spend: the quantisation where codes cannot be
    kept otherwise (on a GPU each forward quantises), on the CPU the look at every byte; with accumulation, of each
    micro-batch. The price is the codes between steps, 4.5 bits a weight. A skipped step (``GradScaler``) costs nothing.

    Weights changed in between are noticed as in ``fixed_weights``: ``load_state_dict`` and other in-place operations
    are, replaced memory is; writes through ``.data``, by a custom kernel or by the step of another fused optimizer are
    not: call ``renew`` of what is returned, or ``nvfp4.invalidate``, or hand each optimizer in. Layers converted later
    need a call of their own. Operands with noise, torch.distributed and compiled graphs quantise in the forward as
    ever. ``remove()``, or leaving ``with after_step(...):``, ends it.
    Raises TypeError for an optimizer without step hooks, such as accelerate's wrapper: give the one inside.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer with step hooks, got {type(optimizer).__name__}")
    return AfterStep(optimizer, model)


def _quantize(weights: list[Stored]) -> None:
    """All magnitudes that layers share are forgotten first: a fused step leaves no trace on any of them."""
    groups: dict[int, SharedAmax] = {id(s.state.shared): s.state.shared for s in weights if s.state.shared is not None}
    for shared in groups.values():
        shared.forget()
    for stored in weights:
        if not stored.weight.is_meta:
            stored.state.renew(stored.weight)
