"""`RequestError` as OpenAI says it: `{"error": {"message", "type", "param", "code"}}`, the status and `Retry-After`.

Imports msgspec and the door's errors only.
"""

import math

import msgspec

from deploy.frontend.errors import RequestError


class ErrorDetail(msgspec.Struct, frozen=True):
    """param: the field at fault. code: a short name that programs compare."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every response that is not a success, and the event that ends a stream which failed."""

    error: ErrorDetail


def error_body(error: RequestError) -> bytes:
    """JSON."""
    return msgspec.json.encode(ErrorBody(ErrorDetail(error.message, error.fault.type, error.param, error.code)))


def error_headers(error: RequestError) -> dict[str, str]:
    """When to come again, in whole seconds."""
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))} if error.retry_after_s > 0 else {}
