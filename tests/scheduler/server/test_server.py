"""The core behind its socket: who may speak, stale epochs, lost leaders and front ends, the order of what goes out.

Everything on both event loops: asyncio's own, and uvloop, on which Ray runs its asyncio actors.
"""

import asyncio
import gc
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import uvloop
from msgspec import structs

from kvcache.ids import BlockId, GroupId
from kvcache.standing import Standing
from scheduler.config.core import CoreConfig, Resolved
from scheduler.core import SchedulerCore
from scheduler.protocol.handshake import Stranger, introduce
from scheduler.protocol.inventory import parts
from scheduler.protocol.leaders import Beat, Commands, Drop, End, Hello, Inventory, LeaseId, Moved, Report, Start
from scheduler.protocol.messages import (
    Alive,
    Connect,
    Deltas,
    Failure,
    Finished,
    FinishReason,
    Misses,
    Request,
    Resumption,
    Stop,
    Submit,
    TalliedMetric,
    Tally,
    Welcome,
)
from scheduler.protocol.sampling import SamplingParams
from scheduler.protocol.wire import MAX_FRAME_BYTES, FrameSocket
from scheduler.server.server import SchedulerServer
from scheduler.state.resident import ProtocolError

TOKEN = "secret"
BLOCK = 16
PATIENCE_S = 60.0
"""After which a message that was lost counts as lost."""

ALIVE = msgspec.msgpack.encode(Alive())


class Client(FrameSocket):
    """Passes over what says no more than that the server lives."""

    def receive(self, most: int = MAX_FRAME_BYTES) -> bytes | None:
        deadline_s = time.monotonic() + PATIENCE_S
        while (payload := super().receive(most)) == ALIVE:
            assert time.monotonic() < deadline_s, "nothing else is said"
        return payload


