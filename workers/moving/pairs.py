"""Blocks through torch.distributed, point to point: NCCL between GPUs, gloo where one asks for it on CPUs. Imports torch.

A communicator joins one sender and one receiver, each a rank of its own group: made when the two first exchange blocks, kept
until one of them fails or goes. The keys by which the two find each other travel over the transfer's own connection, whose
sides have proved that they know the cluster's token; a TCPStore would answer anybody.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from workers.moving.connection import Connection, Fetch, StoreEntry
from workers.moving.mover import TIMEOUT_S, Shard

STAGE_BYTES = 64 << 20
"""Blocks are gathered into messages of about this size."""

SLOWEST_BYTES_S = 50e6
"""A transfer that is slower than this for its whole length counts as stuck."""

NEVER = timedelta(days=30)
SENDER, RECEIVER = 0, 1


class ConnectionStore(Store):
    """The rendezvous of two ranks over their connection, as torch's backends want it: what one sets, the other gets."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: bytes | str) -> None:
        raw = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = raw
        self._connection.send(StoreEntry(key, raw))

    def get(self, key: str) -> bytes:
        with self._lock:
            while key not in self._values:
                entry = self._connection.receive(StoreEntry)
                self._values[entry.key] = entry.value
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta = NEVER) -> None:
        del timeout  # the connection has its own
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """What is known on this side: never waits, since a backend's own threads ask too."""
        return all(key in self._values for key in keys)

    def clone(self) -> Store:
        """A backend may want one for its own threads."""
        return self


class PairCommunicator:
    """A communicator of two. Its first message makes it, which waits for the other side in the backend's own way: that ends
    when the other process does, not before."""

    def __init__(self, number: int, rank: int, device: torch.device, connection: Connection) -> None:
        self.number = number
        self.peer = 1 - rank
        self._store = ConnectionStore(connection)
        self._on_gpu = device.type == "cuda"
        self._group: Any = _backend(rank, device, PrefixStore(f"pair {number}", self._store))

    def send(self, tensor: Tensor) -> Any:
        return self._group.send([tensor], self.peer, 0)

    def receive(self, tensor: Tensor) -> Any:
        return self._group.recv([tensor], self.peer, 0)

    def wait(self, work: Any) -> None:
        """On a GPU only the current stream waits. On a CPU this thread does, for gloo's own timeout at most."""
        work.wait()

    def close(self) -> None:
        """Also with a message under way: it ends then on this side, with gloo only once the other side has gone."""
        if self._on_gpu:
            self._group.abort()
        self._group = None


class PairWire:
    """The `Wire` through communicators. Two messages are under way: one is gathered while the other travels."""

    def __init__(self, device: torch.device, timeout_s: float = TIMEOUT_S, stage_bytes: int = STAGE_BYTES) -> None:
        self._device = device
        self._timeout_s = timeout_s
        self._stage_bytes = stage_bytes
        self._pairs: dict[tuple[int, int, int], PairCommunicator] = {}  # (group, epoch, this side's rank)
        self._made = 0
        self._lock = threading.Lock()

    def host(self, shard: Shard) -> str:
        del shard
        return ""

    def standing(self, shard: Shard) -> int:
        pair = self._pairs.get((shard.group, shard.epoch, RECEIVER))
        return pair.number if pair is not None else 0

    def agree(self, shard: Shard, fetch: Fetch) -> int:
        pair = self._pairs.get((shard.group, shard.epoch, SENDER))
        if pair is not None and pair.number == fetch.pair:
            return fetch.pair
        return self.make()

    def make(self) -> int:
        """The number of a new pair."""
        with self._lock:
            self._made += 1
            return self._made

    def send(self, connection: Connection, shard: Shard, pair: int) -> None:
        works: deque[Any] = deque()
        ids = self._ids(shard)
        with self._using(connection, shard, pair, SENDER) as link:
            for index, stage in self._messages(ids, shard):
                if len(works) > 1:  # the message before the last was in this stage
                    link.wait(works.popleft())
                torch.index_select(shard.pool.raw, 0, index, out=stage)
                works.append(link.send(stage))
            for work in works:
                link.wait(work)

    def receive(self, connection: Connection, shard: Shard, pair: int) -> None:
        ids = self._ids(shard)
        with self._using(connection, shard, pair, RECEIVER) as link:
            for index, stage in self._messages(ids, shard):
                link.wait(link.receive(stage))
                shard.pool.raw.index_copy_(0, index, stage)

    def forget(self, group: int, epoch: int, *, sending: bool) -> None:
        self._drop((group, epoch, SENDER if sending else RECEIVER))

    def close(self) -> None:
        for key in list(self._pairs):
            self._drop(key)

    @contextlib.contextmanager
    def _using(self, connection: Connection, shard: Shard, number: int, rank: int) -> Iterator[PairCommunicator]:
        """The pair of that number, made if need be, with the side stream current; ends it if anything goes wrong."""
        key = (shard.group, shard.epoch, rank)
        try:
            with shard.side.after(shard.ready):
                pair = self._pairs.get(key)
                if pair is None or pair.number != number:
                    self._drop(key)
                    pair = self._pairs[key] = PairCommunicator(number, rank, self._device, connection)
                yield pair

            def check() -> None:
                shard.abort.check()
                connection.check()

            patience_s = self._timeout_s + len(shard.blocks) * shard.pool.layout.block_bytes / SLOWEST_BYTES_S
            shard.side.finish(patience_s, check)
        except BaseException:
            self._drop(key)
            shard.side.drain()
            raise

    def _ids(self, shard: Shard) -> Tensor:
        """On the device. This copy waits for the side stream: so it goes before what that waits for."""
        with shard.side.after():
            return torch.tensor(shard.blocks, device=self._device)

    def _messages(self, ids: Tensor, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        """(block ids of a message, where to put it), in two stages by turns."""
        size = shard.pool.layout.block_bytes
        batch = min(max(1, self._stage_bytes // size), len(shard.blocks))
        stages = [shard.pool.raw.new_empty(batch, size) for _ in range(2)]
        for turn, index in enumerate(torch.split(ids, batch)):
            shard.abort.check()
            yield index, stages[turn % 2][: len(index)]

    def _drop(self, key: tuple[int, int, int]) -> None:
        if (pair := self._pairs.pop(key, None)) is not None:
            pair.close()


def _backend(rank: int, device: torch.device, store: Store) -> Any:
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = NEVER
        with _harmless_watchdog():
            return dist.ProcessGroupNCCL(store, rank, 2, options)
    return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=TIMEOUT_S))


_WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_environment = threading.Lock()


@contextlib.contextmanager
def _harmless_watchdog() -> Iterator[None]:
    """NCCL's watchdog in torch ends the process when a peer is lost, which is right for a group's own ranks and wrong here.

    torch knows no other way to say so than the environment at the moment at which a communicator is made.
    """
    with _environment:
        before = os.environ.get(_WATCHDOG)
        os.environ[_WATCHDOG] = "0"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_WATCHDOG]
            else:
                os.environ[_WATCHDOG] = before
