"""How many, and how they come and go: `deployment_config`, whose replicas are groups here, and `ingress_deployment_config`,
whose replicas are front ends."""

from typing import Any

from deploy.ray_serve_llm.reading import (
    Reading,
    Translation,
    aside,
    engine,
    idle,
    mapping,
    off,
    read,
    refuse,
    refused,
    serve,
    set_engine,
)

AUTO_REPLICAS = (1, 100)
"""What Serve takes `num_replicas: auto` for: at least, at most."""

BY_NEED = "groups are added when newcomers wait for upscale_delay_s or blocks run short, and go when idle for downscale_delay_s"
OVERRIDES = "say it below `deployments:` of the application, for Engine (scheduler, groups) and Ingress (front ends)"
LIVES = "scheduler and ranks are watched by Manta itself (docs/reliability.md)"
BOUNDS = "max_num_seqs run in a group at once, and the queue before them is bounded by max_queued_requests"


def _num_replicas(translation: Translation, path: str, value: Any) -> None:
    least, most = AUTO_REPLICAS if value == "auto" else (value, value)
    set_engine(translation, "groups", least, path)
    set_engine(translation, "max_groups", most, path)


def _deployment_autoscaling(translation: Translation, path: str, value: Any) -> None:
    """Above what `num_replicas: auto` says; beside a number Serve does not take it either."""
    groups, origins = translation.engine, translation.origins
    if (groups.get("groups"), groups.get("max_groups")) == AUTO_REPLICAS:
        for name in ("groups", "max_groups"):
            del groups[name], origins[name]
    elif "groups" in groups:
        refuse(path, value, f"{origins['groups']} says how many there are: leave one of them out")
    read(translation, path, value, AUTOSCALING)


def _min_replicas(translation: Translation, path: str, value: Any) -> None:
    if value == 0:
        refuse(path, value, "one group always stays: say 1")
    set_engine(translation, "groups", value, path)


def _initial_replicas(translation: Translation, path: str, value: Any) -> None:
    if value != (least := translation.engine.get("groups", 1)):
        refuse(path, value, f"min_replicas={least} are started, and more as they are needed: leave it out")


def _max_queued(translation: Translation, path: str, value: Any) -> None:
    if value == -1:
        translation.idle.append(f"{path}: the queue is always bounded")
    else:
        serve("max_queued_requests")(translation, path, value)


def _ingress_autoscaling(translation: Translation, path: str, value: Any) -> None:
    given = mapping(path, value)
    read(translation, path, given, dict.fromkeys(AUTOSCALING, aside))
    least = given.get("min_replicas", 1)
    if given.get("max_replicas", least) != least or given.get("initial_replicas", least) != least:
        refuse(path, value, "the number of front ends does not follow the load: say num_replicas instead")
    serve("replicas")(translation, f"{path}.min_replicas", least)


AUTOSCALING: dict[str, Reading] = {
    "min_replicas": _min_replicas,
    "initial_replicas": _initial_replicas,
    "max_replicas": engine("max_groups"),
    "upscale_delay_s": engine("scale_wait_s"),
    "downscale_delay_s": engine("scale_idle_s"),
    "downscale_to_zero_delay_s": refused("one group always stays: leave it out"),
    "policy": refused(f"{BY_NEED}: leave it out"),
    **dict.fromkeys(
        (
            "target_ongoing_requests", "target_num_ongoing_requests_per_replica", "metrics_interval_s", "look_back_period_s",
            "smoothing_factor", "upscale_smoothing_factor", "downscale_smoothing_factor", "upscaling_factor",
            "downscaling_factor", "aggregation_function",
        ),
        idle(BY_NEED),
    ),
}  # fmt: skip

COMMON: dict[str, Reading] = {
    "name": idle("the deployments are called Engine and Ingress"),
    "max_ongoing_requests": idle(BOUNDS),
    "health_check_period_s": idle(LIVES),
    "health_check_timeout_s": idle(LIVES),
    "graceful_shutdown_wait_loop_s": idle(LIVES),
    "ray_actor_options": off(OVERRIDES),
    "user_config": off(OVERRIDES),
    "logging_config": off("say `serve: {log_format: json}` beside llm_configs, or leave it out"),
    "max_replicas_per_node": off("a group takes what fits on a node: leave it out"),
    "placement_group_bundles": off("say placement_group_config instead"),
    "placement_group_strategy": off("say placement_group_config instead"),
}

DEPLOYMENT: dict[str, Reading] = {
    "num_replicas": _num_replicas,
    "autoscaling_config": _deployment_autoscaling,
    "max_queued_requests": _max_queued,
    "graceful_shutdown_timeout_s": engine("drain_timeout_s"),
    "request_router_config": idle("the scheduler sends each request where the most of its prefix is, or where it waits least"),
    **COMMON,
}

INGRESS: dict[str, Reading] = {
    "num_replicas": serve("replicas"),
    "autoscaling_config": _ingress_autoscaling,
    "max_queued_requests": _max_queued,
    "graceful_shutdown_timeout_s": idle(LIVES),
    "request_router_config": idle("any front end serves any request"),
    **COMMON,
}

INGRESS_CLASS: dict[str, Reading] = {
    "ingress_cls": refused("the doors are Manta's (docs/api.md): leave it out"),
    "ingress_extra_kwargs": off("the doors are Manta's (docs/api.md): leave it out"),
}

EXPERIMENTAL: dict[str, Reading] = {
    "num_ingress_replicas": serve("replicas"),
    "stream_batching_interval_ms": idle("tokens are sent as they come, those that come together as one event"),
    "num_router_replicas": refused("say ingress_deployment_config.num_replicas instead"),
}

