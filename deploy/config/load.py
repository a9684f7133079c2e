"""One frozen tree of settings from a YAML file and flags: flags over file over defaults.

The only place that touches the environment: MANTA_CONFIG names the file where no flag does, MANTA_API_KEYS holds keys,
RAY_ADDRESS names the cluster that a Ray job runs on, `bound_openmp_spin` sets how OpenMP waits, and the functions about proxies
set and read what Ray Serve, and Manta in its processes, take from there. Imports no torch, no ray.

    engine:                     # cluster.config.EngineConfig
      model: /models/Qwen3-8B
      tensor_parallel_size: 2
      kv_memory: 40GiB
    serve:                      # deploy.config.serve.ServeConfig, for an endpoint
      port: 8000
    sampling:                   # scheduler.protocol.sampling.SamplingParams, for prompts of `manta generate` that do not say
      temperature: 0.7
    models:                     # of an endpoint of several: each by its name, the first one first
      qwen:                     # keys of `engine:`, which has what all have in common, and the model's own of `serve:`
        model: /models/Qwen3-8B
        tool_parser: hermes
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from cluster.config import EngineConfig
from deploy.config.faults import meant, where
from deploy.config.serve import ModelServeConfig, ServeConfig, for_model, model_name
from scheduler.config.options import options
from scheduler.protocol.sampling import SamplingParams

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny"
CONFIG_VARIABLE = "MANTA_CONFIG"
KEYS_VARIABLE = "MANTA_API_KEYS"
RAY_VARIABLE = "RAY_ADDRESS"
RECEIVE_VARIABLE, CONNECTIONS_VARIABLE = "MANTA_RECEIVE_TIMEOUT_S", "MANTA_MAX_CONNECTIONS"
UNCOUNTED = 1 << 30
DEFAULT_MAX_TOKENS = 128
IDLE_S = 120
"""A HAProxy that another has replaced still takes one request of each connection: none of them is idle for longer."""

PROXY_START_S = "60"
"""Serve's 5 are too little where all cores are busy: it would kill a proxy that comes up, and with it the start."""

