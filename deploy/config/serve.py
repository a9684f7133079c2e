"""What an endpoint is asked to be: who may use it, how much one request may ask for. One frozen record, valid from its birth.

Like `cluster.config.EngineConfig`, each field carries the sentence that the command line shows. Imports nothing but `option`.
"""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cluster.config import option

LOG_FORMATS = ("text", "json")
TOOL_FORMATS = ("hermes", "llama")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """The endpoint of one model. Errors: ValueError that names the field, the value given and what is legal."""

    host: str = option("127.0.0.1", "Address to listen on. Anything but loopback needs API keys, or --no-auth.")
    port: int = option(8000, "Port of the HTTP endpoint.")
    grpc_port: int | None = option(None, "Port of the gRPC endpoint.", shown="no gRPC")
    served_model_name: str | None = option(None, "Name that clients ask for.", shown="the checkpoint folder's name")
    app_name: str = option("manta", "Name of the application on a Ray cluster that serves others, too.")
    route_prefix: str = option("/", "Path below which a Ray cluster serves this application, beside others.")
    haproxy: bool = option(True, "HAProxy before the front ends, instead of Ray Serve's own proxy in Python.")
    replicas: int = option(1, "Front-end processes that tokenise, stream and detokenise.")
    api_key_file: str | None = option(
        None, "File of API keys, one a line; MANTA_API_KEYS holds more, apart by commas.", shown="none"
    )
    best_priority: int = option(
        0, "Most urgent priority (lowest number) to ask for; `priority=N` behind a key in its file is that key's."
    )
    auth: bool = option(True, "Refuse to listen beyond loopback without API keys.")
    share_prefix_cache: bool = option(
        False,
        "Let all API keys (without keys: all users) reuse one another's cached prefixes: more hits, but cached_tokens and the "
        "time that an answer takes then tell each of them what others have asked.",
    )
    cors_origins: tuple[str, ...] = option((), "Origin whose pages may call the endpoint; repeatable.", shown="none")
    request_timeout_s: float = option(600.0, "Deadline of a request, in seconds; a request may ask for an earlier one.")
    receive_timeout_s: float = option(60.0, "Seconds in which a request's headers, and then its body, must have arrived.")
    max_connections: int = option(1024, "Connections of one address at most; with gRPC its calls.")
    max_request_bytes: int = option(8 << 20, "Largest request body.", shown="8MiB", size=True)
    max_choices: int = option(16, "Choices (n, best_of) of one request at most.")
    max_prompts: int = option(64, "Prompts of one completion request at most.")
    max_stops: int = option(16, "Stop strings and stop ids of one request at most.")
    max_logit_bias: int = option(1024, "Entries of logit_bias of one request at most.")
    max_queued_requests: int = option(4096, "Requests that may wait for a group; further ones get 429.")
    max_queued_tokens: int = option(4 << 20, "Prompt tokens that may wait for a group; further requests get 429.")
    tool_format: str | None = option(
        None, "How the model writes calls of tools: hermes or llama.", shown="told by the chat template"
    )
    log_format: str = option("text", "Lines of the log: text or json.")
    request_log: str | None = option(
        None, "File that gets lengths and hashes of every request, never content.", shown="none"
    )
    otlp_endpoint: str | None = option(None, "OpenTelemetry collector (OTLP over HTTP) for traces.", shown="no traces")

    def __post_init__(self) -> None:
        limits = ("max_request_bytes", "max_choices", "max_prompts", "max_queued_requests", "max_queued_tokens")
        for name in ("replicas", "max_connections", *limits):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1: raise it")
        for name in ("port", "grpc_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port < 1 << 16:
                raise ValueError(f"{name}={port} is outside [0, 65535]: choose a port")
        if not self.app_name or "#" in self.app_name:
            raise ValueError(f"app_name={self.app_name!r} cannot be one: choose a name without #")
        if not self.route_prefix.startswith("/") or (self.route_prefix.endswith("/") and self.route_prefix != "/"):
            raise ValueError(f"route_prefix={self.route_prefix!r} is not a path: write / or, for example, /qwen")
        for name, what in (("request_timeout_s", "end"), ("receive_timeout_s", "arrive")):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0: give requests seconds to {what} in")
        if self.log_format not in LOG_FORMATS:
            raise ValueError(f"log_format={self.log_format!r} is unknown: choose one of {', '.join(LOG_FORMATS)}")
        if self.tool_format not in (None, *TOOL_FORMATS):
            raise ValueError(f"tool_format={self.tool_format!r} is unknown: choose one of {', '.join(TOOL_FORMATS)}")

    @property
    def base_url(self) -> str:
        """Where a client on this machine reaches the endpoint: the loopback, if it listens on every address."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        prefix = "" if self.route_prefix == "/" else self.route_prefix
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{prefix}"

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether it is an address of this machine for itself, or the one name that always is. Any other name may be resolved to
    anything."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def model_name(served: str | None, checkpoint: str) -> str:
    """What clients call the model: as told, else the name of the checkpoint's folder as it was given, a link's own."""
    return served or Path(os.path.abspath(checkpoint)).name
