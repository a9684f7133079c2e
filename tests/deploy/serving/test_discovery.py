"""Front ends follow which models Serve has beside the first: what is opened, exchanged, refused and let go, and when."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve._private.application_state import ApplicationStatusInfo, StatusOverview
from ray.serve._private.common import DeploymentStatusInfo, DeploymentStatusTrigger
from ray.serve.schema import ApplicationStatus, DeploymentStatus

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL, ModelSettings
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.models.adapters import OwnShelf
from deploy.frontend.models.further import FurtherModels, ModelState
from deploy.observing.observer import Observer
from deploy.serving.replicas import discovery as module
from deploy.serving.replicas import engine as engine_module
from deploy.serving.replicas.administration import ServeAdministration
from deploy.serving.replicas.discovery import Discovery
from deploy.serving.replicas.engine import ServedVersion, further_name
from deploy.text.prompts import Prompt
from scheduler.server.stats import ClusterStatus
from tests.deploy.doors.http.conftest import ScriptedCluster
from tests.deploy.frontend.fake_engine import FakeEngine
from tests.shared.adapters import make_adapter

PATIENCE_S = 60.0
OUTPUT = [200, 201, 202]


def told(name: str, version: str = "1", **limits: Any) -> ServedVersion:
    engine = EngineConfig(model=str(EMBEDDED_MODEL))
    return ServedVersion(ModelSettings(engine, ServeConfig(served_model_name=name, **limits)), 1, version)


def with_adapter(name: str, version: str, *adapters: str) -> ServedVersion:
    plain = told(name, version)
    return replace(plain, config=replace(plain.config, engine=replace(plain.config.engine, lora=adapters, max_loras=2)))


class FakeServe:
    """Applications, and what their Engines tell; None: that one does not answer. building: those that have no Engine yet. up:
    versions of which groups are up. given_up: applications that Serve does not try any more, and why."""

    def __init__(self) -> None:
        self.applications: dict[str, ServedVersion | None] = {}
        self.building: set[str] = set()
        self.up: set[str] = {"1"}
        self.engines: dict[tuple[str, str], FakeEngine] = {}
        self.fault: Exception | None = None
        self.given_up: dict[str, str] = {}
        self.deleted: list[str] = []

    def further_applications(self, endpoint: str) -> dict[str, str | None]:
        if self.fault is not None:
            raise self.fault
        return {name: self.given_up.get(name) for name in self.applications if name.startswith(endpoint + ":")}

    def delete(self, name: str, _blocking: bool) -> None:
        self.deleted.append(name)
        del self.applications[name]

    def get_deployment_handle(self, name: str, app_name: str) -> Any:
        if app_name in self.building:
            raise KeyError(f"{name} of {app_name} does not exist")
        return FakeHandle(self, app_name)

    def cluster(self, _: Any, application: str, version: str) -> Any:
        engine = self.engines.setdefault((application, version), FakeEngine(OUTPUT))
        return FakeCluster(engine, lambda: version in self.up)


class FakeHandle:
    def __init__(self, serve: FakeServe, application: str) -> None:
        self.told = self
        self._serve, self._application = serve, application

    async def remote(self) -> ServedVersion:
        if (answer := self._serve.applications[self._application]) is None:
            raise TimeoutError("the Engine is being replaced")
        return answer


class FakeCluster(ScriptedCluster):
    def __init__(self, engine: FakeEngine, up: Callable[[], bool]) -> None:
        super().__init__(engine, lives=9)
        self._up = up

    async def groups_are_up(self) -> bool:
        return self._up()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    fake = FakeServe()
    monkeypatch.setattr(module, "further_applications", fake.further_applications)
    monkeypatch.setattr(serve, "get_deployment_handle", fake.get_deployment_handle)
    monkeypatch.setattr(serve, "delete", fake.delete)
    monkeypatch.setattr(module, "ServeCluster", fake.cluster)
    monkeypatch.setattr(module, "AdapterShelf", lambda _: OwnShelf())
    monkeypatch.setattr(module, "serves_another_version", lambda _: True)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "TURN_POLL_S", 0.01)
    monkeypatch.setattr(module, "LINGER_S", 0.01)
    return fake


def following(work: Callable[[Discovery, FurtherModels], Awaitable[None]], limits: ServeConfig | None = None) -> None:
    """Does the work beside a discovery for the endpoint `manta`, whose first model is `tiny`."""

    async def run() -> None:
        further = FurtherModels()
        discovery = Discovery("manta", "tiny", limits or ServeConfig(), further)
        await discovery.begin()
        task = asyncio.create_task(discovery.run())
        try:
            await work(discovery, further)
            discovery.check()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    asyncio.run(run())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def names(further: FurtherModels) -> list[str]:
    return [model.name for model in further]


def test_a_front_end_knows_all_models_before_it_takes_requests(fake: FakeServe) -> None:
    fake.applications = {"manta:a": told("a"), "manta:b": told("b"), "other:c": told("c")}

    async def work(_: Discovery, further: FurtherModels) -> None:
        assert names(further) == ["a", "b"]

    following(work)


def test_models_come_and_go(fake: FakeServe) -> None:
    async def work(discovery: Discovery, further: FurtherModels) -> None:
        assert names(further) == []
        fake.applications["manta:a"] = told("a", tool_parser="none", max_choices=9)
        await until(lambda: names(further) == ["a"])
        model = further.get("a")
        assert model is not None
        assert (model.config.tool_parser, model.config.max_choices) == ("none", 3), "what is the endpoint's is not the model's"
        assert discovery.opened("a") is not None
        del fake.applications["manta:a"]
        await until(lambda: names(further) == [])
        await until(lambda: fake.engines["manta:a", "1"].closed)
        assert discovery.opened("a") is None

    following(work, ServeConfig(max_choices=3))


def test_what_is_under_way_at_a_model_that_goes_ends_first(fake: FakeServe) -> None:
    fake.applications["manta:a"] = told("a")

    async def work(_: Discovery, further: FurtherModels) -> None:
        model, engine = further.get("a"), fake.engines["manta:a", "1"]
        assert model is not None
        engine.hold_after = 0
        await until(lambda: model.service.connected)
        async with output_of(model.service) as output:
            await until(lambda: model.service.under_way)
            del fake.applications["manta:a"]
            await until(lambda: names(further) == [])
            await asyncio.sleep(0.1)
            assert not engine.closed
            engine.hold_after = None
            engine.released.set()
            assert await output == OUTPUT
        await until(lambda: engine.closed)

    following(work)


@asynccontextmanager
async def output_of(service: Any) -> AsyncIterator["asyncio.Task[list[int]]"]:
    """Of a request that begins now."""

    async def ask() -> list[int]:
        prompt: Prompt = await service.prompt([1, 2, 3])
        return [
            token async for _, delta in service.generate([prompt], request_id="r") for choice in delta.choices
            for token in choice.token_ids
        ]  # fmt: skip

    asking = asyncio.create_task(ask())
    yield asking
    await asking


def test_an_engine_or_a_serve_that_does_not_answer_changes_nothing(fake: FakeServe) -> None:
    fake.applications["manta:a"] = told("a")

    async def work(_: Discovery, further: FurtherModels) -> None:
        model = further.get("a")
        fake.applications["manta:a"] = None
        await asyncio.sleep(0.1)
        fake.fault = RuntimeError("the controller is being replaced")
        await asyncio.sleep(0.1)
        fake.fault, fake.applications["manta:a"] = None, told("a")
        await asyncio.sleep(0.1)
        assert further.get("a") is model, "the very same, of which nothing was opened anew"

    following(work)


def test_an_application_that_is_still_being_built_is_waited_for(fake: FakeServe) -> None:
    async def work(_: Discovery, further: FurtherModels) -> None:
        fake.building.add("manta:a")
        fake.applications["manta:a"] = told("a")
        await asyncio.sleep(0.1)
        assert names(further) == []
        fake.building.clear()
        await until(lambda: names(further) == ["a"])

    following(work)


def test_newcomers_go_to_another_version_once_its_groups_are_up(fake: FakeServe) -> None:
    fake.applications["manta:a"] = told("a")

    async def work(_: Discovery, further: FurtherModels) -> None:
        old = further.get("a")
        fake.applications["manta:a"] = told("a", "2")
        await asyncio.sleep(0.1)
        assert further.get("a") is old
        fake.applications["manta:a"] = told("a", "3")  # deployed once more before that one is up
        fake.up.add("3")
        await until(lambda: further.get("a") is not old)
        await until(lambda: fake.engines["manta:a", "1"].closed)
        assert not fake.engines["manta:a", "3"].closed

    following(work)


def test_what_cannot_be_served_is_said_once_and_holds_up_nobody(
    fake: FakeServe, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = told("broken")
    config = ModelSettings(replace(broken.config.engine, model=str(tmp_path)), broken.config.serve)
    fake.applications = {"manta:broken": replace(broken, config=config), "manta:tiny": told("tiny"), "manta:a": told("a")}

    async def work(_: Discovery, further: FurtherModels) -> None:
        assert names(further) == ["a"]
        await asyncio.sleep(0.2)
        said = [record.getMessage() for record in caplog.records if "cannot be served" in record.getMessage()]
        assert len(said) == 2
        assert any("another model as 'tiny'" in words for words in said)
        fake.applications["manta:tiny"] = told("second")
        await until(lambda: names(further) == ["a", "second"])
        fake.applications["manta:twice"] = told("a")
        await asyncio.sleep(0.1)
        assert names(further) == ["a", "second"]

    following(work)


def test_another_version_whose_adapters_cannot_be_served_leaves_the_one_that_is(fake: FakeServe, tmp_path: Path) -> None:
    """One of them has the name of another model."""
    folder = make_adapter(tmp_path / "adapter", EMBEDDED_MODEL)
    fake.applications = {"manta:a": with_adapter("a", "1", f"own={folder}"), "manta:b": told("b")}
    fake.up.add("2")

    async def work(discovery: Discovery, further: FurtherModels) -> None:
        served = [model for model in further.listed() if model.name in ("a", "own")]
        assert len(served) == 2
        fake.applications["manta:a"] = with_adapter("a", "2", f"own={folder}", f"b={folder}")
        await until(lambda: "manta:a" in discovery._refused)
        assert [model for model in further.listed() if model.name in ("a", "own")] == served
        fake.applications["manta:a"] = with_adapter("a", "2", f"own={folder}", f"c={folder}")
        await until(lambda: names(further) == ["a", "b"] and further.get("c") is not None)
        assert served != [model for model in further.listed() if model.name in ("a", "own")]

    following(work)


def test_a_model_that_is_tried_again_and_again_leaves_nothing_behind(
    fake: FakeServe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    fake.applications["manta:a"] = with_adapter("a", "1", f"own={tmp_path / 'missing'}")

    async def work(discovery: Discovery, further: FurtherModels) -> None:
        for _ in range(3):
            await until(lambda: "manta:a" in discovery._refused)
            discovery._refused.clear()
        fake.applications.clear()
        await until(lambda: not discovery._opening)
        assert not [thread for thread in threading.enumerate() if thread.name == "manta-request-log"]
        assert names(further) == []

    following(work, ServeConfig(request_log=str(tmp_path / "log")))


def administration(discovery: Discovery) -> ServeAdministration:
    """Of the endpoint `manta`; nobody asks its first model's Engine."""
    limits = ServeConfig(app_name="manta", served_model_name="tiny")
    nobody: Any = None
    config = EngineConfig(model=str(EMBEDDED_MODEL))
    return ServeAdministration(nobody, config, limits, ApiKeys(), 1, discovery, nobody, nobody)


