"""Who may pass the first in the queue, for how long, and how long anyone can wait; and deadlines."""

import pytest

from scheduler.placement.admission import MOST_TRIES
from scheduler.placement.limits import RequestRefused
from scheduler.protocol.messages import Failure, FinishReason
from scheduler.server.stats import snapshot
from scheduler.state.queue.deadlines import FEWEST_KEPT
from tests.scheduler.cluster import Cluster, Stream


def running(cluster: Cluster, stream: Stream) -> bool:
    return stream.finished is None and cluster.sequence(stream).lease is not None


# ---- skipping


def test_a_small_one_passes_a_large_one_that_finds_no_room() -> None:
    cluster = Cluster((8,), max_num_seqs=8, enable_prefix_caching=False)
    cluster.submit([0] * 4, max_tokens=13)  # four blocks at most
    large = cluster.submit([0] * 24, max_tokens=4)[0]
    small = cluster.submit([1], max_tokens=2)[0]
    assert running(cluster, small)
    assert not running(cluster, large)
    assert snapshot(cluster.core).skipped == 1
    cluster.run()


def test_nobody_passes_it_once_it_has_waited_for_skip_s_and_room_is_kept() -> None:
    cluster = Cluster((8,), max_num_seqs=8, enable_prefix_caching=False, queue_skip_s=2.0)
    cluster.submit([0] * 4, max_tokens=13)
    large = cluster.submit([0] * 24, max_tokens=4)[0]
    cluster.wait(1.9)
    early = cluster.submit([1], max_tokens=2)[0]
    assert running(cluster, early)
    cluster.wait(0.1)
    late = [cluster.submit([1], max_tokens=2)[0] for _ in range(3)]
    while not running(cluster, large):
        assert not any(running(cluster, stream) for stream in late)
        cluster.step()
    assert all(running(cluster, stream) or cluster.sequence(stream).lease is None for stream in late)
    cluster.run()


def test_with_skip_s_0_the_order_is_strict() -> None:
    cluster = Cluster((8,), max_num_seqs=8, enable_prefix_caching=False, queue_skip_s=0.0)
    cluster.submit([0] * 4, max_tokens=13)
    large = cluster.submit([0] * 24, max_tokens=4)[0]
    small = cluster.submit([1], max_tokens=2)[0]
    assert not running(cluster, large)
    assert not running(cluster, small)
    cluster.run()


