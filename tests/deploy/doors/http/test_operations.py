"""What is there besides generating: models, tokens, health, metrics, the status page."""

import asyncio
import json
import shutil
import socket
import subprocess

import httpx
import openai
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.http.app import create_app
from deploy.doors.http.entrance import plain
from deploy.doors.openai.responses.store.storing import OwnResponses, bounds_of
from deploy.doors.openai.routes import model_routes, openai_routes
from deploy.frontend.models.further import FurtherModels
from deploy.frontend.service import service as service_module
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.status.routes import status_routes
from deploy.text.tokenizer import Tokenizer
from scheduler.server.stats import ClusterStatus
from tests.deploy.configs.test_images import FILES, values
from tests.deploy.doors.http.conftest import MODEL, PATIENCE_S, Host, ScriptedCluster
from tests.deploy.doors.http.test_errors import error_of
from tests.deploy.frontend.fake_engine import FakeEngine

GET_PATHS = (
    "/", "/health", "/metrics", "/openapi.json", "/ready", "/status.json", "/status/app.js", "/v1/models",
    f"/v1/models/{MODEL}", "/version",
)  # fmt: skip


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "manta")
    assert model.model_extra == {"max_model_len": 2048}
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("folder/name")


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    tokenizer = Tokenizer.load(EMBEDDED_MODEL)
    assert tokenizer is not None
    text = "def add(a, b): 你好"
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    ids = tokenizer.encode(text)
    assert answer == {
        "count": len(ids),
        "max_model_len": 2048,
        "tokens": ids,
        "token_strs": [tokenizer.token_text(token) for token in ids],
    }
    assert http.post("/tokenize", json={"prompt": text}).json()["token_strs"] is None
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": ""}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
        ("/tokenize", {"promt": "a"}, "promt"),
        ("/detokenize", {"tokens": [4096]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_tokenize_and_detokenize_refuse(http: httpx.Client, path: str, body: dict[str, object], param: str) -> None:
    assert error_of(http.post(path, json=body), 400)["param"] == param


def test_health_ready_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json().keys() == {"version"}


def test_metrics(http: httpx.Client) -> None:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'manta_ready{model="tiny"} 1.0' in answer.text


def test_the_status_page_is_there(http: httpx.Client) -> None:
    assert http.get("/").headers["content-type"].startswith("text/html")
    assert http.get("/status.json").status_code == 200
    assert http.get("/status/style.css").status_code == 200


def test_every_path_that_answers_get_is_named_here(service: Service) -> None:
    config = ServeConfig()
    pages = status_routes(service)
    own = openai_routes(service, config, Grammars(service.model), OwnResponses(bounds_of(config)))
    parts = (create_app(service, config, ApiKeys(), pages=pages), own, model_routes(service, FurtherModels()), pages)
    routes = [route for part in parts for route in part.routes if isinstance(route, APIRoute | Route)]
    known = {route.path for route in routes if "GET" in (route.methods or ())}
    assert {path.replace(MODEL, "{model:path}").replace("app.js", "{name}") for path in GET_PATHS} == known


@pytest.mark.parametrize("path", [*GET_PATHS, "/v1/models/other", "/nowhere"])
def test_head_is_the_head_of_get(http: httpx.Client, path: str) -> None:
    for _ in range(2):  # on one connection: not a byte of a body may be in between
        head, get = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers.keys() == get.headers.keys()
        assert head.headers.get("content-type") == get.headers.get("content-type")
        if path not in ("/metrics", "/status.json"):  # which change
            assert head.headers["content-length"] == str(len(get.content))


def test_head_of_what_is_only_posted_to(http: httpx.Client) -> None:
    answer = http.head("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_head_needs_the_same_key(host: Host, service: Service) -> None:
    url = host.serve(service, keys=ApiKeys(["k"]))
    assert [httpx.head(url + path).status_code for path in ("/health", "/ready", "/", "/v1/models")] == [200, 200, 200, 401]
    assert httpx.head(f"{url}/v1/models", headers={"authorization": "Bearer k"}).status_code == 200


@pytest.mark.parametrize("name", FILES)
def test_the_health_check_of_an_image_passes(address: str, name: str) -> None:
    """As Docker calls it, but for the port."""
    (check,) = values(name, "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[0] == "wget"
    command[-1] = command[-1].replace("http://127.0.0.1:8000", address)
    assert address in command[-1]
    if shutil.which("wget") is None:
        assert httpx.head(command[-1]).status_code == 200, "what wget sends"
    else:
        assert subprocess.run(command, timeout=PATIENCE_S, env={"http_proxy": "http://127.0.0.1:1"}).returncode == 0


@pytest.mark.parametrize(
    ("path", "same"),
    [
        ("/health/", "/health"),
        ("//health", "/health"),
        ("/v1/models/", "/v1/models"),
        ("//v1//models///", "/v1/models"),
        (f"/v1//models/{MODEL}/", f"/v1/models/{MODEL}"),
        ("/version//", "/version"),
        ("/status//style.css", "/status/style.css"),
        ("//", "/"),
    ],
)
def test_slashes_too_many_are_no_other_path(http: httpx.Client, address: str, path: str, same: str) -> None:
    answer = http.get(address + path)
    assert (answer.status_code, answer.history) == (200, [])
    assert answer.content == http.get(same).content


def test_slashes_do_not_lead_around_the_key(host: Host, service: Service) -> None:
    url = host.serve(service, keys=ApiKeys(["k"]))
    for path, status in (("/v1/models/", 401), ("//metrics", 401), ("//status//..//status.json/", 404), ("//health/", 200)):
        assert raw_status(url, path) == status, path


def raw_status(url: str, path: str) -> int:
    """Of a path that no client has tidied up."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int(connection.makefile().readline().split()[1])


def test_a_request_may_have_slashes_too_many(http: httpx.Client, address: str) -> None:
    assert http.post(f"{address}//v1/completions/", json={"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("path", "root", "same"),
    [
        ("/manta//v1/models/", "/manta", "/manta/v1/models"),
        ("/manta/", "/manta", "/manta/"),
        ("/manta", "/manta", "/manta"),
        ("/mantaray/", "/manta", "/mantaray/"),
        ("/", "", "/"),
        ("", "", ""),
    ],
)
def test_slashes_below_a_prefix(path: str, root: str, same: str) -> None:
    assert plain(path, root) == same


class SilentCluster(ScriptedCluster):
    """Its scheduler answers nobody, not even who gives up."""

    silent = False

    async def status(self, maps: bool = False) -> ClusterStatus:
        while self.silent:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        return await super().status(maps)


def test_ready_answers_whatever_the_cluster_does(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "READY_TIMEOUT_S", 0.05)
    cluster = SilentCluster(FakeEngine(reply=[5]))
    url = host.serve(host.service(cluster))
    cluster.silent = True
    try:
        answer = httpx.get(f"{url}/ready", timeout=PATIENCE_S)
        assert "the cluster has not said within 0.05 s how it is" in error_of(answer, 503)["message"]
        assert answer.headers["retry-after"] == "1"
    finally:
        cluster.silent = False


def test_ready_says_what_is_missing(host: Host) -> None:
    class Starting(ScriptedCluster):
        async def status(self, maps: bool = False) -> ClusterStatus:  # noqa: ARG002
            return ClusterStatus(phase="starting")

    url = host.serve(host.service(Starting(FakeEngine(reply=[5]))))
    assert error_of(httpx.get(f"{url}/ready"), 503)["message"] == "no group takes requests: starting"
    alone = Service(ServedModel.read(MODEL, EMBEDDED_MODEL, None), ScriptedCluster(FakeEngine(reply=[5])))
    assert "no scheduler can be reached yet" in error_of(httpx.get(f"{host.serve(alone)}/ready"), 503)["message"]


def test_behind_ray_serve_a_response_has_one_id(service: Service) -> None:
    """Serve's replicas and proxies put it on every response by themselves."""
    from ray.serve._private.http_util import RequestIdMiddleware

    async def scenario() -> None:
        app = create_app(service, ServeConfig(), ApiKeys(), names_responses=False)

        @app.get("/fault")
        async def fault() -> None:
            raise RuntimeError("of a test")

        behind = RequestIdMiddleware(app)
        transport = httpx.ASGITransport(behind, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://manta") as client:
            for path, status in (("/version", 200), ("/nowhere", 404), ("/fault", 500)):
                for asked in ({}, {"x-request-id": "mine"}):
                    answer = await client.get(path, headers=asked)
                    assert answer.status_code == status
                    (name,) = answer.headers.get_list("x-request-id")
                    assert name == "mine" if asked else name
                    assert status != 500 or name in answer.json()["error"]["message"]

    asyncio.run(scenario())
