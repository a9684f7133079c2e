"""A model whose every layer sees a window, in pools that are far smaller than its sequences: the tokens of transformers."""

from pathlib import Path

import pytest
import torch

from deploy import LLM
from tests.end_to_end.cache.turns import OUTPUT, PROMPTS, fetch_prefix, take_turns
from tests.end_to_end.engines import MISTRAL, greedy, kv_memory, open_llm, run, tokens
from tests.end_to_end.waiting import nothing_left_behind
from tests.shared.checkpoints import generate_reference, make_checkpoint

BLOCK, WINDOW, CHUNK = 16, 40, 32
MOST = 3 + 1 + 2 * CHUNK // BLOCK
"""Blocks that one sequence holds: those that are seen, the one that is filled, and two chunks ahead."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("windowed"), MISTRAL, seed=7, sliding_window=WINDOW, max_position_embeddings=1024
    )


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return [generate_reference(checkpoint, prompt, OUTPUT, torch.float64) for prompt in PROMPTS]


def open_windowed(path: Path, blocks: int, **options: int) -> LLM:
    return open_llm(
        path, block=BLOCK, blocks=blocks, dtype="float64", model_implementation="transformers", max_num_batched_tokens=CHUNK,
        **options,
    )  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("blocks", [MOST, MOST + 3, 2 * MOST, 200])
def test_the_same_tokens_in_a_pool_far_smaller_than_the_sequences(
    blocks: int, checkpoint: Path, expected: list[list[int]]
) -> None:
    with nothing_left_behind(), open_windowed(checkpoint, blocks) as llm:
        outputs = run(llm, PROMPTS, greedy(OUTPUT))
    assert [choice for choices in tokens(outputs) for choice in choices] == expected


@pytest.mark.slow
def test_two_ranks_give_the_same_back(checkpoint: Path, expected: list[list[int]]) -> None:
    with open_windowed(checkpoint, MOST + 3, size=2) as llm:
        outputs = run(llm, PROMPTS, greedy(OUTPUT))
    assert [choice for choices in tokens(outputs) for choice in choices] == expected


def test_the_next_turn_hits_what_is_left_of_the_last_one(checkpoint: Path, expected: list[list[int]]) -> None:
    """No whole block is computed again, though less than a third of them is there."""
    with open_windowed(checkpoint, MOST + 3) as llm:
        run(llm, PROMPTS[:1], greedy(100))
        again = run(llm, [[*PROMPTS[0], *expected[0][:100]]], greedy(OUTPUT - 100))[0]
    assert again.num_cached_tokens == (len(PROMPTS[0]) + 99) // BLOCK * BLOCK
    assert again.outputs[0].token_ids == expected[0][100:]


def test_windows_come_back_from_host_memory(checkpoint: Path, expected: list[list[int]]) -> None:
    host = kv_memory(checkpoint, 30, BLOCK, "float64")
    with nothing_left_behind(), open_windowed(checkpoint, 16, host_kv_memory=host) as llm:
        assert all(fewer > -2 * BLOCK for fewer in take_turns(llm, expected))
        stats = llm.stats()
    assert stats.loads >= 2
    assert 0 < stats.loaded_tokens <= stats.loads * 3 * BLOCK, "a window each time, whatever the length"
    assert stats.failed_transfers == 0


def test_a_window_is_fetched_by_another_group(checkpoint: Path) -> None:
    stats = fetch_prefix(lambda groups: open_windowed(checkpoint, 200, groups=groups))
    assert stats.fetches >= 1
    assert stats.failed_transfers == 0
    assert stats.fetched_tokens <= stats.fetches * 4 * BLOCK, "a window and a part each time"
