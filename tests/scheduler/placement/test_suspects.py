"""A request that may have killed its groups runs alone, and takes no more of them than it must."""

from collections.abc import Iterable

import pytest

from kvcache.ids import GroupId
from scheduler.protocol.messages import FinishReason
from scheduler.protocol.silence import BEAT_S
from scheduler.state.sequence import State
from tests.scheduler.cluster import LOST, Cluster, Stream


def running(cluster: Cluster, group: int) -> set[int]:
    """Streams."""
    return {sequence.stream for sequence in cluster.core.groups[GroupId(group)].running}


def group_of(cluster: Cluster, stream: Stream) -> int:
    blocks = cluster.sequence(stream).blocks
    assert blocks is not None, "it does not run"
    return blocks.group


def kill_with(cluster: Cluster, stream: Stream) -> None:
    """The group where it runs dies, and comes back."""
    group = group_of(cluster, stream)
    cluster.lose(group, returning=True)
    cluster.bring_up(group)


def submit(cluster: Cluster, count: int) -> list[Stream]:
    return [cluster.submit([at % 2, at // 2 % 2, 1], max_tokens=40)[0] for at in range(count)]


def test_what_ran_in_one_group_that_died_is_no_suspect() -> None:
    cluster = Cluster((80, 80), max_num_seqs=8)
    streams = submit(cluster, 6)
    cluster.step(times=3)
    cluster.lose(0, returning=True)
    assert not cluster.core.waiting.apart
    assert running(cluster, 1)
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}


def test_the_second_time_it_runs_alone_until_it_has_come_further() -> None:
    cluster = Cluster((40, 40), max_num_seqs=8)
    streams = submit(cluster, 6)
    suspect = streams[0]
    for _ in range(2):
        cluster.step(times=3)
        kill_with(cluster, suspect)
    known = len(suspect.tokens)
    others: set[int] = set()
    while not running(cluster, group := group_of(cluster, suspect)) > {suspect.number}:
        alone = cluster.core.groups[GroupId(group)].alone
        assert alone is not None
        assert running(cluster, group) == {suspect.number}
        others |= running(cluster, 1 - group)
        cluster.step()
    assert len(suspect.tokens) >= known + 16
    assert others, "the other group worked meanwhile"
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}, "every token was right"


def test_who_kills_a_group_alone_ends_and_the_others_go_on() -> None:
    cluster = Cluster((40, 40), max_num_seqs=8)
    streams = submit(cluster, 6)
    poison = streams[2]
    deaths = 0
    while poison.finished is None:
        deaths += 1
        while cluster.sequence(poison).blocks is None:  # the trials of others come first
            cluster.step()
        kill_with(cluster, poison)
    assert deaths == 3, "two with others, one alone"
    end = poison.finished
    assert end is not None
    assert end.reason is FinishReason.FAILED
    assert "each of 3 groups that ran the request has died" in end.message
    assert LOST in end.message
    cluster.run()
    assert {cluster.reason(stream) for stream in streams if stream is not poison} == {FinishReason.LENGTH}


def test_the_only_group_is_emptied_for_a_trial_and_filled_again() -> None:
    cluster = Cluster((60,), max_num_seqs=8)
    suspects = submit(cluster, 3)
    for _ in range(2):
        cluster.step(times=2)
        cluster.lose(0, returning=True)
        cluster.bring_up(0)
    late = cluster.submit([0, 0, 1, 1], max_tokens=5)[0]
    assert len(running(cluster, 0)) == 1, "one after the other"
    assert cluster.sequence(late).state is State.WAITING
    cluster.run()
    assert {cluster.reason(stream) for stream in [*suspects, late]} == {FinishReason.LENGTH}


def test_a_connection_that_is_cut_makes_nobody_a_suspect() -> None:
    cluster = Cluster((80, 80), max_num_seqs=8)
    streams = submit(cluster, 6)
    for _ in range(4):
        cluster.step(times=2)
        for group in (0, 1):
            cluster.cut(group)
        assert not any(cluster.sequence(stream).deaths for stream in streams)
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}


