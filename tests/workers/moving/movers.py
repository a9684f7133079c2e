"""Movers in a test: pools with known bytes, every kind of transport, and what each mover says."""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcache.layout import BlockLayout
from kvcache.pool import KVPool
from scheduler.protocol.leaders import Moved, Movement, Receive, Send
from workers.host import SharedMemory
from workers.moving.exchange import Exchange, LocalTransport
from workers.moving.mapped import MappedWire
from workers.moving.mover import BlockMover, Transport
from workers.moving.pairs import PairWire
from workers.moving.transport import SocketTransport, SocketWire, Wire

LAYOUT = BlockLayout(block_size=16, layers=2, kv_heads=2, head_dim=8, dtype="bfloat16")
BLOCKS = 40
TOKEN = "the cluster's secret"
PATIENCE_S = 60.0
KINDS = ("local", "socket", "gloo", "mapped")
NCCL = pytest.param("nccl", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"))
"""Between the two devices, in threads of one process: groups of an odd number sit on the second."""


def ids(blocks: Sequence[int]) -> bytes:
    return np.array(blocks, np.int32).tobytes()


def random_pool(blocks: int = BLOCKS, seed: int = 0, layout: BlockLayout = LAYOUT, device: str = "cpu") -> KVPool:
    pool = KVPool(layout, blocks, device)
    pool.raw.copy_(torch.randint(0, 256, pool.raw.shape, generator=torch.Generator().manual_seed(seed)))
    return pool


class SameProcess:
    """What processes with memory in common have, within one: pools by their addresses. broken: nothing can be mapped; wrong: it
    can, and something else is read there."""

    def __init__(self, host: str = "here", *, broken: bool = False, wrong: bool = False) -> None:
        self.host = host
        self.broken, self.wrong = broken, wrong
        self.asked = 0

    def share(self, pool: KVPool) -> SharedMemory:
        name = weakref.ref(pool.data)
        POOLS[str(id(name)).encode()] = name
        return SharedMemory(str(id(name)).encode(), pool.raw.numel(), 0, b"", 0, b"", False)

    def map(self, shared: SharedMemory) -> Tensor:
        self.asked += 1
        if self.broken:
            raise RuntimeError("peer access is not supported")
        data = POOLS[shared.handle]()
        assert data is not None
        raw = data.view(-1).view(torch.uint8)
        return torch.zeros_like(raw) if self.wrong else raw


POOLS: "dict[bytes, weakref.ref[Tensor]]" = {}


class Said:
    """What a mover has said, by transfer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.moved: list[Moved] = []

    def add(self, moved: Moved) -> None:
        with self._changed:
            self.moved.append(moved)
            self._changed.notify_all()

    def wait(self, transfer: int) -> Moved:
        """Exactly one answer, in time."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(one.transfer == transfer for one in self.moved), PATIENCE_S)
            (found,) = [one for one in self.moved if one.transfer == transfer]
        return found


@dataclass
class Site:
    """One rank of one group."""

    group: int
    epoch: int
    pool: KVPool
    mover: BlockMover
    transport: Transport | None
    said: Said

    @property
    def rows(self) -> Tensor:
        """The pool's bytes as they are now, on the CPU."""
        return self.pool.raw.cpu().clone()

    def take(self, *movements: Movement) -> None:
        for movement in movements:
            self.mover.take(movement)

    def send(self, transfer: int, to: "Site", blocks: Sequence[int]) -> None:
        self.take(Send(transfer, ids(blocks), to.group, to.epoch))

    def receive(self, transfer: int, of: "Site", blocks: Sequence[int]) -> None:
        assert of.transport is not None
        self.take(Receive(transfer, ids(blocks), of.group, of.epoch, (of.transport.address,)))


@dataclass
class World:
    """Makes sites of one kind; closes them all."""

    kind: str
    timeout_s: float = PATIENCE_S
    exchange: Exchange = field(default_factory=Exchange)
    sites: list[Site] = field(default_factory=list)

    def site(
        self, group: int, epoch: int = 0, *, pool: KVPool | None = None, host: KVPool | None = None, token: str = TOKEN,
        memory: SameProcess | None = None,
    ) -> Site:  # fmt: skip
        if pool is None:
            pool = random_pool(seed=group, device=f"cuda:{group % 2}" if self.kind == "nccl" else "cpu")
        transport, said = self._transport(pool, group, epoch, token, memory or SameProcess()), Said()
        mover = BlockMover(pool, host, transport, said.add, rank=0, epoch=epoch)
        self.sites.append(Site(group, epoch, pool, mover, transport, said))
        return self.sites[-1]

    def _transport(self, pool: KVPool, group: int, epoch: int, token: str, memory: SameProcess) -> Transport:
        if self.kind == "local":
            return LocalTransport(self.exchange, group=group, epoch=epoch, rank=0, timeout_s=self.timeout_s)
        small = 3 * pool.layout.block_bytes  # several messages for each transfer
        pairs = PairWire(pool.device, self.timeout_s, stage_bytes=small)
        wires: dict[str, Wire] = {"socket": SocketWire(), "mapped": MappedWire(pairs, memory, self.timeout_s)}
        return SocketTransport(
            wires.get(self.kind, pairs), host="127.0.0.1", token=token, group=group, epoch=epoch, rank=0,
            timeout_s=self.timeout_s,
        )  # fmt: skip

    def close(self) -> None:
        for site in self.sites:
            site.mover.close()
