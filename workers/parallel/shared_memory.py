"""Collectives between processes of one host through a piece of shared memory: 4-20 us where gloo takes 300.

Imports torch and the Linux system calls of the standard library. The memory is a memfd: it has no name, so it can
neither leak nor need tidying, whatever kills a rank, and the size of /dev/shm in a container does not matter.

    ┌ words ───────────────────────┬ buffer 0 ──────────────────────┬ buffer 1 ──────────────────────┐
    │ rank 0: arrived summed left  │ section of rank 0, rank 1, ... │ section of rank 0, rank 1, ... │
    └ a cache line for each rank ──┴────────────────────────────────┴────────────────────────────────┘

Collective number n uses buffer n % 2. A rank copies its tensor into its section, sets arrived = n, and waits until all
ranks have arrived. One wait is enough: who has arrived at n + 1 has finished reading n, whose buffer is
used again only at n + 2.
"""

import mmap
import os
import platform
import select
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.parallel.in_process import PeerLost, sum_in_rank_order

SECTION_BYTES = 1 << 20
SHARED_SUM_BYTES = 1 << 18
"""Above this size each rank sums only its share and copies the rest: a second wait, but less memory traffic."""
WORDS_PER_RANK = 8  # a cache line of int64
ARRIVED, SUMMED, LEFT = range(3)
ABORTED, CLOSED = 1, 2  # values of LEFT
MAX_CACHED_VIEWS = 256

SPINS = 500  # reads of a flag, about 20 us, before giving the core away
YIELDS = 300
NAP_S = 50e-6
CHECK_S = 0.05  # how often a waiting rank looks whether its peers live


def is_supported() -> bool:
    """Linux on x86: flags written after data must be seen after data, and Python has no fence for weaker machines."""
    return hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")


def create_segment(size: int, section_bytes: int = SECTION_BYTES) -> int:
    """A file descriptor of zeroed shared memory for `size` ranks. Close it once every rank has mapped it."""
    descriptor = os.memfd_create("tensor-parallel")
    os.ftruncate(descriptor, _segment_bytes(size, section_bytes))
    return descriptor


def open_segment(pid: int, descriptor: int) -> int:
    """The segment that process `pid` created under its number `descriptor`. Raises OSError if it may not be opened."""
    return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)


def watch_processes(pids: Sequence[int]) -> Callable[[], bool]:
    """A check whether all of these processes still run; a killed one counts as gone before its parent has noticed."""
    poll = select.poll()
    for pid in pids:
        poll.register(os.pidfd_open(pid), select.POLLIN)
    return lambda: not poll.poll(0)