def test_a_cut_takes_nothing_of_what_a_death_has_said() -> None:
    cluster = Cluster((80,), max_num_seqs=8)
    (stream,) = submit(cluster, 1)
    cluster.step(times=2)
    kill_with(cluster, stream)
    cluster.step(times=2)
    cluster.cut(0)
    assert len(cluster.sequence(stream).deaths) == 1
    cluster.step(times=2)
    kill_with(cluster, stream)
    assert cluster.sequence(stream).suspect


def test_who_is_suspected_for_cuts_alone_joins_the_others_again() -> None:
    """Both groups are cut off at once: those who came from one to the other are suspects until the first is back."""
    cluster = Cluster((80, 80), max_num_seqs=8)
    streams = submit(cluster, 6)
    cluster.step(times=2)
    cut_off = []
    for group in (0, 1):
        cut_off.append(cluster.groups.pop(GroupId(group)))
        cluster.core.group_down(GroupId(group), LOST, returning=True)
        cluster.settle()
    assert len(cluster.core.waiting.apart) > 0
    for before in cut_off:
        cluster._rejoin(before)
    assert not cluster.core.waiting.apart
    assert not any(group.closed for group in cluster.core.groups.values())
    assert not any(cluster.sequence(stream).deaths for stream in streams)
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}


def test_a_suspect_that_goes_leaves_its_group_open() -> None:
    cluster = Cluster((60,), max_num_seqs=8)
    first, second = submit(cluster, 2)
    for _ in range(2):
        cluster.step(times=2)
        cluster.lose(0, returning=True)
        cluster.bring_up(0)
    cluster.abort(first)
    assert running(cluster, 0) == {second.number}
    cluster.abort(second)
    assert not cluster.core.groups[GroupId(0)].closed
    late = cluster.submit([1], max_tokens=5)[0]
    assert running(cluster, 0) == {late.number}
    cluster.run()


def strike(cluster: Cluster, groups: Iterable[int]) -> None:
    """They have died at one moment; the scheduler hears of one after the other, and of none that is up that it lives."""
    for group in groups:
        cluster.lose(group, returning=True)
        cluster.wait(0.01)


def test_deaths_between_which_it_has_come_further_are_no_row() -> None:
    """A leader dies; later on both groups are stopped at once, which is noticed in one after the other."""
    cluster = Cluster((200, 200), max_num_seqs=8)
    streams = [cluster.submit([at % 2, at // 2 % 2, 1], max_tokens=60)[0] for at in range(6)]
    cluster.step(times=3)
    cluster.lose(0, returning=True)
    cluster.bring_up(0)
    cluster.step(times=25)
    strike(cluster, (0, 1))
    for group in (0, 1):
        cluster.bring_up(group)
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}


def test_what_strikes_all_groups_at_once_makes_nobody_a_suspect() -> None:
    cluster = Cluster((80, 80, 80, 80), max_num_seqs=8, beats=True)
    streams = submit(cluster, 8)
    for _ in range(2):
        cluster.step(times=18)
        cluster.wait(1.0)
        cluster.beat()
        strike(cluster, range(4))
        assert not any(cluster.sequence(stream).suspect for stream in streams)
        for group in range(4):
            cluster.bring_up(group)
        assert not any(cluster.sequence(stream).wary for stream in streams), "these are others than have died"
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}


def test_who_is_wary_goes_on_in_the_first_group_that_has_lived_on() -> None:
    cluster = Cluster((80, 80, 80, 80), max_num_seqs=8, beats=True)
    streams = submit(cluster, 8)
    cluster.step(times=2)
    before = {stream.number for stream in streams if group_of(cluster, stream) == 0}
    strike(cluster, (0, 1))
    wary = {stream.number for stream in streams if cluster.sequence(stream).wary}
    assert wary
    assert wary < before, "they came from one to the other"
    cluster.wait(BEAT_S / 2)
    cluster.beat()
    assert {sequence.stream for sequence in cluster.core.waiting.apart} == wary, "that may have been on its way"
    cluster.wait(BEAT_S)
    cluster.beat(2)
    assert wary <= running(cluster, 2), "the other may have died, or is in a long step"
    assert not cluster.core.waiting.apart
    assert not any(sequence.wary for sequence in cluster.core.sequences.values())
    cluster.lose(2, returning=True)
    deaths = {sequence.stream: len(sequence.deaths) for sequence in cluster.core.sequences.values()}
    assert {deaths[stream] for stream in wary} == {2}, "that death counts"
    cluster.wait(1.0)
    cluster.beat(3)
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}


