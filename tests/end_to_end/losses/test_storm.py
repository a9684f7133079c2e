"""Requests that come, stream, and are cancelled at random, on small pools and pipelined groups; one group dies midway.

Whoever is left alone gets the tokens that it would have got alone; in the end every block is back.
"""

import asyncio
import random
from pathlib import Path

import pytest

from cluster.resolve import DEPTH
from deploy import LLM, SamplingParams
from tests.end_to_end.engines import MISTRAL, open_llm, run, tokens
from tests.end_to_end.losses.faults import BreakRanks
from tests.end_to_end.prompts import draw
from tests.end_to_end.waiting import nothing_left_behind, wait_idle

REQUESTS = 40
STEPS_OF_THE_LOST_GROUP = 30
FAMILY = draw(120, seed=200)


def requests(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts with common beginnings, of every kind of end."""
    numbers = random.Random(seed)
    drawn = []
    for at in range(REQUESTS):
        prompt = [*FAMILY[: numbers.randrange(0, 120)], *draw(numbers.randrange(1, 60), seed=300 + at)]
        stops = tuple(range(0, 199, 11)) if numbers.random() < 0.3 else ()
        params = SamplingParams(
            temperature=numbers.choice([0.0, 1.0]), seed=at, stop_token_ids=stops, n=numbers.choice([1, 1, 2]),
            max_tokens=numbers.randrange(1, 60),
        )  # fmt: skip
        drawn.append((prompt, params))
    return drawn


async def ask(llm: LLM, prompt: list[int], params: SamplingParams, leave_after: int | None) -> list[list[int]] | None:
    """The choices' tokens; None if it was left after so many outputs."""
    outputs = 0
    stream = llm.stream(prompt, params)
    async for output in stream:
        outputs += 1
        if output.finished:
            return [choice.token_ids for choice in output.outputs]
        if leave_after is not None and outputs > leave_after:
            await stream.aclose()  # type: ignore[attr-defined]
            return None
    return None


async def storm(llm: LLM, work: list[tuple[list[int], SamplingParams]], numbers: random.Random) -> list[list[list[int]] | None]:
    tasks = []
    for prompt, params in work:
        leave_after = numbers.randrange(0, 12) if numbers.random() < 0.4 else None
        tasks.append(asyncio.create_task(ask(llm, prompt, params, leave_after)))
        await asyncio.sleep(numbers.random() * 0.02)
    return await asyncio.gather(*tasks)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("seed", "depth", "report_steps", "groups", "size"), [(1, 1, 1, 2, 1), (2, 1, 3, 2, 2), (3, 0, 5, 3, 1)]
)
def test_nobody_is_disturbed_and_nothing_is_lost(
    seed: int,
    depth: int,
    report_steps: int,
    groups: int,
    size: int,
    checkpoints: dict[str, Path],
    break_ranks: BreakRanks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = requests(seed)
    with open_llm(checkpoints[MISTRAL], block=256, dtype="float64", enable_prefix_caching=False) as llm:
        expected = tokens(run(llm, [prompt for prompt, _ in work], [params for _, params in work]))
    monkeypatch.setitem(DEPTH, "cpu", depth)
    break_ranks("manta-group0", STEPS_OF_THE_LOST_GROUP)
    with (
        nothing_left_behind(),
        open_llm(
            checkpoints[MISTRAL], block=16, blocks=30, dtype="float64", groups=groups, size=size, max_num_seqs=6,
            max_num_batched_tokens=24, report_steps=report_steps,
        ) as llm,
    ):  # fmt: skip
        answers = asyncio.run(storm(llm, work, random.Random(seed)))
        wait_idle(llm)
        assert sum(group.up for group in llm.stats().groups) == groups - 1, "a group was lost"
    complete = [(answer, whole) for answer, whole in zip(answers, expected, strict=True) if answer is not None]
    assert len(complete) > REQUESTS // 3
    assert all(answer == whole for answer, whole in complete)
