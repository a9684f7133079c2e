"""Faults put into ranks that run: an executor that raises after so many steps."""

import threading
from collections.abc import Callable

import pytest

from workers.execution.cpu.runner import ModelRunner
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Pending

BreakRanks = Callable[[str, int], None]
"""(beginning of the ranks' thread names, steps): each of those ranks fails after so many steps from now on."""


class Injected(RuntimeError):
    """The fault of these tests."""


def breaker(monkeypatch: pytest.MonkeyPatch) -> BreakRanks:
    """Ranks of local groups are threads, `manta-group1-rank0` and so on; by that name they are told apart."""
    execute = ModelRunner.execute
    limits: dict[str, int] = {}
    steps: dict[str, int] = {}

    def failing(self: ModelRunner, batch: ResidentBatch, step: Launched) -> Pending:
        name = threading.current_thread().name
        steps[name] = steps.get(name, 0) + 1
        if any(name.startswith(ranks) and steps[name] > limit for ranks, limit in limits.items()):
            raise Injected(f"{name} has burnt down")
        return execute(self, batch, step)

    def break_ranks(ranks: str, after: int) -> None:
        limits[ranks] = after
        steps.clear()

    monkeypatch.setattr(ModelRunner, "execute", failing)
    return break_ranks
