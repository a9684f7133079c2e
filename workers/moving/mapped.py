"""Blocks between GPUs of one host: the receiver maps the sender's pool and copies from it. Imports torch.

    sender ───Readable──▶ receiver    the pool's handle, which of its blocks, what the first begins with
           ◀───Mapped────             and where it cannot be read, the two go on by a communicator (`pairs`)

Copy engines read over NVLink or PCIe. So steps on either side keep their multiprocessors, nothing is gathered before or
scattered after, and two ranks have no communicator to make, to wait in or to give up.

A driver may say that it reaches another GPU's memory and read something else there: hence the sample, once for each mapping.
"""

import logging
import threading
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvcache.pool import KVPool
from workers.host import SharedMemory, host_identity
from workers.mapping import mapped, share
from workers.moving.connection import MAPPED, Connection, Fetch, Mapped, PairOffer, Readable
from workers.moving.lane import TransferFailed
from workers.moving.mover import TIMEOUT_S, Shard
from workers.moving.pairs import PairWire
from workers.moving.side import copy_rows

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 4096


class Memory(Protocol):
    """What processes of one host have in common. host: its name, equal for those that do."""

    host: str

    def share(self, pool: KVPool) -> SharedMemory:
        """A name of the pool's memory. Errors: RuntimeError."""
        ...

    def map(self, shared: SharedMemory) -> Tensor:
        """[bytes] uint8, another process's memory as long as the tensor lives. Errors: RuntimeError."""
        ...


class DeviceMemory:
    """A GPU's."""

    def __init__(self, device: torch.device) -> None:
        self.host = host_identity()
        self._device = device

    def share(self, pool: KVPool) -> SharedMemory:
        return share(pool.raw.view(-1))

    def map(self, shared: SharedMemory) -> Tensor:
        return mapped(shared, self._device)


class MappedWire:
    """The `Wire` of GPUs: by mapped memory between two of one host, else and where that fails by communicators."""

    def __init__(self, pairs: PairWire, memory: Memory, timeout_s: float = TIMEOUT_S) -> None:
        self._pairs = pairs
        self._memory = memory
        self._timeout_s = timeout_s
        self._shared: dict[int, SharedMemory] = {}  # by the pool's address: named once, since torch counts who has been told
        self._mapped: dict[tuple[int, int], dict[bytes, Tensor]] = {}  # (group, epoch) -> handle -> [blocks, block_bytes]
        self._unmapped: set[int] = set()  # groups whose memory cannot be read here
        self._lock = threading.Lock()

    def host(self, shard: Shard) -> str:
        return "" if shard.group in self._unmapped else self._memory.host

    def standing(self, shard: Shard) -> int:
        return self._pairs.standing(shard)

    def agree(self, shard: Shard, fetch: Fetch) -> int:
        return MAPPED if fetch.host == self._memory.host else self._pairs.agree(shard, fetch)

    def send(self, connection: Connection, shard: Shard, pair: int) -> None:
        if pair == MAPPED:
            if self._let_read(connection, shard):
                return
            pair = self._pairs.make()
            connection.send(PairOffer(pair))
        self._pairs.send(connection, shard, pair)

    def receive(self, connection: Connection, shard: Shard, pair: int) -> None:
        if pair == MAPPED:
            readable = connection.receive(Readable)
            blocks = _blocks(readable, shard)
            theirs = self._reach(shard, readable, blocks[0])
            connection.send(Mapped(theirs is not None))
            if theirs is not None:
                self._read(connection, shard, theirs, blocks)
                return
            pair = connection.receive(PairOffer).pair
        self._pairs.receive(connection, shard, pair)

    def forget(self, group: int, epoch: int, *, sending: bool) -> None:
        self._pairs.forget(group, epoch, sending=sending)
        if not sending:
            self._mapped.pop((group, epoch), None)

    def close(self) -> None:
        self._pairs.close()
        self._mapped.clear()

    # ---- the sender

    def _let_read(self, connection: Connection, shard: Shard) -> bool:
        """Whether the receiver can; then it is about to."""
        raw = shard.pool.raw
        with shard.side.after(shard.ready):
            first = raw[shard.blocks[0], :SAMPLE_BYTES].clone()
        self._finish(connection, shard)  # from here on the blocks hold what they are to hold, for whoever looks
        with shard.side.after(), self._lock:
            if (pool := self._shared.get(raw.data_ptr())) is None:
                pool = self._shared[raw.data_ptr()] = self._memory.share(shard.pool)
            sample = first.cpu().numpy().tobytes()
        connection.send(Readable(pool, np.array(shard.blocks, np.int32).tobytes(), sample))
        return connection.receive(Mapped).ok

    # ---- the receiver

    def _reach(self, shard: Shard, readable: Readable, first: int) -> Tensor | None:
        """[blocks, block_bytes] uint8, the sender's pool; None where it cannot be read."""
        known = self._mapped.setdefault((shard.group, shard.epoch), {})
        if (rows := known.get(readable.pool.handle)) is None:
            try:
                with shard.side.after():
                    rows = self._memory.map(readable.pool).view(-1, shard.pool.layout.block_bytes)
                    found = rows[first, :SAMPLE_BYTES].cpu().numpy().tobytes()
                if found != readable.sample:
                    raise RuntimeError("what is read there is not what is there")
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                logger.warning("group %d: its memory cannot be read here, NCCL brings its blocks: %s", shard.group, reason)
                self._unmapped.add(shard.group)
                return None
            known[readable.pool.handle] = rows
        return rows

    def _read(self, connection: Connection, shard: Shard, theirs: Tensor, blocks: list[int]) -> None:
        try:
            with shard.side.after(shard.ready):
                copy_rows(theirs, blocks, shard.pool.raw, shard.blocks, shard.abort)
            self._finish(connection, shard)
            connection.check()  # a sender that has gone or withdrawn may have let others write there
        except BaseException:
            shard.side.drain()
            self._mapped.pop((shard.group, shard.epoch), None)
            raise

    def _finish(self, connection: Connection, shard: Shard) -> None:
        """The side stream is done, or the other side has gone."""

        def check() -> None:
            shard.abort.check()
            connection.check()

        shard.side.finish(self._timeout_s, check)


def _blocks(readable: Readable, shard: Shard) -> list[int]:
    """The sender's. Errors: TransferFailed for others than its pool has."""
    blocks: list[int] = np.frombuffer(readable.blocks, np.int32).tolist()
    theirs = readable.pool.size // shard.pool.layout.block_bytes
    if len(blocks) != len(shard.blocks) or min(blocks) < 0 or max(blocks) >= theirs:
        raise TransferFailed("the two sides do not agree on the blocks")
    return blocks
