"""The lease protocol: ordered logs down, numbered reports up, and the cut between them."""

import msgspec
import numpy as np
import pytest

from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig, Resolved
from scheduler.core import SchedulerCore
from scheduler.protocol.leaders import Drop, ExpertLoad, Grant, Report, Start
from scheduler.protocol.messages import NO_TOKEN, FinishReason, Request, TokenLogprobs
from scheduler.protocol.sampling import SamplingParams
from scheduler.state.resident import ProtocolError
from tests.scheduler.cluster import Cluster, filled

HERE = GroupId(0)


def test_a_decode_step_sends_nothing_down() -> None:
    cluster = Cluster((8,), block_size=16)
    cluster.submit([1], max_tokens=30)
    cluster.step(times=2)
    for _ in range(8):
        cluster.step()
        assert not cluster.groups[HERE].down


def test_commands_are_numbered_without_a_gap_from_0_in_each_epoch() -> None:
    cluster = Cluster((8,))
    cluster.submit([1], max_tokens=20)
    cluster.step(times=10)  # `SimulatedGroup.take` checks every batch
    assert cluster.groups[HERE].issued >= 4
    cluster.bring_up(0)
    assert cluster.groups[HERE].issued == 1
    assert isinstance(cluster.groups[HERE].down[0], Start)
    cluster.run()


def test_only_those_who_were_told_something_are_handed_out_and_no_former_epoch_is() -> None:
    core = SchedulerCore(CoreConfig(block_size=4), Resolved(max_model_len=64))
    for group in range(3):
        core.group_up(GroupId(group), 0, 8, 4)
    for stream in range(2):
        core.submit(0, Request(stream, np.full(3, stream, np.int32).tobytes(), b"", SamplingParams(max_tokens=2)))
    core.group_down(GroupId(0), "gone", returning=True)  # what it had been told goes with it
    logs = core.take_logs()
    assert [name for name, _ in logs] == [1, 2]
    assert [type(command) for _, log in logs for command in log.commands] == [Start, Start]
    core.group_up(GroupId(0), 1, 8, 4)
    assert core.take_logs() == []
    core.abort(0, 0)
    ((_, log),) = core.take_logs()
    assert (log.first, [type(command) for command in log.commands]) == (1, [Drop])


def test_a_gap_in_the_reports_is_an_error_that_names_both_numbers() -> None:
    cluster = Cluster((8,))
    cluster.submit([1], max_tokens=20)
    cluster.deliver()
    cluster.turn()
    cluster.turn()
    cluster.groups[HERE].up.popleft()
    with pytest.raises(ProtocolError, match="sent report 1, expected 0"):
        cluster.arrive()
    cluster.core.check()


@pytest.mark.parametrize("steps", [0, 5])
def test_a_report_of_too_many_steps_is_an_error(steps: int) -> None:
    """The scheduler keeps one block and one report of tokens that are not yet written back."""
    cluster = Cluster((8,))
    stream = cluster.submit([1], max_tokens=20)[0]
    lease = cluster.sequence(stream).lease
    leases, tokens = np.array([lease], np.int64).tobytes(), np.zeros(steps, np.int32).tobytes()
    with pytest.raises(ProtocolError, match=f"{steps} steps"):
        cluster.core.report(HERE, Report(0, 0, 1, steps, leases, b"", tokens))
    cluster.core.check()


def test_a_report_that_tells_of_experts_what_cannot_be_is_an_error() -> None:
    cluster = Cluster((8,))
    lease = cluster.sequence(cluster.submit([1], max_tokens=20)[0]).lease
    leases, tokens = np.array([lease], np.int64).tobytes(), np.zeros(1, np.int32).tobytes()
    with pytest.raises(ProtocolError, match="tells of its experts what cannot be"):
        cluster.core.report(HERE, Report(0, 0, 1, 1, leases, b"", tokens, expert_load=ExpertLoad((0, 1), bytes(24))))
    cluster.core.check()


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5])
def test_reports_of_a_whole_block_of_steps_lose_no_token(prompt: int) -> None:
    cluster = Cluster((16,), steps=4, depth=1)
    streams = [cluster.submit([1] * (prompt + more), max_tokens=25)[0] for more in range(3)]
    cluster.run()
    assert {len(stream.tokens) for stream in streams} == {25}


