"""`RequestError` as Anthropic says it: `{"type": "error", "error": {"type", "message"}, "request_id"}`.

Statuses are those of every door. Imports msgspec and the door's errors only.
"""

import msgspec

from deploy.doors.anthropic.records import ErrorAnswer, ErrorDetails
from deploy.frontend.errors import CONTEXT_EXCEEDED, Fault, RequestError

PATH = "/v1/messages"
REQUEST_ID_HEADER = "request-id"

TOO_LONG = "prompt is too long"

TYPES = {
    Fault.INVALID: "invalid_request_error",
    Fault.UNAUTHENTICATED: "authentication_error",
    Fault.FORBIDDEN: "permission_error",
    Fault.NOT_FOUND: "not_found_error",
    Fault.TOO_SLOW: "timeout_error",
    Fault.CONFLICT: "conflict_error",
    Fault.TOO_LARGE: "request_too_large",
    Fault.UNPROCESSABLE: "invalid_request_error",
    Fault.OVERLOADED: "rate_limit_error",
    Fault.CANCELLED: "api_error",
    Fault.INTERNAL: "api_error",
    Fault.UNAVAILABLE: "overloaded_error",
    Fault.TIMED_OUT: "timeout_error",
}


def is_for(path: str) -> bool:
    """Whether clients of this path know errors in Anthropic's form. path: without the application's own part."""
    return path == PATH or path.startswith(f"{PATH}/")


def error_answer(error: RequestError, request_id: str) -> ErrorAnswer:
    """There is no other place for the field at fault than the message; and agents know by its words when a prompt is too long,
    and shorten it."""
    named = error.param is None or error.param in error.message
    message = error.message if named else f"{error.param}: {error.message}"
    if error.code == CONTEXT_EXCEEDED:
        message = f"{TOO_LONG}: {message}"
    return ErrorAnswer(error=ErrorDetails(type=TYPES[error.fault], message=message), request_id=request_id)


def error_body(error: RequestError, request_id: str) -> bytes:
    """JSON."""
    return msgspec.json.encode(error_answer(error, request_id))
