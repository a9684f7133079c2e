"""A request's life: refused, ended in every state, exact at the block border, and told once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from kvcache.ids import GroupId
from scheduler.config.core import QueueBounds
from scheduler.placement.limits import RequestRefused, allowance, blocks_for
from scheduler.protocol.messages import Failure, FinishReason, Request, Resumption
from scheduler.protocol.sampling import SamplingParams
from scheduler.server.stats import snapshot
from scheduler.state.resident import ProtocolError
from scheduler.state.sequence import State
from tests.scheduler.cluster import LOST, Cluster, Stream, filled


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("output", [1, 4, 5, 8, 9])
@pytest.mark.parametrize(("depth", "steps"), [(0, 1), (1, 1), (1, 4)])
def test_lengths_around_the_block_border(prompt: int, output: int, depth: int, steps: int) -> None:
    """A prompt that exactly fills a block; an output that ends with one. Never is a block more held than needed."""
    cluster = Cluster((8,), depth=depth, steps=steps)
    stream = cluster.submit([1] * prompt, max_tokens=output)[0]
    needed = blocks_for(prompt + output - 1, 4)
    most = 0
    while stream.finished is None:
        most = max(most, cluster.held())
        cluster.step()
    assert most <= needed
    assert cluster.reason(stream) is FinishReason.LENGTH
    cluster.run()
    assert cluster.core.table.pools[GroupId(0)].cached == (prompt + output - 1) // 4


def test_the_largest_request_that_fits_the_pool_uses_all_of_it() -> None:
    cluster = Cluster((3,))
    stream = cluster.submit(filled(0), max_tokens=9)[0]
    cluster.run()
    assert len(stream.tokens) == 9
    with pytest.raises(RequestRefused):
        cluster.submit(filled(0), max_tokens=10)


def test_max_tokens_none_goes_on_to_the_end_of_the_pool() -> None:
    cluster = Cluster((3,))
    stream = cluster.submit(filled(0), max_tokens=None)[0]
    cluster.run()
    assert cluster.reason(stream) is FinishReason.LENGTH
    assert len(stream.tokens) == 3 * 4 + 1 - 4


def test_max_tokens_none_goes_on_to_the_end_of_the_model() -> None:
    cluster = Cluster((16,), max_model_len=10)
    stream = cluster.submit(filled(0), max_tokens=None)[0]
    cluster.run()
    assert len(stream.tokens) == 6


# ---- refusals


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "model_len", "pool", "numbers"),
    [
        (0, 1, 99, 9, ["empty"]),
        (90, 10, 99, 99, ["90 prompt tokens", "max_tokens=10", "99 tokens", "raise max_model_len"]),
        (99, None, 99, 99, ["99 prompt tokens", "max_tokens=1", "99 tokens"]),
        (30, 8, 99, 9, ["30 prompt tokens", "max_tokens=8", "10 blocks of 4", "has 9", "raise kv_memory"]),
        (38, None, 99, 9, ["38 prompt tokens", "10 blocks of 4", "has 9"]),
        (1, 1, 99, 0, ["no group of workers"]),
    ],
)
def test_a_refusal_says_the_numbers(prompt: int, max_tokens: int | None, model_len: int, pool: int, numbers: list[str]) -> None:
    with pytest.raises(RequestRefused) as refused:
        allowance(prompt, max_tokens, model_len, 4, pool)
    for number in numbers:
        assert number in str(refused.value)


def test_limits_leave_room_for_every_token_but_the_last() -> None:
    assert allowance(29, 8, 99, 4, 9) == (8, 9)
    assert allowance(36, None, 99, 4, 9) == (1, 9)
    assert allowance(5, None, 99, 4, None) == (94, 25)
    assert allowance(5, None, 99, 4, 2) == (4, 2)
    assert allowance(8, 0, 99, 4, 2) == (0, 2)


def test_a_refused_request_leaves_nothing_behind() -> None:
    cluster = Cluster((3,))
    with pytest.raises(RequestRefused):
        cluster.submit([1] * 13, n=3, max_tokens=1)
    assert not cluster.core.sequences
    assert cluster.core.counters.requests == 0


def test_a_stream_number_in_use_is_an_error() -> None:
    cluster = Cluster((8,))
    stream = cluster.submit([1], n=2)[1]
    cluster._numbers = stream.number
    with pytest.raises(ProtocolError, match="has not ended"):
        cluster.submit([1])
    assert len(cluster.core.sequences) == 2
    cluster.run()


# ---- early ends


def queued(cluster: Cluster) -> Stream:
    cluster.submit(filled(0, 0, 0, 0), max_tokens=17)
    return cluster.submit(filled(1, 1, 1, 1, 1), max_tokens=2)[0]


def deferred(cluster: Cluster) -> Stream:
    cluster.submit([*filled(0, 1), 0], max_tokens=2)
    return cluster.submit([*filled(0, 1), 1], max_tokens=2)[0]


def prefilling(cluster: Cluster) -> Stream:
    stream = cluster.submit(filled(0, 1, 1), max_tokens=2)[0]
    cluster.step()
    assert not stream.tokens
    return stream


def decoding(cluster: Cluster) -> Stream:
    stream = cluster.submit(filled(0), max_tokens=9)[0]
    cluster.step(times=3)
    assert stream.tokens
    return stream


def preempted(cluster: Cluster) -> Stream:
    cluster.submit([0], max_tokens=32)
    stream = cluster.submit([1], max_tokens=32)[0]
    while not cluster.sequence(stream).preemptions:
        cluster.step()
    assert stream.tokens
    assert cluster.sequence(stream).state is State.WAITING
    return stream


@pytest.mark.parametrize("reach", [queued, deferred, prefilling, decoding, preempted])
@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_abort_in_every_state(reach: Callable[[Cluster], Stream], in_flight: bool, depth: int) -> None:
    cluster = Cluster((8,), max_num_batched_tokens=4, depth=depth)
    stream = reach(cluster)
    if in_flight:  # a step with it is done, its report not yet here
        cluster.deliver()
        cluster.turn()
    told = len(stream.tokens)
    cluster.abort(stream)
    assert cluster.reason(stream) is FinishReason.ABORTED
    assert (stream.front_end, stream.number) not in cluster.core.sequences
    cluster.abort(stream)  # once more is no event
    cluster.end(stream, 0)
    cluster.arrive()
    assert len(stream.tokens) == told
    cluster.run()


def test_a_stop_string_keeps_what_came_before_it() -> None:
    cluster = Cluster((8,))
    stream = decoding(cluster)
    cluster.end(stream, 1)
    assert stream.finished is not None
    assert (stream.finished.reason, stream.finished.tokens) == (FinishReason.STOP, 1)
    cluster.run()


def test_a_stop_string_found_in_a_preempted_sequence_ends_it() -> None:
    cluster = Cluster((8,))
    stream = preempted(cluster)
    cluster.end(stream, 2)
    assert stream.finished is not None
    assert stream.finished.tokens == 2
    cluster.run()


def test_the_leader_s_end_wins_if_it_was_committed_first() -> None:
    cluster = Cluster((8,))
    stream = cluster.submit([1], max_tokens=2)[0]
    cluster.run()
    cluster.core.end(stream.front_end, stream.number, 1)
    cluster.settle()
    assert cluster.reason(stream) is FinishReason.LENGTH


def test_stop_ids_end_the_output_but_not_before_min_tokens() -> None:
    cluster = Cluster((8,))
    plain = cluster.submit([1], max_tokens=20, stop_ids=(0, 1))[0]
    patient = cluster.submit([1], max_tokens=20, stop_ids=(0, 1), min_tokens=6)[0]
    cluster.run()
    assert [len(plain.tokens), len(patient.tokens)] == [1, 6]
    assert {cluster.reason(plain), cluster.reason(patient)} == {FinishReason.STOP}


def test_a_front_end_that_goes_takes_its_requests_along() -> None:
    cluster = Cluster((8,))
    gone = [cluster.submit([1], front_end=1, max_tokens=20)[0] for _ in range(2)]
    stays = cluster.submit([0], front_end=2, max_tokens=3)[0]
    cluster.step()
    cluster.front_end_down(1)
    assert {front_end for front_end, _ in cluster.core.sequences} == {2}
    cluster.run()
    assert all(stream.finished is None for stream in gone)
    assert len(stays.tokens) == 3


def test_counters_and_statistics() -> None:
    cluster = Cluster((8,))
    cluster.submit([*filled(0, 1), 0], n=2, max_tokens=3)
    cluster.run()
    cluster.core.expect(GroupId(1), 8)
    stats = snapshot(cluster.core)
    assert (stats.requests, stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (1, 9, 8, 6)
    assert (stats.waiting, stats.preemptions) == (0, 0)
    up, expected = stats.groups
    assert (up.up, up.total_blocks, up.free_blocks, up.held_blocks, up.cached_blocks) == (True, 8, 6, 0, 2)
    assert (expected.up, expected.total_blocks, expected.running) == (False, 8, 0)


# ---- taken up where another scheduler, or connection, was lost


def begun(cluster: Cluster, tokens: int, **settings: Any) -> Stream:
    stream = cluster.submit(filled(0, 1), **settings)[0]
    while len(stream.tokens) < tokens:
        cluster.step()
    return stream


def test_what_is_resumed_goes_on_where_it_was_and_counts_on() -> None:
    cluster = Cluster((8,), bounds=QueueBounds(max_queued_requests=1))
    stream = begun(cluster, 5, max_tokens=9, tenant="ann")
    others = cluster.submit(filled(1, 1, 1, 1, 1, 1), max_tokens=8, n=2)
    cluster.reconnect(0)
    counters, sequence = cluster.core.counters, cluster.core.sequences[0, stream.number]
    assert (counters.requests, counters.resumed, counters.refused) == (2, 3, 0), "the queue, which is full, takes them"
    assert sequence.charged == sequence.committed == 8 + 5
    cluster.run()
    assert len(stream.tokens) == 9
    assert stream.finished is not None
    assert (stream.finished.tokens, stream.finished.preemptions) == (9, 1)
    assert stream.finished.cached_tokens == 0, "as at its first start"
    assert all(cluster.reason(other) is FinishReason.LENGTH for other in others)


def test_a_tenant_pays_once_for_what_is_resumed() -> None:
    """As much as one whose connection was never cut."""
    paid = []
    for cut in (False, True):
        cluster = Cluster((8,))
        stream = begun(cluster, 6, max_tokens=12, tenant="ann")
        before = cluster.core.waiting.fair.served("ann")
        if cut:
            cluster.reconnect(0)
        tenant = cluster.sequence(stream).tenant
        cluster.run()
        paid.append(tenant.served)
        assert before < tenant.served
    assert paid[0] == paid[1]


def test_its_deadline_counts_from_its_first_submit() -> None:
    cluster = Cluster((8,))
    stream = begun(cluster, 3, max_tokens=20, deadline_s=10.0)
    cluster.wait(6.0)
    cluster.reconnect(0)
    cluster.wait(3.9)
    cluster.step()
    assert stream.finished is None
    cluster.wait(0.2)
    cluster.step()
    assert stream.finished is not None
    assert stream.finished.message == f"the request did not end within 10 s: it has {len(stream.tokens)} tokens of output"
    assert stream.finished.failure is Failure.TIMED_OUT


@pytest.mark.parametrize(
    ("settings", "tokens", "reason"),
    [({"max_tokens": 3}, 3, FinishReason.LENGTH), ({"stop_ids": (0, 1), "min_tokens": 3}, 3, FinishReason.STOP)],
)
def test_an_end_that_was_lost_comes_again_at_once(settings: dict[str, Any], tokens: int, reason: FinishReason) -> None:
    cluster = Cluster((8,))
    stream = cluster.submit(filled(0, 1), **settings)[0]
    cluster.run()
    assert len(stream.tokens) == tokens
    stream.finished = None
    starts = cluster.core.groups[GroupId(0)].starts
    cluster.reconnect(0)
    assert cluster.reason(stream) is reason
    assert cluster.core.groups[GroupId(0)].starts == starts


def test_an_output_without_a_limit_ends_where_a_smaller_pool_does() -> None:
    cluster = Cluster((8, 3))
    stream = begun(cluster, 8, max_tokens=None)
    cluster.core.group_down(GroupId(0), LOST)
    cluster.groups.pop(GroupId(0))
    cluster.reconnect(0)
    assert cluster.reason(stream) is FinishReason.LENGTH
    assert len(stream.tokens) == 8


@pytest.mark.parametrize("wrong", [{"choice": 2}, {"choice": -1}, {"output": b"abc"}])
def test_a_resumption_that_cannot_be_is_an_error_and_changes_nothing(wrong: dict[str, Any]) -> None:
    cluster = Cluster((8,))
    resumption = structs.replace(Resumption(1, b"", 0.0), **wrong)
    request = Request(5, np.array([1], np.int32).tobytes(), b"", SamplingParams(n=2), resumption=resumption)
    with pytest.raises(ProtocolError, match="cannot resume choice"):
        cluster.core.submit(0, request)
    cluster.settle()
    assert not cluster.core.sequences