class Served:
    """A server on a thread of its own, and clients that speak to it."""

    def __init__(self, new_loop: Callable[[], asyncio.AbstractEventLoop], hung_after_s: float = 1e9) -> None:
        self.core = SchedulerCore(CoreConfig(block_size=BLOCK, hung_after_s=hung_after_s), Resolved(max_model_len=256))
        self.clients: list[FrameSocket] = []
        self.loop = new_loop()
        self.used = threading.Event()
        self.server = SchedulerServer(self.core, TOKEN, check_invariants=True, used=self.used.set)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self.server.listen("127.0.0.1"), self.loop).result(30)

    def ask(self, question: Callable[[SchedulerCore], Any]) -> Any:
        async def answer() -> Any:
            return question(self.core)

        return asyncio.run_coroutine_threadsafe(answer(), self.loop).result(30)

    def between(self, gone: asyncio.StreamWriter, change: Callable[[SchedulerCore], Any]) -> None:
        """Runs one call when that connection is dead and its reader has not been told yet: the moment in which uvloop raises
        at a write."""
        done = threading.Event()

        def call() -> None:
            try:
                self.server.call(change)
            finally:
                done.set()

        def end() -> None:
            gone.transport.abort()
            self.loop.call_soon(call)  # after the connection's end was heard, before its reader runs again

        self.loop.call_soon_threadsafe(end)
        assert done.wait(PATIENCE_S)

    def connect(self, opening: Hello | Connect, token: str = TOKEN) -> FrameSocket:
        """Errors: Stranger."""
        client = Client.connect("127.0.0.1", self.port)
        introduce(client, token, opening)
        client._socket.settimeout(PATIENCE_S)
        self.clients.append(client)  # held: a forgotten socket is a closed one
        return client

    def leader(self, group: int = 0, epoch: int = 0) -> FrameSocket:
        return self.connect(Hello(group, epoch, blocks=8, max_num_seqs=4))

    def front_end(self) -> FrameSocket:
        client = self.connect(Connect())
        assert read(client, Welcome).block_size == BLOCK
        return client

    def close(self) -> None:
        for client in self.clients:
            client.close()
        asyncio.run_coroutine_threadsafe(self.server.close(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Leaders that say nothing are well here."""
    served = Served(request.param)
    yield served
    served.close()


def read(client: FrameSocket, kind: type[Any]) -> Any:
    payload = client.receive()
    assert payload is not None, "the server has closed the connection"
    return msgspec.msgpack.decode(payload, type=kind)


def reset(client: FrameSocket) -> None:
    """Goes without a word, as a host does whose process was killed with data unread."""
    client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client._reader.close()  # not `close`, which ends both directions in good order first
    client._socket.close()


def tokens_of(deltas: Deltas) -> dict[int, list[int]]:
    """By stream."""
    streams = np.frombuffer(deltas.streams, np.int64).tolist()
    columns = np.frombuffer(deltas.tokens, np.int32).reshape(-1, len(streams)).T.tolist()
    return dict(zip(streams, columns, strict=True))


def request(stream: int, prompt: int = 20, **params: Any) -> Request:
    params = {"max_tokens": 8} | params
    return Request(stream, np.arange(prompt, dtype=np.int32).tobytes(), b"", SamplingParams(**params))


def first_token(start: Start, epoch: int = 0, number: int = 0, token: int = 7) -> Report:
    """The leader has computed the whole prompt and sampled one token."""
    computed = len(start.tokens) // 4 - start.cached_tokens
    return Report(
        epoch, number, 1, 1, np.array([start.lease]).tobytes(), np.array([computed], np.int32).tobytes(),
        np.array([token], np.int32).tobytes(),
    )  # fmt: skip


def test_a_leader_says_its_ports_and_what_has_moved_between_its_reports(served: Served) -> None:
    leader = served.connect(Hello(0, 0, blocks=8, max_num_seqs=4, host_blocks=3, ports=("here:1", "here:2")))
    front_end = served.front_end()
    front_end.send(Submit((request(1),)))
    start = read(leader, Commands).commands[0]
    assert served.ask(lambda core: core.groups[GroupId(0)].ports) == ("here:1", "here:2")
    heard: list[tuple[int, Moved]] = []
    served.ask(lambda core: setattr(core, "moved", lambda group, moved: heard.append((group, moved))))
    leader.send(Moved(0, 5, True, 0.5, 4096))
    leader.send(first_token(start))
    assert np.frombuffer(read(front_end, Deltas).tokens, np.int32).tolist() == [7]
    assert heard == [(0, Moved(0, 5, True, 0.5, 4096))]


def test_without_the_token_nobody_is_heard(served: Served) -> None:
    for opening in (Hello(0, 0, 8, 4), Connect()):
        with pytest.raises(Stranger):
            served.connect(opening, token="guess")
    assert served.ask(lambda core: list(core.groups)) == []


def test_tallies_outlive_the_front_ends_that_sent_them(served: Served) -> None:
    for total in (2.0, 3.0):
        front_end = served.front_end()
        front_end.send(Tally((TalliedMetric("ttft", (), (1, 0), total),)))
        front_end.send(Submit((request(1, prompt=0),)))
        assert read(front_end, Deltas).finished, "messages are heard in order, so the tally was heard before the refusal"
        front_end.close()
    status = served.ask(lambda _: served.server.status(maps=False))
    assert status.tallies == (TalliedMetric("ttft", (), (2, 0), 5.0),)


def test_what_is_not_the_protocol_closes_the_connection(served: Served) -> None:
    client = FrameSocket.connect("127.0.0.1", served.port)
    client.send({"hello": "world"})
    assert client.receive() is not None, "the challenge, which everybody gets"
    assert client.receive() is None


def test_a_request_travels_to_the_leader_and_its_tokens_back(served: Served) -> None:
    leader, front_end = served.leader(), served.front_end()
    front_end.send(Submit((request(5, max_tokens=2),)))
    commands = read(leader, Commands)
    (start,) = commands.commands
    assert commands.first == 0
    assert isinstance(start, Start)
    leader.send(first_token(start))
    deltas = read(front_end, Deltas)
    assert np.frombuffer(deltas.streams, np.int64).tolist() == [5]
    assert np.frombuffer(deltas.tokens, np.int32).tolist() == [7]
    last = np.array([9], np.int32).tobytes()
    leader.send(Report(0, 1, 1, 1, np.array([start.lease]).tobytes(), b"", last, ((start.lease, FinishReason.LENGTH),)))
    (finished,) = read(front_end, Deltas).finished
    assert (finished.stream, finished.reason, finished.tokens) == (5, FinishReason.LENGTH, 2)


def test_a_refused_request_ends_with_the_numbers(served: Served) -> None:
    served.leader()
    front_end = served.front_end()
    front_end.send(Submit((request(1, prompt=200, max_tokens=20, n=2),)))
    ends = read(front_end, Deltas).finished
    assert [end.stream for end in ends] == [1, 2]
    assert all(end.reason == FinishReason.FAILED and "14 blocks" in end.message and "has 8" in end.message for end in ends)


def test_a_lost_leader_sends_its_requests_to_another_group_with_their_tokens(served: Served) -> None:
    leaders = {0: served.leader(0)}
    front_end = served.front_end()
    front_end.send(Submit((request(1),)))
    (start,) = read(leaders[0], Commands).commands
    leaders[0].send(first_token(start, token=42))
    read(front_end, Deltas)
    leaders[1] = served.leader(1)
    leaders[0].close()
    (again,) = read(leaders[1], Commands).commands
    assert np.frombuffer(again.tokens, np.int32).tolist() == [*range(20), 42]
    assert again.prompt_tokens == 20
    assert again.lease != start.lease


def test_a_group_that_is_lost_for_good_is_not_waited_for_when_its_leader_hears_of_it(served: Served) -> None:
    leader = served.leader()
    served.front_end()  # answered after the leader was heard
    served.loop.call_soon_threadsafe(served.server.group_lost, GroupId(0), "it was not needed any more")
    assert leader.receive() is None
    served.front_end()  # answered after the leader's end was heard
    assert served.ask(lambda core: (list(core.groups), core.expected)) == ([], {})


def test_a_gap_in_the_reports_fences_the_group(served: Served) -> None:
    leader, front_end = served.leader(), served.front_end()
    front_end.send(Submit((request(1),)))
    (start,) = read(leader, Commands).commands
    leader.send(first_token(start, number=3))
    assert leader.receive() is None
    assert served.ask(lambda core: list(core.groups)) == []


def test_a_stale_epoch_cannot_come_back(served: Served) -> None:
    served.leader(epoch=1)
    front_end = served.front_end()  # answered after the leader was heard
    assert served.leader(epoch=0).receive() is None
    front_end.send(Submit((request(1),)))
    front_end.send(Stop(99, 0))
    assert served.ask(lambda core: core.groups[GroupId(0)].epoch) == 1


def test_a_group_that_has_served_another_scheduler_says_what_stands_in_its_pool(served: Served) -> None:
    """In as many messages as it says; nothing is started before the last of them was heard."""
    prompt = np.arange(3 * BLOCK, dtype=np.int32)
    content = [prompt[at : at + BLOCK].tobytes() for at in range(0, len(prompt), BLOCK)]
    blocks = [BlockId(5), BlockId(2), BlockId(7)]
    above = [None, *blocks[:-1]]
    standing = [Standing(*each) for each in zip(blocks, above, ["", "", ""], content, strict=True)]
    front_end = served.front_end()
    served.ask(lambda core: core.expect(GroupId(0)))
    front_end.send(Submit((request(1, prompt=3 * BLOCK + 1),)))
    told = parts(standing, 1)
    assert len(told) == 3
    leader = served.connect(Hello(0, 4, blocks=8, max_num_seqs=4, inventories=len(told)))
    for part in told:
        assert served.ask(lambda core: list(core.groups)) == []
        leader.send(part)
    (start,) = read(leader, Commands).commands
    assert start.cached_tokens == 3 * BLOCK
    assert np.frombuffer(start.blocks, np.int32).tolist()[:3] == blocks
    served.ask(lambda _: None)  # what came after the last part is done
    del part, told
    lists = [each for each in gc.get_objects() if isinstance(each, list) and each and isinstance(each[0], Inventory)]
    assert not lists, "the tokens of a whole pool are kept for as long as the group is connected"


@pytest.mark.parametrize("fault", ["another's block", "too many parts", "not the protocol"])
def test_a_group_whose_word_of_its_pool_cannot_be_is_fenced(served: Served, fault: str) -> None:
    """Whoever has started it must hear of that: it would wait for another scheduler."""
    content = np.zeros(BLOCK, np.int32).tobytes()
    count = 9 if fault == "too many parts" else 1
    leader = served.connect(Hello(0, 4, blocks=8, max_num_seqs=4, inventories=count))
    said = parts([Standing(BlockId(8 if fault == "another's block" else at), None, str(at), content) for at in range(count)], 1)
    for part in said:
        leader.send(Connect() if fault == "not the protocol" else part)
    assert leader.receive() is None
    assert served.ask(lambda core: list(core.groups)) == []
    assert {(group, fenced.epoch, fenced.cut) for group, fenced in served.server.fenced.items()} == {(0, 4, False)}
    served.leader(epoch=5)
    served.front_end()  # answered after the leader was heard
    assert served.leader(epoch=3).receive() is None
    assert served.ask(lambda core: core.groups[GroupId(0)].epoch) == 5
    assert served.server.fenced[GroupId(0)].epoch == 4, "a stale one is not worth a word"


def test_a_front_end_that_leaves_frees_its_blocks(served: Served) -> None:
    leader, front_end = served.leader(), served.front_end()
    front_end.send(Submit((request(1, prompt=40), request(2, prompt=60))))  # the second waits for the first one's prefix
    (start,) = read(leader, Commands).commands
    front_end.close()
    assert read(leader, Commands).commands == (Drop(start.lease),)
    assert served.ask(lambda core: core.table.pools[GroupId(0)].held) == 0


def test_nothing_is_kept_of_connections_that_were_cut(served: Served) -> None:
    """A scheduler has so many objects that live long that garbage in cycles may wait for hours to be collected."""

    def wait(condition: Callable[[SchedulerCore], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not served.ask(condition):
            assert time.monotonic() < deadline_s

    def kept() -> int:
        """Of this server: others may run in this process."""
        readers = [each for each in gc.get_objects() if isinstance(each, asyncio.StreamReader)]
        return sum(each._loop is served.loop for each in readers)  # type: ignore[attr-defined]

    gc.disable()
    try:
        before = kept()
        for epoch in range(5):
            leader, front_end = served.leader(epoch=epoch), served.front_end()
            wait(lambda core: bool(core.groups))
            reset(leader)
            reset(front_end)
            wait(lambda core: not (core.groups or served.server._front_ends))
        deadline_s = time.monotonic() + PATIENCE_S
        while kept() > before:  # their tasks end, and uvloop closes their handles, in turns of the loop that nobody hears of
            assert time.monotonic() < deadline_s
    finally:
        gc.enable()


def test_closing_ends_every_log(served: Served) -> None:
    leader = served.leader()
    served.front_end()
    asyncio.run_coroutine_threadsafe(served.server.close(), served.loop).result(30)
    (end,) = read(leader, Commands).commands
    assert isinstance(end, End)


# ---- what is written to one that has just gone


def next_token(leases: Listing[int], number: int, token: int) -> Report:
    """One decode step of these."""
    sampled = np.full(len(leases), token, np.int32).tobytes()
    return Report(0, number, 1, 1, np.array(leases).tobytes(), b"", sampled)


class Shared:
    """One group that runs a stream of each of two front ends, and has told the first token of each."""

    def __init__(self, served: Served) -> None:
        self.served, self.leader = served, served.leader()
        self.goes, self.stays = served.front_end(), served.front_end()
        self.leases = [self._start(front_end, stream) for stream, front_end in enumerate((self.goes, self.stays))]
        for number, (lease, front_end) in enumerate(zip(self.leases, (self.goes, self.stays), strict=True)):
            counts, token = np.array([20], np.int32).tobytes(), np.array([7], np.int32).tobytes()
            self.leader.send(Report(0, number, 1, 1, np.array([lease]).tobytes(), counts, token))
            read(front_end, Deltas)

    def _start(self, front_end: FrameSocket, stream: int) -> int:
        alone = Request(stream, np.full(20, stream, np.int32).tobytes(), b"", SamplingParams(max_tokens=8))
        front_end.send(Submit((alone,)))
        (start,) = read(self.leader, Commands).commands
        return int(start.lease)

    def assert_the_other_goes_on(self) -> None:
        """It gets its token, its group runs on, and what the one who went had under way is dropped."""
        deltas = read(self.stays, Deltas)
        assert tokens_of(deltas) == {1: [8]}
        assert np.frombuffer(deltas.positions, np.int32).tolist()[0] + deltas.advanced == 21
        assert read(self.leader, Commands).commands == (Drop(LeaseId(self.leases[0])),)
        self.leader.send(next_token(self.leases[1:], 3, 9))
        assert tokens_of(read(self.stays, Deltas)) == {1: [9]}
        assert self.served.ask(lambda core: list(core.groups)) == [GroupId(0)]


def test_a_front_end_that_has_gone_takes_nothing_from_the_others(served: Served) -> None:
    shared = Shared(served)
    report = next_token(shared.leases, 2, 8)
    served.between(served.server._front_ends[0], lambda core: core.report(GroupId(0), report))
    shared.assert_the_other_goes_on()


def test_nor_does_one_that_is_reset_between_two_reports(served: Served) -> None:
    shared, held, hold = Shared(served), threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        hold.wait()

    served.loop.call_soon_threadsafe(wait)  # so that the loop finds the reset and the report at once
    held.wait()
    reset(shared.goes)
    shared.leader.send(next_token(shared.leases, 2, 8))
    hold.set()
    shared.assert_the_other_goes_on()


def test_nor_does_what_cannot_be_sent(served: Served) -> None:
    shared = Shared(served)
    report = next_token(shared.leases, 2, 8)

    def say_and_report(core: SchedulerCore) -> None:
        core.report(GroupId(0), report)
        sequence = core.sequences[0, 0]
        core.outbox.logprobs(sequence, cast(bytes, object()))
        served.server.call(lambda _: None)

    served.ask(say_and_report)
    assert shared.goes.receive() is None, "its connection ends: it would miss something"
    shared.assert_the_other_goes_on()


def test_a_leader_that_has_gone_takes_nothing_from_the_other_groups(served: Served) -> None:
    leaders = {0: served.leader(0), 1: served.leader(1)}
    front_end = served.front_end()
    requests = [Request(at, np.full(20, at, np.int32).tobytes(), b"", SamplingParams(max_tokens=8)) for at in range(2)]

    def submit(core: SchedulerCore) -> None:
        for each in requests:
            core.submit(0, each)

    served.between(served.server._leaders[GroupId(0)], submit)
    starts = [command for _ in range(2) for command in read(leaders[1], Commands).commands]
    assert sorted(np.frombuffer(start.tokens, np.int32)[0] for start in starts) == [0, 1], "its own, then the other's"
    leaders[1].send(first_token(starts[0]))
    assert list(tokens_of(read(front_end, Deltas)).values()) == [[7]]
    assert served.ask(lambda core: list(core.groups)) == [GroupId(1)]


def test_a_front_end_that_has_gone_before_it_is_welcomed_leaves_nothing_behind(served: Served) -> None:
    served.leader()
    for _ in range(8):
        reset(served.connect(Connect()))
    stays = served.front_end()  # answered after them
    stays.send(Submit((request(1),)))
    read(served.clients[0], Commands)
    assert served.ask(lambda _: len(served.server._front_ends)) == 1


def test_what_a_call_did_before_it_failed_is_told(served: Served) -> None:
    leader, front_end = served.leader(), served.front_end()

    def submit_twice(core: SchedulerCore) -> None:
        core.submit(0, request(1))
        core.submit(0, request(1))

    def call(_: SchedulerCore) -> None:
        with pytest.raises(ProtocolError, match="has not ended"):
            served.server.call(submit_twice)

    served.ask(call)
    (start,) = read(leader, Commands).commands
    leader.send(first_token(start))
    assert tokens_of(read(front_end, Deltas)) == {1: [7]}


def test_a_group_that_hangs_is_fenced_and_its_sequences_go_on_elsewhere(served: Served) -> None:
    """Its socket stays open, and what it says afterwards counts no more."""
    leaders = [served.leader(0), served.leader(1)]
    front_end = served.front_end()
    front_end.send(Submit((request(1),)))
    (start,) = read(leaders[0], Commands).commands
    leaders[0].send(first_token(start, token=42))
    read(front_end, Deltas)
    leaders[1].send(Beat(0))
    leaders[0].send(Beat(0, busy_s=2e9, patience_s=4.0))
    (again,) = read(leaders[1], Commands).commands
    assert np.frombuffer(again.tokens, np.int32).tolist() == [*range(20), 42]
    fenced = served.server.fenced[GroupId(0)]
    assert (fenced.group, fenced.epoch) == (0, 0)
    assert "a step has not ended after 2000000000.0 s" in fenced.reason
    assert leaders[0].receive() is None
    assert served.leader(0, epoch=0).receive() is None, "its epoch is over"
    leaders[1].send(first_token(again, token=43))
    assert tokens_of(read(front_end, Deltas)) == {1: [43]}
    served.leader(0, epoch=1)
    served.front_end()  # answered after it was heard
    assert sorted(served.ask(lambda core: list(core.groups))) == [0, 1]


def test_so_is_one_whose_leader_says_nothing() -> None:
    served = Served(asyncio.new_event_loop, hung_after_s=2.0)
    silent, beating = served.leader(0), threading.Event()
    well = served.leader(1)

    def beat() -> None:
        while not beating.wait(0.1):
            well.send(Beat(0))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    assert silent.receive() is None
    assert served.ask(lambda core: list(core.groups)) == [GroupId(1)]
    assert served.ask(lambda core: list(core.expected)) == [GroupId(0)], "its next epoch is waited for"
    beating.set()
    thread.join(PATIENCE_S)
    served.close()


def test_groups_that_are_struck_at_once_lose_no_request(served: Served) -> None:
    """Whoever goes from each to the next meets the death of all."""
    leaders = [served.leader(group) for group in range(4)]
    front_end = served.front_end()
    front_end.send(Submit((request(1),)))
    (start,) = read(leaders[0], Commands).commands
    leaders[0].send(first_token(start, token=42))
    assert tokens_of(read(front_end, Deltas)) == {1: [42]}
    for leader in leaders:
        leader.close()
    back = served.leader(0, epoch=1)
    (again,) = read(back, Commands).commands
    back.send(first_token(again, epoch=1, token=43))
    assert tokens_of(read(front_end, Deltas)) == {1: [43]}


def test_a_group_is_whole_since_its_ranks_were_heard_and_its_step_began(served: Served) -> None:
    leader, group = served.leader(), GroupId(0)

    def whole_s_after(beat: Beat) -> float:
        leader.send(beat)
        deadline_s = time.monotonic() + PATIENCE_S
        while served.ask(lambda _: served.server._vitals._beats.get(group)) != beat:
            assert time.monotonic() < deadline_s
        whole_s: float = served.ask(lambda core: core.groups[group].whole_s)
        return whole_s

    whole_s_after(Beat(0, silent_s=9.0, silent_rank=1))  # it is up
    for troubled in (Beat(0, silent_s=3.0, silent_rank=1), Beat(0, busy_s=3.0, patience_s=9.0)):
        began_s = time.monotonic()
        assert whole_s_after(troubled) < began_s
    assert whole_s_after(Beat(0, silent_s=0.1, silent_rank=1, busy_s=0.2)) >= began_s - 0.2


def test_a_front_end_that_says_nothing_is_left_and_one_that_says_it_lives_is_not() -> None:
    served = Served(asyncio.new_event_loop, hung_after_s=0.5)
    leader, silent, well, ended = served.leader(), served.front_end(), served.front_end(), threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            leader.send(Beat(0))
            well.send(Alive())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    silent.send(Submit((request(1),)))
    well.send(Submit((request(2),)))
    assert silent.receive() is None
    commands: list[Any] = []
    while not any(isinstance(command, Drop) for command in commands):
        commands += read(leader, Commands).commands
    assert served.ask(lambda core: [stream for _, stream in core.sequences]) == [2]
    ended.set()
    thread.join(PATIENCE_S)
    served.close()


def test_everybody_is_told_that_the_scheduler_lives(served: Served) -> None:
    for client in (served.leader(), served.front_end()):
        assert FrameSocket.receive(client) == ALIVE


@pytest.mark.few(1)
def test_a_scheduler_is_in_use_while_it_has_a_group_and_a_front_end(served: Served) -> None:
    def is_used() -> bool:
        served.used.clear()
        return served.used.wait(2.0)

    front_end = served.front_end()
    assert not is_used()
    leader = served.leader()
    assert served.used.wait(PATIENCE_S)
    front_end.close()
    while served.ask(lambda _: served.server._front_ends):
        time.sleep(0.01)
    assert not is_used()
    served.front_end()
    assert served.used.wait(PATIENCE_S)
    leader.close()
    while served.ask(lambda core: core.groups):
        time.sleep(0.01)
    assert not is_used()


def test_a_front_end_that_submits_what_lives_ends_alone(served: Served) -> None:
    """And comes back over another connection, where it says what it has of it."""
    leader, wrong, other = served.leader(), served.front_end(), served.front_end()
    wrong.send(Submit((request(1),)))
    (start,) = read(leader, Commands).commands
    other.send(Submit((request(1, prompt=1),)))
    (beside,) = read(leader, Commands).commands
    wrong.send(Submit((request(1),)))
    assert wrong.receive() is None, "it broke the protocol"
    assert read(leader, Commands).commands == (Drop(start.lease),)
    again = served.front_end()
    output = np.array([7], np.int32).tobytes()
    again.send(Submit((structs.replace(request(1), resumption=Resumption(0, output, 0.5, 1, 0, 0.1, Misses(cold=20))),)))
    (resumed,) = read(leader, Commands).commands
    assert (len(resumed.tokens) // 4, resumed.prompt_tokens, resumed.max_tokens) == (21, 20, 8)
    leader.send(first_token(beside))
    assert tokens_of(read(other, Deltas)) == {1: [7]}


def test_closing_tells_front_ends_that_nobody_comes(served: Served) -> None:
    """Or they would wait for another scheduler."""
    leader, front_end = served.leader(), served.front_end()
    front_end.send(Submit((request(1), request(2, prompt=200))))
    assert isinstance(read(leader, Commands).commands[0], Start)
    asyncio.run_coroutine_threadsafe(served.server.close(), served.loop).result(PATIENCE_S)
    ends: list[Finished] = []
    while (payload := front_end.receive()) is not None:
        ends += msgspec.msgpack.decode(payload, type=Deltas).finished
    assert [(end.stream, end.failure) for end in ends] == [(2, Failure.IMPOSSIBLE), (1, Failure.UNAVAILABLE)]
    assert ends[1].message == "the scheduler was shut down"
