"""Text is tokenised beside the event loop, a bounded number at once, and what cannot fit is not tokenised: at every door."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest

from deploy.batch.backends.own import ServiceBackend
from deploy.batch.lines import Line, parse
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.grpc.server import GrpcDoor
from deploy.doors.http.app import create_app
from deploy.frontend.errors import CONTEXT_EXCEEDED, RequestError
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from deploy.text.content import Content, Conversation
from deploy.text.tokenising import LONG_AT_ONCE, LONG_CHARACTERS, is_long
from deploy.text.tokenizer import Tokenizer
from tests.deploy.doors.http.conftest import ScriptedCluster
from tests.deploy.frontend.fake_engine import FakeEngine
from tests.deploy.frontend.running import connected

PATIENCE_S = 60.0
LONG = " " * (LONG_CHARACTERS + 8)
"""Some 200 tokens."""

HUGE = "def add(a, b):\n" * 70_000
"""About 1 MiB, of a model that takes 2,048 tokens."""

MIXED = "a-b+" * 18_000
"""Fewer bytes than 2,048 of the longest tokens have, yet far more tokens."""


class SlowTokenizer(Tokenizer):
    """Counts what it reads, and stays inside long texts until it is let go."""

    def __init__(self, implementation: Any) -> None:
        super().__init__(implementation)
        self.characters = self.inside = self.most_inside = 0
        self.released = threading.Event()
        self._lock = threading.Lock()

    def encode(self, text: str, *, around: bool = True) -> list[int]:
        with self._lock:
            self.characters += len(text)
            self.inside += 1
            self.most_inside = max(self.inside, self.most_inside)
        if len(text) > LONG_CHARACTERS:
            assert self.released.wait(PATIENCE_S)
        with self._lock:
            self.inside -= 1
        return super().encode(text, around=around)


@pytest.fixture
def slow() -> SlowTokenizer:
    loaded = Tokenizer.load(EMBEDDED_MODEL)
    assert loaded is not None
    return SlowTokenizer(loaded._implementation)


def running(tokenizer: Tokenizer) -> AbstractAsyncContextManager[Service]:
    model = replace(ServedModel.read("tiny", EMBEDDED_MODEL, None), tokenizer=tokenizer)
    engine = FakeEngine(reply=[5, 6, 7])
    return connected(Service(model, ScriptedCluster(engine)))


def http(service: Service) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(service, ServeConfig(), ApiKeys()))
    return httpx.AsyncClient(transport=transport, base_url="http://manta", timeout=PATIENCE_S)


class Call:
    """What a gRPC method is told of its call, and the status that it ends with."""

    def __init__(self) -> None:
        self.details = ""
        self.trailing: dict[str, str] = {}

    def invocation_metadata(self) -> None:
        return None

    def peer(self) -> str:
        return "unix:"

    def time_remaining(self) -> None:
        return None

    def set_code(self, code: Any) -> None:
        pass

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailing = dict(trailing_metadata)


Refusal = tuple[str, str]
"""(code, message)."""

Door = Callable[[Service, str], Awaitable[Refusal]]


def post(path: str, body: Callable[[str], dict[str, Any]]) -> Door:
    async def ask(service: Service, text: str) -> Refusal:
        async with http(service) as client:
            answer = await client.post(path, json=body(text))
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]["code"], answer.json()["error"]["message"]

    return ask


async def grpc_generate(service: Service, text: str) -> Refusal:
    call, door = Call(), GrpcDoor(service, ServeConfig(), ApiKeys())
    assert [each async for each in door.Generate(pb.GenerateRequest(prompt=pb.Prompt(text=text)), call)] == []
    return call.trailing["error-code"], call.details


async def grpc_batch(service: Service, text: str) -> Refusal:
    door = GrpcDoor(service, ServeConfig(), ApiKeys())
    chat = pb.Prompt(chat=pb.Chat(messages=[pb.Message(role="user", content=text)]))
    answer = await door.GenerateBatch(pb.GenerateBatchRequest(requests=[pb.GenerateRequest(prompt=chat)] * 4), Call())
    assert len({result.error.message for result in answer.results}) == 1
    return answer.results[0].error.reason, answer.results[0].error.message


async def grpc_tokenize(service: Service, text: str) -> Refusal:
    call = Call()
    await GrpcDoor(service, ServeConfig(), ApiKeys()).Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=text)), call)
    return call.trailing["error-code"], call.details


async def batch_line(service: Service, text: str) -> Refusal:
    body = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": text}}
    content = msgspec.json.encode(body)
    with pytest.raises(RequestError) as refused:
        await ServiceBackend(service, ServeConfig()).answer(parse(Line(1, content, len(content)), 8 << 20))
    return refused.value.code or "", refused.value.message


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


DOORS: dict[str, Door] = {
    "chat": post("/v1/chat/completions", lambda text: {"messages": said(text)}),
    "chat, many messages": post("/v1/chat/completions", lambda text: {"messages": said(text[: len(text) // 32]) * 32}),
    "completions": post("/v1/completions", lambda text: {"prompt": text}),
    "completions, many prompts": post("/v1/completions", lambda text: {"prompt": ["a", text, text, text]}),
    "tokenize": post("/tokenize", lambda text: {"prompt": text}),
    "tokenize, a chat": post("/tokenize", lambda text: {"messages": said(text)}),
    "gRPC": grpc_generate,
    "gRPC, a batch": grpc_batch,
    "gRPC, tokenize": grpc_tokenize,
    "batch": batch_line,
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_what_cannot_fit_is_refused_before_it_is_tokenised(door: Door, slow: SlowTokenizer) -> None:
    """By its bytes alone, or once its beginning says so: never more is read than what a prompt that fits may have."""
    slow.released.set()

    async def scenario() -> None:
        async with running(slow) as service:
            code, message = await door(service, HUGE)
            assert code == CONTEXT_EXCEEDED
            assert "bytes, and 2048 tokens hold 79872 at most: shorten it" in message
            assert slow.characters <= len("a"), "of the prompt before it"
            code, message = await door(service, MIXED)
            assert code == CONTEXT_EXCEEDED
            assert "more than 2048 tokens in the first 16384 of its" in message
            assert slow.characters <= 4 * 16384 + 2 * len("a")

    asyncio.run(scenario())


def test_long_texts_wait_for_one_another_and_nobody_else_does(slow: SlowTokenizer) -> None:
    async def scenario() -> None:
        async with running(slow) as service, http(service) as client, asyncio.timeout(PATIENCE_S):
            long = [asyncio.create_task(client.post("/tokenize", json={"prompt": LONG})) for _ in range(3)]
            long += [asyncio.create_task(client.post("/v1/completions", json={"prompt": [LONG, LONG]})) for _ in range(3)]
            long += [asyncio.create_task(client.post("/v1/chat/completions", json={"messages": said(LONG)})) for _ in range(3)]
            while slow.inside < LONG_AT_ONCE:
                await asyncio.sleep(0.01)
            for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": said("a")})):
                assert (await client.post(path, json=body)).status_code == 200
            assert (await client.get("/health")).status_code == 200
            assert not any(task.done() for task in long)
            slow.released.set()
            assert {answer.status_code for answer in await asyncio.gather(*long)} == {200}
            assert slow.most_inside <= LONG_AT_ONCE + 1, "the two, and the short one beside them"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "method", "result"),
    [
        ("/v1/completions", {"prompt": "a"}, "encode", [5]),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "encode", [5]),
        ("/tokenize", {"prompt": "a"}, "encode", [5]),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "token_text", "a"),
        ("/detokenize", {"tokens": [5]}, "decode", "a"),
    ],
)
def test_the_event_loop_goes_on_while_a_short_text_is_worked_on(
    slow: SlowTokenizer, path: str, body: dict[str, Any], method: str, result: object
) -> None:
    """Whatever the tokenizer needs for it: those in Python are slow."""
    entered, left = threading.Event(), threading.Event()

    def work(*_: object, **__: object) -> object:
        entered.set()
        assert left.wait(PATIENCE_S), "the event loop stands still"
        return result

    async def scenario() -> None:
        async with running(slow) as service, http(service) as client:
            setattr(slow, method, work)
            asked = asyncio.create_task(client.post(path, json=body))
            async with asyncio.timeout(PATIENCE_S):
                while not entered.is_set():
                    await asyncio.sleep(0)
            left.set()
            assert (await asked).status_code == 200

    asyncio.run(scenario())


def test_what_nobody_waits_for_is_not_tokenised(slow: SlowTokenizer) -> None:
    async def scenario() -> None:
        async with running(slow) as service, asyncio.timeout(PATIENCE_S):
            asked = [asyncio.create_task(service.prompt(LONG)) for _ in range(2 * LONG_AT_ONCE)]
            while slow.inside < LONG_AT_ONCE:
                await asyncio.sleep(0.01)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            slow.released.set()
            while slow.inside:
                await asyncio.sleep(0.01)
            assert (await service.prompt("a")).text == "a"
            assert slow.characters == LONG_AT_ONCE * len(LONG) + len("a")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("content", "long"),
    [
        ("a" * LONG_CHARACTERS, False),
        ("a" * (LONG_CHARACTERS + 1), True),
        (Conversation(said("a" * 4000) * 2), False),
        (Conversation(said("a" * 4000) * 3), True),
        (Conversation([{"role": "user", "content": [{"type": "text", "text": "a" * 9000}]}]), True),
        (Conversation(said("a"), tools=[{"x" * 9000: None}]), True),
        (Conversation(said("a"), template_kwargs={"x": "a" * 9000}), True),
        (Conversation(said("a") * 3000), True),
        ([1] * 10_000, True),
        ([1], False),
    ],
)
def test_what_is_long(content: Content, long: bool) -> None:
    assert is_long(content) == long
