"""Blocks between groups that share a process: copied straight from pool to pool. Imports the mover's types."""

import time
from dataclasses import dataclass
from threading import Condition

from workers.moving.lane import TransferFailed
from workers.moving.mover import TIMEOUT_S, Shard
from workers.moving.side import copy_rows


@dataclass(eq=False, slots=True)
class _Offer:
    """A sender that waits. taken, over, withdrawn: what has become of it; written under the exchange's lock."""

    shard: Shard
    taken: bool = False
    over: bool = False
    withdrawn: bool = False
    failure: str = ""


class Exchange:
    """Where the ranks of one process meet: one for all groups."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.offers: dict[tuple[int, int, int, int], _Offer] = {}
        """(transfer, receiving group, its epoch, rank) -> the sender"""

    def wake(self) -> None:
        with self.changed:
            self.changed.notify_all()


class LocalTransport:
    """The `Transport` of one rank in an exchange. The receiver copies; the sender waits until it has."""

    def __init__(
        self, exchange: Exchange, *, group: int, epoch: int, rank: int, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.address = f"local:{group}.{epoch}.{rank}"
        self._exchange = exchange
        self._group, self._epoch, self._rank = group, epoch, rank
        self._timeout_s = timeout_s

    def send(self, shard: Shard) -> float:
        key = (shard.transfer, shard.group, shard.epoch, self._rank)
        offer = _Offer(shard)
        changed = self._exchange.changed
        with shard.abort.waking(self._exchange.wake), changed:
            self._exchange.offers[key] = offer
            changed.notify_all()
            began_s = time.perf_counter()
            try:
                if not changed.wait_for(lambda: offer.taken or offer.over or shard.abort.reason, self._timeout_s):
                    raise TransferFailed(f"nobody fetched the blocks within {self._timeout_s:g} s")
                began_s = time.perf_counter()
                changed.wait_for(lambda: offer.over or shard.abort.reason)
                shard.abort.check()
            finally:
                offer.withdrawn = not offer.over
                self._exchange.offers.pop(key, None)
        if offer.failure:
            raise TransferFailed(offer.failure)
        return time.perf_counter() - began_s

    def receive(self, shard: Shard) -> float:
        offer = self._take(shard)
        began_s = time.perf_counter()
        failure = ""
        try:
            if len(offer.shard.blocks) != len(shard.blocks) or offer.shard.pool.layout != shard.pool.layout:
                raise TransferFailed("the two sides do not agree on the blocks")
            with shard.side.after(shard.ready, offer.shard.ready):
                copy_rows(offer.shard.pool.raw, offer.shard.blocks, shard.pool.raw, shard.blocks, shard.abort)
            shard.side.finish(self._timeout_s, shard.abort.check)
        except Exception as error:
            failure = f"the receiver failed: {error}"
            raise
        finally:
            shard.side.drain()
            with self._exchange.changed:
                offer.over, offer.failure = True, failure
                self._exchange.changed.notify_all()
        if offer.withdrawn:  # its blocks may have been granted again while they were read
            raise TransferFailed("the sender withdrew")
        return time.perf_counter() - began_s

    def _take(self, shard: Shard) -> _Offer:
        key = (shard.transfer, self._group, self._epoch, self._rank)
        exchange = self._exchange
        with shard.abort.waking(exchange.wake), exchange.changed:
            if not exchange.changed.wait_for(lambda: key in exchange.offers or shard.abort.reason, self._timeout_s):
                raise TransferFailed(f"nobody sent the blocks within {self._timeout_s:g} s")
            shard.abort.check()
            offer = exchange.offers[key]
            offer.taken = True
            exchange.changed.notify_all()
        return offer

    def forget(self, group: int, epoch: int, *, sending: bool) -> None:
        """Nothing is kept of a pair."""

    def enter(self, epoch: int) -> None:
        self._epoch = epoch

    def close(self) -> None:
        """There are no threads."""
