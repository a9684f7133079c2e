"""Who may wait, who goes first, and why a prompt had to be computed."""

import pytest

from kvcache.ids import GroupId
from scheduler.config.core import QueueBounds
from scheduler.placement.limits import LONGEST_RETRY_S, RequestRefused
from scheduler.protocol.messages import Failure, FinishReason, Misses
from scheduler.server.stats import EngineStats, pool_maps, snapshot
from scheduler.state.queue.pace import Pace
from tests.scheduler.cluster import Cluster, filled


def parts(cluster: Cluster) -> dict[str, int]:
    """Where the prompt tokens of all that have started came from."""
    stats = snapshot(cluster.core)
    names = ("cached_tokens", "miss_inside_block", "miss_routed", "miss_evicted", "miss_cold")
    return {name: getattr(stats, name) for name in names}


def stats_of(cluster: Cluster) -> EngineStats:
    return snapshot(cluster.core)


# ---- the queue


def test_a_full_queue_refuses_and_says_when_to_try_again() -> None:
    cluster = Cluster((8,), max_num_seqs=1, bounds=QueueBounds(max_queued_requests=2))
    cluster.submit([1] * 4)
    first, second = cluster.submit([1] * 4)[0], cluster.submit([0] * 4)[0]
    with pytest.raises(RequestRefused, match="2 requests with 8 tokens are waiting and 2 requests may") as refusal:
        cluster.submit([1] * 4)
    assert refusal.value.failure is Failure.OVERLOADED
    assert refusal.value.retry_after_s >= 1.0
    assert stats_of(cluster).refused == 1
    cluster.abort(first)
    assert cluster.submit([1] * 4), "there is room again"
    cluster.run()
    assert cluster.reason(second) is FinishReason.LENGTH


def test_the_queue_is_bounded_by_tokens_too_but_an_empty_one_takes_anything() -> None:
    cluster = Cluster((8,), max_num_seqs=1, bounds=QueueBounds(max_queued_tokens=10))
    cluster.submit([1] * 4)
    cluster.submit([1] * 12)
    with pytest.raises(RequestRefused, match="10 tokens may"):
        cluster.submit([1])
    cluster.run()


def test_a_preempted_sequence_comes_back_to_a_full_queue() -> None:
    cluster = Cluster((5,), bounds=QueueBounds(max_queued_requests=1), enable_prefix_caching=False)
    streams = [cluster.submit([value] * 3, max_tokens=12)[0] for value in (0, 1)]
    cluster.submit([1] * 3)
    cluster.run()
    assert stats_of(cluster).preemptions
    assert all(cluster.reason(stream) is FinishReason.LENGTH for stream in streams)


def test_the_wait_until_a_retry_follows_the_pace_of_the_queue() -> None:
    cluster = Cluster((8,), max_num_seqs=1, bounds=QueueBounds(max_queued_requests=4))
    core = cluster.core
    core.now_s = 1_000.0  # hours without a queue say nothing about its pace
    for _ in range(5):
        cluster.submit([1] * 4, max_tokens=1)
    with pytest.raises(RequestRefused) as refusal:
        cluster.submit([0] * 4)
    assert refusal.value.retry_after_s == 1.0, "nothing is known yet"
    for _ in range(20):  # one of four tokens starts each second
        core.now_s += 1.0
        cluster.step()
        cluster.submit([1] * 4, max_tokens=1)
    with pytest.raises(RequestRefused) as refusal:
        cluster.submit([0] * 4)
    assert refusal.value.retry_after_s == pytest.approx(4.0, rel=0.2), "16 tokens wait, and 4 leave in a second"
    core.now_s += 1e6
    with pytest.raises(RequestRefused) as refusal:
        cluster.submit([0] * 4)
    assert refusal.value.retry_after_s == LONGEST_RETRY_S, "nothing leaves any more"