OPENMP_SPIN = "2000"
HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
PROXY_PORTS = {
    "HAProxy's page": ("RAY_SERVE_HAPROXY_STATS_PORT", "8404"),
    "HAProxy's metrics": ("RAY_SERVE_HAPROXY_METRICS_PORT", "9101"),
    "the proxy behind HAProxy": ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "8500"),
    "the gRPC proxy behind HAProxy": ("RAY_SERVE_FALLBACK_PROXY_GRPC_PORT", "9500"),
}
SECTIONS = ("engine", "serve", "sampling", "models")
ENGINE_KEYS = tuple(f.name for f in options(EngineConfig))
SERVE_KEYS = tuple(f.name for f in options(ServeConfig))
SAMPLING_KEYS = SamplingParams.__struct_fields__
MODEL_SERVE_KEYS = tuple(f.name for f in options(ModelServeConfig))
MODEL_KEYS = tuple(key for key in ENGINE_KEYS if key not in ("local", "ray_address")) + MODEL_SERVE_KEYS
"""Of one of several models."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_COMMENT = re.compile(r"(^|\s)#.*")
_KEY_WORDS = re.compile(r"(?:priority=(-?\d{1,10}))?(?:(?:^| )(operator))?")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

T = TypeVar("T")
S = TypeVar("S", EngineConfig, ServeConfig)


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which, why, and what to write instead."""


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that a process of Manta is told at its start. further: the models that an endpoint serves beside its first,
    each with the settings of all that is the endpoint's."""

    engine: EngineConfig
    sampling: SamplingParams
    serve: ServeConfig
    further: tuple["ModelSettings", ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model of several. serve: the endpoint's settings, with what is this model's own and its name."""

    engine: EngineConfig
    serve: ServeConfig

    @property
    def name(self) -> str:
        """That clients ask for."""
        return model_name(self.serve.served_model_name, self.engine.model)


def load_config(
    file: Path | None = None,
    engine: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    serve: Mapping[str, Any] | None = None,
) -> Config:
    """Reads the tree. engine, sampling, serve: values given as flags, by field name; None means that a flag was not given."""
    if file is None and (named := environ.get(CONFIG_VARIABLE)):
        file = Path(named)
    tree = {} if file is None else _read_yaml(file)
    try:
        sections = _sections(tree)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    config = _config(sections, engine, sampling, serve)
    if (address := environ.get(RAY_VARIABLE)) and config.engine.ray_address is None and not config.engine.local:
        config = replace(config, engine=replace(config.engine, ray_address=address))
    return config


def model_config(name: str, settings: Mapping[str, Any], endpoint: ServeConfig) -> ModelSettings:
    """A model beside the others of an endpoint, by the keys of its entry below `models:`. Errors: ConfigError."""
    return _model(name, settings, {}, {}, endpoint)


def endpoint_config(tree: Mapping[Any, Any]) -> Config:
    """The tree as it is in memory, such as the arguments of a Ray Serve application. Errors: ConfigError."""
    return _config(_sections(tree))


def engine_config(values: Mapping[str, Any]) -> EngineConfig:
    """Builds the engine's settings by field name; `model` left out means the checkpoint that comes with Manta. `lora` may be a
    mapping of names to folders, or a list of NAME=FOLDER."""
    if isinstance(adapters := values.get("lora"), Mapping):
        for name in adapters:
            if not isinstance(name, str) or "=" in name:
                raise ConfigError(f"lora: {name!r} cannot name an adapter from the start: write a string without '='")
        values = {**values, "lora": [f"{name}={folder}" for name, folder in adapters.items()]}
    if (model := values.get("model", EMBEDDED_MODEL)) is None:
        model = EMBEDDED_MODEL
    if not isinstance(model, str | Path) or not str(model):
        raise ConfigError(f"model={model!r} names no checkpoint: give its folder, its id or its URL, or leave it out")
    return _settings({**values, "model": str(model)}, EngineConfig)


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """Builds sampling parameters by field name. `stop` may be one string; the keys of `logit_bias` may be strings
    (JSON)."""
    reject_unknown(values, SAMPLING_KEYS)
    ready = dict(values)
    if isinstance(ready.get("stop"), str):
        ready["stop"] = (ready["stop"],)
    return _convert(ready, SamplingParams)


def read_api_keys(serve: ServeConfig, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Keys of the environment, then those of the file. Errors: ConfigError, also where an endpoint without keys would be
    reached from other machines."""
    named = [key.strip() for key in environ.get(KEYS_VARIABLE, "").split(",")]
    found = tuple(dict.fromkeys(key for key in (*named, *_key_file(serve)) if key))
    if not all(key.isascii() for key in found):
        raise ConfigError("an API key holds characters that HTTP headers cannot: use ASCII ones")
    if not found and serve.auth and not serve.on_loopback:
        raise ConfigError(
            f"host={serve.host} can be reached from other machines and there is no API key: name a file with api_key_file, set "
            f"{KEYS_VARIABLE}, or say --no-auth (auth: false) to let everybody in"
        )
    return found


def read_key_priorities(serve: ServeConfig) -> dict[str, int]:
    """The most urgent priority of each key whose line in the file has one. Errors: ConfigError."""
    return {key: said.priority for key, said in _key_file(serve).items() if said.priority is not None}


def read_operators(serve: ServeConfig) -> tuple[str, ...]:
    """The keys whose lines in the file say that they may change the cluster. Errors: ConfigError."""
    return tuple(key for key, said in _key_file(serve).items() if said.operator)


class _Said(NamedTuple):
    """Behind a key."""

    priority: int | None
    operator: bool


def _key_file(serve: ServeConfig) -> dict[str, _Said]:
    """A key a line, behind it perhaps `priority=N`, `operator` and a comment. Errors: ConfigError that names the line, never
    the key."""
    if serve.api_key_file is None:
        return {}
    try:
        text = Path(serve.api_key_file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys in {serve.api_key_file}: {error}") from error
    keys: dict[str, _Said] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        words = _COMMENT.sub("", line).split()
        match = _KEY_WORDS.fullmatch(" ".join(words[1:]))
        if words and match is None:
            raise ConfigError(
                f"{serve.api_key_file}, line {number}: behind the key may stand `priority=N`, then `operator`, and a "
                "comment (# ...), nothing else"
            )
        if words and match is not None:
            keys[words[0]] = _Said(int(match[1]) if match[1] else None, match[2] is not None)
    return keys


def parse_size(name: str, value: int | str) -> int:
    """Bytes from 4294967296, "4GiB", "512 MiB", "4g" (binary) or "4GB" (decimal)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f'{name}={value!r} is not a size: write bytes, or a number with a unit such as "4GiB" or "512MiB"')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def reject_unknown(given: Iterable[Any], known: Iterable[str], prefix: str = "") -> None:
    """Refuses keys that nothing reads, naming the nearest one that exists."""
    legal = tuple(known)
    for key in given:
        if key not in legal:
            near = meant(str(key), legal)
            hint = f"did you mean {prefix + near!r}?" if near else f"known are {', '.join(legal)}"
            raise ConfigError(f"unknown key {prefix + str(key)!r}: {hint}")


def _read_yaml(file: Path) -> dict[Any, Any]:
    try:
        tree = msgspec.yaml.decode(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{file} holds a {type(tree).__name__}: write the sections {', '.join(SECTIONS)}")
    return tree or {}


def _sections(tree: Mapping[Any, Any]) -> dict[str, dict[Any, Any]]:
    reject_unknown(tree, SECTIONS)
    sections = {name: _section(tree, name) for name in SECTIONS}
    for name, known in (("engine", ENGINE_KEYS), ("serve", SERVE_KEYS), ("sampling", SAMPLING_KEYS)):
        reject_unknown(sections[name], known, f"{name}.")
    return sections


def _config(
    sections: Mapping[str, dict[Any, Any]],
    engine: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    serve: Mapping[str, Any] | None = None,
) -> Config:
    engine_values, serve_values = sections["engine"] | _given(engine), sections["serve"] | _given(serve)
    params = sampling_params({"max_tokens": DEFAULT_MAX_TOKENS} | sections["sampling"] | _given(sampling))
    if not sections["models"]:
        return Config(engine_config(engine_values), params, _settings(serve_values, ServeConfig))
    for key, values in (("model", engine_values), ("served_model_name", serve_values)):
        if key in values:
            raise ConfigError(f"{key}={values[key]!r} goes with one model, and models names several: say it there")
    endpoint = _settings(serve_values, ServeConfig)
    first, *further = (
        _model(name, _section(sections["models"], name, "models."), engine_values, serve_values, endpoint)
        for name in sections["models"]
    )
    return Config(first.engine, params, first.serve, tuple(further))


def _model(
    name: Any, settings: Mapping[Any, Any], engine: Mapping[str, Any], serve: Mapping[str, Any], endpoint: ServeConfig
) -> ModelSettings:
    """engine, serve: values that all models of the endpoint have in common. Errors: ConfigError."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"models: {name!r} is no name: write what clients shall ask for, in quotes if it is a number")
    reject_unknown(settings, MODEL_KEYS, f"models.{name}.")
    if not settings.get("model"):
        raise ConfigError(f"models.{name}.model is missing: name the folder, the id or the URL of its checkpoint")
    own = {key: settings[key] for key in MODEL_SERVE_KEYS if key in settings}
    values = {key: value for key, value in settings.items() if key not in own}
    try:
        described = _settings({**serve, **own, "served_model_name": name}, ServeConfig)
        return ModelSettings(engine_config({**engine, **values}), for_model(endpoint, described))
    except ValueError as error:
        raise ConfigError(f"models.{name}: {error}") from None


def _section(tree: Mapping[Any, Any], name: Any, prefix: str = "") -> dict[Any, Any]:
    section = {} if tree.get(name) is None else tree[name]
    if not isinstance(section, dict):
        raise ConfigError(f"{prefix}{name} holds a {type(section).__name__}: write one `key: value` a line below it")
    return section


def _given(flags: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (flags or {}).items() if value is not None}


def _settings(values: Mapping[str, Any], target: type[S]) -> S:
    """A record of settings from values by field name; sizes may have units."""
    reject_unknown(values, [f.name for f in options(target)])
    sizes = [f.name for f in options(target) if f.metadata.get("size") and values.get(f.name) is not None]
    return _convert({**values, **{name: parse_size(name, values[name]) for name in sizes}}, target)


def _convert(values: Mapping[str, Any], target: type[T]) -> T:
    try:
        return msgspec.convert(values, target, str_keys=True)
    except msgspec.ValidationError as error:
        fault = where(error)
        said = f"{fault.said[:1].lower()}{fault.said[1:]}"
        raise ConfigError(f"{fault.path}: {said}" if fault.path else fault.said) from None
    except UnicodeEncodeError as error:
        name = next((name for name, value in values.items() if value == error.object), "a setting")
        raise ConfigError(f"{name}={error.object!a} holds half of a surrogate pair: write the whole pair") from None


def bound_openmp_spin(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets OpenMP's idle threads spin for some microseconds, then sleep, unless the user has said how they shall wait.

    GNU OpenMP spins for milliseconds by default. On cores that anybody else uses too, two threads then wait for each other
    at every operation: `docs/performance.md` has the figures. Works if called before torch is first imported; Ray workers on
    this machine inherit it.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN)


def choose_proxy(serve: ServeConfig, environ: MutableMapping[str, str] = os.environ) -> None:
    """Puts HAProxy before the replicas instead of Serve's own proxy, unless told otherwise, and bounds what clients may hold
    open. Works if called before `ray.serve` is first imported; Serve's processes on this machine inherit it."""
    environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "deploy.doors.connections.bound_serve")
    environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", PROXY_START_S)
    environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")  # who does not answer ends nothing in good order
    environ[RECEIVE_VARIABLE] = str(serve.receive_timeout_s)
    if serve.haproxy:
        environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
        environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")  # no load balancer has to notice first
        environ.setdefault("RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S", str(math.ceil(serve.receive_timeout_s)))
        longest_s = IDLE_S + math.ceil(serve.receive_timeout_s + serve.request_timeout_s)
        environ.setdefault("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", str(longest_s))  # Serve's 120 cut streams at any change
    else:
        environ[CONNECTIONS_VARIABLE] = str(serve.max_connections)


def connection_bounds(environ: Mapping[str, str] = os.environ) -> ServeConfig:
    """What `choose_proxy` has said of receive_timeout_s and max_connections, in a process of Serve's. Behind HAProxy, whose
    address all clients share, connections are not counted."""
    timeout_s = float(environ.get(RECEIVE_VARIABLE, ServeConfig().receive_timeout_s))
    return ServeConfig(receive_timeout_s=timeout_s, max_connections=int(environ.get(CONNECTIONS_VARIABLE, UNCOUNTED)))


def keep_haproxy_private(folder: Path, program: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """HAProxy keeps its files and its admin socket in `folder` and is started by `program` (`deploy.serving.haproxy`), unless
    told otherwise. Works if called before `ray.serve` is first imported; Serve's processes on this machine inherit it."""
    for name, file in HAPROXY_FILES.items():
        environ.setdefault(name, str(folder / file))
    environ.setdefault("RAY_SERVE_HAPROXY_BINARY_PATH", str(program))


def proxy_ports(serve: ServeConfig, environ: Mapping[str, str] = os.environ) -> dict[str, tuple[str, int]]:
    """Ports that Serve's proxies take beside those that clients use: {what for: (the variable that moves it, port)}.
    Errors: ConfigError."""
    ports = {}
    for what, (name, default) in PROXY_PORTS.items():
        if serve.haproxy and (serve.grpc_port is not None or "gRPC" not in what):
            value = environ.get(name, default)
            if not value.isdecimal():
                raise ConfigError(f"{name}={value!r} is not a port: write a number")
            ports[what] = (name, int(value))
    return ports
