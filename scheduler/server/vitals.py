"""Which groups have hung: a pure judge over what their leaders say of themselves. Time is an argument.

    a rank is stopped, or its host is gone    it says nothing: the leader to the scheduler, a peer to its leader, who tells
    a step does not end                       its leader says since when it is in it, and how long such a step may take

A group without work is judged as well, or else it would be given some. Imports `silence` and `leaders`.
"""

from typing import NamedTuple

from kvcache.ids import GroupId
from scheduler.protocol.leaders import Beat
from scheduler.protocol.silence import Silence


class Fenced(NamedTuple):
    """An epoch of a group that is not listened to any more, though its ranks may run on: whoever started them ends them.

    cut: its connection has ended, and nothing else is known against it: ranks that live may come back as another epoch.
    """

    group: int
    epoch: int
    reason: str
    cut: bool = False


class Vitals:
    """The groups that are up, each by its present epoch. hung_after_s: of silence."""

    def __init__(self, now_s: float, hung_after_s: float) -> None:
        self._hung_after_s = hung_after_s
        self._silence = Silence(now_s)
        self._epochs: dict[GroupId, int] = {}
        self._beats: dict[GroupId, Beat] = {}

    def up(self, group: GroupId, epoch: int, now_s: float) -> None:
        self._epochs[group] = epoch
        self._beats.pop(group, None)
        self._silence.heard(group, now_s)

    def gone(self, group: GroupId) -> None:
        self._epochs.pop(group, None)
        self._beats.pop(group, None)
        self._silence.forget(group)

    def heard(self, group: GroupId, epoch: int, now_s: float, beat: Beat | None = None) -> None:
        """Its leader has said something. What an earlier epoch says is no sign of life."""
        if self._epochs.get(group) == epoch:
            self._silence.heard(group, now_s)
            if beat is not None:
                self._beats[group] = beat

    def look(self, now_s: float) -> list[Fenced]:
        """Those that have hung, and why; call it every `LOOK_S`."""
        hung = []
        for name, silent_s in self._silence.look(now_s).items():
            group = GroupId(name)
            reason = _why(silent_s, self._beats.get(group), self._hung_after_s)
            if reason is not None:
                hung.append(Fenced(group, self._epochs[group], f"group {group} hangs: {reason}"))
        return hung


def _why(silent_s: float, beat: Beat | None, hung_after_s: float) -> str | None:
    if silent_s > hung_after_s:
        return f"its leader has said nothing for {silent_s:.1f} s"
    if beat is None:
        return None
    if beat.silent_s > hung_after_s:
        return f"rank {beat.silent_rank} has said nothing for {beat.silent_s:.1f} s"
    patience_s = max(beat.patience_s, hung_after_s)
    if beat.busy_s > patience_s:
        return f"a step has not ended after {beat.busy_s:.1f} s, and {patience_s:.1f} s are more than such a step takes"
    return None
