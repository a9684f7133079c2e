"""Joins a Ray cluster, or starts one on this machine. Imports ray, and grpc to ask first whether anybody answers.

Ray itself tries a dead address for half a minute, a file that names a dead cluster for longer, and says little of why.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import ray
from ray._common.network_utils import parse_address
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.node import Node
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from cluster.config import EngineConfig
from cluster.engine import EngineError, Progress
from cluster.shadows import job_environment, refuse_unclaimed

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 30.0
"""Whoever listens may be busy, and is waited for longer than one that is not there."""

QUESTION = "/ray.rpc.NodeInfoGcsService/CheckAlive"
OTHERWISE = "start a cluster with `ray start --head`, or leave ray_address (--ray-address) out: Manta then starts its own"

HEARD_S = 5.0

IDLE = ("start_monitor", "start_api_server", "start_log_monitor")
"""Three of Ray's processes, 280 MiB and 3 CPU seconds of a start, that nobody asks for anything on a cluster of our own: its
autoscaler, which has no machine to add; the server of a dashboard that is off; and what reads all logs for drivers that want
none, and keeps files and memory of every process that there was."""

LATE = "timed out during startup"
"""Ray's words of a node that was not there in time."""

_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Ray takes 127.0.0.1 for a mistake and puts the outward address in its place; the rest of the loopback range it keeps."""


def connect_ray(config: EngineConfig, cpus: int, progress: Progress) -> bool:
    """True if the cluster is ours, to be shut down with the engine.

    A cluster of our own counts logical CPUs, as many as the ranks want: they share the cores of this machine.
    Errors: EngineError if nobody answers at `ray_address`, or not to us.
    """
    if ray.is_initialized():
        refuse_unclaimed()
        return False
    if config.ray_address is not None:
        progress(f"joining the Ray cluster at {config.ray_address}")
        check_address(config.ray_address)
        with _own_sigterm():
            ray.init(
                address=config.ray_address, runtime_env=job_environment(), log_to_driver=False, logging_level=logging.ERROR
            )
        return False
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15, and whatever else computes here would starve ranks
    progress("starting Ray on this machine")
    start_ray(max(cpus, os.cpu_count() or 1), runtime_env=job_environment(), logging_level=logging.ERROR)
    return True


def start_ray(cpus: int, **options: Any) -> None:
    """A cluster of this process's own, without `IDLE`, whatever else runs on this machine. options: more of `ray.init`'s.

    Ray gives a node half a minute to start in, which an overloaded machine may not keep: it has a second one. Errors: Ray's.
    """
    start = partial(
        ray.init, address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, _node_ip_address=_LOOPBACK,
        **options,
    )  # fmt: skip
    with _own_sigterm(), _without_idle_processes():
        try:
            start()
        except Exception as error:
            if LATE not in str(error):
                raise
            logger.warning("Ray did not start in time: once more")
            ray.shutdown()
            start()


def check_address(address: str) -> None:
    """Within seconds. Errors: EngineError that says what is wrong with `address` and what to do."""
    if address == "local" or "://" in address:
        return
    found = _resolve(address)
    code = _ask(found)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise EngineError(
                f"the Ray cluster at {found} wants a token: write it into ~/.ray/auth_token and leave RAY_AUTH_MODE unset, or "
                "set RAY_AUTH_TOKEN and RAY_AUTH_MODE=token"
            )
        try:
            header = AuthenticationTokenLoader.instance().get_token_for_http_header() or {}
        except AuthenticationError as error:
            raise EngineError(
                f"the Ray cluster at {found} wants a token, and RAY_AUTH_MODE=token finds none here: write it into "
                "~/.ray/auth_token, or set RAY_AUTH_TOKEN"
            ) from error
        code = _ask(found, header)
        if code is grpc.StatusCode.UNAUTHENTICATED:
            raise EngineError(
                f"the Ray cluster at {found} refuses our token: it has another one than RAY_AUTH_TOKEN, the file that "
                "RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token (the first of them that is there counts)"
            )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        gone = " (Ray's note of the cluster that was started last: it has gone)" if address == "auto" else ""
        raise EngineError(f"no Ray cluster answers at {found}{gone}: {OTHERWISE}")


def _resolve(address: str) -> str:
    """host:port. Errors: EngineError."""
    try:
        found: str | None = canonicalize_bootstrap_address(address)
    except Exception as error:  # Ray raises whatever its parsers and resolvers do
        raise EngineError(f"ray_address={address!r} is not the address of a Ray cluster ({error}): {OTHERWISE}") from error
    if found is None:
        raise EngineError(f"ray_address={address!r}, and no Ray cluster runs on this machine: {OTHERWISE}")
    return found


def _ask(address: str, header: dict[str, str] | None = None) -> grpc.StatusCode:
    """How Ray's GCS answers; a message without content is one that it understands."""
    host, port = parse_address(address) or ("", "")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return grpc.StatusCode.UNAVAILABLE
    metadata = [(name.lower(), value) for name, value in (header or {}).items()]
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(QUESTION, request_serializer=bytes, response_deserializer=bytes)
        try:
            ask(b"", timeout=ANSWER_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


@contextlib.contextmanager
def _without_idle_processes() -> Iterator[None]:
    """Inside, `ray.init` starts a cluster without `IDLE`. Ray's command line has options for these, `ray.init` has none."""
    starts = {name: vars(Node)[name] for name in IDLE if name in vars(Node)}  # a Ray that has other names starts them all
    for name in starts:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, start in starts.items():
            setattr(Node, name, start)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray puts handlers of its own for SIGTERM, in C++ and in Python, which print a trace and end the process at once. Whoever
    has one keeps it."""
    previous = signal.getsignal(signal.SIGTERM)
    ours = callable(previous) and threading.current_thread() is threading.main_thread()
    try:
        yield
    except SystemExit:  # only Ray's handlers raise it
        if ours:
            signal.signal(signal.SIGTERM, previous)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(HEARD_S)  # for one that lets another thread end this one
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, previous)
