"""Applications of Ray Serve with an `Engine`: how one is made, and handed to Serve. Imports ray."""

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from cluster.fleet.estate import version_of
from deploy.config.load import ModelSettings
from deploy.config.serve import ServeConfig
from deploy.serving.replicas.engine import EngineReplica
from workers.model.sources.find import pinned

MAX_ASKING = 1024
HEALTH_CHECK_S = 5.0
ENGINE_HEALTH_TIMEOUT_S = 8.0
"""Serve replaces a replica that has not answered three times: one that is stopped, then, in half a minute."""
FRONT_END_HEALTH_TIMEOUT_S = 10.0
"""Longer, since its end cuts streams. Serve's own 30 s would keep those of one that is stopped waiting for two minutes."""
GRACE_S = 30.0
"""What a replica that Serve takes away has to end in. A front end has as long as any of its requests may take besides: none is
cut for it."""
QUIET = LoggingConfig(enable_access_log=False)
"""Serve would log every call, and front ends ask the Engine how the cluster is once a second."""


def further_application(model: ModelSettings, threads: int, groups: int | None = None) -> Application:
    """An Engine alone, which front ends find by the name of the application. Its requests have all their time to end in."""
    engine = pinned(model.engine)
    version = version_of(engine, model.serve, threads)
    owner = engine_deployment(groups or engine.groups, model.serve.request_timeout_s + GRACE_S)
    return owner.bind(engine, model.serve, threads, version, further=True)


def engine_deployment(groups: int, grace_s: float) -> serve.Deployment:
    return serve.deployment(
        name="Engine", num_replicas=1, max_ongoing_requests=MAX_ASKING, ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_S, health_check_timeout_s=ENGINE_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=grace_s, logging_config=QUIET, user_config={"groups": groups},
    )(EngineReplica)  # fmt: skip


def deploy_further(made: Application, name: str) -> None:
    """As `deploy`. Nobody reaches it but through front ends."""
    serve.run_many([serve.RunTarget(target=made, name=name, route_prefix=None)], wait_for_applications_running=False)


def deploy(made: Application, limits: ServeConfig) -> None:
    """Hands the application to Serve, in place of the one of that name if there is one. Does not wait until it runs."""
    target = serve.RunTarget(target=made, name=limits.app_name, route_prefix=limits.route_prefix)
    serve.run_many([target], wait_for_applications_running=False)
