"""Thoughts in chat answers: whole and in parts, with all that may be asked beside them."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.service.model import ServedModel
from deploy.text.tokenizer import CHANNEL_MARKS, THINK_MARKS
from tests.deploy.doors.dialects.conftest import QWEN_TEMPLATE
from tests.deploy.doors.http.conftest import KV_MEMORY_BYTES, MODEL, PATIENCE_S, Host, ScriptedCluster
from tests.deploy.doors.http.openai.test_chat import HELLO, chat
from tests.deploy.doors.http.openai.test_resumed_streams import events_of, stream
from tests.deploy.doors.http.openai.test_tools import BOTH, calls_of
from tests.deploy.frontend.fake_engine import FakeEngine

OPENING = QWEN_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}\n</tool_call>'
OTHER_CALL = CALL.replace("Paris", "Rome")
THOUGHT = f"Is it caf\u00e9 \u4f60\u597d? </thin\n{OTHER_CALL}"
ANSWER = "Yes, <think> is a tag.\n"
OUTPUT = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
VOCABULARY = 4096

Reading = Callable[[str], ServedModel]


@pytest.fixture(scope="module", params=["spelled", "tokens"])
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reading:
    """Reads a folder like the checkpoint that ships with Manta, with this chat template: the marks of thoughts are spelled, or
    tokens of their own, for which there are no weights."""

    @functools.cache
    def read(template: str) -> ServedModel:
        folder = tmp_path_factory.mktemp("thinker")
        for file in EMBEDDED_MODEL.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "chat_template.jinja").write_text(template)
        if request.param == "tokens":
            settings = json.loads((folder / "tokenizer.json").read_text())
            plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
            marks = enumerate(THINK_MARKS + CHANNEL_MARKS, start=VOCABULARY)
            settings["added_tokens"] += [{"id": token, "content": mark} | plain for token, mark in marks]
            (folder / "tokenizer.json").write_text(json.dumps(settings))
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY + 16}))
        return ServedModel.read(MODEL, folder, None)

    return read


class Thinker:
    """A model that says something, and a client of its endpoint."""

    def __init__(self, host: Host, model: ServedModel, output: str, steps: int, config: ServeConfig) -> None:
        tokenizer = model.tokenizer
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self.engine = FakeEngine([*tokenizer.encode(output), *tokenizer.encode("<|im_end|>")], steps_per_delta=steps)
        self.service = host.service(ScriptedCluster(self.engine), model=model)
        self.address = host.serve(self.service, config)
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


Speaking = Callable[..., Thinker]


@pytest.fixture
def speaking(host: Host, thinker: Reading) -> Iterator[Speaking]:
    opened: list[Thinker] = []

    def speak(output: str, template: str = QWEN_TEMPLATE, steps: int = 1, **config: Any) -> Thinker:
        opened.append(Thinker(host, thinker(template), output, steps, ServeConfig(**config)))
        return opened[-1]

    yield speak
    for each in opened:
        each.engine.released.set()


def told(answer: Any) -> tuple[str | None, str | None, int | None]:
    """(thought, answer, tokens of thought) of the first choice."""
    message, details = answer.choices[0].message, answer.usage.completion_tokens_details
    assert message.reasoning == message.reasoning_content
    return message.reasoning_content, message.content, None if details is None else details.reasoning_tokens


def test_a_thought_is_no_part_of_the_answer(speaking: Speaking) -> None:
    model = speaking(OUTPUT)
    answer = chat(model.client, max_tokens=300)
    thought_tokens = len(model.tokenizer.encode(f"<think>\n{THOUGHT}\n</think>"))
    assert told(answer) == (THOUGHT, ANSWER, thought_tokens)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > thought_tokens
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("output", "template", "thought", "answer"),
    [
        ("Yes.", QWEN_TEMPLATE, None, "Yes."),
        ("<think>\n\n</think>\n\nYes.", QWEN_TEMPLATE, None, "Yes."),
        ("Hm.\n</think>\n\nYes.", OPENING, "Hm.", "Yes."),
        ("Hm.\n", OPENING, "Hm.\n", ""),
    ],
)
def test_how_an_output_may_begin(speaking: Speaking, output: str, template: str, thought: str | None, answer: str) -> None:
    model = speaking(output, template)
    whole = chat(model.client, max_tokens=100)
    assert told(whole)[:2] == (thought, answer)
    assert (told(whole)[2] == 0) == (thought is None and "<think>" not in output)


def test_enable_thinking(speaking: Speaking) -> None:
    model = speaking("Hm.</think>Yes.", OPENING)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert told(chat(model.client, max_tokens=100, extra_body=off)) == (None, "Hm.</think>Yes.", 0)
    assert told(chat(model.client, max_tokens=100))[:2] == ("Hm.", "Yes.")


def test_without_a_parser_a_thought_is_text(speaking: Speaking) -> None:
    answer = chat(speaking(OUTPUT, reasoning_parser="none").client, max_tokens=300)
    assert answer.choices[0].message.content == OUTPUT
    assert "reasoning" not in answer.model_dump_json()


def test_a_parser_may_be_named(speaking: Speaking) -> None:
    plain = QWEN_TEMPLATE.replace("<think></think>", "")
    assert chat(speaking(OUTPUT, plain).client, max_tokens=300).choices[0].message.content == OUTPUT
    assert told(chat(speaking(OUTPUT, plain, reasoning_parser="think").client, max_tokens=300))[:2] == (THOUGHT, ANSWER)


@pytest.mark.parametrize("cut", [1, 3, 12])
def test_an_unfinished_thought(speaking: Speaking, cut: int) -> None:
    model = speaking(f"\n{THOUGHT}", OPENING)
    answer = chat(model.client, max_tokens=cut)
    thought, content, tokens = told(answer)
    assert (content, tokens, answer.choices[0].finish_reason) == ("", cut, "length")
    assert THOUGHT.startswith((thought or "").strip())


def test_calls_in_a_thought_are_none(speaking: Speaking) -> None:
    """And those behind it are."""
    model = speaking(OUTPUT + CALL, steps=7)
    answer = chat(model.client, tools=BOTH, max_tokens=400)
    (call,) = calls_of(answer)
    assert json.loads(call.function.arguments)["city"] == "Paris"
    assert (told(answer)[:2], answer.choices[0].finish_reason) == ((THOUGHT, ANSWER.strip()), "tool_calls")
    alone = chat(speaking(OUTPUT).client, tools=BOTH, max_tokens=400)
    assert (calls_of(alone), told(alone)[:2], alone.choices[0].finish_reason) == ([], (THOUGHT, ANSWER), "stop")


def test_stop_strings(speaking: Speaking) -> None:
    model = speaking(OUTPUT)
    behind = chat(model.client, max_tokens=300, stop=["is a"])
    assert (told(behind)[:2], behind.choices[0].finish_reason) == ((THOUGHT, "Yes, <think> "), "stop")
    inside = chat(model.client, max_tokens=300, stop=["</th"])
    thought, content, tokens = told(inside)
    assert (thought, content) == (THOUGHT[: THOUGHT.index("</th")], "")
    assert inside.usage is not None
    assert tokens == inside.usage.completion_tokens


def test_logprobs_are_the_answers(speaking: Speaking) -> None:
    for steps in (1, 50):
        model = speaking(OUTPUT, steps=steps)
        whole = chat(model.client, max_tokens=300, logprobs=True).choices[0].logprobs
        assert whole is not None
        assert whole.content is not None
        spelled = b"".join(bytes(entry.bytes or ()) for entry in whole.content).decode()
        assert spelled.removesuffix("<|im_end|>").lstrip() == ANSWER
        assert len(spelled) <= len(f"\n\n{ANSWER}<|im_end|>")
        streamed = [
            entry
            for chunk in parts(model, logprobs=True)
            for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else None) or ()
        ]
        assert [entry.token for entry in streamed] == [entry.token for entry in whole.content]


def parts(model: Thinker, **fields: Any) -> list[Any]:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 400, "stream": True} | fields
    return list(model.client.chat.completions.create(**asked))


@pytest.mark.few
@pytest.mark.parametrize("steps", [1, 2, 5, 500])
@pytest.mark.parametrize("tools", [False, True])
def test_a_stream_says_the_same(speaking: Speaking, steps: int, tools: bool) -> None:
    model = speaking(OUTPUT + (CALL if tools else ""), steps=steps)
    asked: dict[str, Any] = {"tools": BOTH} if tools else {}
    whole = chat(model.client, n=2, max_tokens=400, **asked)
    chunks = parts(model, n=2, stream_options={"include_usage": True}, **asked)
    for choice in whole.choices:
        deltas = [c.delta.model_dump() for chunk in chunks for c in chunk.choices if c.index == choice.index]
        kinds = [{name for name in ("reasoning", "content", "tool_calls") if delta.get(name)} for delta in deltas]
        assert not any("reasoning" in kind and len(kind) > 1 for kind in kinds), "many clients look for the one or the other"
        assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)
        assert "".join(delta.get("reasoning") or "" for delta in deltas) == choice.message.reasoning  # type: ignore[attr-defined]
        assert "".join(delta.get("content") or "" for delta in deltas) == choice.message.content
        arguments = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls") or ()]
        assert "".join(arguments) == "".join(call.function.arguments for call in calls_of(whole))
        assert deltas[0] == {"role": "assistant", "content": ""} | {k: v for k, v in deltas[0].items() if v is None}
    assert (chunks[-1].usage.completion_tokens_details, whole.usage) == (
        whole.usage and whole.usage.completion_tokens_details,
        chunks[-1].usage,
    )


@pytest.mark.few
@pytest.mark.parametrize("steps", [1, 4, 500])
def test_a_stream_goes_on_behind_each_of_its_events(speaking: Speaking, steps: int) -> None:
    goes_on_behind_each(speaking("<think>\nHm \u4f60.</think>\nYes.\n", steps=steps))


@pytest.mark.few
@pytest.mark.parametrize("steps", [500, 1])
def test_so_does_one_on_channels(speaking: Speaking, steps: int) -> None:
    messages = [("analysis", "Hm."), ("commentary", "I see."), ("analysis", "So."), ("analysis", "Oh."), ("final", "Yes.")]
    output = "<|end|><|start|>assistant".join(f"<|channel|>{channel}<|message|>{text}" for channel, text in messages)
    model = speaking(output, reasoning_parser="openai", steps=steps)
    assert told(chat(model.client, max_tokens=200))[:2] == ("Hm.\nSo.\nOh.", "I see.\nYes.")
    goes_on_behind_each(model)


def goes_on_behind_each(model: Thinker) -> None:
    url = f"{model.address}/v1/chat/completions"
    for stop in ([], [".</think>\n\n", "s.\nx"]):  # what may be the beginning of a stop string lags behind its tokens
        body = {"messages": HELLO, "tools": BOTH, "logprobs": True, "max_tokens": 200, "stop": stop}
        whole = events_of(stream(url, body))
        for last in range(len(whole)):
            rest = events_of(stream(url, body, Last_Event_ID=whole[last][0]))
            assert heard(whole[: last + 1] + rest) == heard(whole), f"behind event {last}"
            if rest:
                more = events_of(stream(url, body, Last_Event_ID=rest[0][0]))
                assert heard(whole[: last + 1] + rest[:1] + more) == heard(whole), f"behind {last}, and the next"


def heard(events: list[tuple[str, dict[str, Any]]]) -> dict[int, list[Any]]:
    """Of each choice: roles, thought, answer, arguments, log-probabilities, ends."""
    choices: dict[int, list[Any]] = {}
    for _, event in events:
        for choice in event["choices"]:
            known = choices.setdefault(choice["index"], ["", "", "", "", [], []])
            delta, table = choice["delta"], choice.get("logprobs") or {}
            calls = [call["function"]["arguments"] for call in delta.get("tool_calls", ())]
            new = [delta.get("role", ""), delta.get("reasoning", ""), delta.get("content", ""), "".join(calls)]
            ends = [choice["finish_reason"]] if choice["finish_reason"] else []
            new += [[entry["token"] for entry in table.get("content", ())], ends]
            choices[choice["index"]] = [had + more for had, more in zip(known, new, strict=True)]
    return choices


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


def test_a_format_holds_behind_the_thought(speaking: Speaking) -> None:
    model = speaking('<think>Hm {"a": 3}</think>{"a": 1}')
    assert told(chat(model.client, max_tokens=100, response_format=FORMAT))[:2] == ('Hm {"a": 3}', '{"a": 1}')
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    chat(model.client, max_tokens=100, response_format=FORMAT, extra_body=off)
    chat(model.client, max_tokens=100, tools=BOTH, tool_choice="required")
    asked = [request.params.grammar for request in model.engine.requests]
    assert [grammar is not None and "think" in grammar.preamble for grammar in asked] == [True, False, True]


def test_a_model_keeps_to_it(host: Host, tmp_path: Path) -> None:
    """A real one, which may think as long as it likes."""
    for file in EMBEDDED_MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    engine = EngineConfig(model=str(tmp_path), local=True, kv_memory=KV_MEMORY_BYTES, threads=1)
    address = host.serve(host.service(LocalCluster(engine), tmp_path))
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
    thought, content, tokens = told(chat(client, max_tokens=40, response_format=FORMAT))
    assert (content == "" and tokens == 40) if thought else json.loads(content or "")["a"] in (1, 2)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    _, content, tokens = told(chat(client, max_tokens=40, response_format=FORMAT, extra_body=off))
    assert (json.loads(content or "")["a"] in (1, 2), tokens) == (True, 0)


def test_a_thought_may_be_sent_again(speaking: Speaking) -> None:
    seen = QWEN_TEMPLATE.replace("'\\n' + message.content", "'\\n' + (message.reasoning_content or '') + message.content")
    assert seen != QWEN_TEMPLATE
    model = speaking(OUTPUT, seen)
    message = chat(model.client, max_tokens=300).choices[0].message
    chat(model.client, [*HELLO, message.model_dump(), *HELLO], max_tokens=3)
    tokens = memoryview(model.engine.requests[-1].tokens).cast("i").tolist()
    assert THOUGHT + ANSWER in model.tokenizer.decode(tokens)


def test_reasoning_effort_reaches_the_template(speaking: Speaking) -> None:
    model = speaking("Hm.</think>Yes.", "{{ reasoning_effort or '' }}" + OPENING)

    def asked() -> str:
        return model.tokenizer.decode(memoryview(model.engine.requests[-1].tokens).cast("i").tolist())

    assert told(chat(model.client, max_tokens=100, reasoning_effort="low"))[:2] == ("Hm.", "Yes.")
    assert asked().startswith("low")
    more = {"chat_template_kwargs": {"reasoning_effort": "max"}}
    chat(model.client, max_tokens=3, reasoning_effort="low", extra_body=more)
    assert asked().startswith("max")
    assert told(chat(model.client, max_tokens=100, reasoning_effort="none")) == (None, "Hm.</think>Yes.", 0)
