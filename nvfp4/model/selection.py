"""Which linear layer of a model is converted into which recipe, and why each of the others is kept.

``Selection`` is the arguments of ``convert``, checked; its ``plan`` looks at a model and changes
nothing:

    1  every linear once, with all of its dotted names; with experts=True stacked experts as well
    2  facts about the whole model: the blocks that keep_first and keep_last name, the output
       embedding, ties
    3  a decision about each: a recipe, or the reason to keep it, the first that holds of
           cannot be    parametrised, a subclass, another dtype, a forward that was replaced, ...
           should not   tied to an embedding, an adapter, excluded, not included, the output
                        embedding, in a kept block
           need not     filter_fn said no; no pattern of the recipe fits; the recipe is bf16
    4  what the owner should hear: patterns that match nothing, no layer at all, and what multiplies
       by weights without being a linear layer

The reasons are the machine-readable words that ``report`` and ``check`` show.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

from torch import nn

from nvfp4.model.convertible import (
    ALREADY,
    bypass_reasons,
    has_stacks,
    is_linear,
    not_linear,
    why_not_experts,
    why_not_linear,
)
from nvfp4.recipes import Recipe, as_recipe

OUTPUT_NAMES = ("lm_head", "output", "head", "embed_out")
"""Last name part of an output embedding where the model does not say which it is."""

ON_PURPOSE = "bf16"

ModuleFilter = Callable[[nn.Module, str], bool]
Recipes = str | Recipe | Mapping[str, "str | Recipe"]
Patterns = str | Sequence[str] | None


Module = TypeVar("Module", bound=nn.Module)


class ConvertWarning(UserWarning):
    """A conversion that did less than asked: a name matches nothing, or no layer was converted."""


@dataclass(frozen=True)
class Decision(Generic[Module]):
    """What happens to one module: either a recipe, or the reason to keep it; the other is None.

    names: all its paths.
    """

    module: Module
    names: tuple[str, ...]
    recipe: Recipe | None
    reason: str | None


@dataclass(frozen=True)
class ConversionPlan:
    """Every decision about a model, and what its owner should hear.

    not_linear: what multiplies by weights and is no linear layer. complaints: what the arguments
    got wrong.
    """

    decisions: tuple[Decision[nn.Linear], ...]
    kept_blocks: tuple[str, ...]
    not_linear: tuple[str, ...]
    complaints: tuple[str, ...]
    experts: tuple[Decision[nn.Module], ...] = ()

    def summary(self) -> str:
        """One line: recipes, number converted, number kept by reason, blocks kept."""
        # each part only where there is something to say
        recipes = Counter(d.recipe.name for d in self.decisions if d.recipe is not None)
        counts = ", ".join(f"{name}: {count}" for name, count in recipes.most_common())
        extra = f"; not_linear: {', '.join(self.not_linear)}" if self.not_linear else ""
        blocks = f"; blocks kept: {', '.join(self.kept_blocks)}" if self.kept_blocks else ""
        by_recipe = f" ({counts})" if len(recipes) > 1 else ""
        if self.experts:
            done = sum(d.recipe is not None for d in self.experts)
            blocks = f"; experts: converted {done}, {_count_kept(self.experts)}{blocks}"
        return (
            f"converted {recipes.total()}{by_recipe}, {_count_kept(self.decisions)}{extra}{blocks}"
        )

    def complain(self, strict: bool, stacklevel: int = 3) -> None:
        """Warn of what is wrong with the arguments, or raise ValueError if strict.

        What no argument can change is a warning either way.
        """
        for message in self.complaints:
            if strict:
                raise ValueError(message)
            warnings.warn(message, ConvertWarning, stacklevel=stacklevel)

        # experts that stay in high precision hold most weights of such a model
        experts = next((kind for kind in self.not_linear if "expert" in kind), None)
        if experts is not None:
            why = ", ".join(
                sorted(
                    {decision.reason for decision in self.experts if decision.reason is not None}
                )
            )
            hint = f" ({why})" if self.experts else "; experts=True converts those it knows"
            message = (
                f"{experts}: fused experts are no linear layers and stay in high precision{hint}"
            )
            warnings.warn(message, ConvertWarning, stacklevel=stacklevel)


@dataclass(frozen=True)
class _Facts:
    """What has to be known of the whole model before one of its layers can be judged.

    kept_blocks: dotted names, with the reason. output: the output embedding's modules, by id;
    knows_output: whether the model says which that is. embeddings: weights of embeddings, by id.
    bypassed: linears that their owner never calls, by id, with the reason.
    """

    kept_blocks: dict[str, str]
    output: frozenset[int]
    knows_output: bool
    embeddings: frozenset[int]
    bypassed: dict[int, str]


@dataclass(frozen=True)
class Selection:
    """Who is converted into what; made by ``Selection.of``.

    recipes: by pattern, in order; None matches every layer.
    """

    recipes: tuple[tuple[str | None, Recipe], ...]
    filter_fn: ModuleFilter | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    keep_first: int | float
    keep_last: int | float
    experts: bool = False

    @classmethod
    def of(
        cls,
        recipe: Recipes,
        filter_fn: ModuleFilter | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        keep_first: int | float = 0,
        keep_last: int | float = 0,
        experts: bool = False,
    ) -> Selection:
        """Check the arguments of ``convert`` and ``check``; an error names the wrong one."""
        # recipes by pattern, or one for all
        if isinstance(recipe, Mapping):
            wrong = next((pattern for pattern in recipe if not isinstance(pattern, str)), None)
            if wrong is not None:
                raise TypeError(
                    f"recipe goes from name patterns to recipes, got the pattern {wrong!r}"
                )
            recipes: tuple[tuple[str | None, Recipe], ...] = tuple(
                (glob, as_recipe(r)) for glob, r in recipe.items()
            )
        else:
            recipes = ((None, as_recipe(recipe)),)

        if filter_fn is not None and not callable(filter_fn):
            raise TypeError(
                f"filter_fn must be callable as filter_fn(module, name), got {filter_fn!r}"
            )
        for argument, value in (("keep_first", keep_first), ("keep_last", keep_last)):
            _check_share(argument, value)
        return cls(
            recipes,
            filter_fn,
            _patterns(include),
            _patterns(exclude),
            keep_first,
            keep_last,
            experts,
        )

    def plan(self, model: nn.Module) -> ConversionPlan:
        """Decide about every linear layer of ``model``, each once, in the order of the walk."""
        linears = _with_names(model, is_linear)
        stacks = _with_names(model, has_stacks) if self.experts else []
        names = [name for _, paths in (*linears, *stacks) for name in paths]

        # facts about the whole model
        ask = getattr(model, "get_output_embeddings", None)
        output = None if ask is None else ask()
        facts = _Facts(
            _kept_blocks(model, names, self.keep_first, self.keep_last),
            # PEFT wraps the layer
            frozenset() if output is None else frozenset(map(id, output.modules())),
            ask is not None,
            frozenset(id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)),
            bypass_reasons(model),
        )

        # a decision about each
        decisions = tuple(self._decide(facts, module, paths) for module, paths in linears)
        experts = tuple(self._decide_experts(facts, module, paths) for module, paths in stacks)

        # what the owner should hear
        unfit = not_linear(model, {id(d.module) for d in experts if d.recipe is not None})
        complaints = [
            *self._unmatched_patterns(names),
            *_nothing_converted((*decisions, *experts), unfit),
        ]
        return ConversionPlan(
            decisions, tuple(facts.kept_blocks), unfit, tuple(complaints), experts
        )

    def _decide(self, facts: _Facts, module: nn.Linear, paths: list[str]) -> Decision[nn.Linear]:
        """A layer is converted only if nothing speaks against any of its names.

        The first pattern that fits any of them gives the recipe.
        """
        reasons = [self._why_keep(facts, module, path) for path in paths]
        return Decision(module, tuple(paths), *self._verdict(paths, reasons))

    def _decide_experts(
        self, facts: _Facts, module: nn.Module, paths: list[str]
    ) -> Decision[nn.Module]:
        """Stacked experts are judged by the name of the module that holds them.

        ``filter_fn`` is not asked, since it expects linears.
        """
        reasons = [why_not_experts(module) or self._why_left_out(facts, path) for path in paths]
        return Decision(module, tuple(paths), *self._verdict(paths, reasons))

    def _verdict(
        self, paths: list[str], reasons: list[str | None]
    ) -> tuple[Recipe | None, str | None]:
        """(recipe, None) or (None, reason), from the reasons against each of a module's names."""
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is not None:
            return None, reason
        for pattern, recipe in self.recipes:
            if pattern is None or any(matches(pattern, path) for path in paths):
                return (recipe, None) if recipe.quantized else (None, ON_PURPOSE)
        return None, "no_recipe"

    def _why_keep(self, facts: _Facts, module: nn.Linear, name: str) -> str | None:
        """The first reason that holds, in the order at the head of the file, or None."""
        # asked about every name, whatever else holds
        accepted = self.filter_fn is None or self.filter_fn(module, name)
        why_not = (
            why_not_linear(module)
            or facts.bypassed.get(id(module))
            or self._why_should_not(facts, module, name)
        )
        return why_not or (None if accepted else "filter_fn")

    def _why_should_not(self, facts: _Facts, module: nn.Linear, name: str) -> str | None:
        """Why a linear that could be converted should not be, or None."""
        if id(module.weight) in facts.embeddings:
            return "tied_to_embedding"
        if any(part.startswith("lora_") for part in name.split(".")):
            return "adapter"

        # by identity if the model says which layer it is, otherwise by name
        is_output = (
            id(module) in facts.output
            if facts.knows_output
            else name.rpartition(".")[2] in OUTPUT_NAMES
        )
        return self._why_left_out(facts, name, is_output)

    def _why_left_out(self, facts: _Facts, name: str, is_output: bool = False) -> str | None:
        """Why the arguments leave a name out, or None."""
        if any(matches(pattern, name) for pattern in self.exclude):
            return "excluded"

        # whoever names what to include means the output embedding too, if it is among that
        if self.include:
            if not any(matches(pattern, name) for pattern in self.include):
                return "not_included"
        elif is_output:
            return "output_embedding"
        return next(
            (why for block, why in facts.kept_blocks.items() if f"{name}.".startswith(f"{block}.")),
            None,
        )

    def _unmatched_patterns(self, names: list[str]) -> Iterator[str]:
        """A complaint about each pattern that matches none of the names."""
        # a pattern with a typing error would otherwise convert less, or more, in silence
        recipes = tuple(pattern for pattern, _ in self.recipes if pattern is not None)
        for argument, patterns in (
            ("recipe", recipes),
            ("include", self.include),
            ("exclude", self.exclude),
        ):
            for pattern in patterns:
                if not any(matches(pattern, name) for name in names):
                    seen = f"names look like {names[:3]}"
                    yield f"{argument} {pattern!r} matches no linear layer; {seen}"


