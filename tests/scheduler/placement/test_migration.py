"""A running sequence goes on in another group with its blocks. A group that runs out of blocks while another has some, or host
memory: who would have to give way leaves in time, or what it has is kept. The cluster checks that the tokens stay the same."""

import pytest

from kvcache.ids import GroupId
from scheduler import policy
from scheduler.policy import Remedy
from scheduler.sequence import State
from tests.scheduler.cluster import Cluster, Stream, filled

PREFIX = filled(0, 1, 0, 1, 1)
ZERO, ONE = GroupId(0), GroupId(1)


def test_a_running_sequence_moves_with_its_blocks_and_says_the_same() -> None:
    cluster = Cluster((16, 16), fetch=True, hash_stride=2)
    stream = cluster.submit([*PREFIX, 0, 1], max_tokens=16)[0]
    cluster.step(times=3)
    before = cluster.sequence(stream)
    assert cluster.migrate(stream)
    lease = before.lease
    cluster.step(0)
    assert cluster.sequence(stream).lease == lease, "it decodes on while its blocks go ahead"
    cluster.run()
    counters = cluster.core.counters
    assert (counters.migrations, counters.preemptions, counters.recomputed_tokens) == (1, 0, 0)
    assert len(stream.tokens) == 16
    assert cluster.core.groups[ONE].starts == 1
    computed = 22 + 16 - 1
    assert counters.fetched_tokens >= computed - 16, "nearly nothing is computed twice"


def test_a_sequence_that_ends_while_its_blocks_go_ahead_has_ended() -> None:
    cluster = Cluster((16, 16), fetch=True)
    stream = cluster.submit([*PREFIX, 0, 1], max_tokens=16)[0]
    cluster.step(times=3)
    assert cluster.migrate(stream)
    cluster.abort(stream)
    cluster.run()
    assert cluster.core.counters.migrations == 0
    assert cluster.core.groups[ONE].starts == 0


def test_nobody_moves_where_there_is_no_other_group_or_no_room() -> None:
    alone = Cluster((16,), fetch=True)
    stream = alone.submit([*PREFIX, 0], max_tokens=4)[0]
    alone.step()
    assert not alone.migrate(stream)
    tight = Cluster((16, 4), fetch=True)
    stream = tight.submit([*PREFIX, 0], max_tokens=4)[0]
    tight.step()
    assert not tight.migrate(stream)


def test_a_draining_group_gives_its_sequences_away_with_their_blocks() -> None:
    cluster = Cluster((16, 16), fetch=True, hash_stride=2)
    streams = [cluster.submit([*PREFIX, last], max_tokens=12)[0] for last in (0, 1)]
    cluster.step(times=2)
    holders = {cluster.sequence(stream).blocks.group for stream in streams if cluster.sequence(stream).blocks}  # type: ignore[union-attr]
    leaving = min(holders)
    assert cluster.drain(leaving)
    cluster.vacate(leaving)
    cluster.run()
    assert cluster.core.counters.preemptions == 0
    assert cluster.core.counters.migrations >= 1
    assert all(len(stream.tokens) == 12 for stream in streams)


# ---- before somebody has to give way


def crowded(
    pools: tuple[int, ...] = (8, 16), *, fetch: bool = False, host_blocks: int = 0, relieve: bool = True
) -> tuple[Cluster, Stream, Stream]:
    """Two sequences in the first group, which has not the blocks for both; the others are empty."""
    cluster = Cluster(pools, grant_ahead=1, fetch=fetch, host_blocks=host_blocks, relieve=relieve)
    for group in range(1, len(pools)):
        cluster.core.groups[GroupId(group)].draining = True
    old = cluster.submit(filled(0, 1), max_tokens=20)[0]
    young = cluster.submit(filled(1, 1), max_tokens=20)[0]
    assert {sequence.blocks.group for sequence in cluster.core.sequences.values() if sequence.blocks} == {ZERO}
    for group in range(1, len(pools)):
        cluster.core.groups[GroupId(group)].draining = False
    return cluster, old, young


