"""`/v1/embeddings`, by the `openai` package; `/v1/score` and `/v1/rerank`, which it does not know, as they are."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest
import torch
import transformers

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.service.holding import HeldNumbers
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.text.tokenizer import Tokenizer
from tests.deploy.doors.http.conftest import KV_MEMORY_BYTES, MODEL, PATIENCE_S, Host
from tests.shared.checkpoints import make_checkpoint
from tests.shared.tokenizers import EOS, byte_level, save

TEXTS = ["def add(a, b):\n    return a + b\n", "class A:", "x"]
HIDDEN = 256
EXAMPLES = Path(__file__).parents[5] / "examples"
JUDGE = (
    "{% for message in messages %}{% if message.role == 'query' %}<|im_start|>{{ instruction or 'find' }} "
    "{{ message.content }}{% elif message.role == 'document' %} : {{ message.content }}<|im_end|>{% endif %}{% endfor %}"
)

ROUNDING = 1e-4
"""Of float32, between one way to compute the same and another."""

Vectors = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def service(host: Host) -> Service:
    engine = EngineConfig(model=str(EMBEDDED_MODEL), local=True, dtype="float32", kv_memory=KV_MEMORY_BYTES, threads=1)
    return host.service(LocalCluster(engine))


@pytest.fixture(scope="module")
def address(host: Host, service: Service) -> str:
    return host.serve(service)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.load(EMBEDDED_MODEL)
    assert loaded is not None
    return loaded


def embed(client: openai.OpenAI, given: Any, **fields: Any) -> Vectors:
    answer = client.embeddings.create(model=MODEL, input=given, **fields)
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return np.array([each.embedding for each in answer.data])


@torch.inference_mode()
def expected(ids: Sequence[Sequence[int]]) -> Vectors:
    """As transformers has the last hidden states, of length 1."""
    model = transformers.AutoModel.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    states = torch.stack([model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in ids])
    unit: Vectors = torch.nn.functional.normalize(states).double().numpy()
    return unit


def test_embeddings_of_every_form(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """A text, token ids, and lists of either."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    wanted = expected(ids)
    for given, rows in ((TEXTS, wanted), (ids, wanted), (TEXTS[0], wanted[:1]), (ids[1], wanted[1:2])):
        np.testing.assert_allclose(embed(client, given), rows, atol=ROUNDING)


