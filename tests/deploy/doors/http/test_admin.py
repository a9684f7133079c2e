"""Who may change a cluster over HTTP, and what the door says of it; and what the commands say that ask there."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from cluster.config import EngineConfig
from deploy.cli import models, operating
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.admin import admin_routes
from deploy.doors.http.app import create_app
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.models.further import ModelState
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from manta.commands import app

ONLY = 7


class Asked:
    """Remembers what it is asked; has one group, which can go only to come back."""

    def __init__(self) -> None:
        self.drained: list[tuple[int, bool]] = []
        self.added: dict[str, dict[str, Any]] = {}

    async def drain(self, group: int, replace: bool, model: str | None) -> None:
        if model is not None:
            raise RequestError(Fault.NOT_FOUND, f"no model {model!r}", param="model")
        if group != ONLY or not replace:
            raise RequestError(Fault.CONFLICT, f"group {group} cannot go")
        self.drained.append((group, replace))

    async def roll(self, checkpoint: str, model: str | None, revision: str | None) -> None:
        raise RequestError.invalid(f"there is no checkpoint {revision} in {checkpoint} for {model}", "checkpoint")

    async def add(self, model: str, settings: Mapping[str, Any]) -> None:
        if model in self.added:
            raise RequestError(Fault.CONFLICT, f"{model} is there")
        self.added[model] = dict(settings)

    async def remove(self, model: str) -> None:
        if self.added.pop(model, None) is None:
            raise RequestError(Fault.NOT_FOUND, f"no model {model!r}", param="model")

    async def models(self) -> list[ModelState]:
        return [await self.model(name) for name in self.added]

    async def model(self, model: str) -> ModelState:
        if model not in self.added:
            raise RequestError(Fault.NOT_FOUND, f"no model {model!r}", param="model")
        return ModelState(model, "failed", "no such GPU")


@pytest.fixture(scope="module")
def service() -> Service:
    model = ServedModel.read("tiny", EMBEDDED_MODEL, None)
    return Service(model, LocalCluster(EngineConfig(model=str(EMBEDDED_MODEL), local=True)))


def ask(
    service: Service, keys: ApiKeys, asked: Asked, key: str | None, path: str, method: str = "POST", body: Any = None
) -> httpx.Response:  # fmt: skip
    app = create_app(service, ServeConfig(), keys, pages=admin_routes(asked))

    async def answer() -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here", headers=headers) as client:
            return await client.request(method, path, json=body)

    return asyncio.run(answer())


@pytest.mark.parametrize(
    ("key", "status"), [(None, 401), ("nobody's", 401), ("a client's", 403), ("an operator's", 202)], ids=str
)
def test_a_cluster_is_changed_with_an_operators_key_alone(key: str | None, status: int, service: Service) -> None:
    keys, asked = ApiKeys(["a client's", "an operator's"], operators=["an operator's"]), Asked()
    answer = ask(service, keys, asked, key, f"/admin/groups/{ONLY}/drain?replace=true")
    assert answer.status_code == status, answer.text
    assert asked.drained == ([(ONLY, True)] if status == 202 else [])


def test_where_there_are_no_keys_everybody_is_an_operator(service: Service) -> None:
    asked = Asked()
    assert ask(service, ApiKeys(), asked, None, f"/admin/groups/{ONLY}/drain?replace=true").status_code == 202
    assert asked.drained == [(ONLY, True)]


def test_where_no_key_is_an_operators_nobody_is(service: Service) -> None:
    answer = ask(service, ApiKeys(["key"]), Asked(), "key", f"/admin/groups/{ONLY}/drain")
    assert answer.status_code == 403
    assert "`operator`" in answer.json()["error"]["message"]


def test_what_cannot_be_done_is_told(service: Service) -> None:
    answer = ask(service, ApiKeys(), Asked(), None, f"/admin/groups/{ONLY}/drain")
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, f"group {ONLY} cannot go")
    assert ask(service, ApiKeys(), Asked(), None, "/admin/groups/x/drain").status_code == 400
    answer = ask(service, ApiKeys(), Asked(), None, "/admin/roll?checkpoint=nowhere")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "checkpoint")
    answer = ask(service, ApiKeys(), Asked(), None, "/admin/roll?checkpoint=org/name&revision=v2&model=q")
    assert answer.json()["error"]["message"] == "there is no checkpoint v2 in org/name for q"
    assert ask(service, ApiKeys(["key"]), Asked(), "key", "/admin/roll?checkpoint=nowhere").status_code == 403
    assert ask(service, ApiKeys(), Asked(), None, f"/admin/groups/{ONLY}/drain?model=other").status_code == 404
    assert ask(service, ApiKeys(), Asked(), None, f"/admin/groups/{ONLY}/drain", "GET").status_code == 405


def test_models_are_added_and_removed_with_an_operators_key_alone(service: Service) -> None:
    keys, asked = ApiKeys(["a client's", "an operator's"], operators=["an operator's"]), Asked()
    settings = {"model": "/models/q", "groups": 2}
    for method, name, status, left in (
        ("PUT", "org/q", 202, {"org/q": settings}), ("PUT", "org/q", 409, {"org/q": settings}),
        ("DELETE", "other", 404, {"org/q": settings}), ("DELETE", "org/q", 202, {}),
    ):  # fmt: skip
        body, before = settings if method == "PUT" else None, dict(asked.added)
        assert ask(service, keys, asked, "a client's", f"/admin/models/{name}", method, body).status_code == 403
        assert asked.added == before
        answer = ask(service, keys, asked, "an operator's", f"/admin/models/{name}", method, body)
        assert (answer.status_code, asked.added) == (status, left), answer.text
    assert ask(service, ApiKeys(), asked, None, "/admin/models/q", "PUT", [1]).status_code == 400


def test_how_models_are_is_told_to_an_operator_alone(service: Service) -> None:
    keys, asked = ApiKeys(["a client's", "an operator's"], operators=["an operator's"]), Asked()
    asked.added["org/q"] = {}
    state = {"id": "org/q", "phase": "failed", "reason": "no such GPU"}
    for path, told in (("/admin/models", {"data": [state]}), ("/admin/models/org/q", state)):
        assert ask(service, keys, asked, "a client's", path, "GET").status_code == 403
        answer = ask(service, keys, asked, "an operator's", path, "GET")
        assert (answer.status_code, answer.json()) == (200, told)
    assert ask(service, keys, asked, "an operator's", "/admin/models/other", "GET").status_code == 404


@pytest.mark.parametrize(
    ("refusal", "code", "said"),
    [
        (httpx.Response(409, json={"error": {"message": "group 7 cannot go"}}), 2, "group 7 cannot go"),
        (httpx.Response(503, json={"error": {"message": "the engine does not answer"}}), 1, "the engine does not answer"),
        (httpx.Response(404, json={"detail": "?"}), 2, "only endpoints on Ray can be changed"),
        (httpx.Response(404, json={"error": {"message": "no model 'x'", "param": "model"}}), 2, "no model 'x'"),
        (httpx.Response(502, text="?"), 1, "answers with status 502"),
        (httpx.ConnectError("refused"), 1, "no answer from http"),
    ],
    ids=["409", "503", "404", "no model", "502", "nobody"],
)
def test_a_command_says_why_it_is_refused(
    refusal: httpx.Response | Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(503)
        if isinstance(refusal, Exception):
            raise refusal
        return refusal

    def client(kind: Any, url: str, _: str | None, **options: Any) -> Any:
        return kind(base_url=url, transport=httpx.MockTransport(answer), **options)

    monkeypatch.setattr(operating, "open_client", client)
    result = CliRunner().invoke(app, ["drain", "7"])
    assert (result.exit_code, said in result.output) == (code, True), result.output


class Endpoint:
    """What `manta models` asks: one model more, which is known at the second look and takes requests at the fourth.

    states: what an operator is told of the models; None: the key is not an operator's."""

    def __init__(self, *states: dict[str, Any], operator: bool = True) -> None:
        self.states = states if operator else None
        self.asked: list[tuple[str, str, Any]] = []
        self.looks = 0

    def answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if request.method != "GET":
            self.asked.append((request.method, request.url.raw_path.decode(), json.loads(request.content or b"null")))
            return httpx.Response(202)
        if path == "/v1/models":
            self.looks += 1
            names = ["tiny", "q"] if self.looks < 3 else ["tiny"]
            return httpx.Response(200, json={"data": [{"id": name} for name in names]})
        if path.startswith("/admin/models"):
            if self.states is None:
                return httpx.Response(403, json={"error": {"message": "not an operator's", "param": None}})
            if path == "/admin/models":
                return httpx.Response(200, json={"data": self.states})
            name = path.removeprefix("/admin/models/")
            starting = {"id": name, "phase": "starting", "reason": "its engine is starting"}
            return httpx.Response(200, json=next((state for state in self.states if state["id"] == name), starting))
        self.looks += 1
        if self.looks < 2:
            return httpx.Response(404, json={"error": {"message": "no such model", "param": "model"}})
        ready = self.looks >= 4 or request.url.params["model"] == "tiny"
        return httpx.Response(200 if ready else 503, json={"error": {"message": "no group takes requests: starting"}})

    def run(self, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, list[str]]:
        def client(kind: Any, url: str, _: str | None, **options: Any) -> Any:
            return kind(base_url=url, transport=httpx.MockTransport(self.answer), **options)

        monkeypatch.setattr(operating, "open_client", client)
        monkeypatch.setattr(models, "LOOK_S", 0.0)
        result = CliRunner().invoke(app, ["models", *words])
        return result.exit_code, result.output.splitlines()


