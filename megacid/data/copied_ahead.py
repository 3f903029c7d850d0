"""Copies batches to a GPU one ahead and on a stream of their own, so that a copy overlaps with the work on a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
CopyTensor = Callable[[Tensor], Tensor]


def copied_ahead(batches: Iterable[T], copy: Callable[[T, CopyTensor], T], device: torch.device) -> Iterator[T]:
    """Yield the batches with copies on the device; on a CPU, the batches as they are.

    The next batch is read, and its copy is started, before a batch is yielded. What the caller then starts on the
    current stream waits for the copy of the yielded batch alone.

    Args:
        copy: gives a batch on the device; its second argument copies one tensor.
    """
    return _copied_ahead(batches, copy, device) if device.type == "cuda" else iter(batches)


def _copied_ahead(batches: Iterable[T], copy: Callable[[T, CopyTensor], T], device: torch.device) -> Iterator[T]:
    stream = torch.cuda.Stream(device)

    def start(batch: T) -> Callable[[], T]:
        """Start to copy a batch; the result makes the current stream wait for it."""
        copies: list[Tensor] = []

        def copy_tensor(x: Tensor) -> Tensor:
            copies.append(x.pin_memory().to(device, non_blocking=True))
            return copies[-1]

        with torch.cuda.stream(stream):
            on_device = copy(batch, copy_tensor)
            done = stream.record_event()

        def finish() -> T:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            for x in copies:  # whose memory `stream` would use again before `current` has read it
                x.record_stream(current)
            return on_device

        return finish

    started: deque[Callable[[], T]] = deque()  # no variable holds a batch that was yielded: its memory is free
    for batch in batches:
        started.append(start(batch))
        if len(started) > 1:
            yield started.popleft()()
    while started:
        yield started.popleft()()
