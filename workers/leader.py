"""The step loop of a group: rank 0 takes commands from the scheduler, steps with its peers, and reports what was done.

Imports `rank`, `reports` and `scheduler.messages`; transports come from outside.
"""

from collections.abc import Sequence
from typing import Protocol

from scheduler.messages import Command, Report
from workers.rank import Rank
from workers.reports import Reporter


class LinkClosed(ConnectionError):
    """The other side has gone."""


class SchedulerLink(Protocol):
    """The group's stream to the scheduler: one ordered log down, one numbered stream of reports up."""

    def receive(self, *, wait: bool) -> Sequence[Command]:
        """The commands that came in since the last call; waits for one if asked. Errors: LinkClosed."""
        ...

    def send(self, report: Report) -> None: ...


class PeerFeed(Protocol):
    """From the leader to each other rank: the commands before each turn, empty ones included, in order."""

    def send(self, commands: Sequence[Command]) -> None: ...


class PeerInbox(Protocol):
    """The other end of `PeerFeed`."""

    def receive(self) -> Sequence[Command]:
        """Waits for the leader's next turn. Errors: LinkClosed."""
        ...


def lead(rank: Rank, link: SchedulerLink, feed: PeerFeed, reporter: Reporter) -> str:
    """Runs until the log ends; returns its reason. Never steps without being told when idle: an idle group sleeps.

    Errors: LinkClosed, and whatever the executor raises; the caller lets the group die then.
    """
    while True:
        commands = link.receive(wait=rank.idle)
        feed.send(commands)
        result = rank.turn(commands)
        if rank.batch.ended is not None:
            return rank.batch.ended
        if result is not None:
            reporter.add(result, rank.batch.applied)
        for report in reporter.take(flush=rank.idle):
            link.send(report)


def follow(rank: Rank, inbox: PeerInbox) -> str:
    """A peer's loop: the same turns as the leader's, with nobody to report to."""
    while rank.batch.ended is None:
        rank.turn(inbox.receive())
    return rank.batch.ended
