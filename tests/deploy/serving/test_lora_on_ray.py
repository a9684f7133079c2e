"""LoRA adapters of an endpoint on Ray, of two ranks and two front ends: what is loaded at run time outlives every process."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from deploy import LLM, SamplingParams
from deploy.config.load import EMBEDDED_MODEL
from tests.deploy.serving.test_serve_on_ray import Endpoint, until
from tests.shared.adapters import make_adapter
from tests.shared.processes import ENGINE, INGRESS, SCHEDULER, WORKER, all_named

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT, SHORT, LONG = "def fibonacci(n):", 16, 400
REPLICAS = 2
ASKED = 8 * REPLICAS
"""Requests in a row that no replica is left out of."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(root / name, EMBEDDED_MODEL, seed=seed) for seed, name in enumerate(("named", "new"), start=1)}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Callable[[str | None, int], str]:
    """By an engine in this process."""
    named = {name: str(folder) for name, folder in folders.items()}
    with LLM(lora=named, local=True, dtype="float32", kv_memory="32MiB") as llm:
        names: list[str | None] = [None, *folders]
        outputs = llm.generate([PROMPT] * 3, SamplingParams(temperature=0.0, max_tokens=LONG, ignore_eos=True), lora=names,
                               progress=False)  # fmt: skip
        texts = dict(zip(names, (output.outputs[0].token_ids for output in outputs), strict=True))
        assert len({tuple(ids) for ids in texts.values()}) == 3
        tokenizer = llm._calls.parser.tokenizer
        assert tokenizer is not None
        decode = tokenizer.decode
    return lambda name, count: decode(texts[name][:count])


@pytest.fixture(scope="module")
def endpoint(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    options = (
        "--tensor-parallel-size", "2", "--replicas", str(REPLICAS), "--lora", f"named={folders['named']}", "--max-loras", "1",
        "--no-haproxy",
    )  # fmt: skip
    with contextlib.closing(Endpoint(tmp_path_factory.mktemp("serve"), options)) as opened:
        opened.gate.touch()
        until("it is not ready", lambda: _quietly(opened.ready), lambda: opened.said)
        yield opened


def _quietly(ask: Callable[[], bool]) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return ask()
    return False


def ask(endpoint: Endpoint, model: str, max_tokens: int = SHORT) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return endpoint.http.post("/v1/completions", json=body)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    said: str = answer.json()["choices"][0]["text"]
    return said


def every_replica_says(endpoint: Endpoint, model: str, status: int) -> bool:
    return all(ask(endpoint, model, 1).status_code == status for _ in range(ASKED))


def test_adapters_outlive_every_process(
    endpoint: Endpoint, folders: dict[str, Path], expected: Callable[[str | None, int], str]
) -> None:
    for name, model in ((None, "tiny"), ("named", "named")):
        assert text(ask(endpoint, model)) == expected(name, SHORT)
    assert ask(endpoint, "new").status_code == 404
    body = {"lora_name": "new", "lora_path": str(folders["new"])}
    assert endpoint.http.post("/v1/load_lora_adapter", json=body).status_code == 200
    until("some front end does not know it", lambda: every_replica_says(endpoint, "new", 200))
    assert text(ask(endpoint, "new")) == expected("new", SHORT)
    for name in (SCHEDULER, WORKER):
        with ThreadPoolExecutor() as threads:
            [victim, *_] = all_named(name, 2 if name == WORKER else 1, endpoint.process.pid)
            asked: list[Future[httpx.Response]] = [
                threads.submit(ask, endpoint, model, LONG) for model in ("new", "named", "tiny", "new")
            ]
            until("none has begun", lambda: endpoint.running() >= 2)
            os.kill(victim, signal.SIGKILL)
            said = [text(answer.result()) for answer in asked]
        assert said == [expected(name, LONG) for name in ("new", "named", None, "new")], name
    for name, count in ((ENGINE, 1), (INGRESS, REPLICAS)):
        before = all_named(name, count, endpoint.process.pid)
        for victim in before:
            os.kill(victim, signal.SIGKILL)
        until("another does not come", lambda: not {*before} & {*all_named(name, count, endpoint.process.pid)})  # noqa: B023
        until("it is not ready again", lambda: _quietly(endpoint.ready))
        until("it is forgotten", lambda: _quietly(lambda: every_replica_says(endpoint, "new", 200)))
        assert text(ask(endpoint, "new")) == expected("new", SHORT)
    assert endpoint.http.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    until("some front end serves it still", lambda: every_replica_says(endpoint, "new", 404))
    assert text(ask(endpoint, "named")) == expected("named", SHORT)
