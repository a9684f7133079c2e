"""Several models behind one endpoint over HTTP: a request goes to the one that it names, at every path; models come and go."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.frontend.models.further import FurtherModel, FurtherModels
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from tests.deploy.doors.http.conftest import PATIENCE_S, Host, ScriptedCluster, until
from tests.deploy.frontend.fake_engine import FakeEngine

FIRST, SECOND = [100, 101, 102], [200, 201, 202]
SECOND_LEN = 512


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with another chat template."""
    folder = tmp_path_factory.mktemp("further") / "second"
    shutil.copytree(EMBEDDED_MODEL, folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}!{{ message.content }}{% endfor %}")
    return folder


class Several:
    """An endpoint of the model `tiny`, and the model `second` beside it."""

    def __init__(self, host: Host, checkpoint: Path, config: ServeConfig | None = None, keys: ApiKeys | None = None) -> None:
        self.engines = FakeEngine(FIRST), FakeEngine(SECOND)
        first = host.service(ScriptedCluster(self.engines[0]))
        model = ServedModel.read("second", checkpoint, SECOND_LEN)
        second = host.service(ScriptedCluster(self.engines[1]), model=model)
        self.model = FurtherModel(second, ServeConfig(max_choices=2))
        self.further = FurtherModels()
        self.further.put(self.model)
        self.first: Service = first
        self.http = httpx.Client(base_url=host.serve(first, config, keys, self.further), timeout=PATIENCE_S, trust_env=False)

    def tokens(self, **fields: Any) -> list[int]:
        """Of an answer."""
        answer = self.http.post("/v1/completions", json={"prompt": "a"} | fields)
        assert answer.status_code == 200, answer.text
        return self.ids(answer.json()["choices"][0]["text"])

    def ids(self, text: str) -> list[int]:
        """Whose output that is."""
        tokenizer = self.first.model.tokenizer
        assert tokenizer is not None
        (ids,) = (ids for ids in (FIRST, SECOND) if tokenizer.decode(ids) == text)
        return ids


@pytest.fixture
def several(host: Host, short_model: Path) -> Iterator[Several]:
    opened = Several(host, short_model)
    yield opened
    opened.http.close()
    for engine in opened.engines:
        engine.released.set()


def test_a_request_goes_to_the_model_that_it_names(several: Several) -> None:
    http = several.http
    names = None, "tiny", "second"
    for name, model, ids in zip(names, ("tiny", "tiny", "second"), (FIRST, FIRST, SECOND), strict=True):
        fields = {} if name is None else {"model": name}
        assert several.tokens(**fields) == ids
        chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], **fields}).json()
        assert (chat["model"], several.ids(chat["choices"][0]["message"]["content"])) == (model, ids)
    assert [len(engine.requests) for engine in several.engines] == [4, 2]


def test_streams_are_the_models_own(several: Several) -> None:
    with several.http.stream("POST", "/v1/completions", json={"model": "second", "prompt": "a", "stream": True}) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert {event["model"] for event in events} == {"second"}
    assert several.ids("".join(event["choices"][0]["text"] for event in events)) == SECOND


def test_every_door_speaks_for_the_model_that_is_named(several: Several) -> None:
    http = several.http
    for name, ids in (("tiny", FIRST), ("second", SECOND)):
        asked = {"model": name, "max_tokens": 3, "messages": [{"role": "user", "content": "a"}]}
        message = http.post("/v1/messages", json=asked).json()
        assert (message["model"], several.ids(message["content"][0]["text"])) == (name, ids)
        response = http.post("/v1/responses", json={"model": name, "max_output_tokens": 16, "input": "a"}).json()
        assert (response["model"], several.ids(response["output"][-1]["content"][0]["text"])) == (name, ids)
        kept = http.get(f"/v1/responses/{response['id']}").json()
        assert kept == response, "one store has the responses of all models"


def test_models_are_listed_with_their_own_lengths(several: Several) -> None:
    http = several.http
    cards = http.get("/v1/models").json()["data"]
    lengths = {"tiny": several.first.model.limits.max_tokens, "second": SECOND_LEN}
    assert {card["id"]: card["max_model_len"] for card in cards} == lengths
    assert [card["id"] for card in cards] == ["tiny", "second"]
    assert http.get("/v1/models/second").json()["max_model_len"] == SECOND_LEN
    assert http.get("/v1/models/third").status_code == 404


def test_tokens_lengths_and_settings_are_the_models_own(several: Several) -> None:
    http, messages = several.http, [{"role": "user", "content": "a"}]
    told = {name: http.post("/tokenize", json={"model": name, "messages": messages}).json() for name in ("tiny", "second")}
    assert told["second"]["max_model_len"] == SECOND_LEN
    assert told["second"]["tokens"] != told["tiny"]["tokens"], "its chat template is another one"
    text = http.post("/detokenize", json={"model": "second", "tokens": told["second"]["tokens"]}).json()["prompt"]
    assert text == "!a"
    refused = http.post("/v1/completions", json={"model": "second", "prompt": "a", "n": 3})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "n": 3}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_model_that_is_not_there_is_404_at_every_path(several: Several, path: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    bodies: dict[str, dict[str, Any]] = {"/v1/chat/completions": {"messages": messages}, "/detokenize": {"tokens": [1]}}
    answer = several.http.post(path, json={"model": "third", **bodies.get(path, {"prompt": "a"})})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "/v1/models" in error["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b'{"model": "second", "prompt"', 400), (b'{"model": 3, "prompt": "a"}', 400), (b"[]", 400), (b"\xff", 400),
     (b'{"model": "second", "prompt": 3}', 400), (b"[" * 100_000, 400)],
    ids=["cut", "no name", "no object", "no text", "its own fault", "deep"],
)  # fmt: skip
def test_a_body_that_cannot_be_read_is_refused_as_ever(several: Several, body: bytes, status: int) -> None:
    answer = several.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error"), answer.text
    assert answer.headers["x-request-id"]


