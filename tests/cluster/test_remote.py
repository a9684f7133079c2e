"""A front end's stream to a scheduler that goes, or does not say what it should."""

import queue
import threading
from collections.abc import Iterator

import msgspec
import pytest

from cluster.engine import EngineError
from cluster.remote import SchedulerStream
from scheduler.messages import Connect, Deltas, Welcome
from scheduler.wire import FrameSocket, listen

TOKEN = "secret"
PATIENCE_S = 60.0


class Scheduler:
    """The other end of one stream, which it opens too."""

    def __init__(self) -> None:
        self.deltas: queue.SimpleQueue[Deltas] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        with listen("127.0.0.1") as listener:
            listener.settimeout(PATIENCE_S)
            opening = queue.SimpleQueue[SchedulerStream]()
            port = listener.getsockname()[1]
            threading.Thread(target=lambda: opening.put(self._open(port)), daemon=True).start()
            self.socket = FrameSocket(listener.accept()[0])
            connect = msgspec.msgpack.decode(self.socket.receive() or b"", type=Connect)
            assert connect.token == TOKEN
            self.socket.send(Welcome(16))
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