class SlowObservers:
    """Observers that are not closed before they may be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_close = threading.Event()
        self.closing: list[Observer] = []
        self.closed: list[Observer] = []
        self._close = Observer.close
        monkeypatch.setattr(Observer, "close", lambda observer: self.close(observer))

    def close(self, observer: Observer) -> None:
        self.closing.append(observer)
        assert self.may_close.wait(PATIENCE_S)
        self._close(observer)
        self.closed.append(observer)


@pytest.mark.parametrize("why", ["another version waits for its turn", "an adapter is missing", "its name is taken"])
def test_a_model_that_goes_while_it_is_opened_is_closed_to_the_end_however_long_that_takes(
    why: str, fake: FakeServe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    observers = SlowObservers(monkeypatch)
    fake.applications["manta:a"] = told("a", "1")

    async def work(discovery: Discovery, further: FurtherModels) -> None:
        if why == "another version waits for its turn":
            fake.applications["manta:a"] = told("a", "2")
            await until(lambda: ("manta:a", "2") in fake.engines)
        else:  # it is being closed when it goes
            missing = with_adapter("b", "1", f"own={tmp_path / 'missing'}")
            fake.applications["manta:b"] = missing if why == "an adapter is missing" else told("tiny")
            await until(lambda: observers.closing)
        fake.applications.clear()
        await until(lambda: len(observers.closing) == 2)
        for _ in range(3):
            await discovery.look()
        assert discovery._opening
        observers.may_close.set()
        await until(lambda: not discovery._opening and len(observers.closed) == 2)
        assert names(further) == []

    following(work, ServeConfig(request_log=str(tmp_path / "log")))


def test_a_model_that_is_closed_when_its_front_end_ends_is_closed_to_the_end(
    fake: FakeServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    observers = SlowObservers(monkeypatch)
    fake.applications["manta:a"] = told("a")

    async def work(discovery: Discovery, _: FurtherModels) -> None:
        fake.applications.clear()
        await until(lambda: observers.closing)
        (leaving,) = discovery._leaving
        leaving.cancel()
        await asyncio.sleep(0.05)
        assert not leaving.done()
        observers.may_close.set()
        await until(lambda: not discovery._leaving)
        assert observers.closed == observers.closing

    following(work)


@pytest.mark.parametrize("failure", [None, "ValueError: 3 ranks do not divide 4 heads"], ids=["coming up", "given up"])
def test_a_model_whose_engine_is_not_up_is_told_of_and_can_be_removed(
    failure: str | None, fake: FakeServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ASK_TIMEOUT_S", 0.1)
    application = further_name("manta", "org/x")

    async def work(discovery: Discovery, further: FurtherModels) -> None:
        endpoint = administration(discovery)
        fake.applications = {"manta:a": told("a"), application: None}
        if failure is not None:
            fake.given_up[application] = failure
        await until(lambda: names(further) == ["a"])
        phase, reason = ("starting", "its engine is starting") if failure is None else ("failed", failure)
        assert await endpoint.model("org/x") == ModelState("org/x", phase, reason)
        listed = {state.id: state for state in await endpoint.models()}
        assert listed.keys() == {"a", application.removeprefix("manta:")}
        assert listed[application.removeprefix("manta:")].reason == reason
        await endpoint.remove("org/x")
        assert fake.deleted == [application]
        with pytest.raises(RequestError) as refusal:
            await endpoint.remove("org/x")
        assert refusal.value.fault is Fault.NOT_FOUND
        assert names(further) == ["a"]

    following(work)


def test_a_model_is_removed_by_the_name_that_it_is_served_as(fake: FakeServe) -> None:
    fake.applications = {"manta:a": told("b"), "manta:c": told("tiny")}

    async def work(discovery: Discovery, _: FurtherModels) -> None:
        endpoint = administration(discovery)
        with pytest.raises(RequestError, match="no model 'a'"):
            await endpoint.remove("a")  # its application is called so
        state = await endpoint.model("c")
        assert (state.phase, "another model as 'tiny'" in (state.reason or "")) == ("failed", True)
        await endpoint.remove("c")
        await endpoint.remove("b")
        assert fake.deleted == ["manta:c", "manta:a"]

    following(work)


def test_a_model_whose_cluster_has_failed_is_told_of(fake: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.applications = {"manta:a": told("a")}
    status = ClusterStatus(phase="failed", progress=("placing", "the cluster could not be started: no such GPU"))

    async def work(discovery: Discovery, _: FurtherModels) -> None:
        endpoint, opened = administration(discovery), discovery.opened("a")
        assert opened is not None
        assert (await endpoint.model("a")).phase != "failed"

        async def failed(maps: bool = False) -> ClusterStatus:  # noqa: ARG001
            return status

        monkeypatch.setattr(opened[1].model.service.cluster, "status", failed)
        assert await endpoint.models() == [ModelState("a", "failed", status.progress[-1])]

    following(work)


def test_why_serve_has_given_an_application_up_is_the_end_of_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = "The deployment failed to start 3 times in a row. Error:\nTraceback:\n  File ...\nValueError: no such GPU\n"
    engine_failed = DeploymentStatusInfo("Engine", DeploymentStatus.DEPLOY_FAILED, DeploymentStatusTrigger.UNSPECIFIED, trace)

    def overview(name: str, status: ApplicationStatus, *deployments: DeploymentStatusInfo) -> StatusOverview:
        return StatusOverview(ApplicationStatusInfo(status, "Failed to update the deployments"), name, [*deployments])

    class Client:
        def list_serve_statuses(self) -> list[StatusOverview]:
            return [
                overview("manta", ApplicationStatus.RUNNING), overview("manta:gone", ApplicationStatus.DELETING),
                overview("manta:up", ApplicationStatus.RUNNING), overview("manta:coming", ApplicationStatus.DEPLOYING),
                overview("manta:x", ApplicationStatus.DEPLOY_FAILED, engine_failed),
                overview("manta:unbuilt", ApplicationStatus.DEPLOY_FAILED),
            ]  # fmt: skip

    monkeypatch.setattr(engine_module, "_get_global_client", lambda **_: Client())
    assert engine_module.further_applications("manta") == {
        "manta:up": None, "manta:coming": None, "manta:x": "ValueError: no such GPU",
        "manta:unbuilt": "Failed to update the deployments",
    }  # fmt: skip
