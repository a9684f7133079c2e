"""Ray Serve on a cluster that this process has joined: its proxies, and applications on it, ours and others'. Imports ray."""

import contextlib
from collections.abc import Callable, Sequence

from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus

from deploy.config.load import ConfigError, ModelSettings
from deploy.config.serve import FURTHER, ServeConfig
from deploy.doors.grpc.server import SERVICER_FUNCTIONS
from deploy.serving.replicas.engine import further_applications, further_name
from scheduler.server.stats import ClusterStatus, EngineStats

ASK_TIMEOUT_S = 1.0
READY = "is ready"


def check_vacant(limits: ServeConfig) -> None:
    """Errors: ConfigError that names what runs on the cluster already where this application shall be."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    details = client.get_serve_details()
    for name, running in details["applications"].items():
        if limits.app_name == name.partition(FURTHER)[0] or limits.route_prefix == running["route_prefix"]:
            raise ConfigError(
                f"the Ray cluster runs the application {name!r} at {running['route_prefix']} already ({running['status']}): "
                "end it (`serve shutdown` ends all), or choose another --app-name and another --route-prefix"
            )
    http, grpc = details["http_options"] or {}, details["grpc_options"] or {}
    if (http.get("host"), http.get("port")) != (limits.host, limits.port):
        raise ConfigError(
            f"Ray Serve listens at {http.get('host')}:{http.get('port')} on this cluster, which cannot change while it runs: "
            f"say --host {http.get('host')} --port {http.get('port')}, or end it with `serve shutdown`"
        )
    if limits.grpc_port is not None and (not grpc.get("grpc_servicer_functions") or grpc.get("port") != limits.grpc_port):
        raise ConfigError(
            "Ray Serve was started on this cluster without this gRPC port, which cannot change while it runs: leave "
            "--grpc-port out, or end Serve with `serve shutdown`"
        )


def failure(app_name: str) -> str | None:
    """Why Serve has given the application up, or that it is not there any more; None while neither is so."""
    now = serve.status().applications.get(app_name)
    if now is None:
        return f"the application {app_name!r} was deleted"
    return now.message if now.status == ApplicationStatus.DEPLOY_FAILED else None


def end(app_name: str) -> None:
    """An endpoint with all its models. Errors: TimeoutError, Ray's."""
    client = _get_global_client()
    assert client is not None
    client.delete_apps([app_name, *further_applications(app_name)])


def start_proxies(limits: ServeConfig) -> None:
    """Starts Serve on the Ray cluster that this process has joined; does nothing where it runs already."""
    grpc = None
    if limits.grpc_port is not None:
        grpc = gRPCOptions(port=limits.grpc_port, grpc_servicer_functions=list(SERVICER_FUNCTIONS))
    serve.start(http_options=HTTPOptions(host=limits.host, port=limits.port), grpc_options=grpc)


class FurtherStarts:
    """Says how the models beside the first come up: each in its own time, and none holds up another."""

    def __init__(self, models: Sequence[ModelSettings], app_name: str, say: Callable[[str], None]) -> None:
        self._app_name = app_name
        self._coming = {model.name: further_name(app_name, model.name) for model in models}
        self._said: dict[str, str] = {}
        self._say = say

    def look(self) -> None:
        for model, application in [*self._coming.items()]:
            with contextlib.suppress(Exception):  # its Engine is on its way, or it has been removed
                words = self._words(application)
                if words == READY:
                    del self._coming[model]
                if self._said.get(model) != words:
                    self._said[model] = words
                    self._say(f"{model} {words}")

    def _words(self, application: str) -> str:
        """Errors: those of `_status_of`."""
        if (given_up := further_applications(self._app_name).get(application)) is not None:
            return f"has failed: {given_up}"
        now = _status_of(application)
        if now.phase == "failed":
            return f"has failed: {now.progress[-1]}"
        return READY if now.obstacle is None else f"takes no requests yet: {now.obstacle}"


def _status_of(application: str) -> ClusterStatus:
    """Errors: Serve's, TimeoutError."""
    owner = serve.get_deployment_handle("Engine", app_name=application)
    now: ClusterStatus = owner.status.remote().result(timeout_s=ASK_TIMEOUT_S)
    return now


def all_status(app_name: str) -> ClusterStatus:
    """What waits and runs, of all models. Errors: those of `_status_of`."""
    statuses = [_status_of(name) for name in (app_name, *further_applications(app_name))]
    engines = [status.engine for status in statuses if status.engine is not None]
    groups = tuple(group for engine in engines for group in engine.groups)
    return ClusterStatus(phase="ready", engine=EngineStats(groups=groups, waiting=sum(engine.waiting for engine in engines)))
