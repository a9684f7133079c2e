"""What becomes of each request that has ended: increments for the metrics, a line in the log, a line for replay, spans.

    observer = Observer.open(serve, model)
    service = Service(model, cluster, observer)
    pushing = asyncio.create_task(observer.run(service))     # cancel it before the service: what it has goes out then

Imports opentelemetry only if traces are asked for.
"""

import asyncio
import logging
from typing import TYPE_CHECKING

from deploy.config.load import ConfigError
from deploy.config.serve import ServeConfig
from deploy.frontend.service.observation import Observation
from deploy.frontend.service.service import Service
from deploy.observing.logs import log_request
from deploy.observing.request_log import RequestLog
from deploy.observing.tally import REQUEST_LOG_DROPPED, increments
from scheduler.server.tallies import Tallies

if TYPE_CHECKING:
    from deploy.observing.tracing import Tracer

logger = logging.getLogger(__name__)

PUSH_S = 1.0
"""Between two tallies: what a replica that dies takes with it."""


class Observer:
    """The `observe` of a `Service`: called on its event loop, never waits."""

    def __init__(self, request_log: RequestLog | None = None, tracer: "Tracer | None" = None, model: str = "") -> None:
        self._request_log = request_log
        self._tracer = tracer
        self._model = model
        self._pending = Tallies()
        self._dropped = 0  # requests missing from the request log that have been counted

    @classmethod
    def open(cls, serve: ServeConfig, model: str) -> "Observer":
        """model: its name in logs and traces. Errors: ConfigError for traces without opentelemetry, OSError for a log."""
        return cls(
            RequestLog(serve.request_log, model) if serve.request_log is not None else None,
            _open_tracer(serve.otlp_endpoint, model) if serve.otlp_endpoint is not None else None,
            model,
        )

    def __call__(self, observation: Observation) -> None:
        self._pending.add(increments(observation))
        trace_id = self._tracer.record(observation) if self._tracer is not None else None
        log_request(observation, self._model, trace_id)
        if self._request_log is not None:
            self._request_log.write(observation)

    async def run(self, service: Service) -> None:
        """Hands the increments to the scheduler about once a second, until cancelled; then for the last time."""
        try:
            while True:
                await asyncio.sleep(PUSH_S)
                self.push(service)
        finally:
            self.push(service)

    def push(self, service: Service) -> None:
        """Hands over what has gathered; it is kept while the scheduler cannot be reached."""
        self._count_dropped()
        metrics = self._pending.take()
        if metrics and not service.tally(metrics):
            self._pending.add(metrics)

    def close(self) -> None:
        """Writes and sends what waits; may take seconds, so call it from a thread."""
        if self._request_log is not None:
            self._request_log.close()
        if self._tracer is not None:
            self._tracer.close()

    def _count_dropped(self) -> None:
        dropped = self._request_log.dropped - self._dropped if self._request_log is not None else 0
        if dropped:
            self._dropped += dropped
            self._pending.add([REQUEST_LOG_DROPPED.count(dropped)])
            logger.warning("%d request(s) are missing from the request log: its disk does not keep up", dropped)


def _open_tracer(endpoint: str, model: str) -> "Tracer":
    try:
        from deploy.observing.tracing import Tracer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"otlp_endpoint={endpoint!r} needs OpenTelemetry ({error.name} is missing): "
            "pip install 'manta-serve[traces]', or leave the option out"
        ) from error
    return Tracer.to_collector(endpoint, model)
