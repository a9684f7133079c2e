"""Who answers the requests of a job, as the job sees it. Imports nothing of either kind: `own` and `endpoint` are the two."""

from dataclasses import dataclass
from typing import Protocol

from deploy.batch.lines import BatchRequest


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """body: JSON. output_tokens: of all choices. warnings: what whoever asked should know beside it."""

    status: int
    body: bytes
    output_tokens: int = 0
    warnings: tuple[str, ...] = ()


class Backend(Protocol):
    """Answers many requests at a time."""

    async def answer(self, request: BatchRequest) -> LineAnswer:
        """Errors: RequestError for a request that failed or cannot be served now; EngineError once none ever will be again;
        ConfigError if the job was set up wrong."""
        ...
