"""Transfers share the channels of their groups, begin when both sides have come to them, and end once on each side."""

import numpy as np
import pytest

from kvcache.ids import GroupId
from scheduler.protocol.leaders import Cut, Load, Offload, Receive, Send
from simulator.transfers import LinkModel, SimulatedTransfers

BLOCK = 10
LINKS = LinkModel(fetch_tokens_per_s=100.0, host_tokens_per_s=200.0, latency_s=0.5, token_bytes=2)
A, B, C = GroupId(0), GroupId(1), GroupId(2)


def filled(count: int) -> bytes:
    return np.arange(count, dtype=np.int32).tobytes()


def transfers() -> SimulatedTransfers:
    made = SimulatedTransfers(LINKS, BLOCK)
    for group in (A, B, C):
        made.group_up(group, 7)
    return made


def fetch(to: SimulatedTransfers, number: int, sender: GroupId, receiver: GroupId, count: int, at_s: float) -> None:
    to.begin(sender, Send(number, filled(count), receiver, 7), at_s)
    to.begin(receiver, Receive(number, filled(count), sender, 7, ()), at_s)


def ends(of: SimulatedTransfers) -> list[tuple[float, int, GroupId, bool]]:
    """(when, transfer, who is told, whether it has arrived) of all that are under way, to the end."""
    told = []
    while (when_s := of.next_s) is not None:
        told += [(round(when_s, 6), moved.transfer, group, moved.ok) for group, moved in of.finished(when_s)]
    return told


def test_one_takes_its_latency_and_its_size() -> None:
    moving = transfers()
    fetch(moving, 1, A, B, 20, at_s=1.0)
    assert moving.finished(3.4) == []
    assert ends(moving) == [(3.5, 1, A, True), (3.5, 1, B, True)]
    assert moving.tokens == {"in": 200}


def test_it_begins_when_both_have_come_to_it() -> None:
    moving = transfers()
    moving.begin(B, Receive(1, filled(10), A, 7, ()), 0.0)
    assert moving.next_s is None
    moving.begin(A, Send(1, filled(10), B, 7), 4.0)
    assert [at for at, *_ in ends(moving)] == [5.5, 5.5]


def test_those_of_one_channel_share_it_and_the_rest_is_for_who_is_left() -> None:
    moving = transfers()
    fetch(moving, 1, A, B, 20, at_s=0.0)
    fetch(moving, 2, A, C, 10, at_s=0.0)  # both 50 a second, until the second is over at 2.5 s
    assert ends(moving) == [(2.5, 2, A, True), (2.5, 2, C, True), (3.5, 1, A, True), (3.5, 1, B, True)]


def test_channels_of_other_groups_and_other_directions_are_free() -> None:
    moving = transfers()
    fetch(moving, 1, A, B, 10, at_s=0.0)
    fetch(moving, 2, B, A, 10, at_s=0.0)
    moving.begin(A, Offload(3, filled(20), filled(20)), 0.0)
    moving.begin(A, Load(4, filled(20), filled(20)), 0.0)
    moving.begin(C, Load(5, filled(20), filled(20)), 0.0)
    assert {at for at, *_ in ends(moving)} == {1.5}
    assert moving.tokens == {"in": 200, "offload": 200, "load": 400}


def test_what_was_under_way_with_a_lost_group_fails_at_the_cut() -> None:
    moving = transfers()
    fetch(moving, 1, A, B, 10, at_s=0.0)
    fetch(moving, 2, C, B, 10, at_s=0.0)
    moving.begin(B, Receive(3, filled(5), A, 7, ()), 0.0)
    moving.group_down(A, 1.0)
    assert [transfer for _, transfer, _, _ in ends(moving)] == [2, 2], "the cut has not come yet"
    moving.begin(B, Cut(A, 7), 3.0)
    assert ends(moving) == [(3.0, 3, B, False), (3.0, 1, B, False)]
    assert moving.finished(100.0) == []


def test_answers_carry_epoch_time_and_size() -> None:
    moving = transfers()
    moving.group_down(C, 0.0)
    moving.group_up(C, 9)
    moving.begin(C, Offload(4, filled(20), filled(20)), 1.0)
    ((group, moved),) = moving.finished(2.5)
    assert (group, moved.epoch, moved.ok, moved.bytes) == (C, 9, True, 400)
    assert moved.elapsed_s == pytest.approx(1.5)