def test_a_late_report_of_a_dropped_lease_is_discarded_and_the_others_in_it_commit() -> None:
    cluster = Cluster((16,))
    gone, stays = (cluster.submit([token], max_tokens=20)[0] for token in (0, 1))
    cluster.step(times=2)
    cluster.turn()
    cluster.abort(gone)
    told = len(gone.tokens), len(stays.tokens)
    cluster.arrive()
    assert (len(gone.tokens), len(stays.tokens)) == (told[0], told[1] + 1)
    cluster.run()


def test_a_row_is_reused_at_once_and_the_former_lease_s_late_tokens_are_not_taken_for_the_new_one_s() -> None:
    cluster = Cluster((16,), max_num_seqs=1, depth=1)
    gone = cluster.submit([0], max_tokens=20)[0]
    cluster.step(times=3)
    cluster.turn()
    cluster.abort(gone)
    new = cluster.submit([1, 0, 1], max_tokens=5)[0]
    assert cluster.sequence(new).row == 0
    cluster.arrive()
    assert new.tokens == []
    cluster.run()


def test_a_block_may_be_granted_again_before_the_leader_has_heard_of_the_drop() -> None:
    cluster = Cluster((4,), depth=1, enable_prefix_caching=False)
    gone = cluster.submit(filled(0, 1), max_tokens=8)[0]
    cluster.step(times=4)
    cluster.turn()
    cluster.abort(gone)
    new = cluster.submit(filled(1, 1, 0), max_tokens=4)[0]
    cluster.turn()  # the commands are still on their way: another step of the old lease, in blocks of the new one
    cluster.arrive()
    cluster.run()
    assert len(new.tokens) == 4


def test_commands_for_a_lease_that_the_leader_has_ended_are_no_ops() -> None:
    cluster = Cluster((16,), grant_ahead=8)
    short = cluster.submit([1, 1], max_tokens=20, stop_ids=(0, 1))[0]
    other = cluster.submit([0], max_tokens=12)[0]
    lease = cluster.sequence(short).lease
    cluster.deliver()
    cluster.turn()  # ends it; the report is on its way
    batch = cluster.groups[HERE].rank.batch
    assert lease is not None
    for command in (Grant(lease, (9,)), Drop(lease)):
        batch.apply(command)
        batch.applied -= 1  # it was not in the log
    cluster.arrive()
    cluster.run()
    assert (len(short.tokens), len(other.tokens)) == (1, 12)


def test_a_stale_epoch_is_discarded_and_its_workers_cannot_come_back() -> None:
    cluster = Cluster((8,))
    stream = cluster.submit([1], max_tokens=6)[0]
    cluster.step(times=2)
    cluster.turn()
    told = len(stream.tokens)
    cluster.bring_up(0)
    ghost = cluster.ghosts[0]
    assert ghost.up
    for _ in range(3):
        cluster.haunt(ghost)
    assert len(stream.tokens) == told
    with pytest.raises(ProtocolError, match="stale worker"):
        cluster.core.group_up(HERE, 0, 8, 4)
    cluster.run()


def test_a_report_of_a_group_that_is_gone_is_discarded() -> None:
    cluster = Cluster((8, 8))
    stream = cluster.submit([1], max_tokens=6)[0]
    cluster.step()
    cluster.turn(0)
    cluster.lose(0)
    cluster.haunt(cluster.ghosts[0])
    cluster.run()
    assert len(stream.tokens) == 6