def test_a_model_is_added_by_command_and_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    endpoint = Endpoint()
    monkeypatch.chdir(tmp_path)
    words = "--model", "q", "--groups", "2", "--tool-parser", "none", "--no-enable-prefix-caching"
    assert endpoint.run(monkeypatch, "add", "org/q r", *words) == (0, [
        "org/q r is on its way", "org/q r: its engine is starting", "org/q r: no group takes requests: starting",
        "org/q r is ready",
    ])  # fmt: skip
    settings = {"model": str(tmp_path / "q"), "groups": 2, "tool_parser": "none", "enable_prefix_caching": False}
    assert endpoint.asked == [("PUT", "/admin/models/org/q%20r", settings)]
    code, said = Endpoint().run(monkeypatch, "add", "q")
    assert (code, "--model is missing" in said[-1]) == (2, True)


def test_adding_a_model_that_fails_ends_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint({"id": "org/q", "phase": "failed", "reason": "3 ranks do not divide 4 heads"})
    code, said = endpoint.run(monkeypatch, "add", "org/q", "--model", "q")
    assert (code, said[0], len(said)) == (1, "org/q is on its way", 2)
    assert "org/q: failed: 3 ranks do not divide 4 heads" in said[1]
    assert "manta models remove" in said[1]
    assert Endpoint(*endpoint.states or ()).run(monkeypatch, "add", "org/q", "--model", "q", "--no-wait")[0] == 0


