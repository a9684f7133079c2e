"""The Python API over a scripted engine."""

import asyncio
import gc
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.engine import EngineError
from deploy.llm import LLM
from deploy.outputs import GenerationError, Logprob
from deploy.prompts import PromptError, Source
from deploy.text import Tokenizer
from kvcache.hashing import hash_pages
from scheduler.sampling import SamplingParams
from tests.deploy.conftest import EOS, Open
from tests.deploy.fake_engine import CACHED_TOKENS, FakeEngine

LONG = SamplingParams(max_tokens=None)
TEXT = " return a + b 你好 🙂 and so on"


@pytest.fixture
def script(tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(TEXT), EOS]


def until(condition: object, timeout_s: float = 5.0) -> None:
    assert callable(condition)
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.005)


def test_generate(open_llm: Open, script: list[int], tokenizer: Tokenizer) -> None:
    llm, engine = open_llm(script)
    prompts = ["def add(a, b):\n   ", "hello"]
    first, second = llm.generate(prompts, LONG)
    assert (first.prompt, first.prompt_token_ids) == (prompts[0], tokenizer.encode(prompts[0]))
    assert (first.num_cached_tokens, first.finished, first.error) == (CACHED_TOKENS, True, None)
    assert [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in first.outputs] == [
        (TEXT, script, "stop", None)
    ]
    assert second.prompt == "hello"
    assert second.request_id != first.request_id
    request = engine.requests[0]
    tokens = np.array(tokenizer.encode(prompts[0]), dtype=np.int32)
    assert request.tokens == tokens.tobytes()
    assert np.frombuffer(request.hashes, dtype=np.uint64).tolist() == hash_pages(tokens, engine.page_size)
    assert request.stop_ids == (EOS,)


def test_shapes_of_prompts(open_llm: Open) -> None:
    llm, _ = open_llm(lambda prompt, _: [prompt[0]])
    assert len(llm.generate("a")) == len(llm.generate([5, 6])) == len(llm.generate({"prompt_token_ids": [5]})) == 1
    assert len(llm.generate(["a", "b"])) == len(llm.generate([[5], [6]])) == 2
    assert llm.generate([]) == []
    mixed: list[Source] = [[5], {"prompt_token_ids": [6]}]
    assert [o.outputs[0].token_ids for o in llm.generate(mixed)] == [[5], [6]]
    chat = llm.chat([{"role": "user", "content": "x"}])
    assert len(chat) == 1
    assert len(llm.chat([[{"role": "user", "content": "x"}]] * 2)) == 2


def test_length_and_ids_without_text(open_llm: Open, bare_checkpoint: Path) -> None:
    llm, _ = open_llm([9] * 50, bare_checkpoint)
    [output] = llm.generate([5, 6], SamplingParams(max_tokens=4))
    assert (output.outputs[0].token_ids, output.outputs[0].text) == ([9] * 4, "")
    assert output.outputs[0].finish_reason == "length"


def test_choices(open_llm: Open, tokenizer: Tokenizer) -> None:
    words = ["one", "two two", "three three three"]
    llm, engine = open_llm(lambda _, choice: tokenizer.encode(words[choice]))
    first, second = llm.generate(["hello", "hello"], SamplingParams(n=3, max_tokens=None))
    assert [o.text for o in first.outputs] == [o.text for o in second.outputs] == words
    assert [o.index for o in first.outputs] == [0, 1, 2]
    assert [request.stream for request in engine.requests] == [0, 3]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("stop", ["+ b", "a + ", " 你", "🙂"])
def test_stop_strings_across_tokens(
    open_llm: Open, script: list[int], tokenizer: Tokenizer, stop: str, steps: int
) -> None:
    llm, engine = open_llm(script, steps_per_delta=steps)
    [output] = llm.generate("x", SamplingParams(stop=("nowhere", stop), max_tokens=None))
    [choice] = output.outputs
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (TEXT[: TEXT.index(stop)], "stop", stop)
    keep = next(n for n in range(1, len(script)) if stop in tokenizer.decode(script[:n]))
    assert choice.token_ids == script[:keep]
    assert engine.stopped == [(0, keep)]


