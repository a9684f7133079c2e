"""What one has asked, nobody else finds in the prefix cache: by `cached_tokens`, and so by the time that an answer takes.

Over HTTP and in batches; `tests/deploy/doors/grpc/test_isolation.py` is the same over gRPC.
"""

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from deploy.batch.backends.own import ServiceBackend
from deploy.batch.lines import Line, parse
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys, account
from deploy.frontend.service.service import Service
from tests.deploy.doors.http.conftest import PATIENCE_S, Host

ANN, BOB = "key of ann", "key of bob"


def secret(test: str) -> str:
    """Text of a few blocks that only one test sends."""
    return f"The code of the safe, in {test}, is 4711. " * 20


class Asker:
    """Sends a prompt with a key, and reads how much of it was cached."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, prompt: str, key: str | None = None, path: str = "/v1/completions", **more: Any) -> int:
        said = {"messages": [{"role": "user", "content": prompt}]} if "chat" in path else {"prompt": prompt}
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        asked = said | {"max_tokens": 1} | more
        answer = httpx.post(self._url + path, json=asked, headers=headers, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.fixture(scope="module")
def locked(host: Host, service: Service) -> Asker:
    return Asker(host.serve(service, keys=ApiKeys([ANN, BOB])))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_key_finds_what_it_has_asked_and_nothing_else(locked: Asker, path: str) -> None:
    prompt = secret(path)
    assert locked(prompt, ANN, path) == 0
    known = locked(prompt, ANN, path)
    assert known > 100, "all but the last token"
    assert locked(prompt, BOB, path) == 0
    assert locked(prompt, BOB, path) == known


def test_no_salt_that_a_client_chooses_leads_to_another_key(locked: Asker) -> None:
    prompt = secret("salts")
    for salt in ("", "mine"):
        locked(prompt, ANN, cache_salt=salt)
    name = account(ANN)
    guesses = ["", "mine", name, f"{name}mine", f":{name}", f"{name}:", f"16:{name}", f"{len(name)}:{name}mine"]
    assert {locked(prompt, BOB, cache_salt=salt, user=ANN) for salt in guesses[:1]} == {0}
    assert {locked(prompt + " ", BOB, cache_salt=salt, user=name) for salt in guesses[1:]} == {0}
    assert locked(prompt, ANN, cache_salt="mine") > 100, "a salt still names a part of what is one's own"


def test_sharing_is_for_those_who_ask_for_it(host: Host, service: Service) -> None:
    shared = Asker(host.serve(service, ServeConfig(share_prefix_cache=True), ApiKeys([ANN, BOB])))
    prompt = secret("sharing")
    assert shared(prompt, ANN) == 0
    assert shared(prompt, BOB) > 100
    assert shared(prompt, BOB, cache_salt="mine") == 0, "one may still keep to oneself"


def test_without_keys_users_are_apart_and_those_without_a_name_are_one(host: Host, service: Service) -> None:
    unlocked = Asker(host.serve(service))
    prompt = secret("users")
    assert unlocked(prompt, user="ann") == 0
    assert unlocked(prompt, user="bob") == 0
    assert unlocked(prompt) == 0
    assert min(unlocked(prompt, user="ann"), unlocked(prompt, user="bob"), unlocked(prompt)) > 100


def test_a_batch_finds_nothing_of_the_keys_beside_it(host: Host, service: Service, locked: Asker) -> None:
    """As with `--app`: the job is one more front end of the scheduler."""
    prompt = secret("batches")
    locked(prompt, ANN)

    def cached(limits: ServeConfig, **more: Any) -> int:
        entry = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
        content = msgspec.json.encode(entry | {"body": {"prompt": prompt, "max_tokens": 1} | more})
        answering = ServiceBackend(service, limits).answer(parse(Line(1, content, len(content)), 1 << 20))
        answer = asyncio.run_coroutine_threadsafe(answering, host.loop).result(PATIENCE_S)
        return int(msgspec.json.decode(answer.body)["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(ServeConfig(), user=user) for user in ("ann", "bob")] == [0, 0]
    assert cached(ServeConfig()) == 0
    assert cached(ServeConfig(), user="ann") > 100
    assert cached(ServeConfig(share_prefix_cache=True), user="carl") > 100, "what those without a name have asked"
