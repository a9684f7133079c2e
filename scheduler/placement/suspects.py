"""Who may have killed the groups that it ran in is tried alone, so that it cannot take group after group, and others with it.

    note      it ran in a group that died; the second time in a row it is a suspect, and waits apart
    try_next  a group is emptied for one of them, and takes nobody else
    clear     it has come further than when the group died: it is as others are again
    came      or the group had not died, and only the connection to it: nobody is suspected for that
    note      or that group has died as well, with it alone: it ends, and says so

What strikes several groups at once (their host, its network) is noticed of one after the other, and whoever goes from each to
the next meets all their deaths. So a death counts only if its group had lived on after the one before: by more than what was on
its way then can say. Who has met one that does not count is *wary*: it goes on in a group that has lived on, if there is room,
or as others do once every group has, and the next death counts. A suspect is tried in a group that has. Hence a request takes
four groups at most, three if each lives on with it for a second.

Nobody wary waits for ever. A group lives on with its next step, or when it comes up; one whose step does not end is fenced when
that has taken longer than any may (`Vitals`), and is waited for no more. One in such a step keeps nobody from the others. The
wary are asked before the queue whenever somebody may start, so what becomes free is theirs; they hold nothing meanwhile, and
nobody waits for them.

A trial is short, and those who make room for it find their blocks where they were. Imports `state`, `admission` and `leases`.
"""

import math

from kvcache.ids import GroupId
from scheduler import leases
from scheduler.placement.admission import Admission
from scheduler.protocol.silence import BEAT_S
from scheduler.state.cluster import ClusterState
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence, State

PROVEN_TOKENS = 16
"""Tokens beyond those known when its group died: more than had been computed without a report."""


class Suspects:
    """One trial at a time, in `group`; None: there is none. Its place is `ResidentGroup.alone`, which ends with the sequence's
    lease."""

    def __init__(self, state: ClusterState, admission: Admission) -> None:
        self._state = state
        self._admission = admission
        self.group: ResidentGroup | None = None

    def note(self, group: ResidentGroup, sequence: Sequence) -> str | None:
        """It ran in a group that has died, all its tokens are written back, and it has not left its row yet. Why it is not
        tried again; None if it is."""
        lived, sequence.bereaved_s = _lived_on(group, sequence), self._state.now_s
        if not lived:
            sequence.wary = True
            return None
        before = () if sequence.committed >= sequence.proven else sequence.deaths
        sequence.deaths = (*before, (group.group, group.life))
        sequence.proven = sequence.committed + PROVEN_TOKENS
        if group.alone is sequence:
            return f"each of {len(sequence.deaths)} groups that ran the request has died, the last one with nothing else to do"
        return None

    def came(self, group: ResidentGroup) -> None:
        """A group is up. If its ranks are those that were taken for dead, they were not: whoever ran there is as before."""
        death = (group.group, group.life)
        for sequence in [each for each in self._state.sequences.values() if death in each.deaths]:
            self._forgive(sequence, death)

    def _forgive(self, sequence: Sequence, death: tuple[GroupId, int]) -> None:
        suspected, waits = sequence.suspect, sequence in self._state.waiting.apart
        sequence.deaths = tuple(each for each in sequence.deaths if each != death)
        if sequence.suspect or not suspected:
            return
        for group in self._state.groups.values():
            if group.alone is sequence:
                group.keep_for(None)
        if waits and not sequence.wary:
            self._state.waiting.apart.remove(sequence)
            self._state.waiting.join([sequence])
        self._state.waiting.made_room()

    def clear(self, group: ResidentGroup) -> bool:
        """Whether the one on trial there has come far enough: then it is as others are, and the group takes them."""
        sequence = group.alone
        if sequence is None or sequence.lease is None or group.length.item(sequence.row) < sequence.proven:
            return False
        sequence.deaths, sequence.wary = (), False
        group.keep_for(None)
        self._state.waiting.made_room()
        return True

    def try_next(self) -> None:
        """Lets those wary go on who may, the first of them first; begins the next trial if none is under way, and lets the
        suspect start once it has its group to itself. Where nobody waits apart and there is no trial it does nothing."""
        self._reassure()
        group = self.group = self._standing() or self._empty_one()
        suspect = group.alone if group is not None else None
        if group is None or suspect is None or suspect.state is not State.WAITING:
            return
        if not (group.running or group.fetching):
            self._admission.place_in(group, suspect)

    def _reassure(self) -> None:
        """Those wary join the queue once all groups that they might go to have lived on. Until then each goes to one that has,
        the least loaded first; who finds no room there keeps those behind it waiting for it, or each would cost a match."""
        waiting, groups = self._state.waiting, [group for group in self._state.groups.values() if not group.draining]
        whole_s = min((group.whole_s for group in groups), default=math.inf)
        wary = sorted(each for each in waiting.apart if not each.suspect)
        ready = [each for each in wary if whole_s >= each.bereaved_s + BEAT_S]
        for sequence in ready:
            waiting.apart.remove(sequence)
            sequence.wary = False
        if ready:
            waiting.join(ready)
        for sequence in [each for each in wary if each.wary]:
            able = [group for group in groups if _lived_on(group, sequence) and group.blocks >= sequence.blocks_at_once]
            for group in sorted(able, key=_load):
                self._admission.place_in(group, sequence)
                if sequence.state is not State.WAITING:
                    sequence.wary = False
                    break
            if able and sequence.wary:
                break

    def _standing(self) -> ResidentGroup | None:
        """The group of the trial that goes on: neither it nor the suspect has gone."""
        group = self.group
        if group is None or group.alone is None or self._state.groups.get(group.group) is not group:
            return None
        if group.alone.state is State.ENDED or (group.draining and group.alone.state is State.WAITING):
            group.keep_for(None)
            self._state.waiting.made_room()
            return None
        return group

    def _empty_one(self) -> ResidentGroup | None:
        """For the next suspect; None without one, or where no group is large enough and has lived on."""
        suspect = min((each for each in self._state.waiting.apart if each.suspect), default=None)
        group = None if suspect is None else self._least_loaded(suspect)
        if group is not None:
            group.keep_for(suspect)
            for other in sorted(group.running, reverse=True):
                leases.preempt(self._state, group, other)
        return group

    def _least_loaded(self, suspect: Sequence) -> ResidentGroup | None:
        groups = (g for g in self._state.groups.values() if g.blocks >= suspect.blocks_at_once and not g.draining)
        fit = [group for group in groups if _lived_on(group, suspect)]
        return min(fit, key=_load, default=None)


def _load(group: ResidentGroup) -> tuple[int, GroupId]:
    return len(group.running) + len(group.fetching), group.group


def _lived_on(group: ResidentGroup, sequence: Sequence) -> bool:
    """After the last death that the sequence has met, by more than what was on its way then can say."""
    return group.whole_s >= sequence.bereaved_s + BEAT_S
