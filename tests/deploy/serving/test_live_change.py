"""An application that runs on Serve: what of its configuration changes while requests run, and who may come beside it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from safetensors.torch import load_file, save_file

from deploy.config.load import EMBEDDED_MODEL, ConfigError
from deploy.config.serve import ServeConfig
from deploy.serving.applications import check_vacant, failure, start_proxies
from tests.deploy.serving.test_ports import HOST
from tests.shared.ports import free_ports
from tests.shared.processes import ENGINE, SCHEDULER, WORKER, all_named, named, wait_gone
from tests.shared.ray_heads import own_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATIENCE_S = 240.0
TOKENS = 1500


def until(what: str, true: Callable[[], bool], clue: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: {clue()}"
        time.sleep(0.1)


class Application:
    """The configuration file that a user deploys again and again."""

    def __init__(self, port: int) -> None:
        self.limits = ServeConfig(host=HOST, port=port, haproxy=False)
        self.http = httpx.Client(base_url=f"http://{HOST}:{port}", timeout=PATIENCE_S, trust_env=False)

    def deploy(self, groups: int, model: Path = EMBEDDED_MODEL, **limits: Any) -> None:
        engine = {
            "model": str(model), "kv_memory": "32MiB", "dtype": "float32", "device": "cpu", "hung_after_s": 120.0,
        }  # fmt: skip
        args = {"engine": engine, "serve": {"port": self.limits.port} | limits}
        application = {
            "name": "manta",
            "route_prefix": "/",
            "import_path": "deploy.app:build",
            "args": args,
            "deployments": [{"name": "Engine", "user_config": {"groups": groups}}],
        }
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    def groups(self) -> list[str]:
        answer = self.http.get("/status.json?history=0")
        return [group["state"] for group in answer.json()["groups"]] if answer.status_code == 200 else []

    def refuses(self, **fields: Any) -> bool:
        answer = self.http.post("/v1/completions", json={"model": "tiny", "prompt": "def", "max_tokens": 1} | fields)
        return answer.status_code == 400

    def complete(self) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": "def", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        whole: dict[str, Any] = answer.json()
        return whole


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    with own_ray(8):
        try:
            opened = Application(free_ports(1)[0])
            check_vacant(opened.limits)
            start_proxies(opened.limits)
            opened.deploy(1)
            until("it does not come up", lambda: opened.groups() == ["up"], lambda: serve.status())
            yield opened
            opened.http.close()
        finally:
            serve.shutdown()


class Load(threading.Thread):
    """Requests, one after the other, until told to stop."""

    def __init__(self, complete: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self._complete = complete
        self._enough = threading.Event()
        self.answers: list[dict[str, Any]] = []
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self._enough.is_set():
                self.answers.append(self._complete())
        except Exception as error:
            self.failure = error

    @property
    def last(self) -> str:
        text: str = self.answers[-1]["choices"][0]["text"]
        return text

    def end(self) -> list[str]:
        """The texts, in order. Errors: whatever has befallen a request."""
        self._enough.set()
        self.join(PATIENCE_S)
        assert not self.is_alive()
        if self.failure is not None:
            raise self.failure
        assert {answer["usage"]["completion_tokens"] for answer in self.answers} == {TOKENS}
        return [answer["choices"][0]["text"] for answer in self.answers]


def test_groups_come_and_go_beside_requests(application: Application) -> None:
    (worker,) = all_named(WORKER, 1)
    load = Load(application.complete)
    load.start()
    application.deploy(2)
    until("no group was added", lambda: application.groups() == ["up", "up"], application.groups)
    assert worker in named(WORKER), "the group that was there has not been started anew"
    application.deploy(1)
    until("the group did not go", lambda: application.groups() == ["up"], application.groups)
    assert len(set(load.end())) == 1
    assert all_named(WORKER, 1) == [worker]


def test_a_number_that_is_not_allowed_changes_nothing(application: Application) -> None:
    application.deploy(0)
    until("Serve does not take it over", lambda: serve.status().applications["manta"].status == "RUNNING")
    assert application.groups() == ["up"]
    application.deploy(1)


def test_a_second_application_is_refused_by_the_name_of_the_first(application: Application) -> None:
    limits = application.limits
    for taken in (limits, replace(limits, app_name="other"), replace(limits, route_prefix="/other")):
        with pytest.raises(ConfigError, match="runs the application 'manta' at / already"):
            check_vacant(taken)
    beside = replace(limits, app_name="other", route_prefix="/other")
    check_vacant(beside)
    with pytest.raises(ConfigError, match=f"listens at {HOST}:{limits.port} on this cluster.*--port {limits.port}"):
        check_vacant(replace(beside, port=limits.port + 1))
    with pytest.raises(ConfigError, match="leave --grpc-port out"):
        check_vacant(replace(beside, grpc_port=1))
    assert failure("manta") is None
    assert failure("other") == "the application 'other' was deleted"


def command(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "manta", *words], capture_output=True, text=True, timeout=PATIENCE_S)


def drain(application: Application, group: int, *options: str) -> "subprocess.CompletedProcess[str]":
    return command("drain", str(group), str(application.http.base_url), *options)


def test_a_group_is_drained_by_command_beside_requests(application: Application) -> None:
    (worker,) = all_named(WORKER, 1)
    load = Load(application.complete)
    load.start()
    refused = drain(application, 0)
    assert (refused.returncode, "the last that takes requests" in refused.stderr) == (2, True), refused.stderr
    assert "there is no group 5: its groups are 0" in drain(application, 5).stderr
    anew = drain(application, 0, "--replace")
    assert (anew.returncode, anew.stdout) == (0, "group 0 runs empty\ngroup 0 serves again\n"), anew.stderr
    (second,) = all_named(WORKER, 1)
    assert second != worker
    application.deploy(2)
    until("no group was added", lambda: application.groups() == ["up", "up"], application.groups)
    gone = drain(application, 0)
    assert (gone.returncode, gone.stdout) == (0, "group 0 runs empty\ngroup 0 is gone\n"), gone.stderr
    assert application.groups() == ["up"]
    assert second not in all_named(WORKER, 1)
    assert len(set(load.end())) == 1
    application.deploy(1)


def test_a_batch_finds_the_scheduler_of_what_is_served(application: Application, tmp_path: Path) -> None:
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": "tiny", "prompt": "def", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    asked.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    address = ray.get_runtime_context().gcs_address
    done = command("batch", "--input", str(asked), "--output", str(answered), "--app", "manta", "--ray-address", address)
    assert done.returncode == 0, done.stderr
    said = json.loads(answered.read_text())["response"]["body"]["choices"][0]["text"]
    assert said == application.complete()["choices"][0]["text"]


def test_what_concerns_front_ends_alone_leaves_scheduler_and_groups_as_they_are(application: Application) -> None:
    ranks, scheduler, engine = all_named(WORKER, 1), all_named(SCHEDULER, 1), all_named(ENGINE, 1)
    application.deploy(1, max_choices=3)
    until("the engine is not replaced", lambda: not {*named(ENGINE)} & {*engine}, lambda: serve.status())
    until("no front end knows of it", lambda: application.refuses(n=4), lambda: serve.status())
    until("Serve does not take it over", lambda: serve.status().applications["manta"].status == "RUNNING")
    application.complete()
    assert (all_named(WORKER, 1), all_named(SCHEDULER, 1)) == (ranks, scheduler)


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """The same shape and tokenizer, other weights."""
    folder = tmp_path / "tiny"
    shutil.copytree(EMBEDDED_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.flip(0) if tensor.dim() == 1 else tensor for name, tensor in weights.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


def test_a_new_version_takes_over_without_a_failed_request(application: Application, other_model: Path) -> None:
    """Three groups of each version, two front ends and one more while they change are one CPU too many: an old group has to
    make room before the new ones are all there. Nor does one fail on the way back, on which the engine dies."""
    application.deploy(3, replicas=2)
    until("not all are up", lambda: application.groups() == ["up"] * 3, application.groups)
    until("Serve does not take it over", lambda: serve.status().applications["manta"].status == "RUNNING")
    old = {*all_named(WORKER, 3), *all_named(SCHEDULER, 1)}
    loads = [Load(application.complete) for _ in range(2)]
    for load in loads:
        load.start()
    before = application.complete()["choices"][0]["text"]
    application.deploy(3, other_model, replicas=2)
    assert not wait_gone(old, PATIENCE_S), "the old version is still there"
    until("Serve does not take it over", lambda: serve.status().applications["manta"].status == "RUNNING")
    until("not all are up", lambda: application.groups() == ["up"] * 3, application.groups)
    after = application.complete()["choices"][0]["text"]
    assert after != before
    back = command("roll", str(EMBEDDED_MODEL), str(application.http.base_url))
    assert back.returncode == 0, back.stderr
    until("nothing new comes", lambda: len(named(SCHEDULER)) == 2)
    os.kill(all_named(ENGINE, 1)[0], signal.SIGKILL)
    until("the first model is not back", lambda: application.complete()["choices"][0]["text"] == before)
    until("not all are up", lambda: application.groups() == ["up"] * 3, application.groups)
    until("a front end has the other yet", lambda: all(load.failure or load.last == before for load in loads))
    for load in loads:
        texts = load.end()
        assert {*texts} == {before, after}, "none is of both"
        assert (texts[0], texts[-1]) == (before, before)
    until("more than one version is there", lambda: len(named(WORKER)) == 3 and len(named(SCHEDULER)) == 1)


def test_the_end_of_the_application_is_that_of_its_scheduler_and_groups(application: Application) -> None:
    left = {*named(WORKER), *all_named(SCHEDULER, 1)}
    assert set(application.groups()) == {"up"}
    serve.delete("manta")
    assert not wait_gone(left, patience_s=30.0), "at once, not when nobody has taken them over for a minute"
