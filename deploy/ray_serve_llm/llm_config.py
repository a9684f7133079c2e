"""The records of Ray Serve LLM, by the same names and with the same fields. Each is valid from its birth: Manta can do what it
says. `MODEL` has what each key becomes. Imports ray's names of accelerators, with `placement`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

from deploy.config.load import ConfigError
from deploy.ray_serve_llm.deployment import DEPLOYMENT, EXPERIMENTAL
from deploy.ray_serve_llm.engine_kwargs import ENGINE_KWARGS
from deploy.ray_serve_llm.placement import read_placement
from deploy.ray_serve_llm.reading import (
    Reading,
    Translation,
    aside,
    idle,
    mapping,
    off,
    only,
    read,
    refuse,
    refused,
    serve,
    within,
)

NOT_NEEDED = ("VLLM_", "RAY_SERVE_LLM_", "HF_HUB_ENABLE_HF_TRANSFER")
"""How variables begin that nothing here reads."""


@dataclass(frozen=True, kw_only=True)
class ModelLoadingConfig:
    """model_id: what clients call the model. model_source: its folder, its id at Hugging Face, its URL, or a mapping with that
    as bucket_uri; if left out, model_id is it."""

    model_id: str
    model_source: Any = None
    tokenizer_source: str | None = None


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """One model, as `ray.serve.llm.LLMConfig` describes it. Errors: ConfigError that names the key, and what to write instead.
    """

    model_loading_config: Mapping[str, Any] | ModelLoadingConfig
    llm_engine: str = "vLLM"
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    accelerator_type: str | None = None
    accelerator_config: Any = None
    placement_group_config: Mapping[str, Any] | None = None
    deployment_config: Mapping[str, Any] = field(default_factory=dict)
    lora_config: Any = None
    runtime_env: Mapping[str, Any] | None = None
    server_cls: Any = None
    experimental_configs: Mapping[str, Any] = field(default_factory=dict)
    log_engine_metrics: bool | None = None
    callback_config: Any = None

    def __post_init__(self) -> None:
        self.translate("LLMConfig").check()

    @property
    def model_id(self) -> str:
        loading = self.model_loading_config
        return loading.model_id if isinstance(loading, ModelLoadingConfig) else str(loading["model_id"])

    @classmethod
    def from_file(cls, path: str) -> "LLMConfig":
        """From a YAML file. Errors: ConfigError."""
        try:
            tree = msgspec.yaml.decode(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        return cls.of(path, tree)

    @classmethod
    def of(cls, path: str, given: Any) -> "LLMConfig":
        """From a mapping. path: where it stands. Errors: ConfigError."""
        translate(path, mapping(path, given)).check()
        return cls(**given)

    def translate(self, path: str) -> Translation:
        """path: what messages shall call it. Errors: ConfigError."""
        return translate(path, {f.name: getattr(self, f.name) for f in fields(self)})


def translate(path: str, given: Mapping[str, Any]) -> Translation:
    """given: by the fields' names. Errors: ConfigError."""
    translation = Translation()
    if given.get("model_loading_config") is None:
        raise ConfigError(f"{path}.model_loading_config is missing: it names the model, by its model_id and its model_source")
    read(translation, path, given, MODEL)
    read_placement(translation, path, {name: given.get(name) for name in PLACEMENT})
    translation.engine.setdefault("max_groups", translation.engine.get("groups", 1))  # a node may yet have to be brought
    return translation


def _model_loading(translation: Translation, path: str, value: Any) -> None:
    given = vars(value) if isinstance(value, ModelLoadingConfig) else mapping(path, value)
    source = given.get("model_source") or given.get("model_id")
    translation.model = str(source["bucket_uri"] if isinstance(source, Mapping) and "bucket_uri" in source else source)
    if not given.get("model_id"):
        raise ConfigError(f"{path}.model_id is missing: it is what clients call the model")
    read(translation, path, given, LOADING)
    translation.engine["model"] = translation.model


def _model_source(_: Translation, path: str, value: Any) -> None:
    if isinstance(value, Mapping):
        read(Translation(), path, value, BUCKET)
    if not isinstance(value, str) and not (isinstance(value, Mapping) and isinstance(value.get("bucket_uri"), str)):
        refuse(path, value, "name a folder, an id at Hugging Face, or the URL of a bucket")


def _runtime_env(translation: Translation, path: str, value: Any) -> None:
    for key, inside in mapping(path, value).items():
        if not inside:
            continue
        left = [name for name in inside if not name.startswith(NOT_NEEDED)] if key == "env_vars" else inside
        if left:
            refuse(
                f"{path}.{key}", left, "say it as the runtime_env of the application, beside `args:`: all actors inherit that"
            )
        translation.idle.append(f"{path}.{key}: nothing here reads {', '.join(inside)}")


BUCKET: dict[str, Reading] = {
    "bucket_uri": aside,
    "extra_files": off("a checkpoint's files are all below one URL: leave it out"),
}

LOADING: dict[str, Reading] = {
    "model_id": serve("served_model_name"),
    "model_source": _model_source,
    "tokenizer_source": ENGINE_KWARGS["tokenizer"],
}

PLACEMENT = ("accelerator_type", "accelerator_config", "placement_group_config")

MODEL: dict[str, Reading] = {
    "model_loading_config": _model_loading,
    "llm_engine": only(("vLLM",), "engine_kwargs are read by vLLM's names: say vLLM, or leave it out"),
    "engine_kwargs": within(ENGINE_KWARGS),
    "deployment_config": within(DEPLOYMENT),
    "lora_config": refused("name adapters in engine_kwargs.lora: {NAME: FOLDER}, instead"),
    "runtime_env": _runtime_env,
    "server_cls": refused("the server is Manta's: leave it out"),
    "experimental_configs": within(EXPERIMENTAL),
    "log_engine_metrics": idle("/metrics and the status page are always there"),
    "callback_config": off("nothing is called while starting: leave it out"),
    **dict.fromkeys(PLACEMENT, aside),  # when the size of a group is known
}
