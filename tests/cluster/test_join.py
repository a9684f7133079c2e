"""A Ray cluster that cannot be joined is told within seconds, and what to do. What answers here is a stand-in for Ray's GCS."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray

from cluster.engine import EngineError
from cluster.join import LATE, QUESTION, check_address, start_ray

HOST = "127.0.0.2"  # 127.0.0.1 is what Ray puts the outward address for
DEAD = f"{HOST}:1"
TOKEN = "f" * 32


class Gcs(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Knows one token."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        assert details.method == QUESTION
        known = ("authorization", f"Bearer {TOKEN}") in [tuple(pair) for pair in details.invocation_metadata]

        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            if not known:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer, request_deserializer=bytes, response_serializer=bytes)


@pytest.fixture
def protected() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2), handlers=[Gcs()])
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    yield f"{HOST}:{port}"
    server.stop(None)


def test_a_dead_address_says_what_to_do() -> None:
    with pytest.raises(EngineError, match=rf"no Ray cluster answers at {DEAD}: start a cluster with `ray start --head`"):
        check_address(DEAD)


def test_nonsense_says_what_to_do() -> None:
    with pytest.raises(EngineError, match="is not the address of a Ray cluster"):
        check_address("nonsense")


JOIN = """
import sys
from ray._private import services
services.find_gcs_addresses = set  # other tests' clusters run on this machine, and "auto" looks through its processes
from cluster.join import check_address
check_address(sys.argv[1])
"""


def join(address: str, home: Path, **environment: str) -> str:
    """What a process of its own, on a machine where no Ray runs and with nothing of Ray's in its environment, says of it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    asked = subprocess.run(
        [sys.executable, "-c", JOIN, address], env=kept | {"HOME": str(home)} | environment, capture_output=True, text=True
    )
    return asked.stderr if asked.returncode else "joined"


def test_the_note_of_a_cluster_that_has_gone_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(DEAD)
    said = join("auto", tmp_path, RAY_TMPDIR=str(tmp_path))
    assert f"no Ray cluster answers at {DEAD} (Ray's note of the cluster that was started last: it has gone)" in said


def test_a_cluster_that_wants_a_token(protected: str, tmp_path: Path) -> None:
    assert "wants a token: write it into ~/.ray/auth_token" in join(protected, tmp_path)
    assert "finds none here: write it into ~/.ray/auth_token" in join(protected, tmp_path, RAY_AUTH_MODE="token")
    assert "refuses our token" in join(protected, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 32)
    assert join(protected, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) == "joined"


def test_the_token_at_home_is_found(protected: str, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    assert join(protected, tmp_path) == "joined"


@pytest.mark.parametrize(
    ("faults", "starts"), [((), 1), ((f"The current node {LATE}.",), 2), ((LATE, LATE), 2), (("no such port",), 1)]
)
def test_a_ray_of_our_own_that_is_late_is_started_once_more(
    faults: tuple[str, ...], starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, asked = [*faults], list[dict[str, Any]]()

    def init(**options: Any) -> None:
        asked.append(options)
        if left:
            raise Exception(left.pop(0))  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: asked.append({}))
    fails = contextlib.nullcontext() if len(faults) < starts else pytest.raises(Exception, match=faults[-1])
    with fails:
        start_ray(3, logging_level=40)
    first = asked[0]
    assert (first["num_cpus"], first["logging_level"], first["_node_ip_address"]) == (3, 40, HOST)
    assert asked == [first, *[{}, first] * (starts - 1)], "what is left of the first ends before the second"