def test_what_holds_for_the_endpoint_holds_for_every_model(host: Host, short_model: Path) -> None:
    several = Several(host, short_model, ServeConfig(max_request_bytes=1000), ApiKeys(["key"]))
    body, headers = {"model": "second", "prompt": "a"}, {"authorization": "Bearer key", "x-request-id": "mine"}
    assert several.http.post("/v1/completions", json=body).status_code == 401
    answer = several.http.post("/v1/completions", json=body, headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"], answer.json()["id"]) == (200, "mine", "cmpl-mine")
    long = json.dumps(body | {"prompt": "a" * 2000}).encode()
    pieces = several.http.post("/v1/completions", content=iter([long]), headers=headers | {"content-type": "application/json"})
    assert (pieces.status_code, "max_request_bytes" in pieces.text) == (413, True), "its length was not declared"
    plain = several.http.post("/v1/completions", content=json.dumps(body), headers=headers | {"content-type": "text/plain"})
    assert plain.status_code == 415


def test_a_model_comes_and_goes_while_requests_run(several: Several, host: Host) -> None:
    held = several.engines[1]
    held.hold_after = 0
    answers: list[list[int]] = []
    asking = threading.Thread(target=lambda: answers.append(several.tokens(model="second")))
    asking.start()
    assert held.holding.wait(PATIENCE_S)
    several.further.remove(several.model)
    gone = several.http.post("/v1/completions", json={"model": "second", "prompt": "a"})
    assert gone.status_code == 404
    assert several.tokens() == FIRST
    held.released.set()
    asking.join(PATIENCE_S)
    assert answers == [SECOND], "what was under way has ended as it would have"
    again = FakeEngine(FIRST)
    model = ServedModel.read("second", EMBEDDED_MODEL, SECOND_LEN // 2)
    several.further.put(FurtherModel(host.service(ScriptedCluster(again), model=model), ServeConfig()))
    assert several.tokens(model="second") == FIRST
    assert several.http.get("/v1/models/second").json()["max_model_len"] == SECOND_LEN // 2


def test_what_is_put_in_the_place_of_a_model_is_not_removed_with_it(several: Several, host: Host) -> None:
    first = several.model
    later = FurtherModel(host.service(ScriptedCluster(FakeEngine(FIRST)), model=first.service.model), ServeConfig())
    several.further.put(later)
    several.further.remove(first)
    assert several.tokens(model="second") == FIRST


def test_it_is_ready_when_any_model_is(several: Several, host: Host, short_model: Path) -> None:
    http = several.http
    lost = Service(ServedModel.read("lost", short_model, None), ScriptedCluster(FakeEngine(FIRST)))  # nobody runs it
    several.further.put(FurtherModel(lost, ServeConfig()))
    assert http.get("/ready").status_code == 200
    assert [http.get(f"/ready?model={name}").status_code for name in ("tiny", "second", "lost", "no")] == [200, 200, 503, 404]
    further = FurtherModels()
    further.put(several.model)
    assert httpx.get(host.serve(lost, further=further) + "/ready").status_code == 200
    assert httpx.get(host.serve(lost) + "/ready").status_code == 503


def test_metrics_and_status_say_of_which_model(several: Several) -> None:
    http = several.http
    several.tokens(model="second")
    text = http.get("/metrics").text
    counted = [line for line in text.splitlines() if line.startswith("manta_submitted_requests_total{")]
    assert counted == [
        'manta_submitted_requests_total{model="tiny"} 0.0', 'manta_submitted_requests_total{model="second"} 1.0'
    ]  # fmt: skip
    shown = {name: http.get("/status.json", params=name and {"model": name}).json() for name in ("", "tiny", "second")}
    assert [(each["model"], each["totals"]["requests"]) for each in shown.values()] == [
        ("tiny", 0), ("tiny", 0), ("second", 1)
    ]  # fmt: skip
    assert all(each["models"] == ["tiny", "second"] for each in shown.values())
    assert http.get("/status.json?model=third").status_code == 404
    several.further.remove(several.model)
    assert http.get("/status.json?model=second").status_code == 404
    until(lambda: http.get("/status.json").json()["models"] == ["tiny"])


def test_each_of_a_models_things_is_made_once(several: Several) -> None:
    made: list[FurtherModel] = []

    def make(model: FurtherModel) -> int:
        made.append(model)
        return len(made)

    assert (several.model.once(make), several.model.once(make)) == (1, 1)
