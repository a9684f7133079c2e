"""A rank's process ends when nobody wants it, whatever Ray makes of that."""

import pytest

from workers.process import actor
from workers.process.actor import WorkerActor


class Ended(BaseException):
    """Instead of the process."""


def test_an_orphan_ends_though_its_place_cannot_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise ConnectionError("Ray does not answer")

    def end(_: int) -> None:
        raise Ended

    monkeypatch.setattr(actor, "remove_placement_group", refuse)
    monkeypatch.setattr(actor, "REMOVAL_S", 0.0)
    monkeypatch.setattr("os._exit", end)
    rank = object.__new__(WorkerActor)
    rank._placement = object()
    with pytest.raises(Ended):
        rank._orphaned()
