"""Groups come and go: their sequences start again elsewhere, wait, or fail with a reason."""

import gc
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import numpy as np
import pytest

from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig, QueueBounds
from scheduler.core import SchedulerCore
from scheduler.placement.limits import LONGEST_RETRY_S, RequestRefused
from scheduler.protocol.leaders import Start
from scheduler.protocol.messages import Failure, FinishReason, Request
from scheduler.protocol.sampling import SamplingParams
from scheduler.state.resident import ResidentGroup
from scheduler.state.sequence import Sequence, State
from tests.scheduler.cluster import LOST, Cluster, filled

CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def test_the_sequences_of_a_lost_group_start_again_in_another_with_the_same_tokens() -> None:
    cluster = Cluster((8, 8))
    streams = [cluster.submit([token] * 5, max_tokens=12)[0] for token in (0, 1)]
    cluster.step(times=4)
    lost = cluster.sequence(streams[0]).blocks
    assert lost is not None
    told = len(streams[0].tokens)
    assert told > 1
    cluster.lose(lost.group)
    survivor = cluster.groups[GroupId(1 - lost.group)]
    start = next(command for command in survivor.down if isinstance(command, Start))
    assert (start.prompt_tokens, len(start.tokens) // 4, start.max_tokens) == (5, 5 + told, 12)
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}


def test_with_no_group_left_all_fail_with_the_reason() -> None:
    cluster = Cluster((8,))
    streams = [cluster.submit([token], max_tokens=20)[0] for token in (0, 1, 0, 1, 0, 1)]
    cluster.step(times=2)
    cluster.lose(0)
    for stream in streams:
        assert stream.finished is not None
        assert stream.finished.reason is FinishReason.FAILED
        assert LOST in stream.finished.message
        assert stream.finished.tokens == len(stream.tokens)
    with pytest.raises(RequestRefused, match="no group"):
        cluster.submit([1])


def test_one_that_is_expected_before_its_end_is_heard_of_is_up_until_then() -> None:
    """Whoever keeps it has found its ranks dead, or ends them, and starts it again: its leader's socket may end later."""
    cluster = Cluster((8,))
    [stream] = cluster.submit([1], max_tokens=6)
    cluster.core.expect(GroupId(0))
    cluster.core.check()
    cluster.step(times=2)
    cluster.lose(0, returning=True)
    cluster.core.check()
    assert cluster.core.expected == {GroupId(0): 8}
    cluster.bring_up(0)
    cluster.run()
    assert cluster.reason(stream) is FinishReason.LENGTH


def test_with_a_replacement_on_its_way_all_wait() -> None:
    cluster = Cluster((8,))
    streams = [cluster.submit([token], max_tokens=6)[0] for token in (0, 1)]
    cluster.step(times=2)
    cluster.lose(0, returning=True)
    late = cluster.submit([0, 1], max_tokens=3)[0]
    assert {cluster.sequence(stream).state for stream in [*streams, late]} == {State.WAITING}
    cluster.bring_up(0)
    cluster.run()
    assert cluster.reason(late) is FinishReason.LENGTH


def test_a_replacement_that_will_not_come_after_all_fails_who_waited_for_it() -> None:
    cluster = Cluster((8,))
    stream = cluster.submit([1], max_tokens=6)[0]
    cluster.lose(0, returning=True)
    assert stream.finished is None
    cluster.lose(0)
    assert cluster.reason(stream) is FinishReason.FAILED


def test_who_is_under_way_waits_for_a_group_that_is_tried_again_later_however_often_it_dies() -> None:
    cluster = Cluster((90,), bounds=QueueBounds(), max_num_seqs=2)
    running = [cluster.submit([token], max_tokens=100)[0] for token in (0, 1)]
    waiting = cluster.submit(filled(0, 1, 0), max_tokens=100)[0]
    for _ in range(3):
        cluster.step(times=20)  # far enough that nobody is suspected
        cluster.lose(0, returning=True)
        cluster.lose(0, back_s=300.0)
        cluster.wait(300.0)
        assert {cluster.sequence(stream).state for stream in (*running, waiting)} == {State.WAITING}
        cluster.core.expect(GroupId(0))
        cluster.bring_up(0)
    cluster.run()
    assert {cluster.reason(stream) for stream in (*running, waiting)} == {FinishReason.LENGTH}


def test_who_waits_for_a_group_that_rests_ends_once_it_will_not_come_or_by_its_deadline() -> None:
    cluster = Cluster((8, 8))
    streams = [cluster.submit([token], max_tokens=20, deadline_s=deadline_s)[0] for token, deadline_s in ((0, None), (1, 60.0))]
    cluster.step(times=2)
    cluster.lose(1)
    cluster.lose(0, back_s=300.0)
    cluster.wait(61.0)
    cluster.submit([1])
    cluster.bring_up(0)
    late, other = streams[1].finished, streams[0]
    assert late is not None
    assert late.failure is Failure.TIMED_OUT
    cluster.lose(0, back_s=30.0)
    assert other.finished is None
    cluster.lose(0)
    assert other.finished is not None
    assert (other.finished.reason, other.finished.failure) == (FinishReason.FAILED, Failure.UNAVAILABLE)


