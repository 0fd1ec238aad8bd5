"""convert: turn the linear layers of a model into NVFP4 ones, in place, by policy; and back.

A layer keeps its identity: only its class and one attribute change. So parameters, optimisers made before, hooks,
aliases and ties stay as they were, and no weight is copied.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from nvfp4.backends.registry import AUTO, check_backend
from nvfp4.linear import Linear, LinearState, layers
from nvfp4.noise import Noise
from nvfp4.ops import INPUT_DTYPES
from nvfp4.recipes import Recipe, as_recipe
from nvfp4.rng import check_seed

OUTPUT_NAMES = ("lm_head", "output", "head", "embed_out")
"""Last name part of an output embedding where the model does not say which it is."""

ModuleFilter = Callable[[nn.Module, str], bool]


class ConvertWarning(UserWarning):
    """A conversion that did less than its arguments suggest: a name that matches nothing, or no layer converted."""


@dataclass(frozen=True)
class _Policy:
    """Who is converted; the reasons are the machine-readable words that ``report`` shows."""

    filter_fn: ModuleFilter | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    kept_blocks: dict[str, str]
    output: nn.Module | None
    knows_output: bool
    embeddings: frozenset[int]

    def reason_to_keep(self, module: nn.Linear, name: str) -> str | None:
        """Why this layer stays as it is, or None if it is to be converted."""
        accepted = self.filter_fn is None or self.filter_fn(module, name)
        return self._cannot(module) or self._should_not(module, name) or (None if accepted else "filter_fn")

    def _cannot(self, module: nn.Linear) -> str | None:
        if isinstance(module, Linear):
            return "already_converted"
        if parametrize.is_parametrized(module):
            return "parametrized"
        if type(module) is not nn.Linear:
            return "subclass"
        if "forward" in vars(module):
            return "forward_replaced"
        if module.weight.dtype not in INPUT_DTYPES:
            return "dtype"
        if isinstance(module.weight, nn.UninitializedParameter):
            return "uninitialized"
        return "empty" if module.weight.numel() == 0 else None

    def _should_not(self, module: nn.Linear, name: str) -> str | None:
        if id(module.weight) in self.embeddings:
            return "tied_to_embedding"
        if any(part.startswith("lora_") for part in name.split(".")):
            return "adapter"
        if any(_matches(pattern, name) for pattern in self.exclude):
            return "excluded"
        if self.include:
            if not any(_matches(pattern, name) for pattern in self.include):
                return "not_included"
        elif self._is_output(module, name):
            return "output_embedding"
        return next((why for block, why in self.kept_blocks.items() if f"{name}.".startswith(f"{block}.")), None)

    def _is_output(self, module: nn.Linear, name: str) -> bool:
        return module is self.output if self.knows_output else name.rpartition(".")[2] in OUTPUT_NAMES


def convert(
    model: nn.Module,
    recipe: str | Recipe = "search_eden",
    *,
    filter_fn: ModuleFilter | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    keep_first: int | float = 0,
    keep_last: int | float = 0,
    backend: str = AUTO,
    seed: int | None = None,
    strict: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """Make the linear layers of ``model`` compute in NVFP4; changes it in place and returns the same object.

    recipe: a name (bf16, rtn, nvidia, four_over_six, tetrajet2, quartet2, search_eden, rl) or a ``Recipe``.
    filter_fn(module, name): convert only where it returns True; called once per dotted name of every linear.
    include, exclude: globs over whole dotted name parts: "layers.1" matches "model.layers.1.mlp.up", never "layers.10".
    ``include`` also overrules the default of keeping the output embedding. keep_first, keep_last: numbered blocks left
    alone at either end of each stack, a count or, if a float below 1, a share rounded up. backend: "auto" or a name.
    seed: of all noise, in [0, 2^64); by default the one given to ``torch.manual_seed``. strict: raise ValueError where
    there would be a warning. verbose: print a one-line summary.

    Kept as they are, with the reason in ``nvfp4.report``: the output embedding, layers tied to an embedding, subclasses
    of nn.Linear, parametrised layers, LoRA adapters, other dtypes, replaced forwards. Converting twice changes nothing.
    Raises ValueError for unknown names, ``BackendUnavailable`` with the reason for a backend that cannot run here.
    """
    chosen = as_recipe(recipe)
    check_backend(backend, _device(model))
    seed = torch.initial_seed() % 2**64 if seed is None else check_seed(seed)
    linears = _linears(model)
    names = [name for _, paths in linears for name in paths]
    policy = _policy(model, names, filter_fn, _patterns(include), _patterns(exclude), keep_first, keep_last)
    _complain(_unmatched(policy, names), strict)
    reasons = [_first_reason(policy, module, paths) for module, paths in linears]  # all decided before any is changed
    if None not in reasons and "already_converted" not in reasons:
        _complain([f"no layer was converted: the model has {len(linears)} linear layers, {_count(reasons)}"], strict)
    index = 1 + max((layer.nvfp4.noise.layer for layer in layers(model).values()), default=-1)
    for (module, _), reason in zip(linears, reasons, strict=True):
        if reason is None:
            if chosen.quantized:
                module.__class__ = Linear
                module.nvfp4 = LinearState(chosen, Noise(seed, index), backend)  # type: ignore[assignment]
                vars(module).pop("nvfp4_kept", None)
                index += 1
        elif reason != "already_converted":
            module.nvfp4_kept = reason  # type: ignore[assignment]
    if verbose:
        print(_summary(chosen, reasons, policy.kept_blocks))
    return model


def revert(model: nn.Module) -> nn.Module:
    """Turn converted layers back into plain ``nn.Linear``s with the same parameters; in place, returns ``model``."""
    for module in model.modules():
        vars(module).pop("nvfp4_kept", None)
        if isinstance(module, Linear):
            del module.nvfp4
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the converted layers of ``model`` compute as plain ``nn.Linear``s, e.g. to evaluate."""
    before = [(layer.nvfp4, layer.nvfp4.enabled) for layer in layers(model).values()]
    for state, _ in before:
        state.enabled = False
    try:
        yield model
    finally:
        for state, enabled in before:
            state.enabled = enabled


