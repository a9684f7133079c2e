"""Keys, origins, sizes and request ids."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.frontend.service.service import Service
from tests.deploy.doors.http.conftest import MODEL, PATIENCE_S, Host, ScriptedCluster
from tests.deploy.doors.http.test_errors import error_of
from tests.deploy.frontend.fake_engine import FakeEngine

KEYS = ("first key", "sk-2/second+key==")


@pytest.fixture(scope="module")
def locked(host: Host, service: Service) -> str:
    return host.serve(service, keys=ApiKeys(KEYS))


@pytest.fixture(scope="module")
def small(host: Host, service: Service) -> str:
    config = ServeConfig(max_request_bytes=1000, cors_origins=("https://friend.example",))
    return host.serve(service, config, ApiKeys(["k"]))


def test_without_a_key_nothing_is_served(locked: str) -> None:
    with httpx.Client(base_url=locked) as client:
        answers = [client.get(path) for path in ("/v1/models", "/metrics", "/status.json", "/version", "/openapi.json", "/no")]
        answers.append(client.post("/v1/completions", json={"prompt": "a"}))
        for answer in answers:
            error = error_of(answer, 401)
            assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/ready", "/"):
            assert client.get(path).status_code == 200


@pytest.mark.parametrize("header", ["Bearer", "Bearer first", "Bearer first keys", "Basic first key", "first key"])
def test_wrong_keys(locked: str, header: str) -> None:
    error_of(httpx.get(f"{locked}/v1/models", headers={"authorization": header}), 401)


def test_any_of_the_keys_will_do(locked: str) -> None:
    for key in KEYS:
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{locked}/v1/models", headers=headers).status_code == 200
    client = openai.OpenAI(base_url=f"{locked}/v1", api_key=KEYS[0], max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked}/v1", api_key="wrong", max_retries=0).models.list()


def test_keys_are_not_kept() -> None:
    keys = ApiKeys(["secret"])
    assert keys.open("secret")
    assert not keys.open("")
    assert "secret" not in repr(vars(keys))
    assert not ApiKeys()


def test_other_origins_are_not_let_in(http: httpx.Client) -> None:
    headers = {"origin": "https://friend.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.options("/v1/completions", headers=headers).headers
    assert "access-control-allow-origin" not in http.get("/v1/models", headers=headers).headers


def test_a_named_origin_is_let_in(small: str) -> None:
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, allowed in (("https://friend.example", True), ("https://stranger.example", False)):
        answer = httpx.options(f"{small}/v1/completions", headers=preflight | {"origin": origin})
        assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
        refused = httpx.get(f"{small}/v1/models", headers={"origin": origin})
        assert refused.status_code == 401
        assert (refused.headers.get("access-control-allow-origin") == origin) == allowed


def body_of(size: int) -> bytes:
    head, tail = b'{"prompt": "a", "user": "', b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


def in_chunks(body: bytes, size: int = 100) -> Iterator[bytes]:
    return (body[at : at + size] for at in range(0, len(body), size))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_be_so_large(small: str, chunked: bool) -> None:
    headers = {"authorization": "Bearer k", "content-type": "application/json"}
    for size, status in ((1000, 200), (1001, 413)):
        content = in_chunks(body_of(size)) if chunked else body_of(size)
        answer = httpx.post(f"{small}/v1/completions", content=content, headers=headers, timeout=PATIENCE_S)
        assert answer.status_code == status, answer.text
    assert "1000 bytes" in error_of(answer, 413)["message"]


def test_a_body_without_end_is_not_read_to_it(small: str) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 10_000

    headers = {"authorization": "Bearer k", "content-type": "application/json"}
    try:
        answer = httpx.post(f"{small}/v1/completions", content=endless(), headers=headers, timeout=PATIENCE_S)
    except httpx.WriteError:
        return  # the server hung up while the client went on
    error_of(answer, 413)


@pytest.mark.parametrize("asked", ["mine-1", "a" * 128, "00-4bf92f3577b34da6a3ce929d0e0e4736:1/2"])
def test_a_request_keeps_its_id(http: httpx.Client, asked: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": asked})
    assert (answer.headers["x-request-id"], answer.json()["id"]) == (asked, f"cmpl-{asked}")
    assert http.get("/nowhere", headers={"x-request-id": asked}).headers["x-request-id"] == asked


@pytest.mark.parametrize("asked", ["", "a" * 129, "a b", 'x"y', "a\tb", "ü"])
def test_a_strange_id_is_replaced(http: httpx.Client, asked: str) -> None:
    headers = [(b"x-request-id", asked.encode())]
    names = {http.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(names) == 2
    assert all(len(name) == 32 for name in names)


def test_refusals_have_an_id_too(locked: str) -> None:
    assert httpx.get(f"{locked}/v1/models", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_whose_account_a_request_is_on(host: Host) -> None:
    """The API key's; without keys the user's. Only digests reach the scheduler."""
    scripted = FakeEngine(reply=[5, 6, 7])
    service = host.service(ScriptedCluster(scripted))
    ask: dict[str, object] = {"prompt": "a", "max_tokens": 2}
    bodies: list[dict[str, object]] = [{"user": "ann"}, {"user": "bob"}, {"user": "ann", "timeout": 7.0}, {}]
    for url, keys in ((host.serve(service), [None] * 4), (host.serve(service, keys=ApiKeys("kl")), ["k", "k", "l", "l"])):
        for key, body in zip(keys, bodies, strict=True):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            assert httpx.post(f"{url}/v1/completions", json=ask | body, headers=headers).status_code == 200
    first, second = ([request.tenant for request in scripted.requests[at : at + 4]] for at in (0, 4))
    assert first[0] == first[2] != first[1]
    assert first[3] == ""
    assert second[0] == second[1] != second[2] == second[3] != ""
    assert not {"ann", "bob", "k", "l"} & {*first, *second}
    assert [request.deadline_s for request in scripted.requests[:4]] == [600.0, 600.0, 7.0, 600.0]


# ---- priorities


def test_nobody_goes_before_others_just_by_asking(host: Host, service: Service) -> None:
    """Without a key, with any, and with one that may; `/v1/chat/completions` as well."""
    keys = ApiKeys(["plain", "urgent"], {"urgent": -5})
    url = host.serve(service, ServeConfig(best_priority=-1), keys)

    def status(key: str, priority: int, path: str = "/v1/completions", **prompt: Any) -> tuple[int, str]:
        asked = {"model": MODEL, "max_tokens": 1, "priority": priority} | (prompt or {"prompt": "a"})
        answer = httpx.post(url + path, json=asked, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S)
        return answer.status_code, answer.text

    assert [status("plain", priority)[0] for priority in (2, 0, -1, -2)] == [200, 200, 200, 400]
    assert [status("urgent", priority)[0] for priority in (-2, -5, -6)] == [200, 200, 400]
    refused, said = status("plain", -2, "/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
    assert refused == 400
    assert "priority=-2 goes before what may be asked for here, which is -1 or more" in said
    opened = host.serve(service)
    asked = {"model": MODEL, "prompt": "a", "max_tokens": 1, "priority": -1}
    assert httpx.post(opened + "/v1/completions", json=asked, timeout=PATIENCE_S).status_code == 400
