"""Who may have killed the groups that it ran in is tried alone, so that it cannot take group after group, and others with it.

    note      it ran in a group that died; the second time it is a suspect, and waits apart
    try_next  a group is emptied for one of them, and takes nobody else
    clear     it has come further than when the group died: it is as others are again
    came      or the group had not died, and only the connection to it: nobody is suspected for that
    note      or that group has died as well, with it alone: it ends, and says so

A trial is short, and those who make room for it find their blocks where they were. Imports `state`, `admission` and `leases`.
"""

from kvcache.ids import GroupId
from scheduler import leases
from scheduler.placement.admission import Admission
from scheduler.state.cluster import ClusterState
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence, State

PROVEN_TOKENS = 16
"""Tokens beyond those known when its group died: more than had been computed without a report."""


class Suspects:
    """One trial at a time. Its place is `ResidentGroup.alone`, which ends with the sequence's lease."""

    def __init__(self, state: ClusterState, admission: Admission) -> None:
        self._state = state
        self._admission = admission
        self._group: ResidentGroup | None = None
        self._noted: dict[GroupId, tuple[int, list[Sequence]]] = {}  # of each group the last life that ended, and who ran there

    def note(self, group: ResidentGroup, sequence: Sequence) -> str | None:
        """It ran in a group that has died, all its tokens are written back, and it has not left its row yet. Why it is not
        tried again; None if it is."""
        life, noted = self._noted.get(group.group, (-1, []))
        self._noted[group.group] = group.life, [*(noted if life == group.life else ()), sequence]
        sequence.deaths += 1
        sequence.proven = sequence.committed + PROVEN_TOKENS
        if group.alone is sequence:
            return f"each of {sequence.deaths} groups that ran the request has died, the last one with nothing else to do"
        return None

    def came(self, group: ResidentGroup) -> None:
        """A group is up. If its ranks are those that were taken for dead, they were not: whoever ran there is as before."""
        life, noted = self._noted.pop(group.group, (-1, []))
        for sequence in noted if life == group.life else ():
            if sequence.state is not State.ENDED and sequence.deaths:
                self._forgive(sequence)

    def lost(self, group: GroupId) -> None:
        """No rank of it comes back."""
        self._noted.pop(group, None)

    def _forgive(self, sequence: Sequence) -> None:
        suspected, waits = sequence.suspect, sequence in self._state.waiting.apart
        sequence.deaths -= 1
        if sequence.suspect or not suspected:
            return
        for group in self._state.groups.values():
            if group.alone is sequence:
                group.alone = None
        if waits:
            self._state.waiting.apart.remove(sequence)
            self._state.waiting.join([sequence])
        self._state.waiting.made_room()

    def clear(self, group: ResidentGroup) -> bool:
        """Whether the one on trial there has come far enough: then it is as others are, and the group takes them."""
        sequence = group.alone
        if sequence is None or sequence.lease is None or group.length.item(sequence.row) < sequence.proven:
            return False
        sequence.deaths, group.alone = 0, None
        self._state.waiting.made_room()
        return True

    @property
    def pending(self) -> bool:
        """There is a trial, or somebody waits for one."""
        return self._group is not None or bool(self._state.waiting.apart)

    def try_next(self) -> None:
        """Begins the next trial if none is under way, and lets the suspect start once it has its group to itself."""
        group = self._group = self._standing() or self._empty_one()
        suspect = group.alone if group is not None else None
        if group is None or suspect is None or suspect.state is not State.WAITING:
            return
        if not (group.running or group.fetching):
            self._admission.place_in(group, suspect)

    def _standing(self) -> ResidentGroup | None:
        """The group of the trial that goes on: neither it nor the suspect has gone."""
        group = self._group
        if group is None or group.alone is None or self._state.groups.get(group.group) is not group:
            return None
        if group.alone.state is State.ENDED or (group.draining and group.alone.state is State.WAITING):
            group.alone = None
            self._state.waiting.made_room()
            return None
        return group

    def _empty_one(self) -> ResidentGroup | None:
        """For the next suspect; None without one, or where no group is large enough."""
        suspect = min(self._state.waiting.apart, default=None)
        group = None if suspect is None else self._least_loaded(suspect)
        if group is not None:
            group.alone = suspect
            for other in sorted(group.running, reverse=True):
                leases.preempt(self._state, group, other)
        return group

    def _least_loaded(self, suspect: Sequence) -> ResidentGroup | None:
        large = [g for g in self._state.groups.values() if g.blocks >= suspect.blocks_at_once and not g.draining]
        return min(large, key=lambda g: (len(g.running) + len(g.fetching), g.group), default=None)