def test_an_event_tries_a_few_and_none_twice_for_the_same_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster((16,), max_num_seqs=16, enable_prefix_caching=False)
    cluster.submit([0] * 48, max_tokens=8)
    tries: list[int] = []
    match = cluster.core.table.index.match

    def watch(*given: object) -> object:
        tries[-1] += 1
        return match(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(type(cluster.core.table.index), "match", lambda _, *given: watch(*given))
    for _ in range(30):
        tries.append(0)
        cluster.submit([1] * 40, max_tokens=8)
    assert max(tries) <= MOST_TRIES
    assert sum(tries) <= 2 * len(tries), "those that are known to need more than there is are not tried"
    for _ in range(3):
        tries.append(0)
        cluster.step()
        assert tries[-1] == 0, "nothing has happened that could help them"
    cluster.run()


# ---- ageing


def test_whoever_has_waited_long_goes_before_the_more_urgent() -> None:
    cluster = Cluster((8,), max_num_seqs=1, queue_age_s=10.0)
    cluster.submit([0] * 4, max_tokens=3)
    calm = cluster.submit([0] * 4, max_tokens=1, priority=5)[0]
    cluster.wait(5.0)
    for _ in range(6):
        cluster.submit([1] * 4, max_tokens=3, priority=-1)
        cluster.step(times=3)
        assert not running(cluster, calm)
        assert calm.finished is None
    cluster.wait(5.0)
    ended = len([stream for stream in cluster.streams.values() if stream.finished])
    while calm.finished is None:
        cluster.submit([1] * 4, max_tokens=3, priority=-1)
        cluster.step()
    assert len([stream for stream in cluster.streams.values() if stream.finished]) - ended <= 3
    assert snapshot(cluster.core).aged >= 1
    cluster.run()


def test_a_flood_that_has_aged_gets_only_every_second_start() -> None:
    cluster = Cluster((8,), max_num_seqs=1, queue_age_s=1.0, enable_prefix_caching=False)
    flood = [cluster.submit([0] * 4, max_tokens=1, tenant="flood")[0] for _ in range(12)]
    cluster.wait(2.0)
    guests = [cluster.submit([1] * 4, max_tokens=1, tenant="guest")[0] for _ in range(3)]
    order: list[str] = []
    while len(order) < 8:
        done = {stream.number for stream in cluster.streams.values() if stream.finished}
        cluster.step()
        order += [
            "flood" if stream in flood else "guest"
            for stream in [*flood, *guests]
            if stream.finished and stream.number not in done
        ]
    assert order[1:7].count("guest") == 3
    cluster.run()


@pytest.mark.parametrize("seed", range(4))
def test_nobody_starves_whatever_comes(seed: int) -> None:
    """The bound of `WaitingRoom`, under a stream of small and urgent requests of other tenants that never ends. A round is a
    second; who runs, runs for 8 at most."""
    skip_s, age_s, longest = 2.0, 20.0, 8.0
    cluster = Cluster((8,), max_num_seqs=3, enable_prefix_caching=False, queue_skip_s=skip_s, queue_age_s=age_s)
    large = [cluster.submit([0] * (24 - seed), max_tokens=5, priority=3, tenant="large")[0] for _ in range(3)]
    started: dict[int, float] = {}
    second = 0
    while len(started) < len(large):
        for number in range(2):
            cluster.submit([1] * (1 + (second + seed) % 3), max_tokens=3 + second % 4, tenant=f"{number}", priority=-number)
        cluster.step()
        cluster.wait(1.0)
        second += 1
        started |= {at: float(second) for at, stream in enumerate(large) if at not in started and stream.tokens}
        assert second < 300
    for older in range(len(large)):
        assert started[older] <= age_s + 2 * (older + 1) * (skip_s + longest)


# ---- deadlines


def test_a_waiting_sequence_ends_with_its_deadline() -> None:
    cluster = Cluster((8,), max_num_seqs=1)
    cluster.submit([0] * 4, max_tokens=20)
    late, patient = cluster.submit([1] * 4, deadline_s=3.0)[0], cluster.submit([1] * 4, deadline_s=300.0)[0]
    cluster.wait(2.9)
    cluster.submit([1] * 4)
    assert late.finished is None
    cluster.wait(0.2)
    cluster.submit([1] * 4)
    assert late.finished is not None
    assert (late.finished.reason, late.finished.failure) == (FinishReason.FAILED, Failure.TIMED_OUT)
    assert late.finished.message == "the request did not end within 3 s: it has not begun"
    assert snapshot(cluster.core).expired == 1
    cluster.run()
    assert cluster.reason(patient) is FinishReason.LENGTH


@pytest.mark.parametrize("choices", [1, 2])
def test_a_request_without_any_time_ends_at_once(choices: int) -> None:
    cluster = Cluster((8,))
    late = cluster.submit([1] * 4, n=choices, deadline_s=0.0)
    assert [stream.finished and stream.finished.failure for stream in late] == [Failure.TIMED_OUT] * choices
    cluster.submit([1] * 4)
    cluster.run()


def test_a_running_sequence_ends_at_the_next_block_and_its_blocks_are_free() -> None:
    cluster = Cluster((8,), max_num_seqs=2)
    late, other = cluster.submit([1] * 4, max_tokens=20, deadline_s=3.0)[0], cluster.submit([0] * 4, max_tokens=20)[0]
    cluster.step(times=3)
    held = cluster.held()
    cluster.wait(4.0)
    cluster.step(times=5)
    assert late.finished is not None
    assert late.finished.failure is Failure.TIMED_OUT
    assert late.finished.tokens == len(late.tokens) > 0
    assert cluster.held() < held + 2
    cluster.run()
    assert cluster.reason(other) is FinishReason.LENGTH


def test_a_request_that_would_meet_its_deadline_in_the_queue_is_refused() -> None:
    cluster = Cluster((8,), max_num_seqs=1, enable_prefix_caching=False)
    cluster.submit([0] * 4, max_tokens=1)
    for _ in range(12):
        cluster.submit([0] * 4, max_tokens=1, tenant="heavy")
    cluster.submit([0] * 4, max_tokens=1, deadline_s=0.5)  # nothing is known of the pace yet
    for _ in range(4):  # four tokens a second
        cluster.wait(1.0)
        cluster.step()
    with pytest.raises(RequestRefused, match=r"its turn would come in about \d s, after its deadline of 2 s") as refusal:
        cluster.submit([0] * 4, max_tokens=1, tenant="heavy", deadline_s=2.0)
    assert refusal.value.failure is Failure.OVERLOADED
    assert refusal.value.retry_after_s == pytest.approx(8.0, abs=2.5)
    assert snapshot(cluster.core).refused == 1
    cluster.submit([0] * 4, max_tokens=1, tenant="heavy", deadline_s=30.0)
    cluster.submit([0] * 4, max_tokens=1, tenant="heavy", deadline_s=2.0, priority=-1)  # goes before them
    cluster.submit([0] * 4, max_tokens=1, tenant="light", deadline_s=2.0)
    cluster.run()


def test_long_deadlines_of_short_requests_keep_nothing_alive() -> None:
    cluster = Cluster((8,))
    deadlines = cluster.core._state.deadlines
    for _ in range(3 * FEWEST_KEPT):
        cluster.submit([0], max_tokens=1, deadline_s=600.0)
        cluster.step()
    assert len(deadlines) <= FEWEST_KEPT + 8
    cluster.run()
