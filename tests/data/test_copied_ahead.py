"""Batches are copied to a GPU one ahead, in the right order, and their memory is not used again too early.

Without a GPU a simulated one runs each stream as late, or as early, as its events allow.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megacid.data.batch import Batch
from megacid.data.copied_ahead import copied_ahead
from megacid.offline.embed import input as embed

GPU = torch.device("cuda")


class Stream:
    """A queue of operations. A lazy stream runs none before an event of it is waited for, or the end."""

    def __init__(self, lazy: bool) -> None:
        self.lazy, self.queue, self.done = lazy, deque[Callable[[], None]](), 0
        self.free: list[list[Any]] = []  # blocks of memory, each with its content

    def submit(self, operation: Callable[[], None]) -> None:
        self.queue.append(operation)
        if not self.lazy:
            self.run()

    def run(self, until: int | None = None) -> None:
        while self.queue and (until is None or self.done < until):
            self.queue.popleft()()
            self.done += 1

    def record_event(self) -> tuple[Stream, int]:
        return self, self.done + len(self.queue)

    def wait_event(self, event: tuple[Stream, int]) -> None:
        self.submit(lambda: event[0].run(event[1]))


class OnDevice:
    """A tensor of the simulated GPU, whose memory returns to its stream like that of torch's allocator."""

    def __init__(self, stream: Stream) -> None:
        self.block = stream.free.pop() if stream.free else [None]
        self.users: list[Stream] = []
        weakref.finalize(self, self._free, self.block, stream, self.users)

    def record_stream(self, stream: Stream) -> None:
        self.users.append(stream)

    @staticmethod
    def _free(block: list[Any], stream: Stream, users: list[Stream]) -> None:
        if any(user.queue for user in users):
            return  # kept until they have run, which is the end of these tests
        stream.free.append(block)


class OnHost:
    def __init__(self, gpu: Gpu, value: int, pinned: bool = False) -> None:
        self.gpu, self.value, self.pinned = gpu, value, pinned

    def pin_memory(self) -> OnHost:
        return OnHost(self.gpu, self.value, pinned=True)

    def to(self, device: torch.device, non_blocking: bool) -> OnDevice:
        assert self.pinned and non_blocking and device == GPU  # otherwise the host waits
        copy, value = OnDevice(self.gpu.current), self.value
        block = copy.block
        self.gpu.current.submit(lambda: block.__setitem__(0, value))
        return copy


class Gpu:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, lazy: str) -> None:
        self.main = self.current = Stream(lazy == "computation")
        self.side = Stream(lazy == "copies")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "stream", self.using)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)

    @contextlib.contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.mark.parametrize("lazy", ["copies", "computation"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_every_batch_is_read_after_its_copy_and_before_its_memory_is_used_again(
    monkeypatch: pytest.MonkeyPatch, lazy: str, count: int
) -> None:
    gpu, found = Gpu(monkeypatch, lazy), []
    taken = 0

    def batches() -> Iterator[Any]:
        nonlocal taken
        for taken in range(1, count + 1):
            yield OnHost(gpu, taken)

    copied: Iterator[Any] = copied_ahead(batches(), lambda batch, copy: copy(batch), GPU)
    for number, batch in enumerate(copied, 1):
        assert taken == min(number + 1, count)  # the copy of the next one has been started
        gpu.main.submit(lambda block=batch.block: found.append(block[0]))  # type: ignore[misc]
        if lazy == "copies":
            assert gpu.side.done == number  # the computation has not waited for the copy of the next one
        del batch
    gpu.main.run()
    assert found == list(range(1, count + 1))


def test_memory_of_a_batch_is_used_again_once_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, "")
    blocks = set()
    for batch in copied_ahead((OnHost(gpu, number) for number in range(9)), lambda batch, copy: copy(batch), GPU):  # type: ignore[arg-type,misc,return-value]
        blocks.add(id(batch.block))  # type: ignore[attr-defined]
        del batch
    assert len(blocks) == 2  # this batch and the next


def test_a_cpu_has_the_batches_themselves() -> None:
    batches = [object(), object()]
    assert list(copied_ahead(batches, lambda batch, copy: pytest.fail("copied"), torch.device("cpu"))) == batches


def tensors(batch: Batch | embed.Batch) -> dict[str, torch.Tensor]:
    fields = batch._asdict() if isinstance(batch, embed.Batch) else vars(batch)
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}


def numbered(number: int) -> Batch:
    wide = torch.full((64, 1 << 12), number)
    return Batch(wide.byte(), wide, wide[:, 0], wide.half(), None, wide[:, 1], ("why",), failure="failure")


def test_all_but_the_ids_of_a_batch_is_copied() -> None:
    """The host reads the ids after every step, which would wait for the GPU."""
    for batch, stays in (
        (numbered(3), {"sample_id"}),
        (embed.Batch(1, *torch.ones(2, 3, 4), [], [2], [], views=torch.ones(2, 3)), set()),
        (embed.Batch(1, *torch.ones(2, 3, 4), [], [2], []), set()),
    ):
        copied = batch.copied(lambda x: x.clone())
        before, after = tensors(batch), tensors(copied)
        assert before.keys() == after.keys()
        assert {name for name in before if before[name] is after[name]} == stays
        assert all(before[name].equal(after[name]) for name in before)
    assert (numbered(3).copied(lambda x: x).failure, copied.rows) == ("failure", [2])  # type: ignore[union-attr]


@pytest.mark.gpu
def test_a_gpu_gets_the_bits_of_the_batches() -> None:
    sums = []
    weight = torch.randn(4096, 4096, device=GPU)
    for batch in copied_ahead(map(numbered, range(40)), Batch.copied, GPU):
        weight = (weight @ weight).clamp_(-1, 1)  # the copies run ahead of this
        sums.append({name: value.double().sum() for name, value in tensors(batch).items()})
        assert batch.image.device.type == "cuda" and batch.sample_id.device.type == "cpu"
    for number, found in enumerate(sums):
        expected = {name: value.double().sum() for name, value in tensors(numbered(number)).items()}
        assert {name: value.item() for name, value in found.items()} == {n: v.item() for n, v in expected.items()}
