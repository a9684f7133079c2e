"""The cluster's cache on real workers: conversations that go on inside blocks, and prompts that part inside one.

In float64 a sequence says the same wherever and however it was computed, so every test compares tokens exactly.
"""

from pathlib import Path

import pytest

from deploy import LLM
from tests.end_to_end.engines import QWEN3, greedy, open_llm, run, tokens
from tests.end_to_end.prompts import draw
from tests.end_to_end.waiting import nothing_left_behind

BLOCK, STRIDE = 64, 32
SYSTEM = draw(90, seed=200)
TURNS = [draw(length, seed=201 + length) for length in (50, 30, 70, 5)]
ANSWER = 23


def converse(llm: LLM) -> tuple[list[list[int]], list[int | None]]:
    """One conversation. Returns each answer, and how many tokens of each prompt were found."""
    said, answers = list(SYSTEM), list[list[int]]()
    cached: list[int | None] = []
    for turn in TURNS:
        said += turn
        output = run(llm, [said], greedy(ANSWER))[0]
        answers.append(list(output.outputs[0].token_ids))
        cached.append(output.num_cached_tokens)
        said += answers[-1]
    return answers, cached


@pytest.mark.parametrize("size", [1, 2], ids=lambda size: f"tp{size}")
def test_a_conversation_computes_each_token_once(size: int, checkpoints: dict[str, Path]) -> None:
    lengths = [len(SYSTEM)]
    for turn in TURNS:
        lengths.append(lengths[-1] + len(turn) + ANSWER)
    with open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64", size=size, hash_stride=0) as llm:
        plain, whole_blocks = converse(llm)
        computed_plainly = llm.stats().prompt_tokens - llm.stats().cached_tokens
    with nothing_left_behind(), open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64", size=size) as llm:
        answers, exact = converse(llm)
        stats = llm.stats()
    assert answers == plain
    assert whole_blocks == [0, *((length - 1) // BLOCK * BLOCK for length in lengths[1:-1])]
    ends = [(length - 1) % BLOCK for length in lengths[1:-1]]
    assert exact == [0, *(length - 1 - (end if end < STRIDE else 0) for length, end in zip(lengths[1:-1], ends, strict=True))]
    assert stats.part_tokens == sum(end for end in ends if end >= STRIDE) > 0
    assert stats.prompt_tokens - stats.cached_tokens == computed_plainly - stats.part_tokens


def test_prompts_that_diverge_inside_a_block_copy_what_they_share(checkpoints: dict[str, Path]) -> None:
    shared = draw(BLOCK + 50, seed=210)
    prompts = [[*shared, *draw(20, seed=211 + i)] for i in range(4)]
    with open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64", enable_prefix_caching=False) as llm:
        expected = tokens(run(llm, prompts, greedy(40)))
    with open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64") as llm:
        outputs = [run(llm, [prompt], greedy(40))[0] for prompt in prompts]
        stats = llm.stats()
    assert tokens(outputs) == expected
    assert [output.num_cached_tokens for output in outputs] == [0, *[len(shared)] * 3]
    assert stats.parts_copied == 3


def test_a_burst_of_prompts_that_share_less_than_a_block_computes_it_once(checkpoints: dict[str, Path]) -> None:
    common = draw(40, seed=260)
    prompts = [[*common, *draw(9, seed=261 + number)] for number in range(5)]
    with open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64", enable_prefix_caching=False) as llm:
        expected = tokens(run(llm, prompts, greedy(20)))
    with open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64") as llm:
        outputs = run(llm, prompts, greedy(20))
    assert tokens(outputs) == expected
    assert [output.num_cached_tokens for output in outputs] == [0, *[len(common)] * 4]


def test_what_a_running_sequence_has_just_said_is_not_computed_again(checkpoints: dict[str, Path]) -> None:
    """A prompt that goes on where a sequence is that still runs: all of it but the last token is in that one's blocks."""
    prompt = draw(100, seed=270)
    with open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64", enable_prefix_caching=False) as llm:
        (said,) = tokens(run(llm, [prompt], greedy(160)))
        follower = [*prompt, *said[0][:61], 5]
        expected = tokens(run(llm, [follower], greedy(20)))
    with open_llm(checkpoints[QWEN3], block=BLOCK, dtype="float64") as llm:
        asked = False
        for _, output in llm.iterate([prompt], greedy(160)):
            if not asked and len(output.outputs[0].token_ids) >= 64:
                asked = True
                (second,) = run(llm, [follower], greedy(20))
                assert not output.finished
        assert tokens([second]) == expected
        assert second.num_cached_tokens == len(follower) - 1
        assert list(output.outputs[0].token_ids) == said[0]
