"""The Python API over a scripted engine."""

import asyncio
import gc
import json
import math
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import deploy.doors.python.llm
import deploy.doors.python.waiting
from cluster.engine import EngineError
from deploy.config.load import ConfigError
from deploy.doors.python.llm import LLM
from deploy.doors.python.sources import Source
from deploy.frontend.errors import Fault
from deploy.frontend.outputs import GenerationError, Logprob
from deploy.text.chat_template import ChatTemplate
from deploy.text.content import PromptError
from deploy.text.tokenizer import Tokenizer
from kvcache.hashing import hash_blocks
from scheduler.protocol.messages import Failure
from scheduler.protocol.sampling import SamplingParams
from tests.deploy.conftest import EOS, Open
from tests.deploy.frontend.fake_engine import CACHED_TOKENS, FakeEngine
from tests.shared.tokenizers import EOS as TOKENIZER_EOS
from tests.shared.tokenizers import TURN_END, byte_level, save

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
    assert [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for o in first.outputs] == [(TEXT, script, "stop", None)]
    assert second.prompt == "hello"
    assert second.request_id != first.request_id
    request = engine.requests[0]
    tokens = np.array(tokenizer.encode(prompts[0]), dtype=np.int32)
    assert request.tokens == tokens.tobytes()
    assert np.frombuffer(request.hashes, dtype=np.uint64).tolist() == hash_blocks(tokens, engine.block_size)
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
def test_stop_strings_across_tokens(open_llm: Open, script: list[int], tokenizer: Tokenizer, stop: str, steps: int) -> None:
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


def test_a_fine_tune_whose_tokenizer_alone_names_its_end(open_llm: Open, checkpoint: Path, tmp_path: Path) -> None:
    """config.json still has the base model's end, and there is no generation_config.json."""
    raw = json.loads((checkpoint / "config.json").read_text()) | {"eos_token_id": TOKENIZER_EOS}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    fine_tuned = Tokenizer.load(save(byte_level(), tmp_path, eos="<|im_end|>"))
    assert fine_tuned is not None
    script = [*fine_tuned.encode("hello"), TURN_END, *fine_tuned.encode(" world") * 10]
    llm, _ = open_llm(script, model=tmp_path)
    [output] = llm.generate("x", LONG)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("hello", "stop")


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
    llm, engine = open_llm(script, hold_after=2)  # so that a part is read before the rest comes, however slow the reader is

    async def collect() -> list[str]:
        texts, tokens = [""], 0
        async for output in llm.stream("x", LONG):
            [choice] = output.outputs
            texts.append(choice.text)
            tokens += choice.new_tokens
            assert texts[-1] == texts[-2] + choice.delta
            assert len(choice.token_ids) == tokens
            assert (choice.finish_reason is not None) == output.finished
            engine.hold_after = None
            engine.released.set()
        return texts

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(collect(), collect()))

    streams = asyncio.run(both())
    assert [texts[-1] for texts in streams] == [TEXT, TEXT]
    assert max(map(len, streams)) > 2, "whoever read a part before the release has the rest apart"


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


FAR_S = 1e6
"""A deadline that no machine is too slow for."""


def test_whose_account_by_when_and_how_urgent(open_llm: Open) -> None:
    """What the call says, and before it what the prompt itself says, None excepted."""
    llm, engine = open_llm([5])
    message = [{"role": "user", "content": "x"}]
    sources: list[Source] = [
        "a",
        {"prompt": "b", "tenant": "bob", "deadline_s": 2 * FAR_S, "priority": -1},
        {"messages": message, "tenant": "", "deadline_s": math.inf, "priority": 0},
        {"prompt_token_ids": [5], "tenant": None, "deadline_s": None, "priority": None},
    ]

    def asked() -> list[tuple[str, float | None, int]]:
        """Since the last look."""
        found = [(request.tenant, request.deadline_s, request.priority) for request in engine.requests]
        engine.requests.clear()
        return found

    expected = [("ann", FAR_S, 3), ("bob", 2 * FAR_S, -1), ("", None, 0), ("ann", FAR_S, 3)]
    llm.generate(sources, tenant="ann", deadline_s=FAR_S, priority=3)
    assert asked() == expected
    list(llm.iterate(sources, tenant="ann", deadline_s=FAR_S, priority=3))
    assert asked() == expected
    llm.chat([message, message], tenant="ann", deadline_s=FAR_S, priority=3)
    assert asked() == [("ann", FAR_S, 3)] * 2

    async def stream() -> None:
        for source in sources:
            async for _ in llm.stream(source, tenant="ann", deadline_s=FAR_S, priority=3):
                pass

    asyncio.run(stream())
    assert asked() == expected
    llm.generate(sources[:2])
    assert asked() == [("", None, 0), ("bob", 2 * FAR_S, -1)]