def test_who_would_have_to_give_way_goes_where_there_is_room_and_does_not_stop() -> None:
    cluster, old, young = crowded(fetch=True)
    computed = cluster.core.groups[ONE].step_tokens
    cluster.run()
    counters = cluster.core.counters
    assert (counters.moved_for_room, counters.migrations, counters.preemptions) == (1, 1, 0)
    assert (len(old.tokens), len(young.tokens)) == (20, 20)
    prompt_again = cluster.core.groups[ONE].step_tokens - computed - 20
    assert prompt_again < 8, "its blocks came with it: at most its last one is computed again"


def test_nobody_moves_to_a_group_that_would_be_short_itself() -> None:
    cluster, _, young = crowded((8, 8), fetch=True)
    cluster.core.groups[ZERO].draining = True
    cluster.submit(filled(0, 0, 0), max_tokens=16)
    cluster.core.groups[ZERO].draining = False
    cluster.step(times=4)
    assert cluster.core.counters.moved_for_room == 0
    cluster.run()
    assert len(young.tokens) == 20


def test_what_somebody_has_who_will_have_to_give_way_is_kept_in_host_memory() -> None:
    cluster, _, young = crowded((8,), host_blocks=32)
    while not cluster.core.counters.preemptions:
        cluster.step()
    assert cluster.core.counters.kept_for_room == 1
    sequence = cluster.sequence(young)
    assert sequence.state is State.WAITING
    kept = cluster.core.counters.offloaded_tokens
    assert kept >= len(young.prompt)
    cluster.run()
    assert cluster.core.counters.loaded_tokens >= 4, "some had been evicted, and came back"
    assert len(young.tokens) == 20


def test_what_it_computes_while_it_runs_on_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "SHORTAGE", 0.5)
    cluster = Cluster((40,), grant_ahead=1, host_blocks=64, max_num_seqs=4)
    for first in (0, 1):
        cluster.submit(filled(first, 0, 1, 1), max_tokens=80)
    while not cluster.core.counters.kept_for_room:
        cluster.step()
    kept = cluster.core.counters.offloaded_tokens
    cluster.step(times=6)
    assert cluster.core.counters.preemptions == 0
    assert cluster.core.counters.offloaded_tokens >= kept + 4
    cluster.run()


def test_one_after_the_other_leaves_a_group_that_stays_short() -> None:
    cluster = Cluster((12, 40), grant_ahead=1, fetch=True)
    cluster.core.groups[ONE].draining = True
    streams = [cluster.submit([first, 0, first, 1], max_tokens=40)[0] for first in (0, 1, 0)]
    cluster.core.groups[ONE].draining = False
    cluster.run()
    assert cluster.core.counters.moved_for_room == 2
    assert cluster.core.counters.preemptions == 0
    assert [len(stream.tokens) for stream in streams] == [40, 40, 40]


@pytest.mark.parametrize(("fetch", "relieve"), [(True, False), (False, True)])
def test_without_relief_it_gives_way(fetch: bool, relieve: bool) -> None:
    cluster, _, young = crowded(fetch=fetch, relieve=relieve)
    while not cluster.core.counters.preemptions:
        cluster.step()
    assert cluster.core.counters.moved_for_room == cluster.core.counters.kept_for_room == 0
    cluster.run()
    assert len(young.tokens) == 20


@pytest.mark.parametrize(
    ("lost", "move", "keep", "way"),
    [
        (100, None, None, Remedy.RECOMPUTE),
        (100, 10.0, None, Remedy.MOVE),
        (100, None, 10.0, Remedy.KEEP),
        (100, 10.0, 5.0, Remedy.KEEP),
        (100, 10.0, 10.0, Remedy.MOVE),
        (4, 10.0, 5.0, Remedy.RECOMPUTE),
        (10, 10.0, 10.0, Remedy.MOVE),
    ],
)
def test_the_cheapest_way_is_taken(lost: int, move: float | None, keep: float | None, way: Remedy) -> None:
    assert policy.relief(lost, move, keep) is way
