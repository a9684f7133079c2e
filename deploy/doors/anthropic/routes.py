"""The paths of Anthropic's Messages. Imports fastapi; what they do is in the modules next door."""

from functools import partial

from fastapi import APIRouter, Request, Response

from deploy.config.serve import ServeConfig
from deploy.doors.anthropic.errors import PATH, error_answer
from deploy.doors.anthropic.messages import Messages
from deploy.doors.anthropic.records import ErrorAnswer, MessageAnswer, Ping, TokenCount, encoded
from deploy.doors.anthropic.schemas import CountTokensRequest, MessagesRequest
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.openai.document import answers, body_of
from deploy.doors.openai.exchanging import read_request, whole_answer
from deploy.doors.openai.streams.sse import EventStream
from deploy.frontend.errors import RequestError
from deploy.frontend.service.service import Service

RECORDS = (MessagesRequest, CountTokensRequest, MessageAnswer, TokenCount, ErrorAnswer)
"""What the OpenAPI document refers to."""


def anthropic_routes(service: Service, config: ServeConfig, grammars: Grammars) -> APIRouter:
    """Everything under `/v1/messages`. grammars: of the service's model, those of its other doors too."""
    router = APIRouter()
    messages = Messages(service, config, grammars)

    @router.post(
        PATH, openapi_extra=body_of(MessagesRequest), responses=answers(MessageAnswer, streamed=True, error=ErrorAnswer)
    )
    async def create_message(request: Request) -> Response:
        """Answer a conversation, as Anthropic's Messages."""
        asked, caller = await read_request(request, MessagesRequest, config), request.state.caller
        warnings = request.state.warnings
        if asked.stream:
            failed = partial(_failure, caller.request_id)
            return EventStream(messages.events(asked, caller, warnings), warnings, failed, end=b"", ping=encoded(Ping()))
        return await whole_answer(request, messages.whole(asked, caller, warnings))

    @router.post(
        f"{PATH}/count_tokens", openapi_extra=body_of(CountTokensRequest), responses=answers(TokenCount, error=ErrorAnswer)
    )
    async def count_tokens(request: Request) -> Response:
        """Count the tokens of a conversation's prompt."""
        asked = await read_request(request, CountTokensRequest, config)
        return await whole_answer(request, messages.count(asked, request.state.warnings))

    return router


def _failure(request_id: str, error: RequestError) -> bytes:
    return encoded(error_answer(error, request_id))