def test_stop_string_waits_for_min_tokens(open_llm: Open, tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("hello hello hello hello")
    llm, _ = open_llm(script)
    [output] = llm.generate("x", SamplingParams(stop=("hello",), min_tokens=len(script) - 1, max_tokens=None))
    assert output.outputs[0].text.count("hello") >= 2


def test_stop_ids(open_llm: Open, tokenizer: Tokenizer) -> None:
    [comma] = tokenizer.encode(",")
    script = [*tokenizer.encode("hello"), comma, EOS, *tokenizer.encode("world")]
    llm, engine = open_llm(script)
    params = SamplingParams(stop_token_ids=(comma,), max_tokens=None)
    [by_id] = llm.generate("x", params)[0].outputs
    assert (by_id.text, by_id.token_ids[-1], by_id.finish_reason, by_id.stop_reason) == ("hello", comma, "stop", comma)
    [by_eos] = llm.generate("x", LONG)[0].outputs
    assert (by_eos.text, by_eos.token_ids[-1], by_eos.stop_reason) == ("hello,", EOS, None)
    [through] = llm.generate("x", SamplingParams(ignore_eos=True, max_tokens=None))[0].outputs
    assert (through.text, through.token_ids, through.finish_reason) == ("hello,world", script, "length")
    assert engine.requests[-1].stop_ids == ()


@pytest.mark.parametrize("steps", [1, 3])
def test_logprobs(open_llm: Open, script: list[int], tokenizer: Tokenizer, steps: int) -> None:
    llm, _ = open_llm(script, steps_per_delta=steps)
    [choice] = llm.generate("x", SamplingParams(logprobs=2, max_tokens=None, stop=("你",)))[0].outputs
    assert choice.logprobs is not None
    assert [next(iter(entry)) for entry in choice.logprobs] == choice.token_ids
    token = choice.token_ids[0]
    assert choice.logprobs[0] == {
        token: Logprob(-0.5, 2, tokenizer.token_text(token)),
        token + 1: Logprob(-0.25, 1, tokenizer.token_text(token + 1)),
    }


def test_failed_requests_raise_after_all_ended(open_llm: Open, script: list[int]) -> None:
    llm, _ = open_llm(script, refuse={9: "needs 7 blocks and the pool has 4: raise kv_memory"})
    with pytest.raises(GenerationError, match="1 of 2 requests failed: needs 7 blocks and the pool has 4") as caught:
        llm.generate([[9, 9], [5]], LONG)
    refused, fine = caught.value.outputs
    assert (refused.outputs[0].finish_reason, refused.error is not None) == ("error", True)
    assert (fine.outputs[0].text, fine.outputs[0].finish_reason) == (TEXT, "stop")


def test_bad_prompts_are_named_and_nothing_is_submitted(open_llm: Open) -> None:
    llm, engine = open_llm([5])
    with pytest.raises(PromptError, match="prompt 1: token id 4000 is outside"):
        llm.generate([[5], [4000]])
    with pytest.raises(PromptError, match="2 prompts and 3 sampling parameters"):
        llm.generate(["a", "b"], [LONG] * 3)
    assert engine.requests == []


def test_lost_engine_fails_what_is_under_way_and_what_comes(open_llm: Open, script: list[int]) -> None:
    llm, _ = open_llm(script, lose_after=3)
    with pytest.raises(GenerationError, match="the fake engine burnt down") as caught:
        llm.generate("x", LONG)
    assert caught.value.outputs[0].outputs[0].token_ids == script[:3]
    with pytest.raises(EngineError, match="the fake engine burnt down"):
        llm.generate("x", LONG)


def test_interrupt_aborts_and_is_raised_again(open_llm: Open, script: list[int]) -> None:
    llm, engine = open_llm(script, hold_after=2)

    def interrupt() -> None:
        engine.holding.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["x", "y"], SamplingParams(n=2, max_tokens=None))
    assert engine.aborted == [0, 1, 2, 3]
    engine.hold_after = None
    engine.released.set()
    assert llm.generate("z", LONG)[0].outputs[0].text == TEXT


def test_iterate_shows_growth_and_aborts_when_left(open_llm: Open, script: list[int]) -> None:
    llm, engine = open_llm(script)
    texts = ["", ""]
    for position, output in llm.iterate(["x", "y"], LONG):
        texts[position] += output.outputs[0].delta
        assert texts[position] == output.outputs[0].text
    assert texts == [TEXT, TEXT]
    for _ in llm.iterate("x", LONG):
        break
    until(lambda: engine.aborted == [2])


def test_async_stream(open_llm: Open, script: list[int]) -> None:
    llm, _ = open_llm(script)

    async def collect() -> list[str]:
        texts, tokens = [""], 0
        async for output in llm.stream("x", LONG):
            [choice] = output.outputs
            texts.append(choice.text)
            tokens += choice.new_tokens
            assert texts[-1] == texts[-2] + choice.delta
            assert len(choice.token_ids) == tokens
            assert (choice.finish_reason is not None) == output.finished
        return texts

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(collect(), collect()))

    for texts in asyncio.run(both()):
        assert texts[-1] == TEXT
        assert len(texts) > 2


def test_async_cancel_aborts(open_llm: Open, script: list[int]) -> None:
    llm, engine = open_llm(script, hold_after=2)

    async def cancelled() -> None:
        async def consume() -> None:
            async for _ in llm.stream("x", LONG):
                pass

        task = asyncio.create_task(consume())
        await asyncio.to_thread(engine.holding.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert engine.aborted == [0]


def test_async_failure_raises(open_llm: Open) -> None:
    llm, _ = open_llm([5], refuse={9: "does not fit"})

    async def consume() -> None:
        async for _ in llm.stream([9]):
            pass

    with pytest.raises(GenerationError, match=r"^does not fit$"):
        asyncio.run(consume())


def test_stats_and_shutdown(open_llm: Open, script: list[int]) -> None:
    llm, engine = open_llm(script)
    with llm:
        llm.generate("x", LONG)
        assert llm.stats().requests == 1
        assert not engine.closed
    assert engine.closed
    llm.shutdown()
    with pytest.raises(EngineError, match="the engine was shut down"):
        llm.generate("x")


def test_shutdown_fails_what_is_under_way(open_llm: Open, script: list[int]) -> None:
    llm, engine = open_llm(script, hold_after=2)

    def shut_down() -> None:
        engine.holding.wait()
        llm.shutdown()

    threading.Thread(target=shut_down).start()
    with pytest.raises(GenerationError, match="the engine was shut down"):
        llm.generate("x", LONG)


def test_a_forgotten_llm_closes_its_engine(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    engine = FakeEngine([5])
    monkeypatch.setattr("deploy.llm.engine_starter", lambda _: engine.start)
    LLM(checkpoint)
    gc.collect()
    until(lambda: engine.closed)