@pytest.mark.parametrize("deadline_s", [-1.0, 0, 0.01, np.float32(0)])
def test_what_has_not_ended_by_its_deadline_fails_even_if_nobody_answers(open_llm: Open, deadline_s: float) -> None:
    llm, engine = open_llm([5, 6], hold_after=0)
    with pytest.raises(GenerationError, match="2 of 2 requests failed: the request did not end within") as caught:
        llm.generate(["x", "y"], SamplingParams(n=2), deadline_s=deadline_s)
    for output in caught.value.outputs:
        assert (output.finished, output.fault) == (True, Fault.TIMED_OUT)
        assert [choice.finish_reason for choice in output.outputs] == ["error", "error"]
    assert engine.aborted == [0, 1, 2, 3], "the engine works for nobody"
    with pytest.raises(GenerationError, match="did not end within"):
        llm.chat([{"role": "user", "content": "x"}], deadline_s=deadline_s)
    engine.hold_after = None
    engine.released.set()
    assert llm.generate("z", deadline_s=FAR_S)[0].fault is None


@pytest.mark.parametrize("deadline_s", [0, 0.01])
def test_a_stream_ends_by_its_deadline(open_llm: Open, deadline_s: float) -> None:
    llm, engine = open_llm([5, 6], hold_after=0)

    async def consume(source: Source, deadline_s: float | None) -> None:
        async for _ in llm.stream(source, deadline_s=deadline_s):
            pass

    for source, of_call in (("x", deadline_s), ({"prompt": "x", "deadline_s": deadline_s}, None)):
        with pytest.raises(GenerationError, match=f"^the request did not end within {deadline_s} s$") as caught:
            asyncio.run(consume(source, of_call))
        assert [output.fault for output in caught.value.outputs] == [Fault.TIMED_OUT]
    assert engine.aborted == [0, 1]


def test_a_deadline_spares_what_has_ended_and_what_was_produced(open_llm: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's: it stands still until one prompt has ended and the other is in the midst."""
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(deploy.doors.python.waiting, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    llm, engine = open_llm(lambda prompt, _: [prompt[0]] * (1 if prompt[0] == 5 else 9), hold_after=3)
    latest = {}
    for position, output in llm.iterate([[5], [6]], LONG, deadline_s=2.0):
        latest[position] = output
        if latest.keys() == {0, 1} and len(latest[1].outputs[0].token_ids) == 3:
            clock.now_s = 102.0
    ended, late = latest[0], latest[1]
    assert (ended.outputs[0].token_ids, ended.error, ended.fault) == ([5], None, None)
    assert (late.outputs[0].token_ids, late.error) == ([6] * 3, "the request did not end within 2 s")
    assert (late.outputs[0].finish_reason, late.fault) == ("error", Fault.TIMED_OUT)
    assert engine.aborted == [1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"deadline_s": "soon"}, "deadline_s must be a number of seconds, not 'soon'"),
        ({"deadline_s": "7"}, "deadline_s must be a number of seconds, not '7'"),
        ({"deadline_s": math.nan}, "deadline_s must be a number of seconds, not nan"),
        ({"deadline_s": True}, "deadline_s must be a number of seconds, not True"),
        ({"deadline_s": 10**400}, "deadline_s must be a number of seconds, not 1000"),
        ({"deadline_s": [1.0, 2.0]}, 'not [1.0, 2.0]: one is for all prompts of a call, and in {"prompt": ...}'),
        ({"priority": 1.5}, "priority must be a whole number of 32 bits, not 1.5"),
        ({"priority": True}, "priority must be a whole number of 32 bits, not True"),
        ({"priority": 1 << 31}, "priority must be a whole number of 32 bits, not 2147483648"),
        ({"tenant": 7}, "tenant must be a string, not int"),
        ({"tenant": ["ann", "bob"]}, "tenant must be a string, not list: one is for all prompts of a call"),
    ],
)
def test_bad_tenants_deadlines_and_priorities_are_refused(open_llm: Open, given: dict[str, Any], message: str) -> None:
    llm, engine = open_llm([5])
    sources: list[Source] = ["a", {"prompt": "b"} | given]
    with pytest.raises(PromptError) as of_call:
        llm.generate("a", **given)
    with pytest.raises(PromptError) as of_prompt:
        llm.generate(sources)
    assert message in str(of_call.value)
    assert message in str(of_prompt.value)
    assert str(of_prompt.value).startswith("prompt 1: ")
    assert engine.requests == []


@pytest.mark.parametrize(("failure", "fault"), [(Failure.OVERLOADED, Fault.OVERLOADED), (Failure.TIMED_OUT, Fault.TIMED_OUT)])
def test_what_the_scheduler_says_of_a_failure_is_told(open_llm: Open, failure: Failure, fault: Fault) -> None:
    llm, _ = open_llm([5], refuse={9: "not now"}, failure=failure)
    with pytest.raises(GenerationError, match="not now") as caught:
        llm.generate([[9], [5]])
    assert [output.fault for output in caught.value.outputs] == [fault, None]


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
    monkeypatch.setattr("deploy.doors.python.llm.engine_starter", lambda _: engine.start)
    LLM(checkpoint)
    gc.collect()
    until(lambda: engine.closed)


