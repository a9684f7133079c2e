"""A running sequence goes on in another group with its blocks. The cluster checks that the tokens stay the same."""

from kvcache.ids import GroupId
from tests.scheduler.cluster import Cluster, filled

PREFIX = filled(0, 1, 0, 1, 1)
ONE = GroupId(1)


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
