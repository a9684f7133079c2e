"""Requests that are ended from outside: by their id, or by their deadline, whatever their caller is doing just then."""

import asyncio
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace

import pytest

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.observation import Observation
from deploy.frontend.service import ServedModel, Service
from deploy.text.prompts import Prompt, Terms
from scheduler.protocol.sampling import SamplingParams
from tests.deploy.frontend.running import connected

PATIENCE_S = 60.0
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
