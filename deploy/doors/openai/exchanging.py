"""A request of HTTP read, and its answer written: what all paths of OpenAI's API have in common. Imports starlette."""

from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from deploy.config.serve import ServeConfig
from deploy.doors.openai.requests.reading import read
from deploy.doors.openai.streams.sse import unless_gone
from deploy.doors.warnings import Warnings

R = TypeVar("R", bound=msgspec.Struct)


async def read_request(request: Request, kind: type[R], config: ServeConfig) -> R:
    """JSON that says so: a page of another origin cannot send that without being allowed to. What is to be told beside the
    answer is gathered in the request's state. Errors: RequestError."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"the body is {media_type or 'of no type'}: send JSON, as `Content-Type: application/json`")
    request.state.warnings = Warnings()
    return read(await request.body(), kind, request.state.warnings, strict=config.strict_fields)


async def whole_answer(request: Request, work: Coroutine[Any, Any, msgspec.Struct]) -> Response:
    """What the work comes to, unless the client goes away before."""
    content = await unless_gone(request.receive, work)
    return json_response(content, request.state.warnings.headers())


def json_response(content: msgspec.Struct, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), headers=headers, media_type="application/json")
