"""One valid request on its way to the service, whichever endpoint made it. Imports the service; no HTTP."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from deploy.doors.access import Caller
from deploy.doors.openai.tools.tools import Tools
from deploy.frontend.outputs import OutputDelta
from deploy.frontend.service import Service
from deploy.text.prompts import Prompt

Deltas = AsyncGenerator[tuple[int, OutputDelta], None]
"""(position of the prompt, what is new of it)."""


@dataclass(frozen=True, slots=True)
class Job:
    """What `Service.generate` takes, and what its response says. id: of the response. created: seconds since 1970. model: as
    clients call it. tools: what the model may call, to find its calls in the output."""

    caller: Caller
    id: str
    created: int
    model: str
    prompts: list[Prompt]
    tools: Tools | None

    @classmethod
    def of(cls, caller: Caller, kind: str, model: str, prompts: list[Prompt], tools: Tools | None = None) -> "Job":
        """kind: what the response's id begins with."""
        return cls(caller, f"{kind}-{caller.request_id}", int(time.time()), model, prompts, tools)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    def deltas(self, service: Service) -> Deltas:
        """Closing it aborts the request. Errors: RequestError."""
        return service.generate(self.prompts, request_id=self.caller.request_id, traceparent=self.caller.traceparent)