def test_the_wary_have_what_becomes_free_in_a_group_that_has_lived_on_and_hold_up_nobody() -> None:
    """The last group is in a long step, whose end they do not await; nor does anyone await theirs."""
    cluster = Cluster((80, 80, 80, 80), max_num_seqs=3, beats=True)
    streams = submit(cluster, 8)
    cluster.step(times=2)
    strike(cluster, (0, 1))
    wary = {sequence.stream for sequence in cluster.core.waiting.apart if sequence.wary}
    assert wary
    late = [cluster.submit([1, 1, at % 2], max_tokens=4)[0] for at in range(3)]
    for _ in range(400):
        cluster.wait(BEAT_S)
        cluster.beat(2)
        cluster.step(2)
        left = {sequence.stream for sequence in cluster.core.waiting.apart}
        began = {sequence.stream for sequence in cluster.core.sequences.values() if sequence.cached_tokens is not None}
        assert not left or not {stream.number for stream in late} & began, "those come after them there"
        if not left and all(stream.finished for stream in late):
            break
    else:
        raise AssertionError("somebody waits for the group in the long step")
    assert GroupId(3) in cluster.groups
    cluster.run()
    assert {cluster.reason(stream) for stream in (*streams, *late)} == {FinishReason.LENGTH}


def test_a_step_that_never_ends_keeps_nobody_wary_for_longer_than_its_group_is_up() -> None:
    cluster = Cluster((80, 80, 80), max_num_seqs=8, beats=True)
    streams = submit(cluster, 6)
    cluster.step(times=2)
    strike(cluster, (0, 1))
    assert cluster.core.waiting.apart, "no other has lived on"
    cluster.wait(300.0)
    cluster.lose(2, returning=True)
    cluster.bring_up(0)
    assert not cluster.core.waiting.apart
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}


def test_no_suspect_is_tried_in_a_group_that_may_have_died_with_the_last() -> None:
    cluster = Cluster((80, 80, 80), max_num_seqs=8, beats=True)
    (suspect,) = submit(cluster, 1)
    for _ in range(2):
        cluster.step(times=2)
        cluster.wait(1.0)
        cluster.beat()
        cluster.lose(group_of(cluster, suspect), returning=True)
    assert cluster.sequence(suspect).suspect
    assert cluster.sequence(suspect).blocks is None
    (last,) = cluster.groups
    cluster.lose(last, returning=True)
    assert len(cluster.sequence(suspect).deaths) == 2
    cluster.bring_up(0)
    cluster.wait(BEAT_S)
    cluster.beat()
    assert running(cluster, 0) == {suspect.number}
    cluster.run()
    assert cluster.reason(suspect) is FinishReason.LENGTH


@pytest.mark.parametrize(("after_s", "most"), [(0.0, 4), (1.0, 3)], ids=["at once", "after a second"])
def test_who_kills_each_group_takes_few_of_them(after_s: float, most: int) -> None:
    cluster = Cluster((80,) * 6, max_num_seqs=8, beats=True)
    streams = submit(cluster, 6)
    poison, deaths = streams[0], 0
    while poison.finished is None:
        while cluster.sequence(poison).blocks is None:
            cluster.wait(BEAT_S)
            cluster.beat()
        cluster.step()
        cluster.wait(after_s)
        if after_s:
            cluster.beat()
        cluster.lose(group_of(cluster, poison), returning=True)
        deaths += 1
    assert deaths == most
    assert "each of 3 groups that ran the request has died" in poison.finished.message
    cluster.run()
    assert {cluster.reason(stream) for stream in streams[1:]} == {FinishReason.LENGTH}
