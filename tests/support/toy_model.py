"""A small language model to convert, and what to ask of it; nothing here trusts ``nvfp4.report``,
but ``reasons``."""

from __future__ import annotations

from typing import Any

import torch
from assertions import assert_floats_bitwise
from torch import nn

import nvfp4


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """A small language model: embedding, numbered blocks, an output embedding by name."""

    def __init__(self, blocks: int = 2, *, tied: bool = False, device: str | None = None) -> None:
        super().__init__()
        with torch.device(device or "cpu"):
            self.embed = nn.Embedding(20, 16)
            self.layers = nn.ModuleList(Block() for _ in range(blocks))
            self.lm_head = nn.Linear(16, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TOKENS = torch.arange(12).view(3, 4)


def quiet(model: nn.Module, recipe: Any = "quartet2", **kwargs: Any) -> nn.Module:
    return nvfp4.convert(model, recipe, verbose=False, seed=5, **kwargs)


def converted(model: nn.Module) -> list[str]:
    """Names of the converted layers, by type alone: without asking nvfp4."""
    return [name for name, module in model.named_modules() if type(module) is nvfp4.Linear]


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {layer.name: layer.reason for layer in nvfp4.report(model).layers}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(TOKENS).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_same_training(a: nn.Module, b: nn.Module) -> None:
    """Outputs and gradients of both models are bitwise equal."""
    assert_floats_bitwise(a(TOKENS), b(TOKENS), "logits")
    for i, (x, y) in enumerate(zip(gradients(a), gradients(b), strict=True)):
        assert_floats_bitwise(x, y, f"gradient {i}")


def assert_untouched(model: nn.Module, before: dict[int, dict[str, Any]]) -> None:
    """Every module has the class and the attributes that ``snapshot`` saw."""
    for module in model.modules():
        kind, attributes = before[id(module)]["class"], before[id(module)]["vars"]
        assert type(module) is kind
        assert vars(module).keys() == attributes


def snapshot(model: nn.Module) -> dict[int, dict[str, Any]]:
    return {id(m): {"class": type(m), "vars": vars(m).keys() | set()} for m in model.modules()}
