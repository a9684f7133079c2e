"""A request of HTTP read, and its answer written: what all paths of OpenAI's API have in common. Imports starlette."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from deploy.config.serve import ServeConfig
from deploy.doors.openai.requests.reading import read
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import Fault, RequestError

R = TypeVar("R", bound=msgspec.Struct)
T = TypeVar("T")


async def read_request(request: Request, kind: type[R], config: ServeConfig) -> R:
    """JSON that says so: a page of another origin cannot send that without being allowed to. What is to be told beside the
    answer is gathered in the request's state. Errors: RequestError."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"the body is {media_type or 'of no type'}: send JSON, as `Content-Type: application/json`")
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise HTTPException(415, f"the body is encoded as {encoding}: send it as it is, without Content-Encoding")
    request.state.warnings = Warnings()
    return read(await request.body(), kind, request.state.warnings, strict=config.strict_fields)


async def whole_answer(request: Request, work: Coroutine[Any, Any, msgspec.Struct]) -> Response:
    """What the work comes to, unless the client goes away before."""
    content = await unless_gone(request.receive, work)
    return json_response(content, request.state.warnings.headers())


def json_response(content: msgspec.Struct, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), headers=headers, media_type="application/json")


class ClientGone(RequestError):
    """Nobody waits for the response any more."""

    def __init__(self) -> None:
        super().__init__(Fault.CANCELLED, "the client went away")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and has ended, once the client has gone. The body must have been read.

    Errors: ClientGone, and whatever `work` raises.
    """
    task, watch = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
