"""asyncio streaming: outputs that grow, and cancelling at every stage, which gives the blocks back."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from deploy import LLM, SamplingParams
from deploy.frontend.outputs import RequestOutput
from deploy.text.content import PromptError
from tests.end_to_end.engines import LLAMA, greedy, open_llm, run, tokens
from tests.end_to_end.prompts import PROMPTS, draw
from tests.end_to_end.waiting import wait_idle, wait_until

LONG = SamplingParams(temperature=1.0, seed=1, max_tokens=400)


@pytest.fixture(scope="module")
def llm(checkpoints: dict[str, Path]) -> Iterator[LLM]:
    """Two groups of two sequences each, prompts in chunks of 8."""
    with open_llm(checkpoints[LLAMA], block=16, dtype="float64", groups=2, max_num_seqs=2, max_num_batched_tokens=8) as engine:
        yield engine


async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


async def until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, lambda: what)


def test_outputs_grow_to_what_generate_gives(llm: LLM) -> None:
    prompts = [prompt[:50] for prompt in PROMPTS]
    expected = tokens(run(llm, prompts, greedy(30)))

    async def stream_all() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(collect(llm.stream(prompt, greedy(30))) for prompt in prompts))

    for outputs, whole in zip(asyncio.run(stream_all()), expected, strict=True):
        seen: list[int] = []
        for output in outputs:
            choice = output.outputs[0]
            assert choice.token_ids[: len(seen)] == seen
            assert len(choice.token_ids) == len(seen) + choice.new_tokens
            seen = choice.token_ids
        assert [seen] == whole
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert outputs[-1].outputs[0].finish_reason == "length"
    wait_idle(llm)


def test_leaving_a_stream_gives_its_blocks_back(llm: LLM) -> None:
    async def leave() -> None:
        stream = llm.stream(draw(40, seed=60), LONG)
        async for output in stream:
            if len(output.outputs[0].token_ids) >= 3:
                break
        assert any(group.held_blocks for group in llm.stats().groups), "it was under way"
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    wait_idle(llm)


def test_cancelling_while_prefilling_decoding_and_queued(llm: LLM) -> None:
    """Four sequences run, two wait; those that are left alone are not disturbed."""
    quiet = draw(30, seed=61)
    expected = tokens(run(llm, [quiet], greedy(120)))[0][0]

    async def scenario() -> list[RequestOutput]:
        before = llm.stats().output_tokens
        undisturbed = asyncio.create_task(collect(llm.stream(quiet, greedy(120))))
        decoding = asyncio.create_task(collect(llm.stream(draw(10, seed=62), LONG)))
        await until(lambda: llm.stats().output_tokens > before + 8, "both decode")
        prefilling = [asyncio.create_task(collect(llm.stream(draw(450, seed=63 + i), greedy(5)))) for i in range(2)]
        queued = [asyncio.create_task(collect(llm.stream(draw(450, seed=65 + i), greedy(5)))) for i in range(2)]
        await until(lambda: llm.stats().waiting == 2, "two wait for a row")
        for task in (queued[0], *prefilling, decoding, queued[1]):
            task.cancel()
        ended = await asyncio.gather(decoding, *prefilling, *queued, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
        return await undisturbed

    outputs = asyncio.run(scenario())
    assert outputs[-1].outputs[0].token_ids == expected
    wait_idle(llm)


def test_leaving_a_blocking_loop_early_aborts_the_rest(llm: LLM) -> None:
    for _, output in llm.iterate([draw(20, seed=70 + i) for i in range(8)], LONG):
        if output.outputs[0].token_ids:
            break
    wait_idle(llm)


def test_cancelling_all_choices_of_a_prompt(llm: LLM) -> None:
    async def leave() -> None:
        params = SamplingParams(temperature=1.0, seed=2, n=3, max_tokens=300)
        stream = llm.stream(draw(100, seed=80), params)
        async for output in stream:
            if sum(len(choice.token_ids) for choice in output.outputs) > 5:
                break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    wait_idle(llm)


def test_errors_reach_the_stream(llm: LLM) -> None:
    with pytest.raises(PromptError, match="empty"):
        asyncio.run(collect(llm.stream([], greedy(3))))
    with pytest.raises(PromptError, match="max_tokens=200 with the 400 tokens of the prompt are above"):
        asyncio.run(collect(llm.stream(draw(400, seed=81), greedy(200))))
    wait_idle(llm)
