"""The step loop of a group: rank 0 takes commands from the scheduler, steps with its peers, and reports what was done.

Imports `rank`, `reports` and `scheduler.protocol.leaders`; transports come from outside.
"""

import contextlib
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from scheduler.protocol.leaders import Adapts, Command, Moved, Refused, Report, Start
from workers.loop.adapters import GatheredReads
from workers.loop.rank import Rank
from workers.loop.reports import Reporter

T = TypeVar("T")


class LinkClosed(ConnectionError):
    """The other side has gone."""


class SchedulerGone(LinkClosed):
    """The scheduler has gone, and the group is as it was: its ranks have made the same turns."""


class SchedulerLink(Protocol):
    """The group's stream to the scheduler: one ordered log down, one numbered stream of reports up, and what has moved."""

    def receive(self, *, wait_s: float) -> Sequence[Command]:
        """The commands that came in since the last call; waits for one, for so long at most. Errors: SchedulerGone."""
        ...

    def send(self, message: Report | Moved | Refused | Adapts) -> None:
        """From any thread. Errors: SchedulerGone."""
        ...

    def wake(self) -> None:
        """Ends a wait in `receive`, with no commands. From any thread."""
        ...


class PeerFeed(Protocol):
    """From the leader to each other rank: the commands before each turn, empty ones included, in order, and the rows held."""

    def send(self, commands: Sequence[Command], held: Sequence[int]) -> None: ...


class PeerInbox(Protocol):
    """The other end of `PeerFeed`."""

    def receive(self) -> tuple[Sequence[Command], Sequence[int]]:
        """Waits for the leader's next turn: commands, and the rows held. Errors: LinkClosed."""
        ...


class Gathered:
    """What the ranks of a group say of each transfer, one after another, becomes one `Moved` once all have.

    ranks: how many. send: to the scheduler, from whichever rank's thread was last; None until the group has its link. Transfers
    of two epochs may have the same number.
    """

    def __init__(self, ranks: int) -> None:
        self.send: Callable[[Moved], None] | None = None
        self._ranks = ranks
        self._lock = threading.Lock()
        self._parts: dict[tuple[int, int], list[Moved]] = {}

    def forget(self) -> None:
        """The epoch is over: what has been said of its transfers is of no use any more."""
        with self._lock:
            self._parts.clear()

    def add(self, moved: Moved) -> None:
        """From any thread, once for each rank and transfer. A scheduler that has gone is the step loop's to notice."""
        with self._lock:
            parts = self._parts.setdefault((moved.epoch, moved.transfer), [])
            parts.append(moved)
            if len(parts) < self._ranks:
                return
            del self._parts[moved.epoch, moved.transfer]
        whole = Moved(
            epoch=moved.epoch,
            transfer=moved.transfer,
            ok=all(part.ok for part in parts),
            elapsed_s=max(part.elapsed_s for part in parts),
            bytes=sum(part.bytes for part in parts),
            message="; ".join(dict.fromkeys(part.message for part in parts if part.message)),
        )
        if self.send is not None:
            with contextlib.suppress(LinkClosed):
                self.send(whole)


def lead(
    rank: Rank, link: SchedulerLink, feed: PeerFeed, reporter: Reporter, reads: GatheredReads | None = None
) -> str:  # fmt: skip
    """Runs until the log ends; returns its reason. Never steps without being told when idle: an idle group sleeps.

    reads: what the ranks say of their LoRA adapters; None where rows have none.
    Errors: SchedulerGone, between two turns; LinkClosed for a peer, and whatever the executor raises: the caller lets the group
    die then.
    """
    if rank.grammars is not None:
        rank.grammars.on_opened = link.wake
    if reads is not None:
        reads.wake = link.wake
        link.wake()  # for what has been said while nobody listened

    def look(wait_s: float) -> list[Command]:
        return [*link.receive(wait_s=wait_s), *(reads.take() if reads is not None else ())]

    while True:
        slept = rank.idle
        commands = rank.look_out(look(math.inf if slept else 0.0), look)
        if slept:
            reporter.wake()
        result = rank.step(begin_turn(rank, feed, commands))
        if rank.batch.ended is not None:
            return rank.batch.ended
        if result is not None:
            reporter.add(result, rank.batch.applied)
        if rank.adapters is not None:
            for leases, why in rank.adapters.refusals():
                link.send(Refused(reporter.epoch, leases, why))
            if waited := rank.adapters.waited():
                link.send(Adapts(reporter.epoch, waited))
        for report in reporter.take(flush=rank.idle):
            link.send(report)


def come(received: "queue.SimpleQueue[T]", wait_s: float) -> Iterator[T]:
    """What has come, after a wait for the first, for so long at most."""
    if wait_s > 0.0:
        with contextlib.suppress(queue.Empty):
            yield received.get(timeout=wait_s if wait_s < math.inf else None)
    while not received.empty():
        yield received.get()


def begin_turn(rank: Rank, feed: PeerFeed, commands: Sequence[Command]) -> Sequence[int]:
    """All but its step: the rows held, when the commands have been applied here and are on their way to the peers.

    They are sent first, so that all ranks apply them at the same time; whether a row that comes with a grammar is held is known
    only when it has been admitted.
    """
    if any(isinstance(command, Start) and command.params.grammar is not None for command in commands):
        rank.apply(commands)
        held = rank.held()
        feed.send(commands, held)
    else:
        held = rank.held()
        feed.send(commands, held)
        rank.apply(commands)
    return held


def abandon(rank: Rank, feed: PeerFeed) -> None:
    """Nobody is in the batch any more and nothing under way: whoever has given these commands has gone. The ranks make the same
    turns meanwhile as ever. Errors: LinkClosed for a peer, and whatever the executor raises."""
    commands = rank.vacate()
    while commands or not rank.idle:
        rank.apply(commands)
        feed.send(commands, ())
        rank.step()
        commands = []


def follow(rank: Rank, inbox: PeerInbox) -> str:
    """A peer's loop: the same turns as the leader's, with nobody to report to."""
    while rank.batch.ended is None:
        rank.turn(*inbox.receive())
    return rank.batch.ended
