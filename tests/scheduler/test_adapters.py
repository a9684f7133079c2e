"""A request's adapter is told with every start of its sequences, and one that cannot be read ends them alone."""

import msgspec

from kvcache.ids import GroupId
from scheduler.config.core import CoreConfig, Resolved
from scheduler.core import SchedulerCore
from scheduler.protocol.leaders import Adapts, Command, Drop, Refused, Start
from scheduler.protocol.messages import Adapter, Failure, FinishReason, Request, Resumption, Started
from scheduler.protocol.sampling import SamplingParams

ADAPTER = Adapter("sql", "1", "/adapters/sql")
GROUP, FRONT_END = GroupId(0), 0


def request(stream: int, adapter: Adapter | None, **fields: object) -> Request:
    params = SamplingParams(max_tokens=4, n=1)
    return msgspec.structs.replace(Request(stream, b"\1\0\0\0" * 20, b"", params, salt=str(stream), adapter=adapter), **fields)


def started(core: SchedulerCore) -> list[Command]:
    """What groups have been told since the last call, as it comes in there."""
    told = [command for _, commands in core.take_logs() for command in commands.commands]
    return [msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=Command) for command in told]


def a_core() -> SchedulerCore:
    core = SchedulerCore(CoreConfig(block_size=16), Resolved(max_model_len=64))
    core.group_up(GROUP, 1, 32, 4)
    return core


def test_each_start_says_which_adapter_is_meant() -> None:
    core = a_core()
    core.submit(FRONT_END, request(0, ADAPTER))
    core.submit(FRONT_END, request(1, None))
    core.submit(FRONT_END, request(2, ADAPTER, resumption=Resumption(0, b"\2\0\0\0", 1.0)))
    assert [command.adapter for command in started(core) if isinstance(command, Start)] == [ADAPTER, None, ADAPTER]
    core.group_down(GROUP, "its workers have gone", returning=True)
    core.group_up(GROUP, 2, 32, 4)
    assert [command.adapter for command in started(core) if isinstance(command, Start)] == [ADAPTER, None, ADAPTER]
    core.check()


def test_who_cannot_be_served_ends_with_the_reason_and_nobody_else() -> None:
    core = a_core()
    for stream, adapter in enumerate((ADAPTER, None, ADAPTER)):
        core.submit(FRONT_END, request(stream, adapter))
    leases = [command.lease for command in started(core) if isinstance(command, Start) and command.adapter is not None]
    core.outbox.drain()
    core.refuse(GROUP, Refused(0, tuple(leases), "an epoch that is over"))
    assert len(core.sequences) == 3
    core.refuse(GROUP, Refused(1, (*leases, 99 << 16), "the adapter cannot be read"))
    core.check()
    assert [command.lease for command in started(core) if isinstance(command, Drop)] == leases
    [(_, deltas)] = core.outbox.drain()
    assert [(end.stream, end.reason, end.failure, end.message) for end in deltas.finished] == [
        (stream, FinishReason.FAILED, Failure.FAULT, "the adapter cannot be read") for stream in (0, 2)
    ]
    assert [stream for _, stream in core.sequences] == [1]
    core.refuse(GROUP, Refused(1, tuple(leases), "again"))


def test_who_waits_for_its_adapter_is_queued_until_it_is_there() -> None:
    core = a_core()
    core.submit(FRONT_END, request(0, ADAPTER))
    core.submit(FRONT_END, request(1, ADAPTER, resumption=Resumption(0, b"\2\0\0\0", 1.0, 1, 0, 0.5)))
    leases = tuple(command.lease for command in started(core) if isinstance(command, Start))
    core.now_s = 3.0
    core.adapts(GROUP, Adapts(0, leases))
    core.adapts(GROUP, Adapts(1, (*leases, 99 << 16)))
    core.now_s = 4.0
    for stream in range(2):
        core.end(FRONT_END, stream, 0)
    [(_, deltas)] = core.outbox.drain()
    assert [end.queued_s for end in deltas.finished] == [3.0, 0.5], "what another scheduler has counted stays"
    assert Started(0, deltas.started[-1].seed, 0, 3.0, deltas.started[-1].misses) == deltas.started[-1]
