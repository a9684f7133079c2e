"""Whether an `Engine` that Serve ends takes its scheduler and groups with it. Without Ray; Serve is played."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus

from deploy.serving.replicas import engine


def saying(status: ApplicationStatus | None) -> Any:
    return lambda: SimpleNamespace(applications={} if status is None else {"manta": SimpleNamespace(status=status)})


def late() -> Any:
    time.sleep(5.0)


def gone() -> Any:
    raise ConnectionError("Serve does not answer")


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (saying(ApplicationStatus.DEPLOYING), True), (saying(ApplicationStatus.DELETING), False), (saying(None), False),
        (late, True), (gone, True),
    ],
)  # fmt: skip
def test_it_does_where_serve_says_that_no_other_comes(
    monkeypatch: pytest.MonkeyPatch, status: Any, wanted: bool
) -> None:
    """What nobody takes over ends by itself; a controller that is stopped just then must not end what serves."""
    monkeypatch.setattr(engine, "ASK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(serve, "status", status)
    assert engine._is_wanted("manta") is wanted
