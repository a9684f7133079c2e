"""The paths of OpenAI's API, and vLLM's two beside them. Imports fastapi; what they do is in the modules next door."""

from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from deploy.config.serve import ServeConfig
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.openai.answers.records import ChatCompletion, Completion, ModelCard, ModelList, Text, Tokens
from deploy.doors.openai.chat import Chat
from deploy.doors.openai.completions import Completions
from deploy.doors.openai.document import answers, body_of
from deploy.doors.openai.endpoint import Endpoint
from deploy.doors.openai.models import TokenTexts, card, one_of
from deploy.doors.openai.reading import read
from deploy.doors.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from deploy.doors.openai.streams.marks import LAST_EVENT_ID
from deploy.doors.openai.streams.sse import EventStream, unless_gone
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import RequestError
from deploy.frontend.further import FurtherModels
from deploy.frontend.service import Service

RECORDS = (
    CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest, Completion, ChatCompletion, ModelCard, ModelList,
    Tokens, Text,
)  # fmt: skip
"""What the OpenAPI document refers to."""

R = TypeVar("R", bound=msgspec.Struct)
G = TypeVar("G", bound=GenerationRequest)


def openai_routes(service: Service, config: ServeConfig) -> APIRouter:
    """What is asked of one model: completions, chat, `/tokenize` and `/detokenize`."""
    router = APIRouter()
    _add_generation(router, service, config)
    _add_tokens(router, TokenTexts(service), config)
    return router


def _add_generation(router: APIRouter, service: Service, config: ServeConfig) -> None:
    grammars = Grammars(service.model)
    completions, chat = Completions(service, config, grammars), Chat(service, config, grammars)

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest), responses=answers(Completion, streamed=True))
    async def complete(request: Request) -> Response:
        """Continue a prompt, or several."""
        return await _generate(request, completions, await _read(request, CompletionRequest, config))

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest), responses=answers(ChatCompletion, streamed=True))
    async def converse(request: Request) -> Response:
        """Answer a conversation."""
        return await _generate(request, chat, await _read(request, ChatRequest, config))


def model_routes(service: Service, further: FurtherModels) -> APIRouter:
    """What is served here, of all models."""
    router = APIRouter()

    @router.get("/v1/models", responses=answers(ModelList))
    async def list_models() -> Response:
        """The models that are served here, the first one first."""
        return _json(ModelList(data=[card(service.model), *(card(each.service.model) for each in further)]))

    @router.get("/v1/models/{model:path}", responses=answers(ModelCard))
    async def retrieve_model(model: str) -> Response:
        """What is known of a model."""
        return _json(card(one_of(model, service, further).model))

    return router


def _add_tokens(router: APIRouter, tokens: TokenTexts, config: ServeConfig) -> None:
    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest), responses=answers(Tokens))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation as the model would see it."""
        return await _answer(request, tokens.tokenize(await _read(request, TokenizeRequest, config)))

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest), responses=answers(Text))
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        return await _answer(request, tokens.detokenize(await _read(request, DetokenizeRequest, config)))


async def _generate(request: Request, endpoint: Endpoint[G], asked: G) -> Response:
    """Whoever says that it reads event streams is given events with ids. Programs that only know OpenAI's streams may take
    every line for data; they do not say so."""
    caller, last_id, warnings = request.state.caller, request.headers.get(LAST_EVENT_ID), request.state.warnings
    if asked.stream:
        with_ids = "text/event-stream" in request.headers.get("accept", "").lower()
        return EventStream(endpoint.events(asked, caller, warnings, last_id, with_ids=with_ids), warnings)
    if last_id is not None:
        raise RequestError.invalid(f"{LAST_EVENT_ID} goes with stream=true: leave it out, or stream", LAST_EVENT_ID)
    return await _answer(request, endpoint.whole(asked, caller, warnings))


async def _read(request: Request, kind: type[R], config: ServeConfig) -> R:
    """JSON that says so: a page of another origin cannot send that without being allowed to. What is to be told beside the
    answer is gathered in the request's state. Errors: RequestError."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"the body is {media_type or 'of no type'}: send JSON, as `Content-Type: application/json`")
    request.state.warnings = Warnings()
    return read(await request.body(), kind, request.state.warnings, strict=config.strict_fields)


async def _answer(request: Request, work: Coroutine[Any, Any, msgspec.Struct]) -> Response:
    content = await unless_gone(request.receive, work)
    return _json(content, request.state.warnings.headers())


def _json(content: msgspec.Struct, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), headers=headers, media_type="application/json")
