"""Serve's own actors, stopped by a signal: they are ended, and Serve has others."""

import time
from collections.abc import Iterator

import pytest
import ray
from ray import serve

from benchmarks.shared.processes import descendants, kept_stopped, named
from deploy.serving.replicas.attending import Attendant
from scheduler.protocol.sentinel import __file__ as SENTINEL
from tests.shared.ports import free_ports
from tests.shared.ray_heads import own_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CONTROLLER, PROXY = "ray::ServeController", "ray::ProxyActor"
PATIENCE_S = 120.0


@pytest.fixture
def _serve() -> Iterator[None]:
    with own_ray(2):
        (port,) = free_ports(1)
        serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": port})
        yield
        serve.shutdown()


def watched(process: int) -> bool:
    return any(SENTINEL in line and str(process) in line.split() for line in descendants(process).values())


def one_watched(name: str, but: int = 0) -> int:
    """The process of that name, once one stands beside it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        for process in named(name):
            if process != but and watched(process):
                return process
        time.sleep(0.1)
    raise AssertionError(f"nothing stands beside {name}")


@pytest.mark.usefixtures("_serve")
@pytest.mark.parametrize("name", [CONTROLLER, PROXY])
def test_who_is_stopped_is_replaced_and_its_successor_watched(name: str) -> None:
    attendant = Attendant()
    first = one_watched(name)
    with kept_stopped([first]):
        second = one_watched(name, but=first)
    assert second != first
    assert first not in named(name)
    assert serve.status().proxies
    attendant.close()
    assert ray.is_initialized()
