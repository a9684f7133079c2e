"""A soak beside faults: what it counts, and the moments at which it looks. Without an endpoint."""

import threading
from typing import Any, cast

import pytest

from benchmarks.chaos import striking
from benchmarks.chaos.faults import Fault
from benchmarks.chaos.run import SHAPE
from benchmarks.chaos.striking import Striking
from benchmarks.serving.soak import Soak
from benchmarks.shared.endpoint import Ask
from benchmarks.shared.load import Outcome

ANYBODY = cast(Any, None)


class Told:
    """Clients to whom one answer after the other is given."""

    def __init__(self, *outcomes: Outcome) -> None:
        self._outcomes = list(outcomes)

    def run(self, _: object, asks: list[Ask], limit: int) -> list[Outcome]:  # noqa: ARG002
        return [self._outcomes.pop(0) for _ in asks]


def test_every_request_counts_once_and_who_is_told_to_come_again_does() -> None:
    lost = Outcome(0.0, status=200)
    answered, given_up, busy = (
        Outcome(0.0, status=200, complete=True), Outcome(0.0, status=200, left=True), Outcome(0.0, status=503)
    )  # fmt: skip
    soak = Soak(ANYBODY, cast(Any, Told(busy, answered, given_up, lost, busy, busy, answered, answered)), None)
    soak._ask([Ask({})] * 4)
    soak._ask([Ask({})])
    assert (soak.done, soak.left, soak.failed, soak.refused) == (5, 1, [lost], 3)


def test_nothing_is_missing_between_two_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = threading.Event()
    whole.set()

    def inflict(*_: object) -> None:
        whole.clear()
        threading.Timer(0.05, whole.set).start()

    for name, instead in (
        ("POLL_S", 0.001), ("inflict", inflict), ("holders", lambda *_: [1 << 30]), ("usual", lambda _: {}),
        ("resume", lambda _: None), ("missing", lambda *_: None if whole.is_set() else "a group"),
    ):  # fmt: skip
        monkeypatch.setattr(striking, name, instead)
    faults = Striking(cast(Any, type("Endpoint", (), {"pid": 0})), SHAPE, [Fault("kill", "peer")], 0.01, seed=0)
    faults.start()
    while len(faults.made) < 5:
        with faults.between:
            assert whole.is_set()
    faults.settle()
    assert set(faults.made) == {"kill:peer"}
