"""Requests that are ended from outside: by their id, or by their deadline, whatever their caller is doing just then."""

import asyncio
import threading
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace

import pytest

from cluster.config import EngineConfig
from cluster.engine import EngineError, OnDeltas, OnFailure, RequestStream
from deploy.config.load import EMBEDDED_MODEL
from deploy.frontend import frontend as frontend_module
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service import service as service_module
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.observation import Observation
from deploy.frontend.service.service import Service
from deploy.text.prompts import Prompt, Terms
from scheduler.protocol.sampling import SamplingParams
from scheduler.server.stats import ClusterStatus
from tests.deploy.frontend.fake_engine import FakeEngine
from tests.deploy.frontend.running import connected

PATIENCE_S = 60.0
SHORT = Prompt([5, 6, 7], SamplingParams(max_tokens=3))
ENDLESS = SamplingParams(max_tokens=1900, ignore_eos=True)
PROMPT = Prompt([5, 6, 7], ENDLESS)


def connected_service(observed: list[Observation] | None = None) -> AbstractAsyncContextManager[Service]:
    config = EngineConfig(model=str(EMBEDDED_MODEL), local=True, kv_memory=32 << 20, threads=1)
    ends = [] if observed is None else observed
    return connected(Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), LocalCluster(config), ends.append))


async def blocks_are_back(service: Service) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            engine = (await service.cluster.status()).engine
            assert engine is not None
            if all(group.held_blocks == 0 and group.running == 0 for group in engine.groups):
                return
            await asyncio.sleep(0.01)


def test_an_abort_by_id_ends_a_request_whose_caller_is_busy() -> None:
    async def scenario() -> None:
        observed: list[Observation] = []
        async with connected_service(observed) as service:
            async with aclosing(service.generate([PROMPT], request_id="mine")) as deltas:
                await anext(deltas)
                assert service.abort("somebody else's") == 0
                assert service.abort("mine") == 1
                await blocks_are_back(service)  # though nobody reads the deltas
                with pytest.raises(RequestError, match="'mine' was aborted") as ended:
                    async for _ in deltas:
                        pass
            assert ended.value.fault is Fault.CANCELLED
            assert [one.outcome for one in observed] == ["cancelled"]
            assert service.abort("mine") == 0
            assert service.under_way == 0

    asyncio.run(scenario())


def test_a_deadline_ends_a_request_whose_caller_is_busy_and_spares_the_caller() -> None:
    async def scenario() -> None:
        async with (
            connected_service() as service,
            aclosing(service.generate([replace(PROMPT, terms=Terms(deadline_s=1.0))], request_id="late")) as deltas,
        ):
            await anext(deltas)
            await blocks_are_back(service)  # a task that was cancelled here would not come out of this wait
            with pytest.raises(RequestError, match="within 1 s") as ended:
                async for _ in deltas:
                    pass
            assert ended.value.fault is Fault.TIMED_OUT

    asyncio.run(scenario())


def test_requests_of_one_id_are_aborted_together() -> None:
    async def scenario() -> None:
        async with connected_service() as service:

            async def ask() -> Fault:
                with pytest.raises(RequestError) as ended:
                    async for _ in service.generate([PROMPT], request_id="twice"):
                        pass
                return ended.value.fault

            asked = [asyncio.create_task(ask()) for _ in range(2)]
            async with asyncio.timeout(PATIENCE_S):
                while service.under_way < 2:
                    await asyncio.sleep(0)
            assert service.abort("twice") == 2
            assert await asyncio.gather(*asked) == [Fault.CANCELLED] * 2

    asyncio.run(scenario())


class Replaced:
    """A cluster whose scheduler dies under the first connection; the second takes as long as the test says."""

    def __init__(self) -> None:
        self.connections = 0
        self.there = True
        self.lose: OnFailure = lambda _: None

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
        if not self.there:
            raise EngineError("there is no scheduler")
        self.connections += 1
        self.lose = on_failure
        engine = FakeEngine(reply=[5, 6, 7])
        return engine.start(EngineConfig(model=str(EMBEDDED_MODEL)), on_deltas, on_failure, lambda _: None)

    async def status(self, maps: bool = False) -> ClusterStatus:  # noqa: ARG002
        return ClusterStatus(phase="ready")


