"""Sequences that go on in another group, with their blocks, in the midst of what they say. In float64, to the token."""

import threading
from pathlib import Path

import pytest

from cluster.local.engine import FRONT_END, LocalEngine
from deploy import LLM
from deploy.frontend.outputs import RequestOutput
from scheduler.core import SchedulerCore
from scheduler.state.sequence import State
from tests.end_to_end.engines import QWEN3, greedy, open_llm, run, tokens
from tests.end_to_end.prompts import draw
from tests.end_to_end.waiting import PATIENCE_S, nothing_left_behind, wait_idle
from workers.execution.cpu.runner import ModelRunner
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Pending

PROMPTS = [draw(100, seed=220 + i) for i in range(4)]
LONG = greedy(150)
HELD = (15, 60)
"""Steps before which a rank waits until the sequences have been sent on their way: by then each has said something."""


class Gates:
    """Each rank waits before its steps of these numbers until that gate is opened."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self._somebody_waits = {step: threading.Event() for step in steps}
        self._opened = {step: threading.Event() for step in steps}
        self._taken: dict[str, int] = {}

    def pass_through(self) -> None:
        """Called by a rank before a step."""
        rank = threading.current_thread().name
        step = self._taken[rank] = self._taken.get(rank, 0) + 1
        if step in self._opened:
            self._somebody_waits[step].set()
            self._opened[step].wait()

    def wait_for_somebody(self, step: int) -> None:
        assert self._somebody_waits[step].wait(PATIENCE_S), f"no rank came to step {step}"

    def open(self, step: int) -> None:
        self._opened[step].set()


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Gates:
    execute, gates = ModelRunner.execute, Gates(HELD)

    def gated(self: ModelRunner, batch: ResidentBatch, step: Launched) -> Pending:
        gates.pass_through()
        return execute(self, batch, step)

    monkeypatch.setattr(ModelRunner, "execute", gated)
    return gates


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> list[list[list[int]]]:
    with open_llm(checkpoints[QWEN3], dtype="float64") as llm:
        return tokens(run(llm, PROMPTS, LONG))


def migrate_all(llm: LLM) -> int:
    """Lets every running sequence go to the other group; returns how many can."""
    engine = llm._engine
    assert isinstance(engine, LocalEngine)

    def migrate(core: SchedulerCore) -> int:
        running = [stream for (_, stream), sequence in core.sequences.items() if sequence.state is State.RUNNING]
        return sum(core.migrate(FRONT_END, stream) for stream in running)

    return engine.call(migrate)


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [1, 2], ids=lambda size: f"tp{size}")
def test_sequences_that_move_in_mid_stream_say_the_same(
    size: int, checkpoints: dict[str, Path], expected: list[list[list[int]]], gates: Gates
) -> None:
    with nothing_left_behind(), open_llm(checkpoints[QWEN3], dtype="float64", size=size, groups=2) as llm:
        outputs: list[RequestOutput] = []
        work = threading.Thread(target=lambda: outputs.extend(run(llm, PROMPTS, LONG)))
        work.start()
        moved = 0
        for step in HELD:
            try:
                gates.wait_for_somebody(step)
                moved += migrate_all(llm)
            finally:
                gates.open(step)
        work.join()
        wait_idle(llm)
        stats = llm.stats()
    assert tokens(outputs) == expected
    assert moved > 0
    assert 0 < stats.migrations <= moved
    assert (stats.preemptions, stats.failed_transfers) == (0, 0)
    assert stats.output_tokens == sum(len(choice) for output in expected for choice in output), "none emitted twice"
    computed = sum(group.step_tokens for group in stats.groups)
    needed = sum(map(len, PROMPTS)) + stats.output_tokens
    assert computed < needed + stats.migrations * 16 * 2, "their blocks went with them"
