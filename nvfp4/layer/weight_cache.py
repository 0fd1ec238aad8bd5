"""How long the codes of a weight live: it is quantised once for as long as it stays the same.

A forward multiplies by w [N, K] in FP4. To quantise w costs several passes over it, to see that it
has not changed at most one, so each layer has a ``WeightCache`` with one entry: the codes (one
QTensor, or one GroupedQTensor of a stack), the key that they hold for, and the point of the CUDA
stream after which they are in memory.

    mode         a weight counts as unchanged while          who sets it
    BYTES        a 64-bit fingerprint of its bytes stays     the default; where the backend has none
                                                             (GPUs), every forward quantises
    FIXED        version counter, storage, strides stay      ``nvfp4.fixed_weights``
    AFTER_STEP   as FIXED; new codes go where the old lay    ``nvfp4.after_step``

BYTES sees every change, and costs 0.7 ms for 4096 x 4096 in BF16, a seventh of quantising it. The
version counter alone will not do as a default: ``torch.optim.AdamW(fused=True)`` does not advance
it, nor do writes through ``.data``, and a model that relied on it trained on its first weights
(loss .933 instead of .063 after 100 steps of a toy). FIXED is therefore for a scope, and whoever
writes without a trace within it calls ``forget``. The key also holds dtype, shape, device, recipe
and backend and, if layers share an amax (``AmaxGroup``), what the others' weights are.

Nothing is kept of a stochastic operand, in a traced graph, or under torch.distributed, where FSDP
refills a weight's memory unseen. A CUDA graph may read only codes that stay where they are
(AFTER_STEP): others would be freed or grow old under it, and what a capture makes itself holds
nothing before the first replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from nvfp4.numerics.scaling import magnitude
from nvfp4.numerics.torch_state import is_capturing, is_traced
from nvfp4.ops import fingerprint

Codes = tuple[Any, ...]
"""fprop's operand of a weight: one QTensor, or for stacked experts one GroupedQTensor of all."""

Content = tuple[Any, ...] | None
"""What changes when a weight does; None where there is no telling."""

STACKS = ("gate_up_proj", "down_proj")
"""Weights of an experts module, as transformers 5 names them: [E, 2 I, H] and [E, H, I]."""


class Mode(Enum):
    """By what a cache tells that its weight has not changed; see the head of the file."""

    BYTES = "bytes"
    FIXED = "fixed"
    AFTER_STEP = "after step"


class Done:
    """A point of the current CUDA stream of ``device``; nothing on devices without streams.

    Codes that were made on one stream may be read on another, which has to wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.event = None if self.stream is None else self.stream.record_event()

    def before_reading(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the current stream wait for that point, if it is another stream.

        The memory of ``tensors`` is kept until it has read them.
        """
        if self.stream is None or self.event is None:
            return
        reader = torch.cuda.current_stream(self.device)
        if reader != self.stream:
            reader.wait_event(self.event)
            for tensor in tensors:
                tensor.record_stream(reader)


class CachedCodes(NamedTuple):
    """The entry of a cache: codes, what they are codes of, and when they are there."""

    key: tuple[Any, ...]
    codes: Codes
    done: Done


