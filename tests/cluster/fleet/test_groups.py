"""Numbers of groups are used again, and none begins with an epoch that the scheduler has seen. Without Ray."""

from types import SimpleNamespace
from typing import Any, cast

from cluster.config import EngineConfig
from cluster.fleet.groups import Groups
from deploy.config.load import EMBEDDED_MODEL
from workers.config import ResolvedWorker


class Scheduler:
    def __init__(self) -> None:
        self.lost: list[int] = []

    def lose(self, group: int, _: str) -> None:
        self.lost.append(group)


def test_one_that_is_removed_as_it_fails_to_come_up_keeps_its_epoch() -> None:
    """Its keeper may have found out first, and say so last."""
    scheduler, lost = Scheduler(), list[str]()
    config = EngineConfig(model=str(EMBEDDED_MODEL))
    groups = Groups(config, cast(ResolvedWorker, None), "text", cast(Any, scheduler), None, lost.append)
    groups.keepers[0] = cast(Any, SimpleNamespace(epoch=4, close=lambda: None))
    groups.keepers[1] = cast(Any, SimpleNamespace(epoch=7, close=lambda: None))
    groups.remove(1)
    groups._gone(1, "group 1 did not come up")
    assert (groups.epochs, scheduler.lost, lost) == ({1: 8}, [1], [])
    groups._gone(0, "group 0 did not come up")
    assert (groups.epochs, lost) == ({0: 5, 1: 8}, ["group 0 did not come up"])
