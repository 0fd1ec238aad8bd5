"""Change what a module computes, in place: its class becomes a subclass of what it was.

Nothing else changes, so parameters, optimisers made before, hooks, aliases, ties, ``state_dict``
and ``isinstance`` stay as they were, and no weight is copied. ``convert`` (of stacked experts too),
``fuse`` and ``dense_linears`` all change modules this way:

    reclass(module, Linear)    nn.Linear has one subclass for it: the module becomes that
    reclass(module, Experts)   MixtralExperts has none: a class (Experts, MixtralExperts) is made,
                               one for all such modules; copies and pickles make it again where
                               they are read
    restore(module)            the class is again what it was

A class that ``reclass`` gave has ``original``, the class before. A class that is derived from it
later, as ``fully_shard`` does with a module that it is called on, only inherits that, and cannot be
restored.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def reclass(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let ``module`` compute as ``kind`` says.

    kind: a subclass of its class that has ``original``, or a class to be mixed in.
    """
    now: type[nn.Module] = type(module)
    assert not can_restore(module), "restore it first: a class is changed once"
    module.__class__ = kind if issubclass(kind, now) else _mixed(kind, now)


def restore(module: nn.Module) -> None:
    """The inverse of ``reclass``."""
    module.__class__ = vars(type(module))["original"]


def can_restore(module: nn.Module) -> bool:
    """Whether the module's class is the one that ``reclass`` gave it."""
    return "original" in vars(type(module))


_MIXED: dict[tuple[Any, Any], type[nn.Module]] = {}
"""The classes made so far: always the same one, so that copies and pickles find it."""


def _mixed(kind: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
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
    made = _mixed(kind, original)
    return made.__new__(made)
