"""JSON bodies of requests and responses, at any HTTP door. Imports starlette and the reading of records."""

from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from deploy.config.serve import ServeConfig
from deploy.doors.openai.reading import read
from deploy.doors.openai.streams.sse import unless_gone
from deploy.doors.warnings import Warnings

R = TypeVar("R", bound=msgspec.Struct)


async def read_body(request: Request, kind: type[R], config: ServeConfig) -> R:
    """JSON that says so: a page of another origin cannot send that without being allowed to. What is to be told beside the
    answer is gathered in the request's state. Errors: RequestError."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"the body is {media_type or 'of no type'}: send JSON, as `Content-Type: application/json`")
    request.state.warnings = Warnings()
    return read(await request.body(), kind, request.state.warnings, strict=config.strict_fields)


async def answer(request: Request, work: Coroutine[Any, Any, msgspec.Struct]) -> Response:
    """What comes of the work, which ends if the client goes away, with the warnings. Errors: RequestError."""
    content = await unless_gone(request.receive, work)
    return as_json(content, request.state.warnings.headers())


def as_json(content: msgspec.Struct, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), headers=headers, media_type="application/json")