def test_the_answer_is_openais(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    assert (answer.object, answer.model, answer.data[0].object) == ("list", MODEL, "embedding")
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


def test_encoding_formats(http: httpx.Client, client: openai.OpenAI) -> None:
    """Numbers, or the same float32 as base64, which the package asks for unasked."""
    asked = {"model": MODEL, "input": TEXTS[0]}
    numbers = http.post("/v1/embeddings", json=asked | {"encoding_format": "float"}).json()["data"][0]["embedding"]
    assert http.post("/v1/embeddings", json=asked).json()["data"][0]["embedding"] == pytest.approx(numbers, abs=ROUNDING)
    packed = http.post("/v1/embeddings", json=asked | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == pytest.approx(numbers, abs=ROUNDING)
    for how in ({}, {"encoding_format": "float"}):
        assert embed(client, TEXTS[0], **how)[0].tolist() == pytest.approx(numbers, abs=ROUNDING)
    refused = http.post("/v1/embeddings", json=asked | {"encoding_format": "int8"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "encoding_format")


def test_dimensions(client: openai.OpenAI) -> None:
    whole, cut = embed(client, TEXTS), embed(client, TEXTS, dimensions=17)
    np.testing.assert_allclose(cut, whole[:, :17] / np.linalg.norm(whole[:, :17], axis=1, keepdims=True), atol=ROUNDING)
    assert embed(client, TEXTS, dimensions=HIDDEN).shape == (len(TEXTS), HIDDEN)
    with pytest.raises(openai.BadRequestError) as caught:
        embed(client, TEXTS, dimensions=HIDDEN + 1)
    assert caught.value.param == "dimensions"


def test_embeddings_share_prefixes_as_others_do(http: httpx.Client) -> None:
    """With those who share its salt and its user, answers among them; exactly."""
    long = "def multiply(a, b):\n    return a * b\n" * 30

    def cached(path: str, **fields: Any) -> int:
        answer = http.post(path, json={"model": MODEL, "cache_salt": "pooling", **fields})
        assert answer.status_code == 200, answer.text
        details: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return details

    assert cached("/v1/completions", prompt=long, max_tokens=1) == 0
    tokens = http.post("/tokenize", json={"prompt": long}).json()["count"]
    assert cached("/v1/embeddings", input=long) == tokens - 1
    assert cached("/v1/embeddings", input=long, user="ann") == 0
    assert cached("/v1/embeddings", input=long, user="ann") == tokens - 1
    assert cached("/v1/embeddings", input=long, cache_salt="another") == 0


def test_pooling_by_another_model(http: httpx.Client) -> None:
    for path, fields in (
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/score", {"text_1": "x", "text_2": "y"}),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}),
    ):
        assert http.post(path, json=fields).status_code == 200, "it may be left out"
        refused = http.post(path, json=fields | {"model": "another"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_truncation_is_refused(http: httpx.Client) -> None:
    refused = http.post("/v1/embeddings", json={"input": "x", "truncate_prompt_tokens": 3})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


def test_terms_of_pooling(http: httpx.Client, host: Host, service: Service) -> None:
    """Priority and deadline are as for any other request."""
    address = host.serve(service, ServeConfig(best_priority=0))
    refused = httpx.post(f"{address}/v1/embeddings", json={"input": "x", "priority": -1}, timeout=PATIENCE_S)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    assert http.post("/v1/embeddings", json={"input": "x", "priority": 3}).status_code == 200
    late = http.post("/v1/embeddings", json={"input": "x " * 200, "timeout": 1e-6})
    assert late.status_code == 504


def test_bad_inputs_are_named(http: httpx.Client) -> None:
    for given, param, words in (
        ([], "input", "an empty list"),
        (["x", [1]], "input", "mixes texts and token ids"),
        (["x", ""], "input[1]", "the prompt is empty"),
        ([[1], [9999999]], "input[1]", "outside the vocabulary"),
        ("x" * 100_000, "input", "shorten it"),
    ):
        refused = http.post("/v1/embeddings", json={"input": given})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), given
        assert words in refused.json()["error"]["message"]
    misspelt = http.post("/v1/embeddings", json={"input": "x", "dimension": 3})
    assert misspelt.json()["error"]["code"] == "unknown_parameter"


def test_how_much_one_request_may_ask_for(host: Host, service: Service) -> None:
    address = host.serve(service, ServeConfig(max_inputs=2))
    for path, fields, param in (
        ("/v1/embeddings", {"input": ["x", "y", "z"]}, "input"),
        ("/v1/score", {"text_1": "x", "text_2": ["x", "y", "z"]}, "text_2"),
        ("/v1/rerank", {"query": "x", "documents": ["x", "y", "z"]}, "documents"),
    ):
        refused = httpx.post(f"{address}{path}", json=fields, timeout=PATIENCE_S)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert "max_inputs" in refused.json()["error"]["message"]
    for path, fields in (
        ("/v1/rerank", {"query": "x", "documents": ["y", "z"]}),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c", "d"]}),
    ):
        assert httpx.post(f"{address}{path}", json=fields, timeout=PATIENCE_S).status_code == 200, "by pairs, not by texts"


def test_how_many_numbers_are_held(host: Host, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    address = host.serve(service)
    monkeypatch.setattr(service, "numbers", held := HeldNumbers(2 * HIDDEN, 2 * HIDDEN))
    refused = httpx.post(f"{address}/v1/embeddings", json={"input": ["x", "y", "z"]}, timeout=PATIENCE_S)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    assert "ask for fewer embeddings at once" in refused.json()["error"]["message"]
    answer = httpx.post(f"{address}/v1/embeddings", json={"input": ["x", "y", "z"], "dimensions": 9}, timeout=PATIENCE_S)
    assert (answer.status_code, held.count) == (200, 0)


def test_scores_of_every_form(http: httpx.Client, client: openai.OpenAI) -> None:
    """The cosine of embeddings: one against many, or pairs; under both of vLLM's names, at both of its paths."""
    [first, second, third] = embed(client, TEXTS)
    every = [float(first @ second), float(first @ third)]

    def scores(path: str, **fields: Any) -> list[float]:
        answer = http.post(path, json={"model": MODEL} | fields).json()
        assert (answer["object"], [each["index"] for each in answer["data"]]) == ("list", list(range(len(answer["data"]))))
        return [each["score"] for each in answer["data"]]

    for path in ("/v1/score", "/score"):
        for left, right in (("text_1", "text_2"), ("queries", "documents")):
            assert scores(path, **{left: TEXTS[0], right: TEXTS[1:]}) == pytest.approx(every, abs=ROUNDING)
            assert scores(path, **{left: TEXTS[0], right: TEXTS[1]}) == pytest.approx(every[:1], abs=ROUNDING)
            both = {left: [TEXTS[0], TEXTS[0]], right: TEXTS[1:]}
            assert scores(path, **both) == pytest.approx(every, abs=ROUNDING)


def test_pairs_that_are_none_are_named(http: httpx.Client) -> None:
    for fields, param in (
        ({}, "text_1"),
        ({"text_1": "x"}, "text_1"),
        ({"text_1": "x", "documents": "y"}, "text_1"),
        ({"queries": [], "documents": "y"}, "queries"),
        ({"queries": ["x", "y"], "documents": ["x", "y", "z"]}, "documents"),
        ({"text_1": "x", "text_2": ["y", ""]}, "text_2[1]"),
        ({"text_1": "", "text_2": ["x", "y"]}, "text_1"),
        ({"queries": ["x", ""], "documents": ["y", "z"]}, "queries[1]"),
        ({"queries": "x", "documents": [""]}, "documents"),
    ):
        refused = http.post("/v1/score", json=fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), fields
    for query, documents, param in (("", ["x"], "query"), ("x", ["y", "x", ""], "documents[2]")):
        refused = http.post("/v1/rerank", json={"query": query, "documents": documents})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), (query, documents)


def test_rerank(http: httpx.Client, client: openai.OpenAI) -> None:
    """Documents as texts or as objects, the best first; at all paths that clients know."""
    query, documents = "x", [*TEXTS, "y"]
    [first, *others] = embed(client, [query, *documents])
    order = np.argsort(-np.array([first @ other for other in others])).tolist()
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        answer = http.post(path, json={"model": MODEL, "query": query, "documents": [*TEXTS, {"text": "y"}]}).json()
        assert [result["index"] for result in answer["results"]] == order
        assert [result["document"]["text"] for result in answer["results"]] == [documents[at] for at in order]
        found = [result["relevance_score"] for result in answer["results"]]
        assert found == pytest.approx([float(first @ others[at]) for at in order], abs=ROUNDING)
        assert (answer["model"], answer["usage"]["total_tokens"] > 0) == (MODEL, True)


def test_top_n_and_return_documents(http: httpx.Client) -> None:
    asked = {"query": "x", "documents": TEXTS}
    for top_n, shown in ((1, 1), (2, 2), (0, 3), (99, 3)):
        results = http.post("/v1/rerank", json=asked | {"top_n": top_n, "return_documents": False}).json()["results"]
        assert len(results) == shown
        assert all("document" not in result for result in results)
    assert http.post("/v1/rerank", json=asked | {"documents": []}).status_code == 400


@pytest.fixture(scope="module")
def judge(host: Host, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model that scores pairs by its next token, and where it is served."""
    path = tmp_path_factory.mktemp("judge") / "judge"
    make_checkpoint(path, vocab_size=419, eos_token_id=EOS, hidden_size=32, num_hidden_layers=1)
    save(byte_level(), path)
    (path / "chat_template.jinja").write_text(JUDGE)
    engine = EngineConfig(model=str(path), local=True, kv_memory=16 << 20, threads=1, score_tokens="n,y")
    model = ServedModel.read("judge", path, None, score_tokens="n,y")
    return path, host.serve(host.service(LocalCluster(engine), model=model))


def test_a_judge_reads_both_through_its_template(judge: tuple[Path, str]) -> None:
    path, address = judge
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    no, yes = (tokenizer.convert_tokens_to_ids(token) for token in ("n", "y"))
    documents = ["niño says hello", "stop !", "the café"]
    for instruction, told in (("find", {}), ("seek", {"chat_template_kwargs": {"instruction": "seek"}})):
        wanted = []
        for document in documents:
            text = f"<|im_start|>{instruction} hello world : {document}<|im_end|>"
            with torch.inference_mode():
                logits = model(tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids).logits[0, -1]
            wanted.append(1 / (1 + float((logits[no] - logits[yes]).exp())))
        asked = {"query": "hello world", "documents": documents, **told}
        results = httpx.post(f"{address}/v1/rerank", json=asked, timeout=PATIENCE_S).json()["results"]
        found = {each["index"]: each["relevance_score"] for each in results}
        assert found == pytest.approx(dict(enumerate(wanted)), abs=ROUNDING)
        assert results[0]["relevance_score"] == pytest.approx(max(wanted), abs=ROUNDING)


def test_what_no_template_can_be_told(http: httpx.Client) -> None:
    for path, fields in (("/v1/score", {"text_1": "x", "text_2": "y"}), ("/v1/rerank", {"query": "x", "documents": ["y"]})):
        refused = http.post(path, json=fields | {"chat_template_kwargs": {"instruction": "x"}})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_what_a_checkpoint_is_not_made_for_is_refused_by_name(host: Host, tmp_path: Path) -> None:
    """A classifier of two labels: neither embeddings nor scores, and no tokens."""
    path = tmp_path / "labels"
    make_checkpoint(
        path, "Qwen3ForSequenceClassification", vocab_size=419, eos_token_id=EOS, pad_token_id=EOS, hidden_size=32,
        num_hidden_layers=1, num_labels=2,
    )  # fmt: skip
    save(byte_level(), path)
    engine = EngineConfig(model=str(path), local=True, kv_memory=16 << 20, threads=1)
    address = host.serve(host.service(LocalCluster(engine), path))
    for url, fields, words in (
        ("/v1/embeddings", {"input": "x"}, "the checkpoint is a classifier"),
        ("/v1/score", {"text_1": "x", "text_2": "y"}, "has 2 labels"),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}, "has 2 labels"),
        ("/v1/completions", {"prompt": "x"}, "it generates nothing"),
    ):
        refused = httpx.post(f"{address}{url}", json=fields, timeout=PATIENCE_S)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
        assert words in refused.json()["error"]["message"]
    assert httpx.post(f"{address}/tokenize", json={"prompt": "hello"}, timeout=PATIENCE_S).status_code == 200


def test_the_template_for_qwen3_reranker(tmp_path: Path) -> None:
    """The prompt that the model was trained on, as its authors have it."""
    make_checkpoint(tmp_path, vocab_size=419, eos_token_id=EOS, hidden_size=32, num_hidden_layers=1)
    save(byte_level(), tmp_path)
    tokenizer = Tokenizer.load(tmp_path, EXAMPLES / "qwen3_reranker.jinja")
    assert tokenizer is not None
    assert tokenizer.has_pair_template
    pair = [{"role": "query", "content": "What is café?"}, {"role": "document", "content": "A drink."}]
    assert tokenizer.template.rendered(pair, None, {"instruction": "Find it"}) == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Find it\n'
        "<Query>: What is café?\n<Document>: A drink.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