def _linears(model: nn.Module) -> list[tuple[nn.Linear, list[str]]]:
    """Each linear layer once, in the order of the walk, with every dotted name that reaches it."""
    found: dict[int, tuple[nn.Linear, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def _policy(
    model: nn.Module,
    names: list[str],
    filter_fn: ModuleFilter | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    keep_first: int | float,
    keep_last: int | float,
) -> _Policy:
    ask = getattr(model, "get_output_embeddings", None)
    embeddings = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    return _Policy(
        filter_fn,
        include,
        exclude,
        _kept_blocks(model, names, keep_first, keep_last),
        ask() if ask is not None else None,
        ask is not None,
        frozenset(id(weight) for weight in embeddings),
    )


def _first_reason(policy: _Policy, module: nn.Linear, paths: list[str]) -> str | None:
    """A layer with several names is converted only if every name is."""
    reasons = [policy.reason_to_keep(module, path) for path in paths]
    return next((reason for reason in reasons if reason is not None), None)


def _kept_blocks(model: nn.Module, names: list[str], first: int | float, last: int | float) -> dict[str, str]:
    """Dotted names of the blocks to keep, with the reason; a stack is an outermost ModuleList that holds linears."""
    first_check, last_check = _check_share("keep_first", first), _check_share("keep_last", last)
    if not first_check and not last_check:
        return {}
    stacks: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside = any(not prefix or f"{name}.".startswith(f"{prefix}.") for prefix, _ in stacks)
        if isinstance(module, nn.ModuleList) and not inside and any(_under(name, linear) for linear in names):
            stacks.append((name, module))
    if not stacks:
        raise ValueError("keep_first and keep_last count the blocks of an nn.ModuleList, but the model has none")
    kept: dict[str, str] = {}
    for name, stack in stacks:
        blocks = [f"{name}.{i}" if name else str(i) for i in range(len(stack))]
        kept |= dict.fromkeys(blocks[: _share(first, len(blocks))], "keep_first")
        kept |= dict.fromkeys(blocks[len(blocks) - _share(last, len(blocks)) :], "keep_last")
    return kept


def _check_share(name: str, value: int | float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < (1 if isinstance(value, float) else math.inf):
        raise ValueError(f"{name} must be a number of blocks (int >= 0) or a share (0 <= float < 1), got {value!r}")
    return value > 0


def _share(value: int | float, count: int) -> int:
    # the share is a decimal number in the user's mind: 0.28 of 25 blocks is 7, though 0.28 * 25 > 7 in binary
    return min(count, value if isinstance(value, int) else math.ceil(round(value * count, 9)))


def _under(prefix: str, name: str) -> bool:
    return not prefix or f"{name}.".startswith(f"{prefix}.")


def _patterns(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if patterns is None else (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(pattern: str, name: str) -> bool:
    """Whether the parts of the pattern match a run of whole parts of the dotted name."""
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatchcase(part, glob) for part, glob in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def _unmatched(policy: _Policy, names: list[str]) -> list[str]:
    return [
        f"{argument} {pattern!r} matches no linear layer; names look like {names[:3]}"
        for argument, patterns in (("include", policy.include), ("exclude", policy.exclude))
        for pattern in patterns
        if not any(_matches(pattern, name) for name in names)
    ]


def _complain(messages: list[str], strict: bool) -> None:
    for message in messages:
        if strict:
            raise ValueError(message)
        warnings.warn(message, ConvertWarning, stacklevel=3)


def _count(reasons: list[str | None]) -> str:
    kept = Counter(reason for reason in reasons if reason is not None)
    detail = ", ".join(f"{reason}: {count}" for reason, count in kept.most_common())
    return f"kept {sum(kept.values())}" + (f" ({detail})" if detail else "")


def _summary(recipe: Recipe, reasons: list[str | None], kept_blocks: dict[str, str]) -> str:
    blocks = f"; blocks kept: {', '.join(kept_blocks)}" if kept_blocks else ""
    converted = reasons.count(None) if recipe.quantized else 0
    return f"nvfp4: recipe {recipe.name}, converted {converted}, {_count(reasons)}{blocks}"


def _device(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter lives; None (not known yet) for meta or no parameters."""
    parameter = next(model.parameters(), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device
