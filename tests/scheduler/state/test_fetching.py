"""A group counts what it will have to compute of those whose prefix is still on its way there."""

from scheduler.state.sequence import State
from tests.scheduler.cluster import Cluster, filled


def test_what_those_who_fetch_will_compute_is_seen_by_who_comes_next() -> None:
    cluster = Cluster((64, 64), fetch=True)
    prefix = filled(*[0, 1] * 4)
    cluster.submit(prefix, max_tokens=1)
    cluster.run()
    busy = cluster.submit([1] * 60, max_tokens=1)[0]
    fetching = cluster.submit([*prefix, *[1, 0, 0] * 27], max_tokens=1)[0]
    next_one = cluster.submit([1, 1, *[0] * 18], max_tokens=1)[0]
    first, second, third = (cluster.sequence(stream) for stream in (busy, fetching, next_one))
    assert second.state is State.FETCHING
    assert first.blocks is not None
    assert second.blocks is not None
    assert third.blocks is not None
    assert second.blocks.group != first.blocks.group
    assert cluster.core.groups[second.blocks.group].coming == 81
    assert third.blocks.group == first.blocks.group, "60 tokens wait there, and 81 will in the other"
    cluster.run()
    assert all(group.coming == 0 for group in cluster.core.groups.values())