def matches(pattern: str, name: str) -> bool:
    """Whether the dotted parts of the pattern match a run of whole parts of the dotted name."""
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatchcase(part, glob) for part, glob in zip(parts[start:], wanted, strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )


def _with_names(
    model: nn.Module, is_meant: Callable[[nn.Module], bool]
) -> list[tuple[Any, list[str]]]:
    """Each module that is meant once, in the order of the walk, with every name that reaches it."""
    modules: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_meant(module):
            modules.setdefault(id(module), (module, []))[1].append(name)
    return list(modules.values())


def _nothing_converted(decisions: Sequence[Decision[Any]], unfit: tuple[str, ...]) -> Iterator[str]:
    """A complaint if no layer is converted, was before, or is left in BF16 on purpose."""
    fine = {None, ALREADY, ON_PURPOSE}
    if not any(decision.reason in fine for decision in decisions):
        extra = f"; not_linear: {', '.join(unfit)}" if unfit else ""
        here = f"the model has {len(decisions)} linear layers, {_count_kept(decisions)}{extra}"
        yield f"no layer was converted: {here}"


def _count_kept(decisions: Sequence[Decision[Any]]) -> str:
    """How many are kept, by reason: "kept 3 (excluded: 2, dtype: 1)"."""
    kept = Counter(decision.reason for decision in decisions if decision.reason is not None)
    detail = ", ".join(f"{reason}: {count}" for reason, count in kept.most_common())
    return f"kept {kept.total()}" + (f" ({detail})" if detail else "")