@pytest.mark.parametrize("prompts", [5, None, 2.5])
def test_what_is_no_prompt_is_refused_in_words(open_llm: Open, prompts: Any) -> None:
    llm, _ = open_llm([7, EOS])
    for call in (llm.generate, llm.iterate, llm.chat):
        with pytest.raises(PromptError, match=f"must be .*, not {type(prompts).__name__}"):
            call(prompts)
    wrong: list[Any] = [5, {"max_tokens": 5}, "greedy", [5]]
    for params in wrong:
        with pytest.raises(PromptError, match="must be SamplingParams"):
            llm.generate("x", params)


def test_prompts_may_come_one_by_one(open_llm: Open) -> None:
    llm, _ = open_llm([7, EOS])
    assert len(llm.generate((text for text in ("x", "y")), progress=False)) == 2
    assert len(llm.chat(({"role": "user", "content": text} for text in ("x", "y")), progress=False)) == 1


def test_a_prompt_may_bring_sampling_parameters(open_llm: Open) -> None:
    llm, engine = open_llm([7, EOS])
    sources: list[Source] = [{"prompt": "x", "max_tokens": 3}, "y"]
    llm.generate(sources, SamplingParams(temperature=0.5, max_tokens=9), progress=False)
    assert [(each.params.temperature, each.params.max_tokens) for each in engine.requests] == [(0.5, 3), (0.5, 9)]


def test_a_template_is_told_of_tools_and_more(open_llm: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = open_llm([7, EOS])
    told: list[Any] = []

    def rendered(_: ChatTemplate, *given: Any) -> str:
        told.append(given)
        return "x"

    monkeypatch.setattr(ChatTemplate, "rendered", rendered)
    tool = {"type": "function", "function": {"name": "get"}}
    llm.chat([{"role": "user", "content": "x"}], tools=[tool], chat_template_kwargs={"a": 1}, progress=False)
    assert told == [([{"role": "user", "content": "x"}], [tool], {"a": 1})]


def test_what_the_settings_cannot_be_is_one_kind_of_error(checkpoint: Path) -> None:
    wrong: list[dict[str, Any]] = [{"tensor_parallel_size": 3}, {"max_model_len": 10**6}, {"gropus": 2}]
    for options in wrong:
        with pytest.raises(ConfigError):
            LLM(checkpoint, local=True, **options)


WRONG: list[Any] = [1, 1.5, True, [1], [b"x"], [{}], b"x", {"a": 1}, object(), "\ud800", math.nan, -1, []]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: "object" if type(value) is object else ascii(value))
def test_an_argument_of_a_wrong_type_is_named(open_llm: Open, value: Any) -> None:
    """Never a TypeError from somewhere inside."""
    llm, _ = open_llm([EOS])
    calls: dict[str, list[Any]] = {
        "lora": [lambda: llm.generate(["x"], lora=value), lambda: llm.chat([{"role": "user", "content": "x"}], lora=value),
                 lambda: llm.embed(["x"], lora=value), lambda: llm.generate(["x"], lora=[value]),
                 lambda: llm.generate([{"prompt": "x", "lora": value}])],
        "dimensions": [lambda: llm.embed(["x"], dimensions=value)] if value not in (1, True) else [],
        "chat_template_kwargs": [lambda: llm.score("x", "y", chat_template_kwargs=value)] if value != {"a": 1} else [],
        "adapter": [lambda: llm.load_lora(value, "/none")],
        "sampling parameters": [lambda: llm.generate(["x"], value), lambda: llm.generate(["x"], [value])],
        "model": [lambda: LLM(value, local=True)] if value != "\ud800" else [],
    }  # fmt: skip
    for name, each in calls.items():
        for call in each:
            with pytest.raises(ValueError, match=name if name != "lora" else r"lora|LoRA"):
                call()
    with pytest.raises(KeyError):
        llm.unload_lora(value)


@pytest.mark.parametrize("deadline_s", [b"1", bytearray(b"1"), "1", True, math.nan, [1]])
def test_a_deadline_of_a_wrong_type_is_named(open_llm: Open, deadline_s: Any) -> None:
    llm, _ = open_llm([EOS])
    with pytest.raises(PromptError, match="deadline_s must be a number"):
        llm.generate(["x"], deadline_s=deadline_s)


def test_halves_of_characters_are_said_to_be_some(open_llm: Open) -> None:
    """msgspec raises an error of its own for them, where it wanted something else."""
    llm, _ = open_llm([EOS])
    with pytest.raises(PromptError, match=r"messages: .* half of a surrogate pair"):
        llm.chat([{"role": "user", "content": "x"}], tools="\ud800")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"groups='\\ud800' holds half of a surrogate pair"):
        LLM(local=True, groups="\ud800")


def test_a_model_that_is_empty_is_not_the_one_that_comes_with_it() -> None:
    with pytest.raises(ConfigError, match="model='' names no checkpoint"):
        LLM("", local=True)
