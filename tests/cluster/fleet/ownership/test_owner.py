"""An owner says to its actors that it lives, notices that it is cut off, and ends once another has come. Ray is played."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.fleet.ownership import owner as owning
from cluster.fleet.ownership.owner import Owner
from scheduler.protocol.orphans import Estate
from tests.shared import waiting

PATIENCE_S = 60.0
ROUND_S = 0.05
UNAVAILABLE = ray.exceptions.ActorUnavailableError("Socket closed", None)
DEAD = ray.exceptions.RayActorError()


class Actor:
    """answers: None: not at all; an error: it fails. asked: how often it was told."""

    def __init__(self, answers: Exception | bool | None = True) -> None:
        self.answers = answers
        self.asked = 0
        self.keep = SimpleNamespace(remote=self._keep)

    def _keep(self) -> "Reference":
        self.asked += 1
        return Reference(self)


@dataclass(frozen=True, eq=False)
class Reference:
    of: Actor


class PlayedRay:
    exceptions = ray.exceptions

    def wait(self, asked: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return [each for each in asked if each.of.answers is not None], []

    def get(self, reference: Any) -> None:
        if isinstance(reference.of.answers, Exception):
            raise reference.of.answers


class Claims:
    superseded = False

    def __init__(self, _estate: Estate) -> None:
        """Claims nothing."""


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Owner]:
    monkeypatch.setattr(owning, "ray", PlayedRay())
    monkeypatch.setattr(owning, "OwnerClaim", Claims)
    owner = Owner(Estate("somewhere", "version", owning.KEEPS * ROUND_S))
    yield owner
    owner.close()


until = partial(waiting.until, patience_s=PATIENCE_S, every_s=0.01)


def test_who_answers_is_told_again_and_who_has_died_is_not(owner: Owner) -> None:
    well, dead, cut = Actor(), Actor(DEAD), Actor(UNAVAILABLE)
    for actor in (well, dead, cut):
        owner.keep(actor)
    until("not all were told again", lambda: min(well.asked, cut.asked) > 5)
    assert dead.asked == 1
    owner.release(well)
    told = well.asked
    until("nobody is told any more", lambda at=cut.asked: cut.asked > at + 5)  # type: ignore[misc]
    assert well.asked <= told + 1
    assert not owner.deaf


def test_an_owner_whom_nobody_answers_any_more_is_deaf_until_somebody_does(owner: Owner) -> None:
    actors = [Actor(), Actor(), Actor(None)]
    for actor in actors:
        owner.keep(actor)
    until("they were not told", lambda: actors[0].asked > 3)
    actors[0].answers = None
    until("the other was not told", lambda at=actors[1].asked: actors[1].asked > at + 10)  # type: ignore[misc]
    assert not owner.deaf, "one is enough"
    actors[1].answers = UNAVAILABLE
    until("it has not noticed", lambda: owner.deaf)
    actors[1].answers = True
    until("it has not heard", lambda: not owner.deaf)


def test_an_owner_whose_actors_are_only_starting_is_not(owner: Owner) -> None:
    first, *_ = actors = [Actor(None), Actor(None)]
    for actor in actors:
        owner.keep(actor)
    time.sleep(10 * ROUND_S)
    assert not owner.deaf
    first.answers = True
    until("it was not told", lambda: first.asked > 3)
    first.answers = None
    until("it has not noticed", lambda: owner.deaf)


def test_an_owner_ends_its_process_before_it_does_anything_to_what_is_another_s(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(BaseException):
        pass

    def end(_code: int) -> None:
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    owner.check()
    owner.close()
    monkeypatch.setattr(Claims, "superseded", True)
    with pytest.raises(Ended):
        owner.check()
