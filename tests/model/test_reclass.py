"""A module that changes its class in place: everything else stays, and copies and pickles find the
class again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import nvfp4
from nvfp4.model.reclass import can_restore, reclass, restore


class Doubling(nn.Module):
    """Mixed in: twice what the module computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Halved(nn.Linear):
    """The one subclass for nn.Linear."""

    original = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def test_a_class_is_mixed_in_and_taken_out():
    """Identity, parameters, hooks and isinstance stay; the class is one for all modules of a
    kind."""
    one, other, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    want, weight, seen = one(x), one.weight, []
    one.register_forward_hook(lambda module, args, y: seen.append(module))
    for module in (one, other):
        reclass(module, Doubling)
    assert type(one) is type(other)
    assert isinstance(one, nn.Linear)
    assert one.weight is weight
    assert torch.equal(one(x), 2 * want)
    assert seen == [one]
    restore(one)
    assert type(one) is nn.Linear
    assert torch.equal(one(x), want)
    assert isinstance(other, Doubling)


def test_a_subclass_is_taken_as_it_is():
    """No class is made where the kind is one of the module's class already."""
    layer = nn.Linear(3, 2)
    reclass(layer, Halved)
    assert type(layer) is Halved
    restore(layer)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@pytest.mark.parametrize("kind", [Doubling, Halved])
def test_copies_and_pickles_are_of_the_same_class(kind, copied):
    """And compute the same; a class that was made at run time cannot be found by its name."""
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    reclass(layer, kind)
    layer.note = "kept"
    twin = copied(layer)
    assert type(twin) is type(layer)
    assert twin.note == "kept"
    assert torch.equal(twin(x), layer(x))
    restore(twin)
    assert type(twin) is nn.Linear


def test_a_class_that_was_derived_since_cannot_be_restored():
    """As ``fully_shard`` derives one from the class of the module that it is called on; its copies
    are its own."""
    layer = nn.Linear(3, 2)
    reclass(layer, Doubling)
    assert can_restore(layer)
    layer.__class__ = type("FSDPLinear", (type(layer),), {})
    assert not can_restore(layer)
    assert type(copy.deepcopy(layer)) is type(layer)


def test_dense_linears_are_converted_and_reverted_to_plain_ones():
    """The second change of class starts from the first one's original."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    nvfp4.dense_linears(model)
    nvfp4.convert(model, "rtn", exclude="1", verbose=False)
    assert [type(layer).__name__ for layer in model] == ["Linear", "DenseLinear"]
    nvfp4.revert(model)
    assert type(model[0]) is nn.Linear