class SharedMemoryGroup:
    """Ranks that are processes of one host, with CPU tensors. Sums in rank order, equal to the bit on all ranks.

    alive: asked now and then while waiting; False means that a peer has gone. timeout_s: how long to wait for a peer.
    keep: what must live as long as the group. Errors: PeerLost when a peer has gone, took too long, or any rank was
    aborted.
    """

    keep: object = None
    peers = None

    def __init__(
        self,
        rank: int,
        size: int,
        descriptor: int,
        *,
        timeout_s: float,
        alive: Callable[[], bool] = lambda: True,
        section_bytes: int = SECTION_BYTES,
    ) -> None:
        self.rank, self.size = rank, size
        memory = mmap.mmap(descriptor, _segment_bytes(size, section_bytes))
        self._words = memoryview(memory).cast("q")
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._section_bytes = section_bytes
        self._peers = [peer for peer in range(size) if peer != rank]
        self._spins = SPINS if size <= len(os.sched_getaffinity(0)) else SPINS // 25
        self._timeout_s, self._alive = timeout_s, alive
        self._number = 0
        self._reason = ""
        self._views: dict[tuple[torch.dtype, torch.Size], list[list[Tensor]]] = {}

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        if tensor.nbytes <= SHARED_SUM_BYTES:
            return sum_in_rank_order(self._exchange(tensor), tensor)
        for part in tensor.view(-1).split(self._section_bytes // tensor.itemsize):  # type: ignore[no-untyped-call]
            self._sum_together(part)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        if tensor.nbytes <= self._section_bytes:
            return torch.stack(self._exchange(tensor))
        parts = tensor.reshape(-1).split(self._section_bytes // tensor.itemsize)  # type: ignore[no-untyped-call]
        gathered = torch.cat([torch.stack(self._exchange(part)) for part in parts], 1)
        return gathered.view(self.size, *tensor.shape)

    def wait_at_most(self, seconds: float) -> None:
        self._timeout_s = seconds

    def abort(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._words[self.rank * WORDS_PER_RANK + LEFT] = ABORTED

    def check(self) -> None:
        if self._reason:
            raise self._lost()

    def close(self) -> None:
        """Peers that go on without this rank are told; the memory goes when the last rank has let go of it."""
        self._reason = self._reason or "the group was closed"
        self._words[self.rank * WORDS_PER_RANK + LEFT] = CLOSED

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order: views of shared memory, valid until the next collective but one."""
        self._number += 1
        sections = self._sections(tensor)
        sections[self.rank].copy_(tensor)
        self._say(ARRIVED)
        self._wait(ARRIVED)
        return sections

    def _sum_together(self, tensor: Tensor) -> None:
        """Each rank sums its share of the elements into rank 0's section, from where all copy the whole."""
        sections = self._exchange(tensor)
        share = -(-tensor.numel() // self.size)
        start = min(self.rank * share, tensor.numel())
        mine = [section[start : start + share] for section in sections]
        sum_in_rank_order(mine, mine[0])
        self._say(SUMMED)
        self._wait(SUMMED)
        tensor.copy_(sections[0])

    def _sections(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's section of the current buffer, seen as such a tensor."""
        key = (tensor.dtype, tensor.shape)
        views = self._views.get(key)
        if views is None:
            if len(self._views) == MAX_CACHED_VIEWS:
                self._views.clear()
            with torch.inference_mode(False):
                views = [[self._section(buffer, rank, tensor) for rank in range(self.size)] for buffer in (0, 1)]
            self._views[key] = views
        return views[self._number % 2]

    def _section(self, buffer: int, rank: int, tensor: Tensor) -> Tensor:
        start = _words_bytes(self.size) + (buffer * self.size + rank) * self._section_bytes
        return self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _say(self, what: int) -> None:
        self.check()
        self._words[self.rank * WORDS_PER_RANK + what] = self._number

    def _wait(self, what: int) -> None:
        """Until every peer has said `what` of the current collective."""
        words, number = self._words, self._number
        for peer in self._peers:
            at, spins = peer * WORDS_PER_RANK + what, 0
            while words[at] < number:
                spins += 1
                if spins > self._spins:
                    self._wait_patiently(peer, at)

    def _wait_patiently(self, peer: int, at: int) -> None:
        """Give the core away, first to whoever is ready, then for good; look after the peers meanwhile."""
        words, yields = self._words, 0
        start = check = time.monotonic()
        while words[at] < self._number:
            left = [words[rank * WORDS_PER_RANK + LEFT] for rank in range(self.size)]
            if ABORTED in left or left[peer] or left[self.rank]:
                raise self._lost()
            yields += 1
            if yields < YIELDS:
                os.sched_yield()
                continue
            time.sleep(NAP_S)
            now = time.monotonic()
            if now - check > CHECK_S:
                check = now
                if not self._alive():
                    self.abort("a rank's process has ended")
                elif now - start > self._timeout_s:
                    self.abort(f"rank {peer} did not answer for {self._timeout_s:.0f} s")

    def _lost(self) -> PeerLost:
        reason = self._reason or "another rank aborted it"
        return PeerLost(f"tensor-parallel group lost, rank {self.rank} of {self.size}: {reason}")


def _words_bytes(size: int) -> int:
    return -(-size * WORDS_PER_RANK * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


def _segment_bytes(size: int, section_bytes: int) -> int:
    return _words_bytes(size) + 2 * size * section_bytes