def test_a_request_waits_for_a_group_that_is_expected_and_is_told_when_to_come_back_where_none_is() -> None:
    for bounds in (None, QueueBounds()):
        cluster = Cluster((8,), bounds=bounds)
        cluster.lose(0, returning=True)
        early = cluster.submit([1] * 4, max_tokens=2)[0]
        cluster.bring_up(0)
        cluster.run()
        assert early.finished is not None
        assert early.finished.reason is FinishReason.LENGTH
        cluster.lose(0)
        with pytest.raises(RequestRefused, match="no group of workers is up or expected") as refusal:
            cluster.submit([1] * 4)
        assert refusal.value.failure is Failure.UNAVAILABLE
        assert refusal.value.retry_after_s is not None
        cluster.bring_up(0)
        cluster.submit([1] * 4)
        cluster.run()


def test_the_longest_wait_and_the_time_in_the_queue_are_known() -> None:
    cluster = Cluster((8,), max_num_seqs=1)
    core = cluster.core
    core.now_s = 10.0
    cluster.submit([1] * 4, max_tokens=2)
    core.now_s = 11.0
    late = cluster.submit([0] * 4, max_tokens=2)[0]
    core.now_s = 14.0
    assert stats_of(cluster).oldest_wait_s == 3.0
    assert (stats_of(cluster).waiting, stats_of(cluster).waiting_tokens) == (1, 4)
    cluster.run()
    assert late.finished is not None
    assert late.finished.queued_s == 3.0


# ---- order


def test_lower_priority_numbers_go_first_and_equal_ones_by_age() -> None:
    cluster = Cluster((8,), max_num_seqs=1)
    cluster.submit([0] * 4, max_tokens=1)
    names = {"late": 1, "first": 0, "second": 0, "urgent": -5}
    streams = {name: cluster.submit([1] * 4, max_tokens=1, priority=priority)[0] for name, priority in names.items()}
    order: list[str] = []
    while len(order) < len(streams):
        cluster.step()
        order += [name for name, stream in streams.items() if stream.finished is not None and name not in order]
    assert order == ["urgent", "first", "second", "late"]


def test_blocks_are_taken_from_the_less_urgent_whoever_came_first() -> None:
    cluster = Cluster((5,), enable_prefix_caching=False)
    calm = cluster.submit([0] * 3, max_tokens=12, priority=1)[0]
    urgent = cluster.submit([1] * 3, max_tokens=12, priority=0)[0]
    cluster.run()
    assert calm.finished is not None
    assert urgent.finished is not None
    assert calm.finished.preemptions > 0
    assert urgent.finished.preemptions == 0


# ---- groups that go


def test_a_draining_group_takes_nobody_and_runs_empty() -> None:
    cluster = Cluster((8, 8))
    stream = cluster.submit([0] * 4, max_tokens=6)[0]
    (home,) = [name for name, group in cluster.core.groups.items() if group.running]
    assert cluster.drain(home)
    assert [group.draining for group in stats_of(cluster).groups if group.group == home] == [True]
    cluster.submit([0] * 4, max_tokens=2)
    assert len(cluster.core.groups[home].running) == 1
    cluster.run()
    assert stream.finished is not None
    assert stream.finished.preemptions == 0


def test_vacating_moves_what_runs_to_the_others_with_the_same_tokens() -> None:
    cluster = Cluster((8, 8))
    streams = [cluster.submit([value] * 4, max_tokens=8)[0] for value in (0, 1, 0)]
    cluster.step(times=3)
    assert cluster.drain(0)
    cluster.vacate(0)
    assert not cluster.core.groups[GroupId(0)].running
    cluster.run()
    assert all(len(stream.tokens) == 8 for stream in streams)


def test_the_last_group_and_the_only_one_large_enough_stay() -> None:
    cluster = Cluster((8, 2))
    cluster.submit([0] * 4, max_tokens=20)
    assert not cluster.drain(0), "the other group is too small for what is there"
    assert cluster.drain(1)
    assert not cluster.drain(0), "somebody must take newcomers"
    assert not cluster.drain(7)
    cluster.run()


# ---- hits and misses


