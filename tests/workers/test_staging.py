"""Copies through buffers that take turns: the right values, and no buffer is filled before it was sent.

There is no GPU: a queue stands for a stream, and nothing that is sent is read before somebody waits for it. Whether
pinned memory is any faster, only a GPU can say.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import torch

from sp_core.verify import examples
from workers.model import staging, weights
from workers.model.staging import BUFFER_BYTES, BUFFERS, Staging
from workers.model.weights import FILES_AT_ONCE, build, fill

CPU = torch.device("cpu")


class Stream:
    """Does what it is told only when somebody waits for it."""

    issued: ClassVar[list["Stream"]] = []
    of: ClassVar[torch.device | None] = None
    """The device of this thread; another one's stream, which torch goes back to, would open a context there."""

    def __init__(self, device: torch.device) -> None:
        assert device == self.of
        self.queue: list[Callable[[], object]] = []
        self.most = 0
        self.issued.append(self)

    def synchronize(self, upto: int | None = None) -> None:
        for work in self.queue[:upto]:
            work()
        del self.queue[:upto]

    def wait_stream(self, other: object) -> None:
        assert isinstance(other, Current)
        Current.waited_for += 1


class Event:
    def __init__(self) -> None:
        self.last: Callable[[], object] | None = None
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.last, self.stream = stream.queue[-1], stream

    def synchronize(self) -> None:
        if self.stream and self.last in self.stream.queue:
            self.stream.synchronize(self.stream.queue.index(self.last) + 1)


class Current:
    """The default stream. What converts a tensor runs there, at once: it is right only after the wait.

    Attributes:
        waits: else it goes on, so that buffers of one tensor are still to be sent when the next one comes.
    """

    waits = False
    waited_for: ClassVar[int] = 0
    """Times that the sending stream has waited for this one, which may still use the memory that a tensor got."""

    def wait_stream(self, stream: Stream) -> None:
        stream.most = max(stream.most, len(stream.queue))
        if self.waits:
            stream.synchronize()


class Late(Staging):
    """Sends when its stream gets to it, from the buffer as it is then."""

    def _send(self, part: torch.Tensor, target: torch.Tensor) -> None:
        self._stream.queue.append(functools.partial(target.copy_, part))  # type: ignore[attr-defined]


class Careless(Late):
    """The control: fills a buffer without a look at whether it was sent."""

    def __init__(self, device: torch.device, size: int) -> None:
        super().__init__(device, size)
        for _ in range(BUFFERS):
            next(self._turns)[1].synchronize = lambda: None  # type: ignore[method-assign]


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """No GPU, but streams as above. The sizes of all pinned memory that was asked for."""
    asked: list[int] = []
    Stream.issued.clear()
    Stream.of = None
    Current.waited_for = 0

    def plain(size: int) -> torch.Tensor:
        asked.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(staging, "_pinned", plain)
    for name, value in (("Stream", Stream), ("Event", Event), ("current_stream", lambda _: Current())):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(Stream, "of", device))
    yield asked


TENSORS = [
    torch.arange(1000, dtype=torch.float32).reshape(10, 100).T,  # not contiguous, as columns of a file may be
    torch.arange(77, dtype=torch.bfloat16),
    torch.tensor(3.0),
    torch.zeros(0, 5),
    torch.arange(64, dtype=torch.int64),
]


def moved(how: Staging) -> bool:
    """Whether all values are right, after their sources were overwritten."""
    sources = [tensor.clone() for tensor in TENSORS]
    copies = []
    for source in sources:
        copies.append(how.move(source))
        source.zero_()
    how.finish()
    return all(torch.equal(copy, tensor) for copy, tensor in zip(copies, TENSORS, strict=True))


@pytest.mark.parametrize("size", [8, 100, 999, 4000, 10**6])
def test_values_are_right_whatever_the_buffers_size(pinned: list[int], size: int) -> None:
    assert moved(Late(CPU, size))
    assert pinned == [size] * BUFFERS
    assert Stream.issued[0].most <= BUFFERS
    assert Current.waited_for == len(TENSORS)


def test_a_buffer_that_is_filled_too_early_would_be_seen(pinned: list[int]) -> None:
    assert not moved(Careless(CPU, 100))


class OnCuda(Late):
    """For a model that says cuda; its weights stay on the CPU."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"
        super().__init__(CPU, 1000)

    @staticmethod
    def release() -> None:
        released.append(True)


released: list[bool] = []


@pytest.mark.parametrize(("dtype", "waits"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_model_is_filled_through_few_buffers(
    pinned: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, waits: bool
) -> None:
    monkeypatch.setattr(Current, "waits", waits)
    reference = examples.TINY["qwen-image"].model
    reference.save_pretrained(tmp_path, max_shard_size="100KB")  # type: ignore[operator]
    files = len(list(tmp_path.glob("*.safetensors")))
    assert files > 3
    model, seen = build(tmp_path), []
    with mock.patch.object(weights, "Staging", OnCuda), mock.patch.object(weights, "_move_buffers"):
        fill(model, tmp_path, torch.device("cuda", 0), dtype, seen.append)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype))
    assert (seen == sorted(seen), seen[-1], released.pop()) == (True, 1.0, True)
    assert len(pinned) == BUFFERS * files  # of which torch has those of FILES_AT_ONCE files at a time
    assert FILES_AT_ONCE * BUFFERS * BUFFER_BYTES <= 2**28


def test_without_pinned_memory_it_is_slower_and_as_right(caplog: pytest.LogCaptureFixture) -> None:
    assert len(staging._pinned(10)) == 10  # here is no driver that could pin
    assert "no pinned memory" in caplog.text or torch.cuda.is_available()