class WeightCache:
    """The codes of one weight, and by what they are known to be still its own.

    group: the layers that share its amax, if any. Copies and pickles keep the group and nothing
    else: they lie outside of the scope that chose the mode.
    """

    def __init__(self, group: AmaxGroup | None = None) -> None:
        self.mode = Mode.BYTES
        self.group = group
        self.entry: CachedCodes | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"mode": Mode.BYTES, "entry": None}

    def content(self, weight: torch.Tensor, backend: str) -> Content:
        """What changes when ``weight`` does, as the mode has it."""
        if is_traced(weight):
            return None

        # an inference tensor has no version
        if self.mode is Mode.BYTES or weight.is_inference():
            number = fingerprint(weight, backend=backend)
            return None if number is None else (number,)

        # a weak reference, since a freed weight's address may be given to the next one, as in
        # .bfloat16().float()
        storage = StorageWeakRef(weight.untyped_storage())
        return weight._version, storage, weight.storage_offset(), weight.stride()

    def amax(self) -> torch.Tensor | None:
        """Float32 [1], the amax of the group; None for a weight that has its own scale."""
        return None if self.group is None else self.group.amax(self.group.contents())

    def get(
        self, weight: torch.Tensor, recipe: str, backend: str, make: Callable[..., Codes], call: Any
    ) -> Codes | None:
        """The codes of ``weight``, by ``make(weight, call, amax)`` if they are not here.

        None if they are not to be kept. recipe: its ``Recipe.key``. RuntimeError where layers share
        an amax and their weights are not here together.
        """
        # what the codes depend on, or None if there is no telling
        if dist.is_available() and dist.is_initialized():
            return None
        among = () if self.group is None else self.group.contents()
        content = self.content(weight, backend)
        if content is None or None in among:
            return None
        key = (content, weight.dtype, weight.shape, weight.device, recipe, backend, among)

        # read once: another thread may end the scope
        entry = self.entry

        # a graph may read codes that stay where they are, and no others
        if is_capturing():
            if self.mode is Mode.AFTER_STEP and entry is not None and entry.key == key:
                return entry.codes
            return None

        if entry is None or entry.key != key:
            # codes made in a rollout serve training as well
            with torch.inference_mode(False), torch.no_grad():
                amax = None if self.group is None else self.group.amax(among)
                entry = self.entry = CachedCodes(key, make(weight, call, amax), Done(weight.device))
        entry.done.before_reading(tensor for q in entry.codes for tensor in q.memory)
        return entry.codes

    def overwrite(self, old: CachedCodes | None) -> None:
        """Write the codes over ``old``, if they are of the same kind.

        So what was captured in a CUDA graph reads the new ones, and autograd tells a backward that
        still waits for the old ones that they were modified, as it would of the weight itself.
        """
        # another recipe, shape or rotation has codes of another kind: the new ones are simply kept
        new = self.entry
        if old is None or new is None:
            return
        if [q.record for q in old.codes] != [q.record for q in new.codes]:
            return
        with torch.inference_mode(False), torch.no_grad():
            for target, source in zip(old.codes, new.codes, strict=True):
                target.overwrite(source)

        self.entry = CachedCodes(new.key, old.codes, Done(old.codes[0].device))

    def forget(self) -> None:
        """Drop the codes, and the magnitudes of the group.

        Needed in FIXED after a write that leaves no trace.
        """
        self.entry = None
        if self.group is not None:
            self.group.forget()

    def leave(self) -> None:
        """End the scope that chose the mode.

        The magnitudes go too: versions tell nothing of what happens outside of it.
        """
        self.mode = Mode.BYTES
        self.forget()


class AmaxGroup:
    """Layers whose weights share one amax, the largest of all; see ``nvfp4.share_amax``.

    Each weight's magnitude is kept for as long as that weight stays the same.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        # by position in ``layers``
        self._magnitudes: dict[int, tuple[Content, torch.Tensor, Done]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_magnitudes": {}}

    def contents(self) -> tuple[Content, ...]:
        """What the amax is a function of; RuntimeError where the weights are not here together."""
        contents = []
        for layer in self.layers:
            # a DTensor is a part, a gathered weight has no values
            weight = layer.weight.detach()
            if type(layer.weight) is not nn.Parameter and type(weight) is not torch.Tensor:
                raise RuntimeError(
                    "layers that share their amax must hold their weights at the same time, in "
                    "high precision: shard the block that holds them as one, or call "
                    "nvfp4.share_amax(model, ())"
                )
            state: Any = layer.nvfp4
            contents.append(state.cache.content(weight, state.backend))
        return tuple(contents)

    def amax(self, contents: tuple[Content, ...]) -> torch.Tensor:
        """The largest magnitude of all, float32 [1]; contents: from ``contents``.

        In a CUDA graph every magnitude is worked out anew, since a replay may find other weights.
        """
        magnitudes = []
        for position, (layer, content) in enumerate(zip(self.layers, contents, strict=True)):
            # no telling whether it is the same, or a graph that will ask again
            if content is None or is_capturing():
                magnitudes.append(magnitude(layer.weight.detach()))
                continue

            # its magnitude from an earlier call, or from now on
            known = self._magnitudes.get(position)
            if known is None or known[0] != content:
                fresh = magnitude(layer.weight.detach())
                known = self._magnitudes[position] = (content, fresh, Done(fresh.device))
            known[2].before_reading((known[1],))
            magnitudes.append(known[1])

        return torch.cat(magnitudes).amax(dim=0, keepdim=True)

    def forget(self) -> None:
        """Work the magnitudes out anew next time."""
        self._magnitudes.clear()