def test_a_prompt_seen_for_the_first_time_is_cold_but_for_the_block_that_no_hit_can_cover() -> None:
    cluster = Cluster((8,))
    cluster.submit([*filled(0, 1), 1, 1], max_tokens=1)
    assert parts(cluster) == {
        "cached_tokens": 0, "miss_inside_block": 2, "miss_routed": 0, "miss_evicted": 0, "miss_cold": 8,
    }  # fmt: skip
    cluster.run()
    cluster.submit(filled(0, 1), max_tokens=1)
    assert parts(cluster) == {
        "cached_tokens": 4, "miss_inside_block": 6, "miss_routed": 0, "miss_evicted": 0, "miss_cold": 8,
    }  # fmt: skip
    assert (stats_of(cluster).routed_by_load, stats_of(cluster).routed_by_prefix) == (1, 1)
    cluster.run()


def test_an_evicted_block_is_told_from_one_never_seen() -> None:
    cluster = Cluster((4,))
    for values in ((0, 0, 0), (1, 1, 1)):  # the second takes the first one's blocks
        cluster.submit([*filled(*values), 1], max_tokens=1)
        cluster.run()
    assert stats_of(cluster).groups[0].evictions > 0
    before = parts(cluster)
    (stream,) = cluster.submit([*filled(0, 0, 0), 1], max_tokens=1)
    cluster.run()
    after = parts(cluster)
    lost = after["miss_evicted"] - before["miss_evicted"]
    assert stream.finished is not None
    assert stream.finished.misses == Misses(evicted=lost, inside_block=1), "its client can be told, too"
    assert lost == 12 - (after["cached_tokens"] - before["cached_tokens"]) > 0
    assert after["miss_cold"] == before["miss_cold"]


def test_a_prefix_that_another_group_has_is_routed_away() -> None:
    cluster = Cluster((16, 16), max_num_seqs=2)
    cluster.submit([*filled(0, 0), 1], max_tokens=1)
    cluster.run()
    (home,) = [name for name in cluster.core.groups if cluster.core.table.pools[name].cached]
    blockers = [cluster.submit([1] * 3, max_tokens=8)[0] for _ in range(4)]
    for name in cluster.core.groups:
        if name != home:
            for stream in blockers:
                if stream.finished is None and cluster.sequence(stream) in cluster.core.groups[name].running:
                    cluster.abort(stream)
    assert not cluster.core.groups[home].free_rows
    cluster.submit([*filled(0, 0), 1], max_tokens=1)
    assert parts(cluster)["miss_routed"] == 8
    cluster.run()


def test_a_request_for_prompt_logprobs_takes_no_hit_but_its_siblings_do() -> None:
    cluster = Cluster((16,))
    cluster.submit([*filled(0, 1), 1], max_tokens=1)
    cluster.run()
    first, second = cluster.submit([*filled(0, 1), 1], n=2, max_tokens=2, prompt_logprobs=1)
    cluster.run()
    assert (cluster.cached_tokens(first), cluster.cached_tokens(second)) == (0, 8)


def test_the_map_shows_each_block_in_its_state() -> None:
    cluster = Cluster((6,))
    cluster.submit([*filled(0), 1], max_tokens=1)
    cluster.run()
    for _ in range(2):
        cluster.submit([*filled(0), 1], max_tokens=3)
    (group,) = pool_maps(cluster.core)
    stats = stats_of(cluster).groups[0]
    assert sorted(group.states).count(2) == stats.shared_blocks == 1
    assert group.states.count(0) == stats.free_blocks
    assert group.states.count(1) == stats.held_blocks - stats.shared_blocks
    cluster.run()
    assert pool_maps(cluster.core)[0].states.count(3) == stats_of(cluster).groups[0].cached_blocks > 0


def test_a_pace_forgets_by_halves() -> None:
    pace = Pace(half_life_s=10.0)
    for second in range(200):
        pace.count(5.0, float(second))
    assert pace.per_s(199.0) == pytest.approx(5.0, rel=0.05)
    assert pace.per_s(209.0) == pytest.approx(pace.per_s(199.0) / 2)
