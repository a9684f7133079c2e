"""One valid request on its way to the service, whichever endpoint made it. Imports the service; no HTTP."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from deploy.config.serve import ServeConfig
from deploy.doors.access import account, check_priority
from deploy.doors.openai.schemas import GenerationRequest
from deploy.doors.openai.tools.tools import Tools
from deploy.frontend.outputs import OutputDelta
from deploy.frontend.service import Service
from deploy.text.prompts import MOST_URGENT, Prompt
from scheduler.protocol.sampling import SamplingParams

Deltas = AsyncGenerator[tuple[int, OutputDelta], None]
"""(position of the prompt, what is new of it)."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. request_id: the door's. traceparent: of W3C's trace context, if there is one. account: of the API key.
    best_priority: the most urgent one that it may ask for."""

    request_id: str
    traceparent: str | None = None
    account: str = ""
    best_priority: int = MOST_URGENT


@dataclass(frozen=True, slots=True)
class Job:
    """What `Service.generate` takes. id: of the response. created: seconds since 1970. model: as clients call it.

    tools: what the model may call, to find its calls in the output. tenant: on whose account, for fairness, and among whose
    prompts prefixes are found: that of the API key; without keys that of the `user` whom the request names.
    share_prefix_cache: prefixes are found among those of all tenants.
    """

    caller: Caller
    id: str
    created: int
    model: str
    prompts: list[tuple[Prompt, SamplingParams]]
    priority: int
    timeout_s: float
    tools: Tools | None
    tenant: str
    share_prefix_cache: bool

    @classmethod
    def of(
        cls, caller: Caller, kind: str, request: GenerationRequest, prompts: list[tuple[Prompt, SamplingParams]],
        service: Service, config: ServeConfig, tools: Tools | None = None,
    ) -> "Job":  # fmt: skip
        """kind: what the response's id begins with. The request may ask for an earlier deadline than the server's.
        Errors: RequestError for a priority that the caller may not ask for."""
        timeout_s = min(config.request_timeout_s, request.timeout or config.request_timeout_s)
        identity = f"{kind}-{caller.request_id}"
        model, priority = service.model.name, check_priority(request.priority or 0, caller.best_priority)
        tenant = caller.account or account(request.user or "")
        shared = config.share_prefix_cache
        return cls(caller, identity, int(time.time()), model, prompts, priority, timeout_s, tools, tenant, shared)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt, _ in self.prompts)

    def deltas(self, service: Service) -> Deltas:
        """Closing it aborts the request. Errors: RequestError."""
        return service.generate(
            self.prompts, request_id=self.caller.request_id, priority=self.priority, timeout_s=self.timeout_s,
            traceparent=self.caller.traceparent, tenant=self.tenant, share_prefix_cache=self.share_prefix_cache,
        )  # fmt: skip
