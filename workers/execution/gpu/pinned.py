"""Host memory that a GPU reads and writes by itself, in turns, so that the host never waits for what it has just begun.

Imports torch and NumPy.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.execution.pending import Arrival, Here

Int32s = npt.NDArray[np.int32]


class PinnedRing:
    """int32 buffers in host memory, used one after another; one is handed out again once the device is past its last use.

    device: the other side; on a CPU there is nothing to pin or to wait for. depth: buffers. size: numbers in each
    at first; a larger demand makes that buffer larger, once.
    """

    def __init__(self, device: torch.device, depth: int, size: int) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._buffers = [self._allocate(size) for _ in range(depth)]
        self._events = [torch.cuda.Event() for _ in range(depth)] if self._on_gpu else []  # type: ignore[no-untyped-call]
        self._turn = -1

    def take(self, size: int) -> Tensor:
        """[size] int32 host memory. `used` must follow what reads or writes it."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._on_gpu:
            self._events[self._turn].synchronize()  # long past, unless the device is `depth` steps behind
        if self._buffers[self._turn].shape[0] < size:
            self._buffers[self._turn] = self._allocate(2 * size)
        return self._buffers[self._turn][:size]

    def used(self) -> Arrival:
        """What reads or writes it has been launched. Returns when that is over."""
        if not self._on_gpu:
            return Here()
        event = self._events[self._turn]
        event.record()
        return event

    def send(self, values: Int32s, target: Tensor) -> None:
        """Launches a copy of values [n] to the first n of `target`, which must be on the device."""
        host = self.take(len(values))
        host.numpy()[:] = values
        target[: len(values)].copy_(host, non_blocking=True)
        self.used()

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, pin_memory=self._on_gpu)
