"""Several models behind one endpoint over gRPC: each request goes to the one that it names."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.grpc.server import GrpcDoor
from deploy.frontend.models.further import FurtherModel, FurtherModels
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from tests.deploy.doors.grpc.calls import until
from tests.deploy.doors.grpc.conftest import Connect
from tests.deploy.doors.http.conftest import ScriptedCluster
from tests.deploy.frontend.fake_engine import FakeEngine

FIRST, SECOND = [100, 101, 102], [200, 201, 202]
SECOND_LEN = 512


@pytest.fixture
def engines() -> tuple[FakeEngine, FakeEngine]:
    return FakeEngine(FIRST), FakeEngine(SECOND)


@pytest.fixture
def stub(runner: asyncio.Runner, connect: Connect, engines: tuple[FakeEngine, FakeEngine]) -> Any:
    """Of the model `tiny`, and the model `second` beside it."""

    async def start() -> list[Service]:
        started = [
            Service(ServedModel.read(name, EMBEDDED_MODEL, length), ScriptedCluster(engine))
            for name, length, engine in zip(("tiny", "second"), (None, SECOND_LEN), engines, strict=True)
        ]
        running.extend(asyncio.create_task(service.run()) for service in started)
        await until(lambda: all(service.connected for service in started))
        return started

    running: list[asyncio.Task[None]] = []
    first, second = runner.run(start())
    further = FurtherModels()
    further.put(FurtherModel(second, ServeConfig(max_stops=1)))
    yield connect(GrpcDoor(first, ServeConfig(), ApiKeys(), further=further))[0]

    async def stop() -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    for engine in engines:
        engine.released.set()
    runner.run(stop())


Answer = Callable[[Awaitable[Any]], Any]


def test_a_request_goes_to_the_model_that_it_names(stub: Any, answer: Answer) -> None:
    requests = [pb.GenerateRequest(prompt=pb.Prompt(text="a"), model=name) for name in ("", "tiny", "second", "third")]
    results = answer(stub.GenerateBatch(pb.GenerateBatchRequest(requests=requests))).results
    assert [list(result.response.choices[0].token_ids) for result in results[:3]] == [FIRST, FIRST, SECOND]
    assert (results[3].error.code, results[3].error.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "model_not_found")


def test_settings_and_lengths_are_the_models_own(stub: Any, answer: Answer) -> None:
    many = pb.GenerateRequest(prompt=pb.Prompt(text="a"), sampling=pb.SamplingParams(stop=["a", "b"]))
    of_second = pb.GenerateRequest(prompt=many.prompt, sampling=many.sampling, model="second")
    results = answer(stub.GenerateBatch(pb.GenerateBatchRequest(requests=[many, of_second]))).results
    assert [result.error.param for result in results] == ["", "stop"]
    told = answer(stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="a"), model="second")))
    assert told.max_model_len == SECOND_LEN
    models = answer(stub.ListModels(pb.ListModelsRequest())).models
    assert [(model.name, model.max_model_len == SECOND_LEN) for model in models] == [("tiny", False), ("second", True)]


def test_a_request_is_aborted_whichever_model_it_is_of(
    stub: Any, engines: tuple[FakeEngine, FakeEngine], runner: asyncio.Runner
) -> None:
    engines[1].hold_after = 0
    call = stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="a"), model="second", request_id="mine"))

    async def abort() -> tuple[int, grpc.StatusCode]:
        reading = asyncio.create_task(anext(aiter(call)))
        await until(lambda: bool(engines[1].requests))
        aborted = (await stub.Abort(pb.AbortRequest(request_id="mine"))).aborted
        await asyncio.gather(reading, return_exceptions=True)
        return aborted, await call.code()

    assert runner.run(abort()) == (1, grpc.StatusCode.CANCELLED)