def _kept_blocks(
    model: nn.Module, names: list[str], first: int | float, last: int | float
) -> dict[str, str]:
    """Dotted names of the blocks to keep, with the reason.

    A stack is whatever has children named 0, 1, ..., be it a list, a Sequential or a dict; the
    outermost on the way to a linear counts, and of its blocks those that hold linears (an
    activation between them is no block).
    """
    if not first and not last:
        return {}

    # stacks by dotted name, with the numbers of their blocks
    stacks: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            stack = ".".join(parts[:depth])
            # a later pipeline stage has no block 0, and its blocks are not the first
            if part.isdecimal() and hasattr(model.get_submodule(stack), "0"):
                stacks.setdefault(stack, set()).add(int(part))
                break
    if not stacks:
        raise ValueError(
            "keep_first and keep_last count numbered blocks (layers.0, h.1, ...), but no linear "
            "layer of the model is in one; name the layers to keep with exclude"
        )

    # the blocks at either end of each
    kept: dict[str, str] = {}
    for stack, numbers in stacks.items():
        blocks = [f"{stack}.{number}" if stack else str(number) for number in sorted(numbers)]
        kept |= dict.fromkeys(blocks[: _share(first, len(blocks))], "keep_first")
        kept |= dict.fromkeys(blocks[len(blocks) - _share(last, len(blocks)) :], "keep_last")
    return kept


def _check_share(name: str, value: int | float) -> None:
    """ValueError if an argument is neither a number of blocks nor a share of them."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < (1 if isinstance(value, float) else math.inf):
        wanted = "a number of blocks (int >= 0) or a share (0 <= float < 1)"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _share(value: int | float, count: int) -> int:
    """How many of ``count`` blocks a count, or a share rounded up, is."""
    if isinstance(value, int):
        return min(count, value)
    # a share is decimal in the user's mind: 0.28 of 25 blocks is 7, though 0.28 * 25 > 7 in binary
    return min(count, math.ceil(round(value * count, 9)))


def _patterns(patterns: Patterns) -> tuple[str, ...]:
    """One pattern or several as a tuple; TypeError for what is no string."""
    if patterns is None:
        return ()
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        patterns = (patterns,)
    wrong = next((pattern for pattern in patterns if not isinstance(pattern, str)), None)
    if wrong is not None:
        raise TypeError(
            f"include and exclude take names with globs, such as 'layers.0', got {wrong!r}"
        )
    return tuple(patterns)
