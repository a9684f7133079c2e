"""What `manta serve` says of the models beside the first while they come up."""

import pytest

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL, ModelSettings
from deploy.config.serve import ServeConfig
from deploy.serving import applications
from deploy.serving.applications import FurtherStarts
from scheduler.server.stats import ClusterStatus, EngineStats, GroupStats


def test_how_each_model_comes_up_or_why_it_has_failed_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    up = ClusterStatus(phase="ready", engine=EngineStats(groups=(GroupStats(0, True, 1, 0, 0, 0, 0),)))
    given_up: dict[str, str | None] = {"manta:a": None, "manta:b": None, "manta:c": None}
    answers = {"manta:b": ClusterStatus(phase="starting"), "manta:c": up}

    def status_of(application: str) -> ClusterStatus:
        if application not in answers:
            raise TimeoutError
        return answers[application]

    monkeypatch.setattr(applications, "further_applications", lambda _: given_up)
    monkeypatch.setattr(applications, "_status_of", status_of)
    engine, said = EngineConfig(model=str(EMBEDDED_MODEL)), list[str]()
    models = [ModelSettings(engine, ServeConfig(served_model_name=name)) for name in "abc"]
    starts = FurtherStarts(models, "manta", said.append)
    for _ in range(2):
        starts.look()
    assert said == ["b takes no requests yet: starting", "c is ready"]
    given_up["manta:a"] = "ValueError: 3 ranks do not divide 4 heads"
    answers["manta:b"] = ClusterStatus(phase="failed", progress=("placing", "no such GPU"))
    for _ in range(2):
        starts.look()
    assert said[2:] == ["a has failed: ValueError: 3 ranks do not divide 4 heads", "b has failed: no such GPU"]
    answers["manta:b"] = up
    starts.look()
    assert said[4:] == ["b is ready"]
