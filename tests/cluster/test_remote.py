"""A front end's stream to a scheduler that goes, or does not say what it should."""

import math
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest

from cluster import remote
from cluster.engine import EngineError
from cluster.remote import EncodedSubmit, SchedulerStream, merged
from scheduler.protocol.handshake import identify
from scheduler.protocol.messages import Alive, Connect, Deltas, FromFrontEnd, Request, Stop, Submit, Welcome
from scheduler.protocol.sampling import SamplingParams
from scheduler.protocol.wire import FrameSocket, listen

TOKEN = "secret"
PATIENCE_S = 60.0


class Scheduler:
    """The other end of one stream, which it opens too."""

    def __init__(self, hung_after_s: float = math.inf) -> None:
        self.deltas: queue.SimpleQueue[Deltas] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        with listen("127.0.0.1") as listener:
            listener.settimeout(PATIENCE_S)
            opening = queue.SimpleQueue[SchedulerStream]()
            port = listener.getsockname()[1]
            threading.Thread(target=lambda: opening.put(self._open(port)), daemon=True).start()
            self.socket = FrameSocket(listener.accept()[0])
            identify(self.socket, TOKEN, Connect)
            self.socket.send(Welcome(16, hung_after_s))
            self.stream = opening.get(timeout=PATIENCE_S)

    def _open(self, port: int) -> SchedulerStream:
        return SchedulerStream("127.0.0.1", port, TOKEN, self.deltas.put, self.failures.put)

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler()
    yield scheduler
    scheduler.close()


def test_what_was_said_before_the_end_comes_before_it(scheduler: Scheduler) -> None:
    said = Deltas(b"12345678", b"1234")
    scheduler.socket.send(said)
    scheduler.socket.close()
    assert scheduler.failures.get(timeout=PATIENCE_S) == "the scheduler has gone"
    assert scheduler.deltas.get_nowait() == said
    with pytest.raises(EngineError, match="the scheduler has gone"):
        scheduler.stream.submit([])


def test_a_scheduler_that_says_nothing_is_left_and_one_that_says_it_lives_is_not() -> None:
    scheduler = Scheduler(hung_after_s=2.0)
    for _ in range(40):  # longer than that in all
        scheduler.socket.send(Alive())
        time.sleep(0.1)
    assert scheduler.failures.empty()
    reason = scheduler.failures.get(timeout=PATIENCE_S)
    assert reason.startswith("the scheduler has said nothing for 2.")
    with pytest.raises(EngineError, match="has said nothing"):
        scheduler.stream.submit([])
    scheduler.close()


def test_one_that_lets_it_in_and_says_no_more_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ANSWER_TIMEOUT_S", 0.5)
    came: queue.SimpleQueue[object] = queue.SimpleQueue()

    def connect(port: int) -> None:
        try:
            came.put(SchedulerStream("127.0.0.1", port, TOKEN, lambda _: None, lambda _: None))
        except ConnectionError as error:
            came.put(error)

    with listen("127.0.0.1") as listener:
        listener.settimeout(PATIENCE_S)
        threading.Thread(target=connect, args=(listener.getsockname()[1],), daemon=True).start()
        socket = FrameSocket(listener.accept()[0])
        identify(socket, TOKEN, Connect)
        assert isinstance(came.get(timeout=PATIENCE_S / 4), ConnectionError)
        socket.close()


def test_a_front_end_says_that_it_lives(scheduler: Scheduler) -> None:
    for _ in range(2):
        assert msgspec.msgpack.decode(scheduler.socket.receive() or b"", type=Alive) == Alive()


@pytest.mark.parametrize("nonsense", [{"hello": "world"}, 7, Welcome(16)])
def test_a_scheduler_that_talks_nonsense_has_gone(scheduler: Scheduler, nonsense: object) -> None:
    scheduler.socket.send(nonsense)
    assert scheduler.failures.get(timeout=PATIENCE_S) == "the scheduler has gone"
    assert scheduler.socket.receive() is None, "it is left"


def test_who_closes_it_is_not_told(scheduler: Scheduler) -> None:
    scheduler.stream.close()
    assert scheduler.socket.receive() is None
    assert scheduler.failures.empty()
    with pytest.raises(EngineError, match="was closed"):
        scheduler.stream.submit([])


def request(stream: int, **settings: Any) -> Request:
    return Request(stream, b"", b"", SamplingParams(), **settings)


@pytest.mark.parametrize("settings", [{"salt": "\ud800"}, {"priority": 1 << 70}])
def test_what_cannot_be_sent_is_the_error_of_its_caller_alone(scheduler: Scheduler, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        scheduler.stream.submit([request(1), request(2, **settings)])
    scheduler.stream.submit([request(3)])
    sent = msgspec.msgpack.decode(scheduler.socket.receive() or b"", type=Submit)
    assert sent == Submit((request(3),))


def test_a_message_that_is_lost_ends_the_stream(scheduler: Scheduler) -> None:
    """Nobody would send it again: its streams must not wait for ever."""
    scheduler.stream.stop(1, cast(int, object()))
    assert scheduler.failures.get(timeout=PATIENCE_S) == "the scheduler has gone"
    with pytest.raises(EngineError, match="the scheduler has gone"):
        scheduler.stream.submit([])


def test_submissions_in_a_row_travel_as_one_and_keep_their_place() -> None:
    raw = [msgspec.Raw(msgspec.msgpack.encode(request(stream))) for stream in range(3)]
    batches = merged([EncodedSubmit((raw[0],)), EncodedSubmit((raw[1],)), Stop(0, 1), EncodedSubmit((raw[2],))])
    sent = [msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=FromFrontEnd) for batch in batches]
    assert sent == [Submit((request(0), request(1))), Stop(0, 1), Submit((request(2),))]


def test_what_is_too_much_for_a_message_travels_as_several_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = [msgspec.Raw(msgspec.msgpack.encode(request(stream))) for stream in range(5)]
    monkeypatch.setattr(remote, "SUBMIT_BYTES", 2 * len(memoryview(raw[0])))
    batches = merged([EncodedSubmit(tuple(raw))])
    assert [len(batch.requests) for batch in batches if isinstance(batch, EncodedSubmit)] == [2, 2, 1]
    assert [one for batch in batches if isinstance(batch, EncodedSubmit) for one in batch.requests] == raw
    monkeypatch.setattr(remote, "SUBMIT_BYTES", 1)
    assert len(merged([EncodedSubmit(tuple(raw))])) == 5, "one that is larger goes alone"
