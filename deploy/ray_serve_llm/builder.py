"""The application that Ray Serve LLM's arguments describe, as one of Manta's. Imports ray."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.serve import Application
from ray.serve.context import _get_global_client

from deploy.config.load import ConfigError
from deploy.config.serve import FURTHER, ServeConfig
from deploy.ray_serve_llm.deployment import INGRESS, INGRESS_CLASS
from deploy.ray_serve_llm.llm_config import LLMConfig
from deploy.ray_serve_llm.reading import aside, mapping, read, refuse
from deploy.serving.replicas.building import build, build_further

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LLMServingArgs:
    """What the builder is given.

    llm_configs: records, mappings, or names of YAML files. serve: settings of Manta's endpoint for which Ray has no name, such
    as api_key_file, by those of `ServeConfig`.
    """

    llm_configs: Sequence[LLMConfig | Mapping[str, Any] | str]
    ingress_cls_config: Mapping[str, Any] = field(default_factory=dict)
    ingress_deployment_config: Mapping[str, Any] = field(default_factory=dict)
    serve: Mapping[str, Any] = field(default_factory=dict)


def build_openai_app(llm_serving_args: LLMServingArgs | Mapping[str, Any]) -> Application:
    """Takes what `ray.serve.llm.build_openai_app` takes. Errors: ConfigError that names the key and what to write instead."""
    return build(read_args(llm_serving_args, _listens_at()))


def build_further_model(llm_serving_args: LLMServingArgs | Mapping[str, Any]) -> Application:
    """A model beside the first of an endpoint: an application of its own, named as the endpoint's, a colon and a name, with
    `route_prefix: null`. Errors: ConfigError."""
    return build_further(read_args(llm_serving_args, None))


def read_args(given: LLMServingArgs | Mapping[str, Any], host: str | None) -> dict[str, Any]:
    """Manta's own tree. host: where the endpoint listens, unless `serve` says so; None for a model beside the first. Errors:
    ConfigError."""
    args = vars(given) if isinstance(given, LLMServingArgs) else mapping("args", given)
    config = _only_model(args)
    translation = config.translate("llm_configs[0]")
    rest = {
        "ingress_cls_config": lambda into, path, value: read(into, path, value, INGRESS_CLASS),
        "ingress_deployment_config": lambda into, path, value: read(into, path, value, INGRESS),
        "serve": lambda into, path, value: into.serve.update(mapping(path, value)),
        "llm_configs": aside,
    }
    read(translation, "args", args, rest)
    if host is not None:
        translation.serve.setdefault("host", host)
    translation.check()
    for line in translation.idle:
        logger.info("it changes nothing: %s", line)
    return {"engine": translation.engine, "serve": translation.serve}


def _only_model(args: Mapping[str, Any]) -> LLMConfig:
    configs = args.get("llm_configs")
    if not isinstance(configs, Sequence) or isinstance(configs, str) or not configs:
        refuse("args.llm_configs", configs, "write a list with the configuration of a model")
    models = [_read(f"llm_configs[{position}]", each) for position, each in enumerate(configs)]
    if len(models) > 1:
        raise ConfigError(
            f"llm_configs has {len(models)} models ({', '.join(model.model_id for model in models)}), and an application of "
            "Serve's has one here: leave the first alone, and write an application for each of the others, named as this one, "
            f"{FURTHER!r} and a name, with route_prefix: null and import_path manta.serve.llm:build_further_model"
        )
    return models[0]


def _read(path: str, given: Any) -> LLMConfig:
    if isinstance(given, LLMConfig):
        return given
    return LLMConfig.from_file(given) if isinstance(given, str) else LLMConfig.of(path, given)


def _listens_at() -> str:
    """Where Ray Serve listens on this cluster; loopback, its default, where it does not run yet."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    options = (client.get_serve_details()["http_options"] or {}) if client is not None else {}
    return str(options.get("host") or ServeConfig().host)
