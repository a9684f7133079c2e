"""Blocks off the stream of the steps: a stream of its own on a GPU, the calling thread on a CPU. Imports torch."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from workers.moving.lane import LaneAbort, TransferFailed

POLL_S = 200e-6

Ready = torch.cuda.Event | None
"""The steps launched so far, as the side stream waits for them; None where the host is the device."""


class Side:
    """One lane's place on its device. A lane has its own, since what waits for another group must hold up no other lane. It is
    used again after it: torch has 32 streams, and hands out the first ones once more then."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def ready(self) -> Ready:
        """Called by the thread of the steps: what it has launched until now."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    @contextmanager
    def after(self, *events: Ready) -> Iterator[None]:
        """What is launched inside runs on the side stream, after those events; nothing of it need be done at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            for event in events:
                if event is not None:
                    self._stream.wait_event(event)
            yield

    def finish(self, timeout_s: float, check: Callable[[], None]) -> None:
        """Waits on the host until the side stream is done. check: called meanwhile, may raise.

        Errors: TransferFailed when the time is over.
        """
        if self._stream is None:
            return
        deadline = time.monotonic() + timeout_s
        with torch.cuda.device(self._stream.device):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            while not event.query():  # type: ignore[no-untyped-call]
                check()
                if time.monotonic() > deadline:
                    raise TransferFailed(f"the device was not done within {timeout_s:g} s")
                time.sleep(POLL_S)

    def drain(self) -> None:
        """Waits for whatever runs on the side stream, without a limit."""
        if self._stream is not None:
            self._stream.synchronize()


def copy_rows(source: Tensor, rows: Sequence[int], target: Tensor, targets: Sequence[int], abort: LaneAbort) -> None:
    """Whole blocks from pool to pool, [blocks, block_bytes] each; on a GPU launched on the current stream, not waited for, and
    those that follow one another on both sides by one copy.

    On a CPU by NumPy: it leaves Python's lock for the time of a block and starts no threads, as torch would for large copies.
    Errors: TransferFailed between two copies once `abort` is set.
    """
    if source.device.type == target.device.type == "cpu":
        read, write = source.numpy(), target.numpy()
        for row, to in zip(rows, targets, strict=True):
            abort.check()
            np.copyto(write[to], read[row])
        return
    for row, to, count in _stretches(rows, targets):
        abort.check()
        target[to : to + count].copy_(source[row : row + count], non_blocking=True)


def _stretches(rows: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first row, first target, how many) that follow one another on both sides."""
    first = to = count = 0
    for row, target in zip(rows, targets, strict=True):
        if count and (row, target) == (first + count, to + count):
            count += 1
            continue
        if count:
            yield first, to, count
        first, to, count = row, target, 1
    if count:
        yield first, to, count
