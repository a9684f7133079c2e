"""A scheduler that cannot be heard while it starts does not keep the next one from coming up. Without Ray."""

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from cluster.fleet import scheduler_keeper
from cluster.fleet.ownership.owner import Owner
from cluster.fleet.scheduler_keeper import SchedulerKeeper
from scheduler.config.core import CoreConfig, Resolved
from scheduler.protocol.orphans import Estate

PATIENCE_S = 60.0


class Actor:
    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, _: str) -> Any:
        return SimpleNamespace(remote=lambda *_: self)


class Actors:
    """Stands for Ray, where no two actors that live have one name. cuts: so many answers do not come, since the connection to
    whoever was asked is cut."""

    exceptions = ray.exceptions

    def __init__(self, cuts: int) -> None:
        self.live: set[str] = set()
        self.cuts = cuts

    def remote(self, _: type) -> "Actors":
        return self

    def options(self, *, name: str, **_: Any) -> Any:
        return SimpleNamespace(remote=lambda *_: self._start(name))

    def _start(self, name: str) -> Actor:
        if name in self.live:
            raise ValueError(f"The name {name} is already taken")
        self.live.add(name)
        return Actor(name)

    def get(self, asked: Actor | list[Actor], timeout: float) -> Any:  # noqa: ARG002
        if isinstance(asked, list):
            return [None for _ in asked]
        if self.cuts:
            self.cuts -= 1
            raise ray.exceptions.ActorUnavailableError("the connection was cut", b"\0" * 16)
        return "127.0.0.1", 1

    def kill(self, actor: Actor) -> None:
        self.live.discard(actor.name)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "0" * 56)


class Owning:
    estate = Estate("manta-app", "1", 60.0)

    def __init__(self) -> None:
        self.kept: list[Actor] = []

    def scheduler_options(self, life: int) -> dict[str, Any]:
        return {"name": f"scheduler/{life}"}

    def keep(self, actor: Actor) -> None:
        self.kept.append(actor)

    def release(self, actor: Actor) -> None:
        self.kept.remove(actor)

    def check(self) -> None:
        """Nobody else has come."""


def test_one_that_was_cut_off_as_it_started_makes_way_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the same name, and it would be told for ever that it has an owner."""
    actors, owner = Actors(cuts=2), Owning()
    monkeypatch.setattr(scheduler_keeper, "ray", actors)
    monkeypatch.setattr(scheduler_keeper, "RESTART_PAUSE_S", 0.01)
    keeper = SchedulerKeeper(CoreConfig(), Resolved(), None, "text", cast(Owner, owner))
    keeper.announce(0)
    replacing = threading.Thread(target=keeper._replace, args=(7,), daemon=True)
    replacing.start()
    replacing.join(PATIENCE_S / 4)
    keeper._closing.set()
    assert keeper.up
    assert (keeper.epoch, actors.live, [actor.name for actor in owner.kept]) == (7, {"scheduler/7"}, ["scheduler/7"])
