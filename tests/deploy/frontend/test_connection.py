"""A front end's way to its scheduler, which is closed while another stream is being opened."""

import threading
import time
from collections.abc import Callable

import pytest

from cluster.engine import EngineLost, OnDeltas, OnFailure, RequestStream
from deploy.frontend.connection import EngineConnection
from tests.deploy.frontend.fake_engine import FakeEngine

PATIENCE_S = 60.0


class Slow:
    """A cluster that opens every stream but the first when the test says so."""

    def __init__(self) -> None:
        self.streams: list[FakeEngine] = []
        self.asked, self.opens = threading.Event(), threading.Event()

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:  # noqa: ARG002
        if self.streams:
            self.asked.set()
            assert self.opens.wait(PATIENCE_S)
        self.streams.append(FakeEngine([]))
        self.streams[-1]._streams, self.streams[-1]._lock = {}, threading.Lock()
        self.streams[-1]._wake = threading.Event()
        return self.streams[-1]


def until(true: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S / 4
    while not true():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.005)


def test_a_stream_that_opens_after_the_end_is_closed() -> None:
    """The scheduler would take it for a front end for as long as this process lives."""
    cluster = Slow()
    connection = EngineConnection(cluster.connect)
    connection.renew()
    assert cluster.asked.wait(PATIENCE_S)
    connection.close()
    with pytest.raises(EngineLost, match="was shut down"):
        connection.renewed(PATIENCE_S)
    cluster.opens.set()
    until(lambda: len(cluster.streams) == 2 and cluster.streams[1].closed)


def test_so_is_one_that_nobody_has_taken_yet() -> None:
    cluster = Slow()
    connection = EngineConnection(cluster.connect)
    cluster.opens.set()
    connection.renew()
    until(lambda: len(cluster.streams) == 2)
    connection.close()
    until(lambda: cluster.streams[1].closed)