def test_a_newcomer_waits_for_a_group_that_rests_if_it_is_tried_soon_and_before_its_deadline() -> None:
    cluster = Cluster((8,), bounds=QueueBounds())
    cluster.lose(0, back_s=300.0)

    def told(deadline_s: float | None = None) -> float:
        with pytest.raises(RequestRefused, match="no group of workers is up or expected") as refusal:
            cluster.submit([1], max_tokens=4, deadline_s=deadline_s)
        assert refusal.value.failure is Failure.UNAVAILABLE
        return refusal.value.retry_after_s

    assert told() == LONGEST_RETRY_S, "and to ask again then"
    cluster.wait(270.0)
    assert told(deadline_s=20.0) == 30.0
    streams = [cluster.submit([1], max_tokens=4, deadline_s=deadline_s)[0] for deadline_s in (None, 40.0)]
    cluster.lose(0, back_s=60.0)
    cluster.bring_up(0)
    cluster.run()
    assert {cluster.reason(stream) for stream in streams} == {FinishReason.LENGTH}


def test_whoever_submits_and_is_willing_to_wait_waits_for_a_group_that_rests() -> None:
    cluster = Cluster((8,))
    cluster.lose(0, back_s=300.0)
    stream = cluster.submit([1], max_tokens=4)[0]
    cluster.bring_up(0)
    cluster.run()
    assert cluster.reason(stream) is FinishReason.LENGTH


def test_what_fits_only_a_group_that_rests_waits_for_it_and_the_others_go_on() -> None:
    cluster = Cluster((8, 4), bounds=QueueBounds())
    large = cluster.submit(filled(0, 1, 0), max_tokens=12)[0]
    open_ended = cluster.submit([1, 0, 1], max_tokens=None)[0]
    cluster.step()
    cluster.lose(0, back_s=100.0)
    with pytest.raises(RequestRefused, match="is up or expected"):
        cluster.submit(filled(0, 1, 0), max_tokens=12)
    with pytest.raises(RequestRefused, match="the largest pool has 8"):
        cluster.submit(filled(0, 1, 0), max_tokens=40)
    cluster.wait(50.0)
    larger = cluster.submit(filled(1, 1, 0, 1, 1), max_tokens=None)[0]
    cluster.step(times=30)
    assert cluster.reason(open_ended) is FinishReason.LENGTH
    assert len(open_ended.tokens) == 4 * 4 + 1 - 3, "shortened, not kept waiting"
    assert {cluster.sequence(stream).state for stream in (large, larger)} == {State.WAITING}
    cluster.reconnect(0)
    cluster.bring_up(0)
    cluster.run()
    assert (len(large.tokens), len(larger.tokens)) == (12, 8 * 4 + 1 - 20)


def test_what_fits_no_surviving_group_fails_and_the_rest_goes_on() -> None:
    cluster = Cluster((8, 4))
    large = cluster.submit(filled(0, 1, 0), max_tokens=12)[0]
    small = cluster.submit([1], max_tokens=6)[0]
    cluster.step()
    cluster.lose(0)
    assert cluster.reason(large) is FinishReason.FAILED
    cluster.run()
    assert cluster.reason(small) is FinishReason.LENGTH


def test_an_output_without_a_limit_is_shortened_when_only_a_smaller_pool_is_left() -> None:
    cluster = Cluster((8, 4))
    stream = cluster.submit([1, 0, 1], max_tokens=None)[0]
    cluster.step(times=3)
    cluster.lose(0)
    cluster.run()
    assert cluster.reason(stream) is FinishReason.LENGTH
    assert len(stream.tokens) == 4 * 4 + 1 - 3


def test_an_output_without_a_limit_that_is_longer_already_ends_there() -> None:
    cluster = Cluster((8, 2))
    stream = cluster.submit([1, 0, 1], max_tokens=None)[0]
    cluster.step(times=12)
    cluster.lose(0)
    assert cluster.reason(stream) is FinishReason.LENGTH
    cluster.run()


def test_one_that_waits_for_a_larger_group_to_come_back_does_not_hold_up_the_others() -> None:
    cluster = Cluster((8, 4))
    cluster.lose(0, returning=True)
    large = cluster.submit(filled(0, 1, 0, 1), max_tokens=8)[0]
    small = cluster.submit([1], max_tokens=6)[0]
    assert cluster.sequence(small).state is State.RUNNING
    cluster.step(times=8)
    assert small.finished is not None
    assert cluster.sequence(large).state is State.WAITING
    cluster.bring_up(0)
    assert cluster.sequence(large).state is State.RUNNING
    cluster.run()


