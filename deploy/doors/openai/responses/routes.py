"""The paths of OpenAI's Responses. Imports fastapi; what they do is in the modules next door."""

from fastapi import APIRouter, Request, Response

from deploy.config.serve import ServeConfig
from deploy.doors.openai.document import answers, body_of
from deploy.doors.openai.exchanging import json_response, read_request, whole_answer
from deploy.doors.openai.responses.asking.schemas import ResponseRequest
from deploy.doors.openai.responses.listing import Order
from deploy.doors.openai.responses.responses import Responses
from deploy.doors.openai.responses.telling.records import Deleted, ItemList
from deploy.doors.openai.responses.telling.records import Response as ResponseRecord
from deploy.doors.openai.streams.marks import LAST_EVENT_ID
from deploy.doors.openai.streams.sse import EventStream
from deploy.frontend.errors import RequestError

RECORDS = (ResponseRequest, ResponseRecord, ItemList, Deleted)
"""What the OpenAPI document refers to."""

USUAL_LIMIT = 20


def response_routes(door: Responses, config: ServeConfig) -> APIRouter:
    """Everything under `/v1/responses`."""
    router = APIRouter(prefix="/v1/responses")

    @router.post("", openapi_extra=body_of(ResponseRequest), responses=answers(ResponseRecord, streamed=True))
    async def respond(request: Request) -> Response:
        """Go on with a conversation of items."""
        asked = await read_request(request, ResponseRequest, config)
        if LAST_EVENT_ID in request.headers:
            raise RequestError.invalid("streams of responses do not go on where they were cut: leave it out", LAST_EVENT_ID)
        caller, warnings = request.state.caller, request.state.warnings
        if not asked.stream:
            return await whole_answer(request, door.whole(asked, caller, warnings))
        stream = door.stream(asked, caller, warnings)
        return EventStream(stream.events(), warnings, stream.failed, end=b"")

    @router.get("/{response_id}", responses=answers(ResponseRecord))
    async def retrieve(request: Request, response_id: str, stream: bool = False) -> Response:
        """A response that is kept."""
        if stream:
            raise RequestError.invalid("a response that is whole is not streamed: leave it out", "stream")
        return Response(await door.retrieve(response_id, request.state.caller), media_type="application/json")

    @router.delete("/{response_id}", responses=answers(Deleted))
    async def delete(request: Request, response_id: str) -> Response:
        """Keep a response no more."""
        return json_response(await door.delete(response_id, request.state.caller))

    @router.post("/{response_id}/cancel", responses=answers(ResponseRecord))
    async def cancel(response_id: str) -> Response:  # noqa: ARG001
        """Refused: only background responses can be cancelled, and there are none."""
        raise RequestError.invalid("responses end with their client's connection: close it; none is made in the background")

    @router.get("/{response_id}/input_items", responses=answers(ItemList))
    async def input_items(
        request: Request, response_id: str, after: str | None = None, limit: int = USUAL_LIMIT, order: Order = "desc"
    ) -> Response:  # fmt: skip
        """The items that a response was made from."""
        return json_response(await door.input_items(response_id, request.state.caller, after, limit, order))

    return router
