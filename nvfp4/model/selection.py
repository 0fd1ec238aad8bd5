"""Which linear layer of a model is converted into which recipe, and why each of the others is kept.

A ``Policy`` is the arguments of ``convert``, checked; its ``plan`` looks at a model and changes nothing. The reasons
are the machine-readable words that ``report`` and ``check`` show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from nvfp4.layer.dense import DenseLinear
from nvfp4.layer.experts import STACKS, Experts, objection
from nvfp4.layer.linear import Linear
from nvfp4.numerics.torch_state import is_plain_parameter
from nvfp4.ops import INPUT_DTYPES
from nvfp4.recipes import Recipe, as_recipe

OUTPUT_NAMES = ("lm_head", "output", "head", "embed_out")
"""Last name part of an output embedding where the model does not say which it is."""

ALREADY, ON_PURPOSE = "already_converted", "bf16"

ModuleFilter = Callable[[nn.Module, str], bool]
Recipes = str | Recipe | Mapping[str, "str | Recipe"]
Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Decision:
    """What happens to one linear layer: either ``recipe`` or ``reason`` (to keep it) is None. names: all its paths."""

    module: nn.Linear
    names: tuple[str, ...]
    recipe: Recipe | None
    reason: str | None


@dataclass(frozen=True)
class ExpertsDecision:
    """The same of one module that holds stacked experts."""

    module: nn.Module
    names: tuple[str, ...]
    recipe: Recipe | None
    reason: str | None


@dataclass(frozen=True)
class Plan:
    """Every decision about a model, and what its owner should hear. not_linear: what no linear layer computes."""

    decisions: tuple[Decision, ...]
    kept_blocks: tuple[str, ...]
    not_linear: tuple[str, ...]
    complaints: tuple[str, ...]
    experts: tuple[ExpertsDecision, ...] = ()

    def summary(self) -> str:
        """One line: recipes, how many layers are converted, how many are kept by reason, and the blocks kept."""
        recipes = Counter(d.recipe.name for d in self.decisions if d.recipe is not None)
        counts = ", ".join(f"{name}: {count}" for name, count in recipes.most_common())
        extra = f"; not_linear: {', '.join(self.not_linear)}" if self.not_linear else ""
        blocks = f"; blocks kept: {', '.join(self.kept_blocks)}" if self.kept_blocks else ""
        by_recipe = f" ({counts})" if len(recipes) > 1 else ""
        if self.experts:
            done = sum(d.recipe is not None for d in self.experts)
            blocks = f"; experts: converted {done}, {_kept(self.experts)}{blocks}"
        return f"converted {recipes.total()}{by_recipe}, {_kept(self.decisions)}{extra}{blocks}"


@dataclass(frozen=True)
class _Facts:
    """What has to be known of the whole model before one of its layers can be judged."""

    kept_blocks: dict[str, str]
    output: frozenset[int]
    knows_output: bool
    embeddings: frozenset[int]
    bypassed: dict[int, str]


@dataclass(frozen=True)
class Policy:
    """Who is converted into what; made by ``make_policy``. recipes: by pattern, in order; None matches every layer."""

    recipes: tuple[tuple[str | None, Recipe], ...]
    filter_fn: ModuleFilter | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    keep_first: int | float
    keep_last: int | float
    experts: bool = False

    def plan(self, model: nn.Module) -> Plan:
        """Decide about every linear layer of ``model``, each once, in the order of the walk."""
        linears = _linears(model)
        stacks = _stacks(model) if self.experts else []
        names = [name for _, paths in (*linears, *stacks) for name in paths]
        ask = getattr(model, "get_output_embeddings", None)
        output = None if ask is None else ask()
        facts = _Facts(
            _kept_blocks(model, names, self.keep_first, self.keep_last),
            frozenset() if output is None else frozenset(map(id, output.modules())),  # PEFT wraps the layer
            ask is not None,
            frozenset(id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)),
            _bypassed(model),
        )
        decisions = tuple(self._decide(facts, module, paths) for module, paths in linears)
        experts = tuple(self._decide_experts(facts, module, paths) for module, paths in stacks)
        unfit = not_linear(model, {id(d.module) for d in experts if d.recipe is not None})
        complaints = [*self._unmatched(names), *_nothing_converted((*decisions, *experts), unfit)]
        return Plan(decisions, tuple(facts.kept_blocks), unfit, tuple(complaints), experts)

    def _decide(self, facts: _Facts, module: nn.Linear, paths: list[str]) -> Decision:
        """A layer with several names is converted only if every name is; the first pattern that fits any gives the
        recipe."""
        reasons = [self._reason_to_keep(facts, module, path) for path in paths]
        return Decision(module, tuple(paths), *self._verdict(paths, reasons))

    def _decide_experts(self, facts: _Facts, module: nn.Module, paths: list[str]) -> ExpertsDecision:
        """As for a layer, by the name of the module; ``filter_fn`` is not asked, which expects linears."""
        reasons = [objection(module) or self._left_out(facts, path) for path in paths]
        return ExpertsDecision(module, tuple(paths), *self._verdict(paths, reasons))

    def _verdict(self, paths: list[str], reasons: list[str | None]) -> tuple[Recipe | None, str | None]:
        reason = next((reason for reason in reasons if reason is not None), None)
        fitting = (r for glob, r in self.recipes if glob is None or any(matches(glob, path) for path in paths))
        recipe = next(fitting, None)
        if reason is None:
            reason = "no_recipe" if recipe is None else None if recipe.quantized else ON_PURPOSE
        return recipe if reason is None else None, reason

    def _reason_to_keep(self, facts: _Facts, module: nn.Linear, name: str) -> str | None:
        accepted = self.filter_fn is None or self.filter_fn(module, name)  # asked about every name, whatever else holds
        return _cannot(facts, module) or self._should_not(facts, module, name) or (None if accepted else "filter_fn")

    def _should_not(self, facts: _Facts, module: nn.Linear, name: str) -> str | None:
        if id(module.weight) in facts.embeddings:
            return "tied_to_embedding"
        if any(part.startswith("lora_") for part in name.split(".")):
            return "adapter"
        is_output = id(module) in facts.output if facts.knows_output else name.rpartition(".")[2] in OUTPUT_NAMES
        return self._left_out(facts, name, is_output)

    def _left_out(self, facts: _Facts, name: str, is_output: bool = False) -> str | None:
        if any(matches(pattern, name) for pattern in self.exclude):
            return "excluded"
        if self.include:
            if not any(matches(pattern, name) for pattern in self.include):
                return "not_included"
        elif is_output:
            return "output_embedding"
        return next((why for block, why in facts.kept_blocks.items() if f"{name}.".startswith(f"{block}.")), None)

    def _unmatched(self, names: list[str]) -> Iterator[str]:
        recipes = tuple(pattern for pattern, _ in self.recipes if pattern is not None)
        for argument, patterns in (("recipe", recipes), ("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(matches(pattern, name) for name in names):
                    yield f"{argument} {pattern!r} matches no linear layer; names look like {names[:3]}"


def make_policy(
    recipe: Recipes,
    filter_fn: ModuleFilter | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    keep_first: int | float = 0,
    keep_last: int | float = 0,
    experts: bool = False,
) -> Policy:
    """Check the arguments that ``convert`` and ``check`` share; ValueError or TypeError names the wrong one."""
    if isinstance(recipe, Mapping):
        wrong = next((pattern for pattern in recipe if not isinstance(pattern, str)), None)
        if wrong is not None:
            raise TypeError(f"recipe as a mapping goes from name patterns to recipes, got the pattern {wrong!r}")
        recipes: tuple[tuple[str | None, Recipe], ...] = tuple((glob, as_recipe(r)) for glob, r in recipe.items())
    else:
        recipes = ((None, as_recipe(recipe)),)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable as filter_fn(module, name), got {filter_fn!r}")
    for argument, value in (("keep_first", keep_first), ("keep_last", keep_last)):
        _check_share(argument, value)
    return Policy(recipes, filter_fn, _patterns(include), _patterns(exclude), keep_first, keep_last, experts)


def matches(pattern: str, name: str) -> bool:
    """Whether the dotted parts of the pattern match a run of whole parts of the dotted name."""
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatchcase(part, glob) for part, glob in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def not_linear(model: nn.Module, converted: Collection[int] = ()) -> tuple[str, ...]:
    """What multiplies by weights without being an ``nn.Linear``, counted: GPT-2's Conv1D, fused expert parameters.

    converted: modules, by id, that are about to be; experts that are already do not count either.
    """
    conv1d = sum(type(m).__name__ == "Conv1D" and _rank(getattr(m, "weight", None)) == 2 for m in model.modules())
    experts = 0
    for name, module in model.named_modules():
        done = isinstance(module, Experts) or id(module) in converted
        if not done and "expert" in f"{name} {type(module).__name__}".lower():
            experts += sum(_rank(parameter) == 3 for parameter in module.parameters(recurse=False))
    counted = ((conv1d, "Conv1D"), (experts, "3-D expert parameter"))
    return tuple(f"{what} x {count}" for count, what in counted if count)


def _rank(tensor: object) -> int | None:
    return tensor.dim() if isinstance(tensor, torch.Tensor) else None


def _stacks(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Each module with stacked experts once, with every dotted name that reaches it."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if all(_rank(getattr(module, stack, None)) == 3 for stack in STACKS):
            found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def _linears(model: nn.Module) -> list[tuple[nn.Linear, list[str]]]:
    """Each linear layer once, in the order of the walk, with every dotted name that reaches it."""
    found: dict[int, tuple[nn.Linear, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def _cannot(facts: _Facts, module: nn.Linear) -> str | None:
    if isinstance(module, Linear):
        return ALREADY
    if parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter):
        return "parametrized"  # also the older weight_norm, whose weight is computed by a hook
    if type(module) not in (nn.Linear, DenseLinear):
        return "subclass"
    if "forward" in vars(module):
        return "forward_replaced"
    if isinstance(module.weight, nn.UninitializedParameter):
        return "uninitialized"
    if not all(is_plain_parameter(parameter) for parameter in module.parameters(recurse=False)):
        return "tensor_subclass"
    if module.weight.dtype not in INPUT_DTYPES:
        return "dtype"
    if 0 in (module.in_features, module.out_features):  # a weight that is gathered when needed may be empty until then
        return "empty"
    return facts.bypassed.get(id(module))


def _bypassed(model: nn.Module) -> dict[int, str]:
    """Linears, by id, whose owner reads their weight and never calls them: converting them would change nothing.

    In eval mode ``nn.TransformerEncoderLayer`` hands its weights to one fused kernel, if its batch comes first and
    ``torch.backends.mha.set_fastpath_enabled(False)`` was not called; ``nn.MultiheadAttention`` always uses the weight.
    """
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            found[id(module.out_proj)] = "bypassed"
        if isinstance(module, nn.TransformerEncoderLayer) and _may_take_fast_path(module):
            found |= dict.fromkeys((id(module.linear1), id(module.linear2)), "fast_path")
    return found


def _may_take_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    torchs = type(layer).forward is nn.TransformerEncoderLayer.forward
    return torchs and layer.self_attn.batch_first and torch.backends.mha.get_fastpath_enabled()


def _nothing_converted(decisions: Sequence[Decision | ExpertsDecision], unfit: tuple[str, ...]) -> Iterator[str]:
    fine = {None, ALREADY, ON_PURPOSE}
    if not any(decision.reason in fine for decision in decisions):
        extra = f"; not_linear: {', '.join(unfit)}" if unfit else ""
        yield f"no layer was converted: the model has {len(decisions)} linear layers, {_kept(decisions)}{extra}"


def _kept(decisions: Sequence[Decision | ExpertsDecision]) -> str:
    kept = Counter(decision.reason for decision in decisions if decision.reason is not None)
    detail = ", ".join(f"{reason}: {count}" for reason, count in kept.most_common())
    return f"kept {kept.total()}" + (f" ({detail})" if detail else "")


def _kept_blocks(model: nn.Module, names: list[str], first: int | float, last: int | float) -> dict[str, str]:
    """Dotted names of the blocks to keep, with the reason.

    A stack is whatever has children named 0, 1, ..., be it a list, a Sequential or a dict; the outermost on the way to
    a linear counts, and of its blocks those that hold linears (an activation between them is no block).
    """
    if not first and not last:
        return {}
    stacks: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            stack = ".".join(parts[:depth])
            if part.isdecimal() and hasattr(model.get_submodule(stack), "0"):  # a later pipeline stage has no block 0
                stacks.setdefault(stack, set()).add(int(part))
                break
    if not stacks:
        raise ValueError(
            "keep_first and keep_last count numbered blocks (layers.0, h.1, ...), but no linear layer of the model is "
            "in one; name the layers to keep with exclude"
        )
    kept: dict[str, str] = {}
    for stack, numbers in stacks.items():
        blocks = [f"{stack}.{number}" if stack else str(number) for number in sorted(numbers)]
        kept |= dict.fromkeys(blocks[: _share(first, len(blocks))], "keep_first")
        kept |= dict.fromkeys(blocks[len(blocks) - _share(last, len(blocks)) :], "keep_last")
    return kept


def _check_share(name: str, value: int | float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < (1 if isinstance(value, float) else math.inf):
        raise ValueError(f"{name} must be a number of blocks (int >= 0) or a share (0 <= float < 1), got {value!r}")


def _share(value: int | float, count: int) -> int:
    # the share is a decimal number in the user's mind: 0.28 of 25 blocks is 7, though 0.28 * 25 > 7 in binary
    return min(count, value if isinstance(value, int) else math.ceil(round(value * count, 9)))


def _patterns(patterns: Patterns) -> tuple[str, ...]:
    found = () if patterns is None else patterns if isinstance(patterns, Sequence) else (patterns,)
    found = (found,) if isinstance(found, str) else tuple(found)
    wrong = next((pattern for pattern in found if not isinstance(pattern, str)), None)
    if wrong is not None:
        raise TypeError(f"include and exclude take names with globs, such as 'layers.0', got {wrong!r}")
    return found
