"""The page of a real endpoint: a model generates behind it, and its blocks, tokens and latencies are what is seen."""

import asyncio
import concurrent.futures
import re
from collections.abc import Iterator
from contextlib import closing

import httpx
import msgspec
import pytest
from playwright.sync_api import expect

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL, bound_openmp_spin
from deploy.doors.access import ApiKeys
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.observing.observer import Observer
from deploy.status.document import StatusDocument
from tests.deploy.doors.http.conftest import Host
from tests.deploy.status.conftest import PATIENCE_MS, Open

expect.set_options(timeout=PATIENCE_MS)

KEY = "a-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
REQUESTS, TOKENS = 6, 160


async def start() -> tuple[Service, list[asyncio.Task[None]]]:
    observer = Observer()
    engine = EngineConfig(model=str(EMBEDDED_MODEL), local=True, groups=2, kv_memory=16 << 20, block_size=32, threads=1)
    service = Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), LocalCluster(engine), observer)
    return service, [asyncio.create_task(service.run()), asyncio.create_task(observer.run(service))]


async def stop(tasks: list[asyncio.Task[None]]) -> None:
    for task in reversed(tasks):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    bound_openmp_spin()
    with closing(Host()) as host:
        service, tasks = host.run(start())
        yield host.serve(service, keys=ApiKeys([KEY]))
        host.run(stop(tasks))


def generate(address: str, number: int) -> int:
    """Completion tokens of one request; all prompts begin alike."""
    prompt = "def add(a, b):\n    return a + b\n" * 20 + f"def f{number}("
    body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
    answer = httpx.post(f"{address}/v1/completions", json=body, headers=HEADERS, timeout=PATIENCE_MS / 1e3)
    tokens: int = answer.raise_for_status().json()["usage"]["completion_tokens"]
    return tokens


def test_a_generating_endpoint_is_seen(address: str, open_page: Open) -> None:
    page = open_page(address)
    expect(page.locator("#phase")).to_have_text("Locked")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#phase")).to_have_text("Ready")
    expect(page.locator("canvas")).to_have_count(2)
    output = page.locator("#figures > div").filter(has_text="Output").locator("b")
    free = page.locator("#legend li").nth(0).locator("b")
    empty = free.inner_text()
    expect(output).to_have_text("0")
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
        generating = [pool.submit(generate, address, number) for number in range(REQUESTS)]
        expect(output).not_to_have_text("0")
        assert [each.result() for each in generating] == [TOKENS] * REQUESTS
    expect(free).not_to_have_text(empty)  # the prompts are cached now
    expect(page.locator("#totals")).to_contain_text(f"{REQUESTS} requests since the scheduler started · {REQUESTS} ended")
    ttft = page.locator("figure").filter(has_text="Time to first token").locator(".reads b").first
    expect(ttft).to_have_text(re.compile(r"\d"))
    shown = httpx.get(f"{address}/status.json", headers=HEADERS).raise_for_status()
    document = msgspec.json.decode(shown.content, type=StatusDocument)
    totals = document.totals
    assert totals.output_tokens == REQUESTS * TOKENS
    misses = totals.miss_inside_block + totals.miss_routed + totals.miss_evicted + totals.miss_cold
    assert totals.started_tokens == totals.cached_tokens + misses > 0
    assert totals.cached_tokens > 0
    for group in document.groups:
        assert group.free + group.held + group.shared + group.cached == group.total
        assert group.map is not None
    assert httpx.get(f"{address}/status.json").status_code == 401
    assert httpx.get(f"{address}/status/app.js").status_code == 200