def test_a_model_is_removed_by_command_and_its_end_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint()
    assert endpoint.run(monkeypatch, "remove", "q") == (0, ["q takes no more requests"])
    assert endpoint.asked == [("DELETE", "/admin/models/q", None)]
    assert endpoint.looks == 3


def test_models_are_listed_with_what_holds_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = Endpoint().run(monkeypatch, "list")
    assert (code, said) == (0, ["tiny: ready", "q: no group takes requests: starting"])


@pytest.mark.parametrize("path", ["/admin/groups", "/admin/groups/", "/admin/models/x/"])
def test_what_is_not_there_leads_nowhere_else(path: str, service: Service) -> None:
    """A slash at the end is taken off, so nobody may be sent there to find one."""
    assert ask(service, ApiKeys(), Asked(), None, path, "GET").status_code in (404, 405)


def test_an_operator_sees_models_that_are_not_served_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    states = (
        {"id": "q", "phase": "degraded", "reason": "degraded"}, {"id": "x", "phase": "failed", "reason": "no such GPU"},
        {"id": "y", "phase": "starting", "reason": "its engine is starting"},
    )  # fmt: skip
    served = ["tiny: ready", "q: no group takes requests: starting"]
    assert Endpoint(*states).run(monkeypatch, "list") == (0, [*served, "x: failed: no such GPU", "y: its engine is starting"])
    assert Endpoint(*states, operator=False).run(monkeypatch, "list") == (0, served)