async def _ends(service: Service, prompt: Prompt, name: str = "one") -> int:
    """How many tokens it had. Errors: RequestError."""
    deltas = [delta async for _, delta in service.generate([prompt], request_id=name)]
    return sum(len(choice.token_ids) for delta in deltas for choice in delta.choices)


async def _lose(service: Service, cluster: Replaced) -> None:
    cluster.there = False
    cluster.lose("the scheduler has gone")
    async with asyncio.timeout(PATIENCE_S):
        while service.connected:
            await asyncio.sleep(0.01)


def test_a_scheduler_that_is_being_replaced_is_waited_for() -> None:
    async def scenario() -> None:
        cluster = Replaced()
        async with connected(Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), cluster)) as service:
            await _lose(service, cluster)
            asked = [asyncio.create_task(_ends(service, SHORT, f"{number}")) for number in range(3)]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in asked)
            cluster.there = True
            assert await asyncio.gather(*asked) == [3, 3, 3]
            assert cluster.connections == 2
            assert service.under_way == 0

    asyncio.run(scenario())


def test_a_service_that_ends_while_it_connects_leaves_no_connection() -> None:
    """A scheduler that another version is to take over from waits for the last front end to go."""

    class Slow(Replaced):
        def __init__(self) -> None:
            super().__init__()
            self.asked, self.opens = threading.Event(), threading.Event()
            self.engine: RequestStream | None = None

        def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> RequestStream:
            self.asked.set()
            assert self.opens.wait(PATIENCE_S)
            self.engine = super().connect(on_deltas, on_failure)
            return self.engine

    async def scenario() -> None:
        cluster = Slow()
        running = asyncio.create_task(Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), cluster).run())
        assert await asyncio.to_thread(cluster.asked.wait, PATIENCE_S)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        cluster.opens.set()
        async with asyncio.timeout(PATIENCE_S / 4):
            while not (isinstance(cluster.engine, FakeEngine) and cluster.engine.closed):
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_who_waits_for_one_can_be_aborted_and_has_a_deadline() -> None:
    async def scenario() -> None:
        cluster = Replaced()
        async with connected(Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), cluster)) as service:
            await _lose(service, cluster)
            aborted = asyncio.create_task(_ends(service, SHORT, "mine"))
            late = asyncio.create_task(_ends(service, replace(SHORT, terms=Terms(deadline_s=0.1)), "late"))
            await asyncio.sleep(0)
            assert service.abort("mine") == 1
            for task, fault in ((aborted, Fault.CANCELLED), (late, Fault.TIMED_OUT)):
                with pytest.raises(RequestError) as ended:
                    await task
                assert ended.value.fault is fault

    asyncio.run(scenario())


def test_one_that_does_not_come_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend_module, "REACH_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        cluster = Replaced()
        async with connected(Service(ServedModel.read("tiny", EMBEDDED_MODEL, None), cluster)) as service:
            await _lose(service, cluster)
            with pytest.raises(RequestError, match="it is being replaced") as ended:
                await _ends(service, SHORT)
            assert (ended.value.fault, ended.value.retry_after_s) == (Fault.UNAVAILABLE, 1.0)

    asyncio.run(scenario())


def test_what_is_not_to_be_had_now_always_says_when_to_come_again() -> None:
    for fault in Fault:
        assert (RequestError(fault, "no").retry_after_s > 0) == (fault in (Fault.OVERLOADED, Fault.UNAVAILABLE))
    assert RequestError(Fault.UNAVAILABLE, "no", retry_after_s=30.0).retry_after_s == 30.0


def test_what_nobody_reads_is_not_computed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MOST_UNREAD", 40)

    async def scenario() -> None:
        observed: list[Observation] = []
        async with connected_service(observed) as service:
            async with aclosing(service.generate([PROMPT], request_id="mine")) as deltas:
                await anext(deltas)
                await blocks_are_back(service)  # though it may have 1,900 tokens, and nobody has aborted it
                with pytest.raises(RequestError, match=r"nobody has read the last \d+ tokens") as ended:
                    await anext(deltas)
            assert ended.value.fault is Fault.TIMED_OUT

    asyncio.run(scenario())
