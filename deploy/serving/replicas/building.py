"""From the tree of a configuration file to an application of Ray Serve. Imports ray."""

import logging
from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from deploy.config.load import (
    MODEL_SERVE_KEYS,
    ConfigError,
    ModelSettings,
    endpoint_config,
    read_api_keys,
    read_key_priorities,
    read_operators,
    reject_unknown,
)
from deploy.config.serve import FURTHER
from deploy.doors.access import ApiKeys
from deploy.serving.replicas.deploying import further_application
from deploy.serving.replicas.ingress import application

logger = logging.getLogger(__name__)


def build(args: Mapping[str, Any]) -> Application:
    """The application from the tree that configuration files hold: `engine:` and `serve:`. Errors: ConfigError."""
    config = endpoint_config(args)
    if config.further:
        name = config.further[0].serve.served_model_name
        raise ConfigError(
            f"models: of several, Serve's file has an application each: here the first alone, and {name!r} as an application "
            f"'manta{FURTHER}...' with import_path deploy.app:build_further (docs/deploy.md)"
        )
    if "groups" in args.get("engine", {}):
        logger.warning(
            "engine.groups stands below args, where a change of it starts replicas anew: below deployments, as the Engine's "
            "user_config: {groups: N}, groups come and go while requests run"
        )
    keys = ApiKeys(read_api_keys(config.serve), read_key_priorities(config.serve), read_operators(config.serve))
    return application(config.engine, config.serve, keys, config.engine.threads or 1)


def build_further(args: Mapping[str, Any]) -> Application:
    """A model beside the first of an endpoint, of the same tree: its `engine:`, and of `serve:` what is a model's own. Errors:
    ConfigError."""
    reject_unknown(args.get("serve") or {}, (*MODEL_SERVE_KEYS, "served_model_name", "log_format"), "serve.")
    config = endpoint_config(args)
    if config.further:
        raise ConfigError("models: names several: write an application for each of them")
    return further_application(ModelSettings(config.engine, config.serve), config.engine.threads or 1)
