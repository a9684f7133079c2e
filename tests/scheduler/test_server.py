"""The core behind its socket: who may speak, stale epochs, lost leaders and front ends, the order of what goes out."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from kvcache.ids import GroupId
from scheduler.config import CoreConfig
from scheduler.core import SchedulerCore
from scheduler.messages import (
    Commands,
    Connect,
    Deltas,
    Drop,
    End,
    FinishReason,
    Hello,
    Moved,
    Report,
    Request,
    Start,
    Stop,
    Submit,
    TalliedMetric,
    Tally,
    Welcome,
)
from scheduler.sampling import SamplingParams
from scheduler.server import SchedulerServer
from scheduler.wire import FrameSocket

TOKEN = "secret"
PAGE = 16


class Served:
    """A server on a thread of its own, and clients that speak to it."""

    def __init__(self) -> None:
        self.core = SchedulerCore(CoreConfig(page_size=PAGE, max_model_len=256))
        self.clients: list[FrameSocket] = []
        self.loop = asyncio.new_event_loop()
        self.server = SchedulerServer(self.core, TOKEN, check_invariants=True)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self.server.listen("127.0.0.1"), self.loop).result(30)

    def ask(self, question: Callable[[SchedulerCore], Any]) -> Any:
        async def answer() -> Any:
            return question(self.core)

        return asyncio.run_coroutine_threadsafe(answer(), self.loop).result(30)

    def connect(self, opening: Hello | Connect) -> FrameSocket:
        client = FrameSocket.connect("127.0.0.1", self.port)
        client.send(opening)
        self.clients.append(client)  # held: a forgotten socket is a closed one
        return client

    def leader(self, group: int = 0, epoch: int = 0) -> FrameSocket:
        return self.connect(Hello(TOKEN, group, epoch, blocks=8, rows=4))

    def front_end(self) -> FrameSocket:
        client = self.connect(Connect(TOKEN))
        assert read(client, Welcome).page_size == PAGE
        return client

    def close(self) -> None:
        for client in self.clients:
            client.close()
        asyncio.run_coroutine_threadsafe(self.server.close(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


def read(client: FrameSocket, kind: type[Any]) -> Any:
    payload = client.receive()
    assert payload is not None, "the server has closed the connection"
    return msgspec.msgpack.decode(payload, type=kind)


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
    leader = served.connect(Hello(TOKEN, 0, 0, blocks=8, rows=4, slots=3, ports=("here:1", "here:2")))
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
    for opening in (Hello("guess", 0, 0, 8, 4), Connect("guess")):
        assert served.connect(opening).receive() is None
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
    assert all(end.reason == FinishReason.FAILED and "14 pages" in end.message and "has 8" in end.message for end in ends)


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


def test_a_front_end_that_leaves_frees_its_blocks(served: Served) -> None:
    leader, front_end = served.leader(), served.front_end()
    front_end.send(Submit((request(1, prompt=40), request(2, prompt=60))))  # the second waits for the first one's prefix
    (start,) = read(leader, Commands).commands
    front_end.close()
    assert read(leader, Commands).commands == (Drop(start.lease),)
    assert served.ask(lambda core: core.table.usage(GroupId(0)).held) == 0


def test_closing_ends_every_log(served: Served) -> None:
    leader = served.leader()
    served.front_end()
    asyncio.run_coroutine_threadsafe(served.server.close(), served.loop).result(30)
    (end,) = read(leader, Commands).commands
    assert isinstance(end, End)
