"""What is there besides generating: models, tokens, health, metrics, the status page."""

import httpx
import openai
import pytest

from deploy.config import EMBEDDED_MODEL
from deploy.text import Tokenizer
from tests.deploy.http.conftest import MODEL
from tests.deploy.http.test_errors import error_of


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
    assert "manta_ready 1.0" in answer.text


def test_the_status_page_is_there(http: httpx.Client) -> None:
    assert http.get("/").headers["content-type"].startswith("text/html")
    assert http.get("/status.json").status_code == 200
    assert http.get("/status/style.css").status_code == 200
