"""What an endpoint is asked to be: who may use it, how much one request may ask for. One frozen record, valid from its birth.

Imports the part of it that the scheduler is told.
"""

import ipaddress
import os
from dataclasses import dataclass, replace
from pathlib import Path

from scheduler.config.core import QueueBounds
from scheduler.config.options import OptionRule, above_0, at_least, check, one_of, option, options
from workers.model.sources.naming import folder_of, kind_of

LOG_FORMATS = ("text", "json")
TOOL_PARSERS = (
    "auto", "none", "hermes", "qwen3_coder", "llama3_json", "pythonic", "mistral", "mistral_v11", "deepseek_v3", "deepseek_v31",
    "glm45", "kimi_k2", "openai",
)  # fmt: skip
REASONING_PARSERS = ("auto", "none", "openai", "think")
FURTHER = ":"
"""Stands in the name of a Serve application between that of an endpoint and that of a model beside its first."""

PORTS = OptionRule(lambda port: 0 <= port < 1 << 16, "is outside [0, 65535]: choose a port")


def _is_path(prefix: str) -> bool:
    return prefix == "/" or (prefix.startswith("/") and not prefix.endswith("/"))


@dataclass(frozen=True, kw_only=True)
class AddressConfig:
    """Where an endpoint is found."""

    host: str = option("127.0.0.1", "Address to listen on. Anything but loopback needs API keys, or --no-auth.")
    port: int = option(8000, "Port of the HTTP endpoint.", PORTS)
    grpc_port: int | None = option(None, "Port of the gRPC endpoint.", PORTS, shown="no gRPC")
    served_model_name: str | None = option(None, "Name that clients ask for.", shown="the id, or the folder's name")
    app_name: str = option(
        "manta",
        "Name of the application on a Ray cluster that serves others, too.",
        OptionRule(lambda name: name and not {"#", FURTHER} & {*name}, f"cannot be one: choose a name without # and {FURTHER}"),
    )
    route_prefix: str = option(
        "/",
        "Path below which a Ray cluster serves this application, beside others.",
        OptionRule(_is_path, "is not a path: write / or, for example, /qwen"),
    )

    @property
    def base_url(self) -> str:
        """Where a client on this machine reaches the endpoint: the loopback, if it listens on every address."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        prefix = "" if self.route_prefix == "/" else self.route_prefix
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{prefix}"

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)


@dataclass(frozen=True, kw_only=True)
class ModelServeConfig(QueueBounds):
    """What is a model's own, where an endpoint serves several."""

    chat_template: str | None = option(
        None,
        "File with a chat template (Jinja) to use instead of the checkpoint's; each front end reads it, as it does the "
        "checkpoint.",
        shown="the checkpoint's",
    )
    tool_parser: str = option(
        "auto",
        f"How the model writes calls of tools: {', '.join(TOOL_PARSERS[2:])}; auto: as its chat template shows; none: calls "
        "are left in the text.",
        one_of(TOOL_PARSERS),
    )
    reasoning_parser: str = option(
        "auto",
        "How the model marks its thoughts: think (<think>), openai (channels of gpt-oss), or none, which leaves them in the "
        "answer; auto goes by the chat template.",
        one_of(REASONING_PARSERS),
    )


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelServeConfig, AddressConfig):
    """The endpoint. Errors: ValueError that names the field, the value given and what is legal."""

    haproxy: bool = option(True, "HAProxy before the front ends, instead of Ray Serve's own proxy in Python.")
    replicas: int = option(1, "Front-end processes that tokenise, stream and detokenise.", at_least(1))
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
    request_timeout_s: float = option(
        600.0,
        "Deadline of a request, in seconds; a request may ask for an earlier one.",
        above_0("give requests seconds to end in"),
    )
    receive_timeout_s: float = option(
        60.0,
        "Seconds in which a request's headers, and then its body, must have arrived.",
        above_0("give requests seconds to arrive in"),
    )
    max_connections: int = option(1024, "Connections of one address at most; with gRPC its calls.", at_least(1))
    max_request_bytes: int = option(8 << 20, "Largest request body.", at_least(1), shown="8MiB", size=True)
    max_choices: int = option(16, "Choices (n, best_of) of one request at most.", at_least(1))
    max_prompts: int = option(64, "Prompts of one completion request at most.", at_least(1))
    max_inputs: int = option(2048, "Texts of one request for embeddings, scores or a ranking at most.", at_least(1))
    max_stops: int = option(16, "Stop strings and stop ids of one request at most.")
    max_logit_bias: int = option(1024, "Entries of logit_bias of one request at most.")
    stored_responses: int = option(
        4096, "Answers of /v1/responses that are kept for previous_response_id, at most; 0 keeps none.", at_least(0)
    )
    stored_response_bytes: int = option(
        256 << 20, "Bytes that they may take together, in memory.", at_least(0), shown="256MiB", size=True
    )
    stored_response_age_s: float = option(86400.0, "Seconds for which each is kept.", above_0("use --stored-responses 0"))
    strict_fields: bool = option(
        False, "Refuse requests with fields that are not known here, which are otherwise ignored with a warning."
    )
    miss_reasons: bool = option(
        False,
        "Say in usage.prompt_tokens_details also why the prompt tokens that were not cached were not: cold, evicted, routed "
        "(another group has them), inside_block.",
    )
    log_format: str = option("text", "Lines of the log: text or json.", one_of(LOG_FORMATS))
    request_log: str | None = option(None, "File that gets lengths and hashes of every request, never content.", shown="none")
    otlp_endpoint: str | None = option(None, "OpenTelemetry collector (OTLP over HTTP) for traces.", shown="no traces")

    def __post_init__(self) -> None:
        check(self)


def is_loopback(host: str) -> bool:
    """Whether it is an address of this machine for itself, or the one name that always is. Any other name may be resolved to
    anything."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def for_model(endpoint: ServeConfig, model: ServeConfig) -> ServeConfig:
    """The settings of an endpoint for one of its models: what is the model's own is `model`'s."""
    own = {f.name: getattr(model, f.name) for f in options(ModelServeConfig)}
    return replace(endpoint, served_model_name=model.served_model_name, **own)


def model_name(served: str | None, checkpoint: str) -> str:
    """What clients call the model: as told, else its id at Hugging Face, or its folder's name as it was given, a link's own."""
    if served:
        return served
    match kind_of(checkpoint):
        case "id":
            return checkpoint
        case "url":
            return checkpoint.rstrip("/").rpartition("/")[2]
    return Path(os.path.abspath(folder_of(checkpoint))).name
