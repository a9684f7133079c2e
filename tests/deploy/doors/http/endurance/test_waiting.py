"""Who goes away while a prompt waits to be tokenised is not worked for."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest

from deploy.config.load import EMBEDDED_MODEL
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.text.content import Content
from deploy.text.prompts import Prompt
from deploy.text.tokenising import LONG_AT_ONCE, is_long
from deploy.text.tokenizer import Tokenizer
from tests.deploy.doors.http.conftest import MODEL, PATIENCE_S, Host, ScriptedCluster, until
from tests.deploy.frontend.fake_engine import FakeEngine
from tests.deploy.text.test_tokenising import LONG, SlowTokenizer, said


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": ["a", LONG], "stream": True}),
        ("/v1/chat/completions", {"messages": said(LONG)}),
        ("/tokenize", {"prompt": LONG}),
    ],
)
def test_a_client_that_goes_away_is_not_waited_for(host: Host, path: str, body: dict[str, object]) -> None:
    loaded = Tokenizer.load(EMBEDDED_MODEL)
    assert loaded is not None
    slow = SlowTokenizer(loaded._implementation)
    model = replace(ServedModel.read(MODEL, EMBEDDED_MODEL, None), tokenizer=slow)
    begun: list[Content] = []
    ended: list[Content] = []

    class Watched(Service):
        async def prompt(self, content: Content, *more: Any) -> Prompt:
            if not is_long(content):
                return await super().prompt(content, *more)
            begun.append(content)
            try:
                return await super().prompt(content, *more)
            except asyncio.CancelledError:
                ended.append(content)
                raise

    url = host.serve(Watched(model, ScriptedCluster(FakeEngine(reply=[5]))))
    clients = [httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) for _ in range(LONG_AT_ONCE + 3)]

    async def scenario() -> None:
        asked = [asyncio.create_task(client.post(path, json=body)) for client in clients]
        async with asyncio.timeout(PATIENCE_S):
            while slow.inside < LONG_AT_ONCE or len(begun) < len(clients):
                await asyncio.sleep(0.01)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, *(client.aclose() for client in clients), return_exceptions=True)

    asyncio.run(scenario())
    try:
        until(lambda: len(ended) == len(clients))
    finally:
        slow.released.set()
    until(lambda: not slow.inside)
    assert slow.characters <= LONG_AT_ONCE * len(LONG) + len(clients) * len("a" * 40)
