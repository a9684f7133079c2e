"""Groups of real workers that run short of blocks: who will have to give way goes on elsewhere, or comes back from host memory,
with the tokens that it would have had undisturbed."""

import threading
from pathlib import Path

import pytest

from cluster.local.engine import LocalEngine
from deploy.frontend.outputs import RequestOutput
from deploy.llm import LLM
from kvcache.ids import GroupId
from scheduler import policy
from tests.end_to_end.prompts import draw
from tests.end_to_end.settings import QWEN3, greedy, kv_memory, open_llm, run, tokens
from tests.end_to_end.waiting import nothing_left_behind, wait_idle, wait_until

PROMPTS = [draw(90, seed=240 + number) for number in range(2)]
BLOCKS = 32  # of 16 tokens: not both prompts with their outputs
LONG = greedy(300)
OTHER = GroupId(1)


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> list[list[list[int]]]:
    with open_llm(checkpoints[QWEN3], dtype="float64") as llm:
        return tokens(run(llm, PROMPTS, LONG))


@pytest.fixture(autouse=True)
def in_good_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks count as short while half of them are there, so that copies are done before none is left."""
    monkeypatch.setattr(policy, "SHORTAGE", 0.5)


def take_newcomers(llm: LLM, group: GroupId, takes: bool) -> None:
    engine = llm._engine
    assert isinstance(engine, LocalEngine)
    engine.call(lambda core: setattr(core.groups[group], "draining", not takes))


@pytest.mark.parametrize("size", [1, 2], ids=lambda size: f"tp{size}")
def test_a_group_that_is_short_of_blocks_gives_a_sequence_away_and_none_stops(
    size: int, checkpoints: dict[str, Path], expected: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints[QWEN3]
    monkeypatch.setattr(policy, "SHORTAGE", 0.2)  # of the other group too
    with nothing_left_behind(), open_llm(path, dtype="float64", size=size, groups=2, blocks=BLOCKS) as llm:
        take_newcomers(llm, OTHER, False)
        outputs: list[RequestOutput] = []
        work = threading.Thread(target=lambda: outputs.extend(run(llm, PROMPTS, LONG)))
        work.start()
        wait_until(lambda: llm.stats().output_tokens > 2, lambda: str(llm.stats()))
        take_newcomers(llm, OTHER, True)
        work.join()
        wait_idle(llm)
        stats = llm.stats()
    assert tokens(outputs) == expected
    assert stats.moved_for_room >= 1
    assert stats.migrations >= 1
    assert stats.failed_transfers == 0


def test_what_had_to_give_way_comes_back_from_host_memory(
    checkpoints: dict[str, Path], expected: list[list[list[int]]]
) -> None:
    path = checkpoints[QWEN3]
    host = kv_memory(path, 4 * BLOCKS, 16, "float64", 1)
    with nothing_left_behind(), open_llm(path, dtype="float64", blocks=BLOCKS, host_kv_memory=host) as llm:
        outputs = run(llm, PROMPTS, LONG)
        wait_idle(llm)
        stats = llm.stats()
    assert tokens(outputs) == expected
    assert stats.kept_for_room >= 1
    assert stats.preemptions >= 1
    assert stats.loaded_tokens > 0, "it was not computed again"
