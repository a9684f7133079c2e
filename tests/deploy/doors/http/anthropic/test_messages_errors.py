"""Whatever goes wrong below `/v1/messages` is said in Anthropic's form, and becomes the right exception of its package."""

from typing import Any

import anthropic
import httpx
import pytest
from starlette.testclient import TestClient

from deploy.config.load import EMBEDDED_MODEL, engine_config
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.http.app import create_app
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from scheduler.protocol.messages import Failure
from tests.deploy.doors.http.anthropic.messages import ask, asked, streamed
from tests.deploy.doors.http.conftest import MODEL, Host, Scripted, messages_client
from tests.deploy.doors.http.openai.test_chat import HELLO
from tests.deploy.frontend.fake_engine import FakeEngine


def error_of(answer: httpx.Response, status: int) -> str:
    """The type of the error of a response that must be in Anthropic's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert (body["type"], body["error"].keys()) == ("error", {"type", "message"})
    assert body["error"]["message"]
    assert answer.headers["request-id"] == body["request_id"] == answer.headers["x-request-id"]
    kind = body["error"]["type"]
    assert isinstance(kind, str)
    return kind


def test_keys_of_either_header(host: Host, service: Service) -> None:
    address = host.serve(service, keys=ApiKeys(["right"]))
    assert ask(messages_client(address, "right")).content
    assert ask(anthropic.Anthropic(base_url=address, auth_token="right", max_retries=0)).content
    assert httpx.get(f"{address}/v1/models", headers={"x-api-key": "right"}).status_code == 200
    with pytest.raises(anthropic.AuthenticationError) as caught:
        ask(messages_client(address, "wrong"))
    assert (caught.value.type, caught.value.request_id is None) == ("authentication_error", False)
    for headers in ({}, {"x-api-key": ""}, {"x-api-key": "right", "authorization": "Bearer wrong"}):
        answer = httpx.post(f"{address}/v1/messages", json=asked(), headers=headers)
        assert error_of(answer, 401) == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_errors_have_their_types(http: httpx.Client, host: Host, service: Service) -> None:
    def post(body: Any, path: str = "/v1/messages", **more: Any) -> httpx.Response:
        return http.post(path, json=body, **more)

    assert error_of(post(asked(model="other")), 404) == "not_found_error"
    assert error_of(post({}, "/v1/messages/batches"), 404) == "not_found_error"
    assert error_of(http.get("/v1/messages"), 405) == "invalid_request_error"
    assert error_of(post(asked(temprature=1)), 400) == "invalid_request_error"
    assert error_of(http.post("/v1/messages", content=b"{", headers={"content-type": "application/json"}), 400)
    assert error_of(http.post("/v1/messages", content=b"{}"), 415) == "invalid_request_error"
    endless = {"messages": [{"role": "user", "content": "x " * 3000}]}
    for path, more in (("/v1/messages", {"max_tokens": 1}), ("/v1/messages/count_tokens", {})):
        long = post(endless | more, path)
        assert error_of(long, 400) == "invalid_request_error"
        assert long.json()["error"]["message"].startswith("prompt is too long: ")
    small = host.serve(service, ServeConfig(max_request_bytes=1000, request_timeout_s=0.001))
    assert error_of(httpx.post(f"{small}/v1/messages", content=b" " * 2000), 413) == "request_too_large"
    assert error_of(httpx.post(f"{small}/v1/messages", json=asked(max_tokens=1900)), 504) == "timeout_error"


def test_errors_become_the_packages_exceptions(scripted: Scripted, host: Host) -> None:
    refusing = FakeEngine([300], refuse={3: "full"}, failure=Failure.OVERLOADED, retry_after_s=7.0)
    address = scripted(refusing)
    first = httpx.post(f"{address}/tokenize", json={"messages": HELLO}).json()["tokens"][0]
    refusing.refuse = {first: "full"}
    for tell in (ask, streamed):
        with pytest.raises(anthropic.RateLimitError) as full:
            tell(messages_client(address))
        assert (full.value.type, full.value.response.headers["retry-after"]) == ("rate_limit_error", "7")
    waiting = Service(ServedModel.read(MODEL, EMBEDDED_MODEL, None), LocalCluster(engine_config({"local": True})))
    with pytest.raises(anthropic.InternalServerError, match="starting") as starting:
        ask(messages_client(host.serve(waiting)))
    assert (starting.value.status_code, starting.value.type) == (503, "overloaded_error")
    assert starting.value.response.headers["retry-after"] == "1"


def test_a_fault_of_the_server(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(ServedModel.read(MODEL, EMBEDDED_MODEL, None), LocalCluster(engine_config({"local": True})))

    async def burn(*_: Any) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(service, "prompt", burn)
    answer = httpx.post(f"{host.serve(service)}/v1/messages", json=asked(), headers={"x-request-id": "mine"})
    assert error_of(answer, 500) == "api_error"
    assert ("mine" in answer.text, "secret" in answer.text) == (True, False)


@pytest.mark.parametrize("by_us", [True, False])
def test_who_names_responses(service: Service, by_us: bool) -> None:
    """Where the usual header is set by Ray Serve, Anthropic's is set here all the same."""
    with TestClient(create_app(service, ServeConfig(), ApiKeys(), names_responses=by_us)) as client:
        answer = client.post("/v1/messages", json={}, headers={"x-request-id": "mine"})
        assert (answer.headers.get("x-request-id"), answer.headers["request-id"]) == ("mine" if by_us else None, "mine")
        assert "request-id" not in client.get("/v1/models").headers


def test_pages_may_call_it(host: Host, service: Service) -> None:
    config = ServeConfig(cors_origins=("https://friend.example",))
    names = "x-api-key,anthropic-version,anthropic-beta,anthropic-dangerous-direct-browser-access,content-type"
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": names}
    origin = {"origin": "https://friend.example"}
    address = host.serve(service, config)
    assert httpx.options(f"{address}/v1/messages", headers=preflight | origin).status_code == 200
    answer = httpx.post(f"{address}/v1/messages", json=asked(), headers=origin)
    assert "request-id" in answer.headers["access-control-expose-headers"].split(", ")
