"""What can go wrong with a request at any door (HTTP, gRPC, batch), said once; each door has its own words for `Fault`.

Imports the wire types only.
"""

from enum import Enum

from deploy.text.content import PromptError, PromptTooLong
from scheduler.protocol.messages import Failure, Finished

CONTEXT_EXCEEDED = "context_length_exceeded"
"""The code that clients of OpenAI's API know for a prompt that is too long."""

DEADLINE_EXCEEDED = "deadline_exceeded"

RETRY_AFTER_S = 1.0
"""For what is not to be had now, where nobody knows better."""


class Fault(Enum):
    """Each with its HTTP status and OpenAI's error type."""

    INVALID = (400, "invalid_request_error")
    UNAUTHENTICATED = (401, "authentication_error")
    FORBIDDEN = (403, "permission_error")
    NOT_FOUND = (404, "not_found_error")
    TOO_SLOW = (408, "timeout_error")
    CONFLICT = (409, "invalid_request_error")
    TOO_LARGE = (413, "invalid_request_error")
    UNPROCESSABLE = (422, "invalid_request_error")
    OVERLOADED = (429, "rate_limit_error")
    CANCELLED = (499, "cancelled")
    INTERNAL = (500, "server_error")
    UNAVAILABLE = (503, "server_error")
    TIMED_OUT = (504, "timeout_error")

    @property
    def status(self) -> int:
        return self.value[0]

    @property
    def type(self) -> str:
        return self.value[1]


class RequestError(Exception):
    """A request that was refused or failed. param: the field at fault. code: a short name that programs compare.

    retry_after_s: when to try again; OVERLOADED and UNAVAILABLE always say it.
    """

    def __init__(
        self, fault: Fault, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.param = param
        self.code = code
        passing = fault in (Fault.OVERLOADED, Fault.UNAVAILABLE)
        self.retry_after_s = retry_after_s or (RETRY_AFTER_S if passing else 0.0)

    @classmethod
    def invalid(cls, message: str, param: str | None = None) -> "RequestError":
        return cls(Fault.INVALID, message, param=param)

    @classmethod
    def of_prompt(cls, error: PromptError, param: str | None) -> "RequestError":
        code = CONTEXT_EXCEEDED if isinstance(error, PromptTooLong) else None
        return cls(Fault.INVALID, str(error), param=param, code=code)

    @classmethod
    def of_end(cls, finished: Finished) -> "RequestError":
        """What a stream that ended as FAILED means to its client."""
        fault = _FAULTS[finished.failure]
        code = _CODES.get(finished.failure)
        return cls(fault, finished.message or "no reason given", code=code, retry_after_s=finished.retry_after_s)


_FAULTS = {
    Failure.FAULT: Fault.INTERNAL,
    Failure.IMPOSSIBLE: Fault.INVALID,
    Failure.OVERLOADED: Fault.OVERLOADED,
    Failure.UNAVAILABLE: Fault.UNAVAILABLE,
    Failure.TIMED_OUT: Fault.TIMED_OUT,
}
_CODES = {Failure.IMPOSSIBLE: CONTEXT_EXCEEDED, Failure.TIMED_OUT: DEADLINE_EXCEEDED}