def test_log_probabilities_go_to_the_stream_of_their_lease_and_no_further_than_the_cut() -> None:
    core = SchedulerCore(CoreConfig(block_size=16))
    core.group_up(HERE, 0, 8, 4)
    for front_end in (0, 1, 2):
        params = SamplingParams(max_tokens=9, logprobs=1)
        core.submit(front_end, Request(7, np.ones(3, np.int32).tobytes(), b"", params))
    leases = [int(core.groups[HERE].lease[row]) for row in range(3)]
    core.abort(2, 7)
    core.outbox.drain()
    core.report(
        HERE,
        Report(
            epoch=0,
            number=0,
            applied=3,
            steps=1,
            leases=np.array(leases, np.int64).tobytes(),
            computed=np.array([3, 2, 3], np.int32).tobytes(),
            tokens=np.array([5, NO_TOKEN, 6], np.int32).tobytes(),
            finished=((leases[0], int(FinishReason.STOP)), (leases[2], int(FinishReason.STOP))),
            logprobs=((leases[0], b"first"), (leases[2], b"third")),
        ),
    )
    core.check()
    told = dict(core.outbox.drain())
    assert told.keys() == {0, 1}
    assert told[0].logprobs == ((7, b"first"),)
    assert [(end.stream, end.tokens) for end in told[0].finished] == [(7, 1)]
    assert np.frombuffer(told[0].tokens, np.int32).tolist() == [5]
    assert told[1].logprobs == ()
    assert np.frombuffer(told[1].tokens, np.int32).tolist() == [NO_TOKEN]
    assert core.outbox.drain() == []


def test_log_probabilities_of_a_prompt_come_with_the_chunk_that_sampled_nothing() -> None:
    core = SchedulerCore(CoreConfig(block_size=16))
    core.group_up(HERE, 0, 8, 4)
    core.submit(0, Request(7, np.ones(9, np.int32).tobytes(), b"", SamplingParams(max_tokens=2, prompt_logprobs=0)))
    lease = core.groups[HERE].lease[:1].tobytes()
    core.outbox.drain()
    for number, (computed, token) in enumerate([(4, NO_TOKEN), (5, 6)]):
        payloads = ((int(np.frombuffer(lease, np.int64)[0]), b"part %d" % number),)
        counts, tokens = np.array([computed], np.int32).tobytes(), np.array([token], np.int32).tobytes()
        core.report(HERE, Report(0, number, 1, 1, lease, counts, tokens, logprobs=payloads))
        core.check()
        ((front_end, told),) = core.outbox.drain()
        assert (front_end, told.logprobs, told.tokens) == (0, ((7, b"part %d" % number),), tokens)


def test_log_probabilities_alone_are_told_too() -> None:
    cluster = Cluster((8,))
    sequence = cluster.sequence(cluster.submit([1], max_tokens=2)[0])
    part = msgspec.msgpack.encode(TokenLogprobs(-0.5, (), ()))
    cluster.core.outbox.logprobs(sequence, part)
    ((front_end, told),) = cluster.core.outbox.drain()
    assert (front_end, told.streams, told.logprobs) == (sequence.front_end, b"", ((sequence.stream, part),))
    cluster._hear(front_end, told)
    cluster.run()


def test_a_sequence_whose_worker_gave_up_on_it_ends_as_failed_and_leaves_its_blocks() -> None:
    """No token came with the step that failed, but its KV was computed."""
    core = SchedulerCore(CoreConfig(block_size=16))
    core.group_up(HERE, 0, 8, 4)
    core.submit(0, Request(7, np.ones(16, np.int32).tobytes(), b"", SamplingParams(max_tokens=9)))
    lease = core.groups[HERE].lease[:1]
    counts, tokens = np.array([16], np.int32).tobytes(), np.array([NO_TOKEN], np.int32).tobytes()
    finished = ((int(lease[0]), int(FinishReason.FAILED)),)
    core.report(HERE, Report(0, 0, 1, 1, lease.tobytes(), counts, tokens, finished=finished))
    core.check()
    ((_, told),) = core.outbox.drain()
    assert [(end.stream, end.reason, end.tokens) for end in told.finished] == [(7, FinishReason.FAILED, 0)]
    assert "grammar" in told.finished[0].message
    assert "not finite" in told.finished[0].message
    assert core.counters.given_up == 1
    usage = core.table.pools[HERE]
    assert (usage.held, usage.free + usage.cached) == (0, 8)
