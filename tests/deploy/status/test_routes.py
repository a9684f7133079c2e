"""What `/status.json` and the page's files answer, and how often the cluster is asked for it."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.status.document import ExpertsLine, StatusDocument
from deploy.status.history import History
from deploy.status.maps import unpack
from deploy.status.page import ASSETS, FOLDER
from scheduler.protocol.sampling import SamplingParams
from tests.deploy.status.fake_cluster import FakeCluster
from tests.deploy.status.serving import make_app

PATIENCE_S = 60.0


@asynccontextmanager
async def client_of(app: FastAPI, lifespan: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        if not lifespan:
            yield client
            return
        async with app.router.lifespan_context(app):
            yield client


async def ask(client: httpx.AsyncClient, query: str = "") -> StatusDocument:
    answer = await client.get(f"/status.json{query}")
    assert answer.status_code == 200
    return msgspec.json.decode(answer.content, type=StatusDocument)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def test_the_scheduler_of_one_process_says_how_busy_it_is() -> None:
    """`--local`: what requests cost counts, looking does not."""

    async def run() -> None:
        engine = EngineConfig(model=str(EMBEDDED_MODEL), local=True, kv_memory=32 << 20, threads=1)
        service = Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), LocalCluster(engine))
        running = asyncio.create_task(service.run())
        await until(lambda: service.connected)
        before = await service.cluster.status()
        for _ in range(3):
            assert (await service.cluster.status(maps=True)).busy_s == before.busy_s
        asked = [await service.prompt("def add(", SamplingParams(max_tokens=16, ignore_eos=True))]
        async for _ in service.generate(asked, request_id="a"):
            pass
        after = await service.cluster.status()
        assert 0.0 < after.busy_s - before.busy_s < after.uptime_s - before.uptime_s
        history = History()
        history.observe(before, 0.0, 0.0)
        busy = history.observe(after, 1.0, 1.0).busy
        assert busy is not None
        assert 0.0 < busy < 1.0
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())


def test_the_document_is_the_cluster() -> None:
    async def run() -> None:
        cluster = FakeCluster(groups=3, blocks=500, load=6)
        cluster.advance(5.0)
        async with client_of(make_app(cluster)) as client:
            document = await ask(client)
            engine = (await cluster.status()).engine
        assert engine is not None
        assert document.phase == "ready"
        assert document.now.epoch == 0
        assert document.totals.started_tokens == engine.started_tokens > 0
        totals = document.totals
        misses = totals.miss_inside_block + totals.miss_routed + totals.miss_evicted + totals.miss_cold
        assert totals.cached_tokens + misses == totals.started_tokens
        for line, group, pool in zip(document.groups, engine.groups, cluster.pools, strict=True):
            assert line.free + line.held + line.shared + line.cached == line.total == 500
            assert line.held + line.shared == group.held_blocks
            assert line.map is not None
            assert unpack(line.map, 500).tolist() == list(pool.states())

    asyncio.run(run())


def test_the_load_of_experts_is_that_of_the_least_even_layer() -> None:
    async def run() -> None:
        cluster = FakeCluster(groups=2)
        async with client_of(make_app(cluster)) as client:
            assert [line.experts for line in (await ask(client)).groups] == [None, None]
        cluster.experts = {1: (1.5, 7), 3: (4.25, 12), 5: (2.0, 3)}
        cluster.pools[1].up = False
        async with client_of(make_app(cluster)) as client:
            assert [line.experts for line in (await ask(client)).groups] == [ExpertsLine(3, 2.58, 4.25, 3, 12), None]

    asyncio.run(run())


def test_viewers_share_one_look() -> None:
    async def run() -> None:
        cluster = FakeCluster()
        async with client_of(make_app(cluster), lifespan=False) as client:
            await asyncio.gather(*(ask(client) for _ in range(50)))
            assert cluster.status_calls == 1

    asyncio.run(run())


def test_history_grows_unwatched_and_maps_are_only_asked_for_while_somebody_looks() -> None:
    async def run() -> None:
        cluster = FakeCluster()
        async with client_of(make_app(cluster)) as client:
            await until(lambda: cluster.status_calls >= 2)
            assert cluster.map_calls == 0
            assert len((await ask(client)).history) >= 2
            assert cluster.map_calls == 1
            assert (await ask(client, "?history=0")).history == ()

    asyncio.run(run())


def test_a_status_that_fails_is_an_answer() -> None:
    async def run() -> None:
        cluster = FakeCluster()
        async with client_of(make_app(cluster), lifespan=False) as client:
            cluster.down = True
            document = await ask(client)
            assert document.phase == "unreachable"
            assert "the scheduler does not answer" in document.progress[0]
            assert document.now.epoch is None
            assert document.groups == ()
            cluster.down = False
            async with asyncio.timeout(PATIENCE_S):
                while (document := await ask(client)).phase != "ready":
                    await asyncio.sleep(0.05)
            assert [sample.epoch for sample in document.history] == [None]

    asyncio.run(run())


def test_answers_are_fresh_and_small() -> None:
    async def run() -> None:
        cluster = FakeCluster(groups=64, blocks=8000, load=0)
        async with client_of(make_app(cluster), lifespan=False) as client:
            answer = await client.get("/status.json", headers={"Accept-Encoding": "gzip"})
            assert answer.headers["Content-Encoding"] == "gzip"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.json()["blocks_per_cell"] == 2
            plain = await client.get("/status.json", headers={"Accept-Encoding": "identity"})
            assert "Content-Encoding" not in plain.headers
            assert plain.json()["groups"] == answer.json()["groups"]
            assert len(plain.content) < 120_000

    asyncio.run(run())


def test_files_of_the_page() -> None:
    async def run() -> None:
        async with client_of(make_app(FakeCluster()), lifespan=False) as client:
            page = await client.get("/")
            assert page.headers["Content-Type"] == "text/html; charset=utf-8"
            assert "default-src 'none'" in page.headers["Content-Security-Policy"]
            assert {path.name for path in FOLDER.iterdir() if path.suffix in (".js", ".css")} == set(ASSETS)
            for name, kind in ASSETS.items():
                answer = await client.get(f"/status/{name}")
                assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"
                assert answer.text == (FOLDER / name).read_text()
            assert (await client.get("/status/page.html")).status_code == 404
            assert (await client.get("/status/..%2fwatch.py")).status_code == 404

    asyncio.run(run())


@pytest.mark.parametrize("name", [*ASSETS, "page.html"])
def test_no_file_names_another_host(name: str) -> None:
    """The one address is the name of the SVG language, which nobody fetches."""
    text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r"\w+://|url\(|@import", text) == []
