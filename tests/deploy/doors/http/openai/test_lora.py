"""LoRA adapters as models of an endpoint: listed, asked for by name at every door, loaded and unloaded while it runs."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.config import EngineConfig
from deploy.batch.backends.own import ServiceBackend
from deploy.batch.lines import Line, parse
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.grpc.reading import Readers
from deploy.doors.http.app import create_app
from deploy.doors.openai.adapters import adapter_routes
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.generation.submission import salt_of
from deploy.frontend.models.adapters import OwnShelf, ServedAdapters
from deploy.frontend.models.further import FurtherModels
from deploy.frontend.service.model import ServedModel
from deploy.text.adapters import Adapters
from scheduler.protocol.messages import Adapter
from tests.deploy.doors.http.conftest import MODEL, Host, ScriptedCluster
from tests.deploy.frontend.fake_engine import FakeEngine
from tests.shared.adapters import make_adapter
from workers.model.lora import files

CHAT = [{"role": "user", "content": "hi"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 3, "store": False},
    "/v1/messages": {"messages": CHAT, "max_tokens": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "named", EMBEDDED_MODEL)


class Endpoint:
    """Of the model `tiny` with one adapter from the start. http: through the whole application, without a socket."""

    def __init__(self, host: Host, folder: Path, shelf: OwnShelf, keys: ApiKeys | None = None) -> None:
        self.engine = FakeEngine([100, 101, 102])
        self.host, self.service, self.further = host, host.service(ScriptedCluster(self.engine)), FurtherModels()
        config = EngineConfig(model=str(EMBEDDED_MODEL), lora=(f"named={folder}",), max_loras=2)
        self.adapters = self._on_loop(lambda: ServedAdapters(self.service, config, ServeConfig(), self.further, shelf))
        self._on_loop(self.adapters.open)
        pages = adapter_routes(self.adapters, ServeConfig())
        self._app = create_app(self.service, ServeConfig(), keys or ApiKeys(), pages=pages, further=self.further)

    def _on_loop(self, work: Any) -> Any:
        async def run() -> Any:
            return work()

        return self.host.run(run())

    def look(self) -> None:
        self.host.run(self.adapters.look())

    def get(self, path: str) -> Any:
        return self.ask("GET", path).json()

    def post(self, path: str, body: Any, key: str | None = None) -> httpx.Response:
        return self.ask("POST", path, body, key)

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> httpx.Response:
        async def answer() -> httpx.Response:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here", headers=headers) as client:
                return await client.request(method, path, json=body)

        return self.host.run(answer())

    def load(self, name: str, folder: Path, **fields: Any) -> httpx.Response:
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)} | fields)

    def unload(self, name: str) -> httpx.Response:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def names(self) -> list[str]:
        return [card["id"] for card in self.get("/v1/models")["data"]]


@pytest.fixture
def endpoint(host: Host, folder: Path) -> Endpoint:
    return Endpoint(host, folder, OwnShelf())


def test_it_is_listed_with_the_model_that_it_is_beside(endpoint: Endpoint, folder: Path) -> None:
    first, second = endpoint.get("/v1/models")["data"]
    assert first["id"] == MODEL
    assert "parent" not in first
    assert (second["id"], second["parent"], second["root"]) == ("named", MODEL, str(folder))
    assert endpoint.get("/v1/models/named") == second


@pytest.mark.parametrize("path", ASKED)
def test_every_door_asks_the_engine_for_the_adapter_that_is_named(path: str, endpoint: Endpoint, folder: Path) -> None:
    for name in ("named", MODEL):
        answer = endpoint.post(path, ASKED[path] | {"model": name})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
    adapted, plain = endpoint.engine.requests[-2:]
    assert adapted.adapter is not None
    assert (adapted.adapter.name, adapted.adapter.folder) == ("named", str(folder))
    assert plain.adapter is None
    assert adapted.tokens == plain.tokens
    assert adapted.salt != plain.salt
    assert endpoint.post(path, ASKED[path] | {"model": "another"}).status_code == 404


def test_grpc_and_batch_files_find_it_too(endpoint: Endpoint, folder: Path) -> None:
    readers = Readers(endpoint.service, ServeConfig(), endpoint.further)
    assert readers.of("named").service.model.parent == MODEL
    with pytest.raises(RequestError):
        readers.of("another")
    config = EngineConfig(model=str(EMBEDDED_MODEL), lora=(f"named={folder}",))
    backend = ServiceBackend(endpoint.service, ServeConfig(), Adapters(config, MODEL))
    for name in ("named", MODEL):
        body = {"model": name, "prompt": "a", "max_tokens": 2}
        content = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}).encode()
        answer = endpoint.host.run(backend.answer(parse(Line(1, content, len(content)), 1 << 20)))
        assert json.loads(answer.body)["model"] == name
    assert [request.adapter is None for request in endpoint.engine.requests[-2:]] == [False, True]


def test_what_the_cluster_is_like_is_told_once_for_a_model_and_its_adapters(endpoint: Endpoint) -> None:
    assert 'model="named"' not in endpoint.ask("GET", "/metrics").text
    assert endpoint.ask("GET", "/ready?model=named").status_code == 200


def test_one_is_loaded_and_unloaded_while_the_endpoint_runs(endpoint: Endpoint, folder: Path, tmp_path: Path) -> None:
    assert endpoint.post("/v1/completions", {"model": "new", "prompt": "a"}).status_code == 404
    answer = endpoint.load("new", folder)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert endpoint.names() == [MODEL, "named", "new"]
    assert endpoint.post("/v1/completions", {"model": "new", "prompt": "a"}).status_code == 200
    before = endpoint.engine.requests[-1]
    assert endpoint.load("new", folder).status_code == 409
    other = make_adapter(tmp_path / "other", EMBEDDED_MODEL, seed=5)
    assert endpoint.load("new", other, load_inplace=True).status_code == 200
    endpoint.post("/v1/completions", {"model": "new", "prompt": "a"})
    after = endpoint.engine.requests[-1]
    assert before.adapter is not None
    assert after.adapter is not None
    assert before.adapter.version != after.adapter.version
    assert before.salt != after.salt
    assert endpoint.unload("new").text == "Success: LoRA adapter 'new' removed successfully."
    assert endpoint.names() == [MODEL, "named"]
    assert endpoint.post("/v1/completions", {"model": "new", "prompt": "a"}).status_code == 404
    assert endpoint.unload("new").status_code == 404


def test_of_several_who_load_one_name_at_once_one_succeeds(endpoint: Endpoint, tmp_path: Path) -> None:
    """All have seen that the name is free before the first of them has written it down."""
    others = [make_adapter(tmp_path / str(seed), EMBEDDED_MODEL, seed=seed) for seed in range(4)]

    async def load_all() -> Any:
        loads = [endpoint.adapters.load_adapter("new", str(other), None, in_place=False) for other in others]
        return await asyncio.gather(*loads, return_exceptions=True)

    answers = endpoint.host.run(load_all())
    refused = [answer for answer in answers if answer is not None]
    assert [answer.fault for answer in refused if isinstance(answer, RequestError)] == [Fault.CONFLICT] * 3
    (winner,) = (other for other, answer in zip(others, answers, strict=True) if answer is None)
    endpoint.post("/v1/completions", {"model": "new", "prompt": "a"})
    asked = endpoint.engine.requests[-1].adapter
    assert asked is not None
    assert asked.folder == str(winner)


def test_what_cannot_be_done_says_why(endpoint: Endpoint, folder: Path, tmp_path: Path) -> None:
    large = make_adapter(tmp_path / "large", EMBEDDED_MODEL, rank=17)
    for name, where, status, field, said in (
        ("new", tmp_path / "none", 400, "lora_path", "not a folder"), ("new", large, 400, "lora_path", "max_lora_rank"),
        ("n\new", folder, 400, "lora_name", "printable"), ("new", EMBEDDED_MODEL, 400, "lora_path", "a checkpoint"),
        (MODEL, folder, 409, "lora_name", "another name"),
        ("named", folder, 409, "lora_name", "configuration"),
    ):  # fmt: skip
        answer = endpoint.load(name, where)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["param"] == field
        assert said in answer.json()["error"]["message"]
    assert endpoint.load("new", folder, base_model_name="another").status_code == 404
    assert endpoint.load("new", folder, base_model_name=MODEL).status_code == 200
    assert endpoint.unload("named").status_code == 409
    assert endpoint.names() == [MODEL, "named", "new"]


def test_only_an_operator_s_key_changes_it(host: Host, folder: Path) -> None:
    guarded = Endpoint(host, folder, OwnShelf(), ApiKeys(("any", "boss"), operators=("boss",)))
    body = {"lora_name": "new", "lora_path": str(folder)}
    for key, status in ((None, 401), ("any", 403), ("boss", 200)):
        assert guarded.post("/v1/load_lora_adapter", body, key).status_code == status
    for key, status in ((None, 401), ("any", 403), ("boss", 200)):
        assert guarded.post("/v1/unload_lora_adapter", body, key).status_code == status


def test_other_front_ends_follow_what_one_of_them_was_told(host: Host, folder: Path, tmp_path: Path) -> None:
    shelf = OwnShelf()
    one, other = Endpoint(host, folder, shelf), Endpoint(host, folder, shelf)
    moving = shutil.copytree(folder, tmp_path / "moving")
    one.load("new", moving)
    assert other.names() == [MODEL, "named"]
    other.look()
    assert other.names() == [MODEL, "named", "new"]
    late = Endpoint(host, folder, shelf)
    make_adapter(moving, EMBEDDED_MODEL, seed=6)
    late.look()
    assert late.names() == [MODEL, "named"], "its files are not those that were loaded"
    one.load("new", moving, load_inplace=True)
    for each in (other, late):
        each.look()
        assert each.post("/v1/completions", {"model": "new", "prompt": "a"}).status_code == 200
    assert late.engine.requests[-1].adapter == other.engine.requests[-1].adapter == shelf.read()["new"]
    other.unload("new")
    for each in (one, late):
        each.look()
        assert each.names() == [MODEL, "named"]


def test_its_files_are_digested_once_by_a_front_end(host: Host, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be large, and a start waits for it."""
    digested: list[Path] = []
    digest = files._digest

    def counted(path: Path) -> str:
        digested.append(path)
        return digest(path)

    monkeypatch.setattr(files, "_digest", counted)
    config = EngineConfig(model=str(EMBEDDED_MODEL), lora=(f"named={folder}",))
    ServedModel.of(config, ServeConfig())
    Endpoint(host, folder, OwnShelf())
    assert digested == [folder]
    ServedModel.checked(config, ServeConfig())
    assert digested == [folder, folder]
    with pytest.raises(ValueError, match="there is a model"):
        ServedModel.checked(config, ServeConfig(served_model_name="named"))


def test_no_two_pairs_of_adapter_and_salt_share_a_prefix() -> None:
    adapters = [None, *(Adapter(name, version, "/") for name in ("a", "b", "a b") for version in ("1", "2"))]
    salts = ["", "a", "\0", "\0\0", "1 a\0", "\x001 a\0", "\x001 a\0a"]
    told = [salt_of(salt, adapter) for adapter in adapters for salt in salts]
    assert len(set(told)) == len(told)
    assert salt_of("as it was", None) == "as it was"
