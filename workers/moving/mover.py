"""Moves one rank's blocks beside its steps: to and from the same rank of other groups, to and from this host's memory.

Commands come from the step loop in the order of the log; it never waits here. Threads do the work, one at a time for each
other group and direction and one for host memory. Imports torch's side of blocks; transports come from outside.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from kvcache.pool import KVPool
from scheduler.protocol.leaders import Cut, Load, Moved, Movement, Offload, Receive, Send
from workers.moving.lane import Lane, LaneAbort, TransferFailed
from workers.moving.side import Ready, Side, copy_rows

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""Longest wait for the other side, or for the next byte."""

JOIN_S = 10.0
MOST_PAIRS = 32
"""Pairs of groups and direction that keep what they have made for one another: a communicator on a GPU holds memory there."""

Blocks = list[int]
LaneKey = tuple[str, int, int]
"""("send", "receive" or "host", group, epoch)"""


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part in one transfer. group, epoch: of the other side. blocks: of `pool`. port: "host:port" where to fetch;
    "" for a sender.

    ready: the steps that were launched before; before they are done, no block of it may be read or written.
    """

    transfer: int
    group: int
    epoch: int
    pool: KVPool
    blocks: Blocks
    side: Side
    ready: Ready
    abort: LaneAbort
    port: str = ""


class Transport(Protocol):
    """Carries blocks between ranks of equal numbers. Its calls come from lanes: in order for one pair of epochs and direction.

    address: "host:port" where others fetch this rank's blocks.
    """

    address: str

    def send(self, shard: Shard) -> float:
        """Returns once the other side has everything: the seconds that it took. Errors: whatever went wrong."""
        ...

    def receive(self, shard: Shard) -> float:
        """Returns once all blocks are here and the device is done with them."""
        ...

    def forget(self, group: int, epoch: int, *, sending: bool) -> None:
        """Whatever is kept of that pair and direction may go; no transfer of it is under way."""
        ...

    def enter(self, epoch: int) -> None:
        """This rank's group has another epoch from now on, at the same address: whoever wants the former one is refused, and
        nothing is kept of any pair. No transfer is under way."""
        ...

    def close(self) -> None:
        """No call follows; ends its threads."""
        ...


class BlockMover:
    """The `Mover` of a rank. rank: its number. host: its blocks in host memory, if any. narrow: the same two of narrow layers,
    if these have any. moved: called from any thread, once for
    each transfer; must not raise. Whatever goes wrong is said by `Moved`: a transfer takes neither steps nor group along."""

    def __init__(
        self,
        pool: KVPool,
        host: KVPool | None,
        transport: Transport | None,
        moved: Callable[[Moved], None],
        *,
        rank: int,
        epoch: int,
        narrow: tuple[KVPool, KVPool | None] | None = None,
    ) -> None:
        self._pools = [(pool, host)] if narrow is None else [(pool, host), narrow]
        self._device = pool.device
        self._transport = transport
        self._moved = moved
        self._rank, self._epoch = rank, epoch
        self._lanes: dict[LaneKey, _BlockLane] = {}
        self._recent: dict[LaneKey, None] = {}  # who may have a communicator, the last used last
        self._leaving: list[_BlockLane] = []  # cut off, perhaps still at work
        self._sides: list[Side] = []  # of lanes that have gone
        self._cut: dict[int, int] = {}  # group -> newest epoch that has gone

    def take(self, command: Movement) -> None:
        """The next movement of the log. Does not wait."""
        if isinstance(command, Cut):
            self._cut_off(command)
            return
        if isinstance(command, Send | Receive):
            lane = self._lane("send" if isinstance(command, Send) else "receive", command.group, command.epoch)
        else:
            lane = self._lane("host", 0, 0)
        lane.put(partial(self._run, command, lane, lane.side.ready()))

    def enter(self, epoch: int) -> None:
        """The group has another epoch from now on. What is under way fails, and nothing of it touches a block any more.

        Errors: TransferFailed if something goes on all the same: then no block of the pool can be trusted.
        """
        stuck = self._end_lanes(f"the group has left epoch {self._epoch}")
        if stuck:
            raise TransferFailed(f"{', '.join(stuck)} did not end within {JOIN_S:g} s")
        self._sides += [lane.side for lane in (*self._lanes.values(), *self._leaving)]
        self._lanes.clear()
        self._recent.clear()
        self._leaving.clear()
        self._epoch = epoch
        if self._transport is not None:
            self._transport.enter(epoch)

    def close(self) -> None:
        """Fails what is under way and ends all threads."""
        reason = "this rank has left its loop"
        for lane in (*self._lanes.values(), *self._leaving):
            lane.abort.set(reason)
        if self._transport is not None:
            self._transport.close()
        for name in self._end_lanes(reason):
            logger.warning("%s does not end", name)

    def _end_lanes(self, reason: str) -> list[str]:
        """Fails what they have to do; the names of those that are not done with it in time."""
        lanes = [*self._lanes.values(), *self._leaving]
        for lane in lanes:
            lane.abort.set(reason)
        return [lane.name for lane in lanes if not lane.join(JOIN_S)]

    def _lane(self, kind: str, group: int, epoch: int) -> "_BlockLane":
        key = (kind, group, epoch)
        lane = self._lanes.get(key)
        if lane is None:
            side = self._sides.pop() if self._sides else Side(self._device)
            lane = self._lanes[key] = _BlockLane(f"manta-{kind}-{group}.{epoch}-rank{self._rank}", side)
            if kind != "host" and epoch <= self._cut.get(group, -1):
                lane.abort.set(f"epoch {epoch} of group {group} has gone")
            elif kind != "host":
                self._cut_off(Cut(group, epoch - 1))  # whose successor is here
        if kind != "host":
            self._recent.pop(key, None)
            self._recent[key] = None
            if len(self._recent) > MOST_PAIRS:
                self._retire()
        return lane

    def _retire(self) -> None:
        """Of the pairs that are quiet, the one that has been so for longest begins anew should it be needed again."""
        quiet = next((key for key in self._recent if self._lanes[key].idle), None)
        if quiet is not None:
            self._forget(quiet)

    def _forget(self, key: LaneKey) -> None:
        """In the lane's own thread, after what it still has to do and before what may follow."""
        self._recent.pop(key, None)
        self._lanes[key].put(partial(self._forget_now, key))

    def _cut_off(self, cut: Cut) -> None:
        self._cut[cut.group] = max(cut.epoch, self._cut.get(cut.group, -1))
        for kind, group, epoch in [key for key in self._lanes if key[0] != "host" and key[1] == cut.group]:
            if epoch <= cut.epoch:
                self._lanes[kind, group, epoch].abort.set(f"epoch {epoch} of group {group} has gone")
                self._forget((kind, group, epoch))
                self._reclaim()
                self._leaving.append(self._lanes.pop((kind, group, epoch)))

    def _reclaim(self) -> None:
        """The sides of those that have left."""
        leaving, self._leaving = self._leaving, []
        for lane in leaving:
            if lane.idle:
                self._sides.append(lane.side)
            else:
                self._leaving.append(lane)

    # ---- in a lane

    def _forget_now(self, key: LaneKey) -> None:
        if self._transport is None:
            return
        try:
            self._transport.forget(key[1], key[2], sending=key[0] == "send")
        except Exception as error:  # a communicator that breaks as it is closed has been closed all the same
            logger.warning("%s group %d, epoch %d: %s", *key, error)

    def _run(self, command: Send | Receive | Offload | Load, lane: "_BlockLane", ready: Ready) -> None:
        try:
            lane.abort.check()
            pool, host = self._of(command)
            blocks = _ids(command.blocks, pool)
            if isinstance(command, Offload | Load):
                elapsed_s = self._copy(command, pool, blocks, host, lane, ready)
            else:
                elapsed_s = self._exchange(command, pool, blocks, lane, ready)
            moved = Moved(self._epoch, command.transfer, True, elapsed_s, len(blocks) * pool.layout.block_bytes)
        except Exception as error:  # sockets, devices, memory: the scheduler computes anew what did not arrive
            reason = lane.abort.reason or str(error) or type(error).__name__
            logger.warning("transfer %d failed: %s", command.transfer, reason)
            moved = Moved(self._epoch, command.transfer, False, message=reason)
        self._moved(moved)

    def _of(self, command: Send | Receive | Offload | Load) -> tuple[KVPool, KVPool | None]:
        """Its layers' pool, and theirs in host memory. Errors: TransferFailed."""
        if command.narrow and len(self._pools) == 1:
            raise TransferFailed("the model has no narrow layers here")
        return self._pools[command.narrow]

    def _exchange(
        self, command: Send | Receive, pool: KVPool, blocks: Blocks, lane: "_BlockLane", ready: Ready
    ) -> float:  # fmt: skip
        if self._transport is None:
            raise TransferFailed("this rank takes no part in transfers")
        port = command.ports[self._rank] if isinstance(command, Receive) else ""
        shard = Shard(command.transfer, command.group, command.epoch, pool, blocks, lane.side, ready, lane.abort, port)
        return self._transport.receive(shard) if isinstance(command, Receive) else self._transport.send(shard)

    def _copy(
        self, command: Offload | Load, pool: KVPool, blocks: Blocks, host: KVPool | None, lane: "_BlockLane", ready: Ready
    ) -> float:  # fmt: skip
        if host is None:
            raise TransferFailed("this rank keeps no blocks in host memory")
        host_blocks = _ids(command.host_blocks, host)
        began_s = time.perf_counter()
        try:
            with lane.side.after(ready):
                if isinstance(command, Offload):
                    copy_rows(pool.raw, blocks, host.raw, host_blocks, lane.abort)
                else:
                    copy_rows(host.raw, host_blocks, pool.raw, blocks, lane.abort)
        finally:
            lane.side.drain()  # also after an error: what is under way ends by itself, and soon
        return time.perf_counter() - began_s


class _BlockLane(Lane):
    """A lane with its place on the pool's device."""

    def __init__(self, name: str, side: Side) -> None:
        super().__init__(name)
        self.side = side


def _ids(buffer: bytes, pool: KVPool) -> Blocks:
    """Errors: TransferFailed for a block that the pool does not have, which must not become somebody else's bytes."""
    ids: Blocks = np.frombuffer(buffer, np.int32).tolist()
    if not ids or min(ids) < 0 or max(ids) >= pool.blocks:
        raise TransferFailed(f"a transfer of {len(ids)} blocks names one that is not among the {pool.blocks} here")
    return ids
