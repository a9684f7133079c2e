"""A prefix that another group has computed is fetched from there, rank by rank: the same tokens, computed once."""

from pathlib import Path

import pytest

from tests.end_to_end.engines import QWEN3, greedy, open_llm, run, tokens
from tests.end_to_end.prompts import draw
from tests.end_to_end.waiting import nothing_left_behind, wait_idle

PREFIX = draw(320, seed=90)
PROMPTS = [PREFIX + draw(12, seed=91 + number) for number in range(16)]
OUTPUT = greedy(24)


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> list[list[list[int]]]:
    with open_llm(checkpoints[QWEN3], dtype="float64") as llm:
        return tokens(run(llm, PROMPTS, OUTPUT))


@pytest.mark.parametrize("size", [1, 2], ids=lambda size: f"tp{size}")
def test_two_groups_with_a_fetch(size: int, checkpoints: dict[str, Path], expected: list[list[list[int]]]) -> None:
    """One group has the prefix and more work than it can do at once; the other fetches the prefix and takes its share."""
    path = checkpoints[QWEN3]
    with nothing_left_behind(), open_llm(path, dtype="float64", size=size, groups=2, max_num_batched_tokens=32) as llm:
        run(llm, [PREFIX], greedy(2))
        assert tokens(run(llm, PROMPTS, OUTPUT)) == expected
        wait_idle(llm)
        stats = llm.stats()
    assert stats.fetches >= 1
    assert stats.failed_transfers == 0
    assert stats.fetched_tokens >= 304, "all full blocks of the prefix"
    assert all(group.steps for group in stats.groups)


def test_groups_that_keep_to_themselves(checkpoints: dict[str, Path], expected: list[list[list[int]]]) -> None:
    with open_llm(checkpoints[QWEN3], dtype="float64", groups=2, max_num_batched_tokens=32, prefix_fetch=False) as llm:
        run(llm, [PREFIX], greedy(2))
        assert tokens(run(llm, PROMPTS, OUTPUT)) == expected
        assert llm.stats().fetches == 0
