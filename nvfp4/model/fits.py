"""Whether what was saved by layer is of a model's layers: asked before anything is restored."""

from __future__ import annotations

from collections.abc import Collection


def check_layers(kind: str, here: Collection[str], saved: Collection[str]) -> None:
    """ValueError unless a ``kind`` of state was saved of the very layers that are here."""
    missing, unexpected = sorted(set(here) - set(saved)), sorted(set(saved) - set(here))
    if missing or unexpected:
        raise ValueError(
            f"{kind} state does not fit the model: missing {missing}, unexpected {unexpected}; "
            "convert the model with the same options first"
        )
