"""Who is taken for hung, by the word of leaders and by their silence; a listener's own sleep is nobody's silence."""

from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig
from scheduler.protocol.leaders import Beat
from scheduler.protocol.silence import BEAT_S, LOOK_S
from scheduler.server.vitals import Fenced, Vitals

SILENT_S = CoreConfig().hung_after_s
HUNG, WELL = GroupId(0), GroupId(1)


class Listening:
    """Time passes in looks, as it does for the scheduler; those who live say so."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.vitals = Vitals(self.now_s, SILENT_S)
        for group in (HUNG, WELL):
            self.vitals.up(group, 3, self.now_s)

    def listen(self, seconds: float, *beats: tuple[GroupId, Beat]) -> list[Fenced]:
        """Looks for so long, or until somebody hangs."""
        for _ in range(round(seconds / LOOK_S)):
            self.now_s += LOOK_S
            for group, beat in beats:
                self.vitals.heard(group, beat.epoch, self.now_s, beat)
            if hung := self.vitals.look(self.now_s):
                return hung
        return []


def test_a_leader_that_says_nothing_hangs_and_the_other_group_does_not() -> None:
    listening = Listening()
    (hung,) = listening.listen(60.0, (WELL, Beat(3)))
    assert (hung.group, hung.epoch) == (HUNG, 3)
    assert "said nothing" in hung.reason
    assert SILENT_S < listening.now_s - 100.0 <= 5.0 - BEAT_S, "noticed within 5 s of its last word"


def test_a_scheduler_that_was_stopped_takes_nobody_for_hung() -> None:
    listening = Listening()
    both = ((HUNG, Beat(3)), (WELL, Beat(3)))
    assert listening.listen(5.0, *both) == []
    listening.now_s += 30.0  # a timer is looked at before what has come in meanwhile
    assert listening.vitals.look(listening.now_s) == []
    assert listening.listen(SILENT_S - 1.0) == []
    assert listening.listen(5.0, *both) == []


def test_but_who_hangs_is_found_by_one_that_is_stopped_again_and_again() -> None:
    listening = Listening()
    for _ in range(40):
        listening.now_s += 2.0
        if found := listening.vitals.look(listening.now_s) or listening.listen(1.0, (WELL, Beat(3))):
            break
    assert [fenced.group for fenced in found] == [HUNG]


def test_a_step_is_judged_by_what_its_leader_expects_of_it() -> None:
    listening = Listening()
    assert listening.listen(60.0, (HUNG, Beat(3, busy_s=200.0, patience_s=300.0)), (WELL, Beat(3))) == []
    (hung,) = listening.listen(1.0, (HUNG, Beat(3, busy_s=4.5, patience_s=4.0)), (WELL, Beat(3)))
    assert hung.group == HUNG
    assert "a step has not ended after 4.5 s" in hung.reason


def test_but_for_as_long_as_one_may_be_silent_at_least() -> None:
    vitals = Vitals(0.0, 60.0)
    vitals.up(HUNG, 3, 0.0)
    vitals.heard(HUNG, 3, LOOK_S, Beat(3, busy_s=59.0, patience_s=4.0))
    assert vitals.look(LOOK_S) == []
    vitals.heard(HUNG, 3, 2 * LOOK_S, Beat(3, busy_s=60.5, patience_s=4.0))
    assert [fenced.group for fenced in vitals.look(2 * LOOK_S)] == [HUNG]


def test_a_silent_peer_is_its_leader_s_to_tell() -> None:
    (hung,) = Listening().listen(1.0, (HUNG, Beat(3, silent_rank=2, silent_s=SILENT_S + 0.1)), (WELL, Beat(3)))
    assert "rank 2 has said nothing" in hung.reason


def test_what_an_earlier_epoch_says_is_no_sign_of_life() -> None:
    listening = Listening()
    (hung,) = listening.listen(60.0, (HUNG, Beat(2)), (WELL, Beat(3)))
    assert hung.group == HUNG
    listening.vitals.gone(HUNG)
    assert listening.listen(60.0, (HUNG, Beat(3)), (WELL, Beat(3))) == []
    listening.vitals.up(HUNG, 4, listening.now_s)
    assert listening.listen(60.0, (HUNG, Beat(4)), (WELL, Beat(3))) == []
