"""Change what a module computes, in place: its class becomes a subclass of what it was.

Nothing else changes, so parameters, optimisers made before, hooks, aliases, ties, ``state_dict``
and ``isinstance`` stay as they were, and no weight is copied. ``convert`` (of stacked experts too),
``fuse`` and ``dense_linears`` all change modules this way:

    reclass(module, Linear)    nn.Linear has one subclass for it: the module becomes that
    reclass(module, Experts)   MixtralExperts has none: a class (Experts, MixtralExperts) is made,
                               one for all such modules; copies and pickles make it again where
                               they are read
    restore(module)            the class is again what it was
    unfuse(model)              so are those that ``fuse`` gave (``FusedModule``); for a while they
                               can also compute as before (``without_fusion``)

A class that ``reclass`` gave has ``original``, the class before. A class that is derived from it
later, as ``fully_shard`` does with a module that it is called on, only inherits that, and cannot be
restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def reclass(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let ``module`` compute as ``kind`` says.

    kind: a subclass of its class that has ``original``, or a class to be mixed in.
    """
    now: type[nn.Module] = type(module)
    assert not can_restore(module), "restore it first: a class is changed once"
    module.__class__ = kind if issubclass(kind, now) else _mix(kind, now)


def restore(module: nn.Module) -> None:
    """The inverse of ``reclass``."""
    module.__class__ = vars(type(module))["original"]


def can_restore(module: nn.Module) -> bool:
    """Whether the module's class is the one that ``reclass`` gave it."""
    return "original" in vars(type(module))


_MIXED: dict[tuple[Any, Any], type[nn.Module]] = {}
"""The classes made so far: always the same one, so that copies and pickles find it."""


def _mix(kind: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of both, ``kind`` first."""
    if (kind, original) not in _MIXED:
        # under the module of the class before, where people look for it
        members = {
            "original": original,
            "__module__": original.__module__,
            "__doc__": kind.__doc__,
            "__reduce_ex__": _reduce,
        }
        _MIXED[kind, original] = type(f"NVFP4{original.__name__}", (kind, original), members)
    return _MIXED[kind, original]


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """For copies and pickles: a class that was made at run time is found by what it was made of."""
    # a class derived from ours, as ``fully_shard`` makes one, is somebody else's to find
    made = type(module)
    if "original" not in vars(made):
        return nn.Module.__reduce_ex__(module, protocol)

    # the two classes, and the attributes
    kind, original = made.__bases__
    state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module).copy()
    return _empty, (kind, original), state


def _empty(kind: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    """A module without attributes, which copy and pickle fill."""
    made = _mix(kind, original)
    return made.__new__(made)


class FusedModule(nn.Module):
    """What fused modules have in common: ``nvfp4_fused`` is False while they compute as before."""

    nvfp4_fused = True


def unfuse(model: nn.Module) -> dict[str, str]:
    """``fuse(model, False)``: all is checked before anything is changed."""
    fused = {
        name: module for name, module in model.named_modules() if isinstance(module, FusedModule)
    }
    # ``fully_shard`` on the module itself derives another class from it
    for name, module in fused.items():
        if not can_restore(module):
            raise RuntimeError(
                f"{name} has become a {type(module).__name__}: call nvfp4.fuse(model, False) "
                "before fully_shard (or parametrize), or shard the blocks that hold the module"
            )
    for module in fused.values():
        vars(module).pop("nvfp4_fused", None)
        restore(module)
    return dict.fromkeys(fused, "separated")


@contextmanager
def without_fusion(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the fused modules of ``model`` compute as they did before ``fuse``."""
    # those that are off already stay so when the context ends
    changed = [
        module
        for module in model.modules()
        if isinstance(module, FusedModule) and module.nvfp4_fused
    ]
    for module in changed:
        module.nvfp4_fused = False
    try:
        yield model
    finally:
        for module in changed:
            module.nvfp4_fused = True