def test_nothing_of_a_lost_group_s_cache_is_hit_in_its_next_epoch() -> None:
    cluster = Cluster((8,))
    cluster.submit(filled(0, 1, 0), max_tokens=2)
    cluster.run()
    cluster.lose(0, returning=True)
    cluster.bring_up(0)
    stream = cluster.submit(filled(0, 1, 0), max_tokens=2)[0]
    cluster.run()
    assert cluster.cached_tokens(stream) == 0


def test_requests_wait_for_a_group_of_unknown_size() -> None:
    cluster = Cluster((4,))
    cluster.lose(0)
    cluster.core.expect(GroupId(0))
    fits = cluster.submit([1], max_tokens=4)[0]
    too_large = cluster.submit(filled(0, 0, 0, 0), max_tokens=4)[0]
    open_ended = cluster.submit([0], max_tokens=None)[0]
    cluster.bring_up(0)
    assert cluster.reason(too_large) is FinishReason.FAILED
    cluster.run()
    assert len(fits.tokens) == 4
    assert len(open_ended.tokens) == 16


def test_a_request_after_the_last_loss_is_refused_with_its_reason() -> None:
    core = SchedulerCore(CoreConfig(block_size=16))
    core.group_up(GroupId(0), 0, 8, 4)
    core.group_down(GroupId(0), "its worker process died")
    with pytest.raises(RequestRefused, match="its worker process died"):
        core.submit(0, Request(0, np.zeros(3, np.int32).tobytes(), b"", SamplingParams()))


def test_the_last_group_runs_empty_if_it_comes_back_and_requests_wait_for_it() -> None:
    cluster = Cluster((8,))
    running = cluster.submit([1], max_tokens=6)[0]
    cluster.step()
    assert not cluster.drain(0), "who would serve?"
    assert cluster.drain(0, returning=True)
    waiting = cluster.submit([0], max_tokens=6)[0]
    cluster.step(times=10)
    assert cluster.reason(running) is FinishReason.LENGTH
    assert waiting.finished is None
    assert waiting.tokens == []
    cluster.lose(0, returning=True)
    cluster.bring_up(0)
    cluster.run()
    assert cluster.reason(waiting) is FinishReason.LENGTH


@pytest.mark.few(1)
@pytest.mark.parametrize("idle", [False, True])
def test_nothing_is_kept_of_groups_and_sequences_that_have_gone(idle: bool) -> None:
    """A resident batch is half a megabyte. idle: nobody runs there, or waits afterwards."""
    cluster = Cluster((8, 8))

    def kept(kind: type) -> int:
        gc.collect()
        return sum(isinstance(each, kind) for each in gc.get_objects())

    def lose(times: int) -> None:
        for turn in range(times):
            streams = [] if idle else [cluster.submit([token, turn % 2], max_tokens=12)[0] for token in (0, 1, 0)]
            cluster.step(times=2)
            cluster.lose(turn % 2, returning=True)
            cluster.bring_up(turn % 2)
            cluster.ghosts.clear()
            cluster.run()
            assert {cluster.reason(stream) for stream in streams} <= {FinishReason.LENGTH}

    lose(2)
    groups, sequences = kept(ResidentGroup), kept(Sequence)
    lose(10)
    assert kept(ResidentGroup) <= groups
    assert kept(Sequence) <= sequences


def test_requests_cancellations_losses_and_front_ends_leave_nothing_behind() -> None:
    """Every object that the core leads to is counted, but for the hashes of evicted blocks, which have a bound of their own."""
    cluster = Cluster((8, 8), hash_stride=2, fetch=True)

    def live(turn: int) -> int:
        """All that happens in a day, for a front end of its own."""
        streams = [
            cluster.submit([token, turn % 2, 1, 0, 1], front_end=turn, salt=str(turn), tenant=str(token), n=1 + token)[0]
            for token in (0, 1, 0)
        ]
        cluster.step(times=2)
        cluster.abort(streams[0])
        cluster.end(streams[1], 1)
        cluster.lose(turn % 2, returning=True)
        cluster.bring_up(turn % 2)
        cluster.run()
        cluster.submit([0, 1], front_end=turn)
        cluster.step()
        cluster.front_end_down(turn)
        cluster.run()
        cluster.cut(1 - turn % 2)
        cluster.core.table.index.evicted.clear()
        return reachable(cluster.core)

    counts = [live(turn) for turn in range(24)]
    assert counts[-1] - counts[11] < 12, f"an object a turn is kept: {counts}"


def reachable(start: object) -> int:
    """Objects that something leads to, code left out."""
    seen, new = dict[int, object](), [start]
    while new:
        each = new.pop()
        if id(each) not in seen and not isinstance(each, CODE):
            seen[id(each)] = each
            new += gc.get_referents(each)
    return len(seen)
