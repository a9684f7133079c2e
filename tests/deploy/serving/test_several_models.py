"""Several models behind one endpoint on Serve: each an application of its own; they come and go beside the others' requests."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from safetensors.torch import load_file, save_file

from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.serving.applications import all_status, check_vacant, start_proxies
from tests.deploy.serving.test_live_change import PATIENCE_S, TOKENS, Load, until
from tests.deploy.serving.test_ports import HOST
from tests.shared.ports import free_ports
from tests.shared.processes import INGRESS, SCHEDULER, WORKER, all_named, command_line, named, wait_gone
from tests.shared.ray_heads import own_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = 2000
ENGINE_SETTINGS = {"kv_memory": "32MiB", "dtype": "float32", "device": "cpu", "hung_after_s": 120.0}
"""A rank that other processes keep from the cores is not started anew: nobody's are but those that a test is about."""


def other_weights(folder: Path, turned: int) -> Path:
    """The same shape and tokenizer, and another answer for each number."""
    shutil.copytree(EMBEDDED_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    turned_weights = {name: tensor.roll(turned, 0) if tensor.dim() == 1 else tensor for name, tensor in weights.items()}
    save_file(turned_weights, folder / "model.safetensors")
    return folder


class Endpoint:
    """What a user deploys again and again: the first model, and others by the names of their checkpoints' folders."""

    def __init__(self, port: int, checkpoints: Path) -> None:
        self.limits = ServeConfig(host=HOST, port=port, haproxy=False)
        self.url = f"http://{HOST}:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False)
        self.checkpoints = checkpoints

    def deploy(self, *models: str) -> None:
        first = {
            "name": "manta", "route_prefix": "/", "import_path": "deploy.app:build",
            "args": {"engine": {"model": str(EMBEDDED_MODEL), **ENGINE_SETTINGS}, "serve": {"port": self.limits.port}},
        }  # fmt: skip
        further = [
            {
                "name": f"manta:{name}", "route_prefix": None, "import_path": "deploy.app:build_further",
                "args": {"engine": {"model": str(self.checkpoints / name), **ENGINE_SETTINGS}},
            }
            for name in models
        ]  # fmt: skip
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [first, *further]}))

    def models(self) -> list[str]:
        answer = self.http.get("/v1/models")
        return [card["id"] for card in answer.json()["data"]] if answer.status_code == 200 else []

    def ready(self, model: str) -> bool:
        return self.http.get("/ready", params={"model": model}).status_code == 200

    def complete(self, model: str = "tiny", tokens: int = TOKENS) -> dict[str, Any]:
        body = {"model": model, "prompt": "def", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        whole: dict[str, Any] = answer.json()
        return whole

    def text(self, model: str) -> str:
        said: str = self.complete(model, 40)["choices"][0]["text"]
        return said


def load_on(endpoint: Endpoint, *models: str) -> list[Load]:
    """Requests to each of them, one after the other."""
    loads = [Load(partial(endpoint.complete, model)) for model in models]
    for load in loads:
        load.start()
    return loads


def engines() -> list[int]:
    """Processes that own the scheduler and the groups of a model."""
    return [pid for pid in named("ray::ServeReplica:manta:") if ":Engine" in command_line(pid)]


def owned() -> tuple[list[int], list[int]]:
    """Schedulers and ranks."""
    return named(SCHEDULER), named(WORKER)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    for number, name in enumerate(("second", "third", "fourth", "later"), start=1):
        other_weights(checkpoints / name, number)
    with own_ray(8):
        try:
            opened = Endpoint(free_ports(1)[0], checkpoints)
            check_vacant(opened.limits)
            start_proxies(opened.limits)
            opened.deploy("second")
            until("the first does not come up", lambda: opened.ready("tiny"), serve.status)
            until("the second does not come up", lambda: opened.ready("second"), serve.status)
            yield opened
            opened.http.close()
        finally:
            serve.shutdown()


def command(endpoint: Endpoint, *words: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "manta", *words, endpoint.url]
    return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S)


def told_groups() -> int:
    """Of all models; 0 while not all tell theirs."""
    try:
        engine = all_status("manta").engine
    except TimeoutError:  # a busy machine
        return 0
    return len(engine.groups) if engine is not None else 0


def test_each_model_answers_for_itself(endpoint: Endpoint) -> None:
    assert endpoint.models() == ["tiny", "second"]
    assert endpoint.text("tiny") != endpoint.text("second")
    assert endpoint.text("tiny") == endpoint.text("tiny")
    metrics = endpoint.http.get("/metrics").text
    assert 'manta_groups_up{model="tiny"} 1.0' in metrics
    assert 'manta_groups_up{model="second"} 1.0' in metrics
    until("not all models tell of their groups", lambda: told_groups() == 2)


