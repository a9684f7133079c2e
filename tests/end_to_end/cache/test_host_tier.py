"""Prompts whose blocks have left the pool come back from host memory: the same tokens, not computed again."""

from pathlib import Path

import pytest

from tests.end_to_end.engines import QWEN3, greedy, kv_memory, open_llm, run, tokens
from tests.end_to_end.prompts import draw
from tests.end_to_end.waiting import nothing_left_behind, wait_idle

PROMPTS = [draw(200, seed=200 + number) for number in range(6)]
BLOCKS = 32  # of 16 tokens: two of the prompts with their output
OUTPUT = greedy(24)


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [1, 2], ids=lambda size: f"tp{size}")
def test_what_was_evicted_comes_back_from_host_memory(size: int, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[QWEN3]
    with open_llm(path, dtype="float64", size=size) as llm:
        expected = tokens(run(llm, PROMPTS, OUTPUT))
    host = kv_memory(path, 6 * BLOCKS, 16, "float64", size)
    with (
        nothing_left_behind(),
        open_llm(path, dtype="float64", size=size, blocks=BLOCKS, host_kv_memory=host, max_num_batched_tokens=32) as llm,
    ):
        for prompt, output in zip(PROMPTS, expected, strict=True):
            assert tokens(run(llm, [prompt], OUTPUT)) == [output]
        wait_idle(llm)
        assert llm.stats().offloaded_tokens > 0
        assert sum(group.evictions for group in llm.stats().groups) > 0
        for prompt, output in zip(PROMPTS, expected, strict=True):
            assert tokens(run(llm, [prompt], OUTPUT)) == [output]
        wait_idle(llm)
        stats = llm.stats()
    assert stats.loads >= 1
    assert stats.loaded_tokens > 0
    assert stats.failed_transfers == 0
