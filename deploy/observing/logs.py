"""The one log line of each request that has ended. Never what was asked or answered. Imports `scheduler.logs`."""

import logging

from deploy.frontend.errors import Fault
from deploy.frontend.service.observation import Observation
from scheduler.logs import fields

logger = logging.getLogger(__name__)

OUR_FAULTS = tuple(fault.name.lower() for fault in Fault if fault.status >= 500)


def log_request(observation: Observation, model: str, trace_id: str | None) -> None:
    """A warning where it was the server's fault. model: its name, if it has one. trace_id: where its spans are, if they are
    traced."""
    ours = observation.outcome in OUR_FAULTS
    said = fields(
        request_id=observation.request_id,
        model=model or None,
        outcome=observation.outcome,
        prompt_tokens=observation.prompt_tokens,
        cached_tokens=observation.cached_tokens,
        output_tokens=observation.output_tokens,
        queued_s=_rounded(observation.queued_s),
        ttft_s=_rounded(observation.ttft_s),
        e2e_s=_rounded(observation.e2e_s),
        preemptions=observation.preemptions,
        priority=observation.priority,
        error=observation.message or None,
        trace_id=trace_id,
    )
    logger.log(logging.WARNING if ours else logging.INFO, "request failed" if ours else "request ended", extra=said)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
