"""A group whose executor fails in mid-generation: its requests go on elsewhere with the same tokens, or say why not."""

from pathlib import Path

import pytest

from cluster.engine import EngineError
from deploy import LLM, SamplingParams
from deploy.frontend.outputs import GenerationError
from tests.end_to_end.engines import QWEN3, greedy, open_llm, run, tokens
from tests.end_to_end.losses.faults import BreakRanks
from tests.end_to_end.prompts import PROMPTS, draw
from tests.end_to_end.waiting import nothing_left_behind, wait_idle

PARAMS = [
    SamplingParams(max_tokens=24, seed=position, temperature=1.0 if position % 2 else 0.0, presence_penalty=0.5)
    for position in range(len(PROMPTS))
]


def open_groups(path: Path, groups: int, size: int) -> LLM:
    return open_llm(path, dtype="float64", groups=groups, size=size, max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> list[list[list[int]]]:
    with open_groups(checkpoints[QWEN3], 1, 1) as llm:
        return tokens(run(llm, PROMPTS, PARAMS))


@pytest.mark.few(2)
@pytest.mark.parametrize("steps", [0, 3, 25], ids=lambda steps: f"after{steps}steps")
@pytest.mark.parametrize("broken", ["manta-group1-rank0", "manta-group0-rank1"])
def test_the_surviving_group_goes_on_with_the_same_tokens(
    broken: str, steps: int, checkpoints: dict[str, Path], expected: list[list[list[int]]], break_ranks: BreakRanks
) -> None:
    break_ranks(broken, steps)
    with nothing_left_behind(), open_groups(checkpoints[QWEN3], 2, 2) as llm:
        assert tokens(run(llm, PROMPTS, PARAMS)) == expected
        stats = llm.stats()
        assert [group.group for group in stats.groups if group.up] == [0 if "group1" in broken else 1]
        assert stats.output_tokens == sum(len(choice) for output in expected for choice in output), "none emitted twice"
        assert tokens(run(llm, PROMPTS[-4:], PARAMS[-4:])) == expected[-4:], "the survivor serves on"
        wait_idle(llm)


def test_with_no_group_left_requests_fail_saying_why(checkpoints: dict[str, Path], break_ranks: BreakRanks) -> None:
    break_ranks("manta-group0", 10)
    break_ranks("manta-group1", 15)
    with nothing_left_behind(), open_groups(checkpoints[QWEN3], 2, 1) as llm:
        with pytest.raises(GenerationError, match=r"rank 0: manta-group\d-rank0 has burnt down") as failure:
            run(llm, PROMPTS, PARAMS)
        outputs = failure.value.outputs
        assert len(outputs) == len(PROMPTS)
        assert all(output.finished for output in outputs)
        assert {choice.finish_reason for output in outputs for choice in output.outputs} <= {"error", "length"}
        with pytest.raises((EngineError, GenerationError), match="burnt down"):  # the latter where the end is not known yet
            run(llm, PROMPTS, PARAMS)


def test_tokens_before_the_failure_are_kept(
    checkpoints: dict[str, Path], expected: list[list[list[int]]], break_ranks: BreakRanks
) -> None:
    break_ranks("manta-group0", 40)
    with open_groups(checkpoints[QWEN3], 1, 1) as llm, pytest.raises(GenerationError) as failure:
        run(llm, PROMPTS, PARAMS)
    kept = [output.outputs[0].token_ids for output in failure.value.outputs]
    assert any(kept)
    for got, (whole,) in zip(kept, expected, strict=True):
        assert got == whole[: len(got)]


def test_another_engine_in_the_process_is_not_touched(checkpoints: dict[str, Path], break_ranks: BreakRanks) -> None:
    prompt = draw(20, seed=50)
    with open_groups(checkpoints[QWEN3], 1, 1) as first:
        before = tokens(run(first, [prompt], greedy(10)))
        break_ranks("manta-group1", 0)
        with open_groups(checkpoints[QWEN3], 2, 1) as second:
            assert tokens(run(second, [prompt] * 4, greedy(10))) == before * 4
        assert tokens(run(first, [prompt], greedy(10))) == before
