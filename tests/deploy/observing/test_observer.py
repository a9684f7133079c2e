"""From a request at the service to what is seen of it: sums at the scheduler, a log line, a line for replay."""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import EngineConfig
from cluster.engine import Engine, OnDeltas, OnFailure
from deploy.config.load import EMBEDDED_MODEL, ConfigError
from deploy.config.serve import ServeConfig
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.errors import RequestError
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.observing.metrics import render
from deploy.observing.observer import Observer
from deploy.observing.request_log import RequestLog
from deploy.observing.tally import OUTPUT_TOKENS, REQUEST_LOG_DROPPED, REQUESTS
from deploy.text.prompts import ModelLimits
from scheduler.protocol.messages import TalliedMetric
from scheduler.protocol.sampling import SamplingParams
from scheduler.server.stats import ClusterStatus
from tests.deploy.frontend.fake_engine import CACHED_TOKENS, FakeEngine
from tests.deploy.frontend.observations import observation

MODEL = ServedModel("fake", Path("fake"), 0, ModelLimits(vocab_size=400, max_tokens=512, eos_ids=()), None)
PROMPT = [7] * 40


class FakeCluster:
    """A new engine for each connection."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> Engine:
        self.engines.append(FakeEngine([1, 2, 3]))
        return self.engines[-1].start(EngineConfig(model="fake"), on_deltas, on_failure, lambda _: None)

    async def status(self, maps: bool = False) -> ClusterStatus:  # noqa: ARG002
        return ClusterStatus(phase="ready")


@asynccontextmanager
async def running(task: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    started = asyncio.create_task(task)
    try:
        yield
    finally:
        started.cancel()
        with suppress(asyncio.CancelledError):
            await started


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


async def ask(service: Service, **params: Any) -> None:
    prompt = await service.prompt(PROMPT, SamplingParams(**params))
    async for _ in service.generate([prompt], request_id="cmpl-7"):
        pass


def outcomes(metrics: Sequence[TalliedMetric]) -> list[tuple[str, float]]:
    return [(dict(metric.labels)["outcome"], metric.total) for metric in metrics if metric.name == REQUESTS.name]


def test_what_a_front_end_observes_reaches_the_scheduler_once() -> None:
    async def work() -> None:
        cluster, observer = FakeCluster(), Observer()
        service = Service(MODEL, cluster, observer)
        async with running(service.run()):
            await until(lambda: service.connected)
            await ask(service)
            await ask(service, n=2)
            observer.push(service)
            observer.push(service)
            await ask(service, max_tokens=1)
            observer.push(service)
        (engine,) = cluster.engines
        assert outcomes(engine.tallied) == [("length", 2), ("length", 1)]
        assert [metric.total for metric in engine.tallied if metric.name == OUTPUT_TOKENS.name] == [9, 1]

    asyncio.run(work())


def test_what_the_last_second_brought_goes_out_when_the_replica_ends() -> None:
    async def work() -> None:
        cluster, observer = FakeCluster(), Observer()
        service = Service(MODEL, cluster, observer)
        async with running(service.run()):
            await until(lambda: service.connected)
            async with running(observer.run(service)):
                await ask(service)
        assert outcomes(cluster.engines[0].tallied) == [("length", 1)]

    asyncio.run(work())


def test_observations_are_kept_while_there_is_no_scheduler() -> None:
    async def work() -> None:
        cluster, observer = FakeCluster(), Observer()
        service = Service(MODEL, cluster, observer)
        with pytest.raises(RequestError, match="starting"):
            await ask(service)
        observer.push(service)
        async with running(service.run()):
            await until(lambda: service.connected)
            cluster.engines[0].closed = True  # its socket has ended, and nobody has noticed yet
            observer.push(service)
            cluster.engines[0].closed = False
            observer.push(service)
        assert outcomes(cluster.engines[0].tallied) == [("unavailable", 1)]

    asyncio.run(work())


def test_a_request_leaves_a_line_in_each_log_and_its_content_in_neither(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        observer = Observer.open(ServeConfig(request_log=str(tmp_path / "requests.jsonl")), "fake")
        service = Service(MODEL, FakeCluster(), observer)
        async with running(service.run()):
            await until(lambda: service.connected)
            await ask(service)
        observer.close()

    with caplog.at_level(logging.INFO, "deploy.observing.logs"):
        asyncio.run(work())
    (line,) = [record for record in caplog.records if record.name == "deploy.observing.logs"]
    said = line.__dict__["fields"]
    assert (said["request_id"], said["model"], said["outcome"], said["error"]) == ("cmpl-7", "fake", "length", None)
    assert (said["prompt_tokens"], said["cached_tokens"], said["output_tokens"]) == (len(PROMPT), CACHED_TOKENS, 3)
    assert 0 < said["ttft_s"] <= said["e2e_s"]
    logged = json.loads((tmp_path / "requests.jsonl").read_text())
    assert (logged["model"], logged["input_length"], logged["output_length"], len(logged["hash_ids"])) == ("fake", 40, 3, 2)
    assert str(PROMPT[:3])[1:-1] not in str(said) + str(logged)


def test_a_fault_of_the_server_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    observe = Observer()
    with caplog.at_level(logging.INFO, "deploy.observing.logs"):
        for outcome in ("overloaded", "abort", "internal"):
            observe(observation(outcome=outcome, message="because"))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert caplog.records[-1].__dict__["fields"]["error"] == "because"


def test_requests_missing_from_the_log_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FullLog(RequestLog):
        dropped = 3

    async def work() -> None:
        cluster = FakeCluster()
        observer = Observer(FullLog(str(tmp_path / "requests.jsonl")))
        service = Service(MODEL, cluster, observer)
        async with running(service.run()):
            await until(lambda: service.connected)
            observer.push(service)
            observer.push(service)
        observer.close()
        assert cluster.engines[0].tallied == [REQUEST_LOG_DROPPED.count(3)]

    asyncio.run(work())
    assert "3 request(s) are missing" in caplog.text


def test_traces_without_opentelemetry_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deploy.observing.tracing", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)  # an import of it fails
    with pytest.raises(ConfigError, match=r"OpenTelemetry .* pip install 'manta-serve\[traces\]'"):
        Observer.open(ServeConfig(otlp_endpoint="http://collector:4318"), "fake")
    Observer.open(ServeConfig(), "fake").close()


def test_the_metrics_of_a_real_engine_add_up() -> None:
    async def work() -> str:
        config = EngineConfig(model=str(EMBEDDED_MODEL), local=True, kv_memory=16 << 20, block_size=16, threads=1)
        observer = Observer()
        service = Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), LocalCluster(config), observer)
        async with running(service.run()):
            await until(lambda: service.connected)
            for _ in range(3):
                await ask(service, max_tokens=5, ignore_eos=True)
            observer.push(service)
            return render({"fake": await service.cluster.status()}).decode()

    families = list(text_string_to_metric_families(asyncio.run(work())))
    every = [sample for family in families for sample in family.samples]
    assert {sample.labels.pop("model") for sample in every} == {"fake"}
    shown = {(s.name, *s.labels.values()): s.value for s in every}
    assert shown["manta_ready",] == 1
    assert shown["manta_requests_total", "length"] == shown["manta_time_to_first_token_seconds_count",] == 3
    assert shown["manta_output_tokens_total",] == shown["manta_request_output_tokens_sum",] == 15
    assert shown["manta_prompt_tokens_total",] == shown["manta_request_prompt_tokens_sum",] == 120
    assert shown["manta_prefix_cache_hit_tokens_total",] == 2 * 32, "two full blocks of 16, twice"
    misses = [shown["manta_prefix_cache_miss_tokens_total", why] for why in ("cold", "evicted", "routed_away", "inside_block")]
    assert misses == [32, 0, 0, 24]
    assert shown["manta_prefix_cache_queried_tokens_total",] == 120
    assert shown["manta_step_tokens_sum", "0"] == 120 - 64 + 3 * 4, "prompts without hits, and the outputs that were fed back"