def test_a_model_is_added_and_removed_by_the_file_beside_requests(endpoint: Endpoint) -> None:
    kept = all_named(INGRESS, 1), engines(), all_named(SCHEDULER, 2), all_named(WORKER, 2)
    loads = load_on(endpoint, "tiny", "second")
    endpoint.deploy("second", "third")
    until("the third does not come up", lambda: endpoint.ready("third"), serve.status)
    assert endpoint.models() == ["tiny", "second", "third"]
    assert len({endpoint.text(model) for model in endpoint.models()}) == 3
    with ThreadPoolExecutor() as pool:
        under_way = pool.submit(endpoint.complete, "third", LONG)
        until("nothing is under way", lambda: running(endpoint, "third") > 0)
        endpoint.deploy("second")
        until("it takes newcomers", lambda: endpoint.models() == ["tiny", "second"], endpoint.models)
        answer = endpoint.http.post("/v1/completions", json={"model": "third", "prompt": "def"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert under_way.result()["usage"]["completion_tokens"] == LONG
    until("its processes are still there", lambda: (len(named(SCHEDULER)), len(named(WORKER))) == (2, 2), serve.status)
    assert all(len(set(load.end())) == 1 for load in loads)
    assert kept == (all_named(INGRESS, 1), engines(), *owned()), "nobody else has been started anew"


def running(endpoint: Endpoint, model: str) -> int:
    groups = endpoint.http.get("/status.json", params={"model": model, "history": 0}).json()["groups"]
    return sum(group["running"] for group in groups)


def test_a_model_is_added_and_removed_by_command(endpoint: Endpoint) -> None:
    (load,) = load_on(endpoint, "tiny")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE_SETTINGS.items()]
    added = command(endpoint, "models", "add", "org/fourth", f"--model={endpoint.checkpoints / 'fourth'}", *options)
    assert (added.returncode, added.stdout.splitlines()[-1:]) == (0, ["org/fourth is ready"]), added.stderr
    assert endpoint.text("org/fourth") not in (endpoint.text("tiny"), endpoint.text("second"))
    twice = command(endpoint, "models", "add", "org/fourth", f"--model={endpoint.checkpoints / 'third'}", *options)
    assert (twice.returncode, "already: choose another name" in twice.stderr) == (2, True), twice.stderr
    listed = command(endpoint, "models", "list")
    assert listed.stdout.splitlines() == ["tiny: ready", "org/fourth: ready", "second: ready"], listed.stderr
    endpoint.deploy("second")
    until("Serve does not take it over", lambda: serve.status().applications["manta"].status == "RUNNING")
    assert endpoint.ready("org/fourth"), "a file that does not know of it leaves it as it is"
    assert "first model" in command(endpoint, "models", "remove", "tiny").stderr
    removed = command(endpoint, "models", "remove", "org/fourth")
    assert removed.returncode == 0, removed.stderr
    assert endpoint.models() == ["tiny", "second"]
    assert "no model 'org/fourth'" in command(endpoint, "models", "remove", "org/fourth").stderr
    until("its processes are still there", lambda: (len(named(SCHEDULER)), len(named(WORKER))) == (2, 2), serve.status)
    assert len(set(load.end())) == 1


def test_a_model_rolls_drains_and_outlives_its_engine_by_itself(endpoint: Endpoint) -> None:
    ingress = all_named(INGRESS, 1)
    loads = load_on(endpoint, "tiny", "second")
    before, old = endpoint.complete("second"), owned()
    rolled = command(endpoint, "roll", str(endpoint.checkpoints / "later"), "--model=second")
    assert rolled.returncode == 0, rolled.stderr
    until("the new version does not come", lambda: endpoint.complete("second")["choices"] != before["choices"], serve.status)
    until("two versions are there", lambda: (len(named(SCHEDULER)), len(named(WORKER))) == (2, 2), serve.status)
    after = endpoint.complete("second")
    assert [len({*then} & {*now}) for then, now in zip(old, owned(), strict=True)] == [1, 1], "the first model's have stayed"
    for engine in engines():
        os.kill(engine, signal.SIGKILL)
    assert endpoint.complete("second")["choices"] == after["choices"]
    drained = command(endpoint, "drain", "0", "--replace", "--model=second")
    assert drained.returncode == 0, drained.stderr
    of_first, of_second = (load.end() for load in loads)
    assert len(set(of_first)) == 1
    assert set(of_second) == {answer["choices"][0]["text"] for answer in (before, after)}, "none is of both"
    assert all_named(INGRESS, 1) == ingress


@pytest.mark.usefixtures("endpoint")
def test_the_end_of_the_endpoint_is_that_of_its_models() -> None:
    left = {*all_named(SCHEDULER, 2), *named(WORKER), *engines()}
    serve.delete("manta")
    assert not wait_gone(left, patience_s=60.0)
    assert not serve.status().applications
