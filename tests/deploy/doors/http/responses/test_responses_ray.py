"""Responses that the front ends of an application on Ray share: one actor, whoever asks, and what follows when it dies.

A Ray cluster beside this process, which is one front end; tasks on it are others.
"""

import asyncio
import os
import signal
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import ray

from cluster.fleet.ownership.remains import actor_of
from deploy.doors.openai.responses.store import shared
from deploy.doors.openai.responses.store.shared import NAME, SharedResponses, end_responses
from deploy.doors.openai.responses.store.storing import Bounds, StoredTurn
from deploy.frontend.errors import Fault, RequestError
from scheduler.protocol.orphans import Estate
from tests.shared.processes import alive, wait_gone
from tests.shared.ray_heads import ray_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BOUNDS = Bounds(100, 1 << 20, 3600.0)
TURN = StoredTurn(b"[1]", b"[2]")
FOREVER_S, SOON_S = 600.0, 12.0

T = TypeVar("T")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ray_head(tmp_path_factory.mktemp("head"), 2, "--include-dashboard=false") as address:
        ray.init(address=address, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture
def estate(cluster: None, request: pytest.FixtureRequest) -> Iterator[Estate]:  # noqa: ARG001
    found = Estate(f"manta-{request.node.name}", "version", getattr(request, "param", FOREVER_S))
    yield found
    end_responses(found.namespace)


def pid_of(estate: Estate) -> int:
    return int(ray.get(actor_of(estate.namespace, NAME).process.remote(), timeout=60))


def asked_elsewhere(estate: Estate, owner: str, name: str) -> bytes | None:
    """By a front end that is another process."""

    async def ask() -> bytes | None:
        store = SharedResponses(estate, BOUNDS, "text")
        try:
            return await store.body(owner, name)
        finally:
            await store.close()

    answer: bytes | None = ray.get(ray.remote(num_cpus=0)(lambda: asyncio.run(ask())).remote(), timeout=120)
    return answer


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def test_any_front_end_finds_what_another_has_kept(estate: Estate) -> None:
    async def put() -> None:
        one, other = SharedResponses(estate, BOUNDS, "text"), SharedResponses(estate, BOUNDS, "text")
        kept = await asyncio.gather(*(store.put("ann", f"r{n}", None, b"{}", TURN) for n, store in enumerate((one, other))))
        assert kept == [True, True], "both at once: one actor all the same"
        assert await other.put("ann", "r2", "r0", b"{2}", TURN)
        assert await one.turns("ann", "r2") == [TURN, TURN]
        assert (await one.turns("bob", "r2"), await one.delete("bob", "r2")) == (None, False)
        assert await one.delete("ann", "r1")
        assert await other.body("ann", "r1") is None
        await one.close()
        await other.close()

    run(put())
    assert asked_elsewhere(estate, "ann", "r2") == b"{2}"


def test_one_that_has_died_is_started_anew_and_empty(estate: Estate) -> None:
    async def lose() -> None:
        store = SharedResponses(estate, BOUNDS, "text")
        assert await store.put("ann", "r", None, b"{}", TURN)
        first = await asyncio.to_thread(pid_of, estate)
        os.kill(first, signal.SIGKILL)
        wait_gone([first])
        deadline_s = time.monotonic() + 120
        while not await store.put("ann", "s", None, b"{}", TURN):  # Ray has yet to hear of it
            assert time.monotonic() < deadline_s
            store._silent_until_s = 0.0
        assert (await store.body("ann", "r"), await store.body("ann", "s")) == (None, b"{}")
        assert not await store.put("ann", "t", "r", b"{}", TURN), "what it goes on from is lost"
        await store.close()

    run(lose())


def test_one_that_is_stopped_holds_nobody_up_for_long(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "ANSWER_S", 0.5)

    async def stop() -> None:
        store = SharedResponses(estate, BOUNDS, "text")
        assert await store.put("ann", "r", None, b"{}", TURN)
        held = await asyncio.to_thread(pid_of, estate)
        os.kill(held, signal.SIGSTOP)
        assert not await store.put("ann", "s", None, b"{}", TURN)
        monkeypatch.setattr(shared, "ANSWER_S", FOREVER_S)  # or the next would wait for it, which it must not
        with pytest.raises(RequestError) as caught:
            await store.body("ann", "r")
        assert (caught.value.fault, caught.value.retry_after_s > 0) == (Fault.UNAVAILABLE, True)
        os.kill(held, signal.SIGCONT)
        store._silent_until_s = 0.0
        assert await store.body("ann", "r") == b"{}"
        await store.close()

    run(stop())


@pytest.mark.parametrize("estate", [SOON_S], indirect=True)
def test_it_lives_as_long_as_a_front_end_does(estate: Estate) -> None:
    async def live() -> int:
        store = SharedResponses(estate, BOUNDS, "text")
        assert await store.put("ann", "r", None, b"{}", TURN)
        held = await asyncio.to_thread(pid_of, estate)
        await asyncio.sleep(2 * SOON_S)
        assert await store.body("ann", "r") == b"{}"
        await store.close()
        return held

    held = run(live())
    assert alive([held])
    assert not wait_gone([held], patience_s=120.0)


def test_it_ends_with_its_application(estate: Estate) -> None:
    async def begin() -> int:
        store = SharedResponses(estate, BOUNDS, "text")
        assert await store.put("ann", "r", None, b"{}", TURN)
        await store.close()
        return await asyncio.to_thread(pid_of, estate)

    held = run(begin())
    end_responses(estate.namespace)
    assert not wait_gone([held], patience_s=120.0)
    end_responses(estate.namespace)  # once more is nothing
