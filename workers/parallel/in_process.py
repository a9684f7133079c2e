"""Tensor-parallel groups within one process: one rank alone, or ranks that are threads. Also what all groups share.

Imports torch only.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


class PeerLost(RuntimeError):
    """A rank of this group has gone or the group was aborted: the group cannot go on, replace it as a whole."""


def sum_in_rank_order(parts: Sequence[Tensor], out: Tensor) -> Tensor:
    """((part 0 + part 1) + part 2) + ... into `out`, which may be one of the parts 0 and 1.

    bf16 and fp16 are summed in float32 and rounded once. Every communicator that sums in Python uses this one function,
    so the result does not depend on how the ranks are connected.
    """
    first, second, *rest = parts
    if rest and out.dtype in NARROW:
        total = first.float().add_(second)
        for part in rest:
            total.add_(part)
        return out.copy_(total)
    torch.add(first, second, out=out)
    for part in rest:
        out.add_(part)
    return out


class Solo:
    """The group of one: every collective is the identity."""

    rank = 0
    size = 1
    peers = None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def wait_at_most(self, seconds: float) -> None:
        """There is nobody to wait for."""

    def abort(self, reason: str) -> None:
        """Nobody can be waiting."""

    def check(self) -> None:
        """There is nobody to lose."""

    def close(self) -> None:
        """Nothing is held."""


class ThreadGroup:
    """Ranks that are threads of one process; `create` makes all of them. Abort one and all are aborted."""

    peers = None

    def __init__(self, rank: int, parts: list[Tensor | None], barrier: threading.Barrier, reasons: list[str]) -> None:
        self.rank = rank
        self.size = len(parts)
        self._parts = parts
        self._barrier = barrier
        self._reasons = reasons

    @classmethod
    def create(cls, size: int) -> "list[ThreadGroup]":
        parts: list[Tensor | None] = [None] * size
        barrier, reasons = threading.Barrier(size), list[str]()
        return [cls(rank, parts, barrier, reasons) for rank in range(size)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor
        parts = self._exchange(tensor)
        total = sum_in_rank_order(parts, torch.empty_like(tensor))
        self._meet()  # until then the others read `tensor`
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = torch.stack(self._exchange(tensor))
        self._meet()
        return gathered

    def abort(self, reason: str) -> None:
        self._reasons.append(reason)
        self._barrier.abort()

    def check(self) -> None:
        if self._barrier.broken:
            raise self._lost()

    def close(self) -> None:
        self._parts[self.rank] = None

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._parts[self.rank] = tensor
        self._meet()
        return [part for part in self._parts if part is not None]

    def _meet(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise self._lost() from None

    def _lost(self) -> PeerLost:
        return PeerLost(f"tensor-parallel group aborted: {self._reasons[0] if self._reasons else 'a rank left'}")
