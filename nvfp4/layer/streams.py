"""What one CUDA stream makes and another one reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Done:
    """All that the current stream of ``device`` was given so far; nothing on devices without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.event = None if self.stream is None else self.stream.record_event()

    def before_reading(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the current stream wait for it, unless it is the same one, and the memory of ``tensors`` outlive what
        that stream reads of it."""
        if self.stream is None or self.event is None:
            return
        reader = torch.cuda.current_stream(self.device)
        if reader != self.stream:
            reader.wait_event(self.event)
            for tensor in tensors:
                tensor.record_stream(reader)
