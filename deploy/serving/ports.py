"""Ports of an endpoint: whether they are free, before anything is loaded, and whether it answers there, before it says so.

Imports httpx when asked.
"""

import contextlib
import socket
import time
from collections.abc import Callable

from deploy.config.load import ConfigError, proxy_ports
from deploy.config.serve import ServeConfig

ASK_TIMEOUT_S = 10.0
POLL_S = 0.2
IN_A_ROW = 10
"""Answers to as many newcomers. Two HAProxies share them by chance, and each learns of a change in its own time."""


def reserve(host: str, port: int, what: str, cure: str) -> socket.socket:
    """A bound socket that does not listen yet: nobody else gets the port, and clients are refused until it does.

    what: the port's use, cure: how to choose another. Errors: ConfigError if the port is taken or the host is not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)  # asyncio sends at once (TCP_NODELAY) only where TCP is named
    except OSError as error:
        raise ConfigError(f"host={host!r} is no address of this machine: {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(f"port {port} on {host}, {what}, cannot be had ({error.strerror}): {cure}") from error
    return bound


def check_free(serve: ServeConfig) -> None:
    """Every port that an endpoint with proxies of its own takes. Errors: ConfigError that names the first that is taken."""
    wanted = [(serve.host, serve.port, "for HTTP", "choose another with --port")]
    if 0 in (serve.port, serve.grpc_port):
        raise ConfigError("port 0: Ray's proxies have to be told one; the system chooses it with --local alone")
    if serve.grpc_port is not None:
        wanted.append((serve.host, serve.grpc_port, "for gRPC", "choose another with --grpc-port"))
    for what, (variable, port) in proxy_ports(serve).items():
        wanted.append(("127.0.0.1", port, f"for {what}", f"set {variable} to a free one, or say --no-haproxy"))
    for each in wanted:
        reserve(*each).close()


def await_answer(serve: ServeConfig, model: str, key: str | None, timeout_s: float, wait: Callable[[], None]) -> None:
    """Returns once requests through the very URL that clients are told are answered by this model, `IN_A_ROW` of them, each by
    a connection of its own. wait: called after one that is not. Errors: TimeoutError that says what was seen last."""
    import httpx

    deadline = time.monotonic() + timeout_s
    headers = {"Connection": "close"} | ({"Authorization": f"Bearer {key}"} if key else {})
    seen, answered = "no answer", 0
    with httpx.Client(base_url=serve.base_url, headers=headers, timeout=ASK_TIMEOUT_S, trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                answer = client.get("/v1/models")
                seen = f"status {answer.status_code}"
                if answer.status_code == 200:
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # somebody else's answer
                        if model in [each["id"] for each in answer.json()["data"]]:
                            answered += 1
                            if answered == IN_A_ROW:
                                return
                            continue
                    seen = f"another server's answer: {answer.text[:80]!r}"
            except httpx.HTTPError as error:
                seen = str(error) or type(error).__name__
            answered = 0
            wait()
    raise TimeoutError(f"the model is ready, but requests to {serve.base_url} do not reach it ({seen})")
