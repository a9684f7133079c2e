"""The paths of OpenAI's API, and vLLM's two beside them. Imports fastapi; what they do is in the modules next door."""

from typing import TypeVar

from fastapi import APIRouter, Request, Response

from deploy.config.serve import ServeConfig
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.openai.answers.records import ChatCompletion, Completion, ModelCard, ModelList, Text, Tokens
from deploy.doors.openai.document import answers, body_of
from deploy.doors.openai.exchanging import json_response, read_request, whole_answer
from deploy.doors.openai.generation.chat import Chat
from deploy.doors.openai.generation.completions import Completions
from deploy.doors.openai.generation.endpoint import Endpoint
from deploy.doors.openai.models import TokenTexts, card, one_of
from deploy.doors.openai.pooling.endpoint import PoolingEndpoint
from deploy.doors.openai.pooling.records import Embeddings, Ranking, Scores
from deploy.doors.openai.requests.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerationRequest,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
)
from deploy.doors.openai.responses.responses import Responses
from deploy.doors.openai.responses.routes import RECORDS as RESPONSE_RECORDS
from deploy.doors.openai.responses.routes import response_routes
from deploy.doors.openai.responses.store.storing import ResponseStore
from deploy.doors.openai.streams.marks import LAST_EVENT_ID
from deploy.doors.openai.streams.sse import COMMENT, EventStream
from deploy.frontend.errors import RequestError
from deploy.frontend.models.further import FurtherModels
from deploy.frontend.service.service import Service

RECORDS = (
    CompletionRequest, ChatRequest, EmbeddingRequest, ScoreRequest, RerankRequest, TokenizeRequest, DetokenizeRequest,
    Completion, ChatCompletion, Embeddings, Scores, Ranking, ModelCard, ModelList, Tokens, Text, *RESPONSE_RECORDS,
)  # fmt: skip
"""What the OpenAPI document refers to."""

G = TypeVar("G", bound=GenerationRequest)


def openai_routes(service: Service, config: ServeConfig, grammars: Grammars, store: ResponseStore) -> APIRouter:
    """What is asked of one model: completions, chat, responses, embeddings, scores, rankings, `/tokenize` and `/detokenize`.
    grammars: of the service's model, for all doors. store: where responses are kept."""
    router = APIRouter()
    chat = _add_generation(router, service, config, grammars)
    router.include_router(response_routes(Responses(service, chat, store), config))
    _add_pooling(router, PoolingEndpoint(service, config), config)
    _add_tokens(router, TokenTexts(service), config)
    return router


def _add_generation(router: APIRouter, service: Service, config: ServeConfig, grammars: Grammars) -> Chat:
    completions, chat = Completions(service, config, grammars), Chat(service, config, grammars)

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest), responses=answers(Completion, streamed=True))
    async def complete(request: Request) -> Response:
        """Continue a prompt, or several."""
        return await _generate(request, completions, await read_request(request, CompletionRequest, config))

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest), responses=answers(ChatCompletion, streamed=True))
    async def converse(request: Request) -> Response:
        """Answer a conversation."""
        return await _generate(request, chat, await read_request(request, ChatRequest, config))

    return chat


def _add_pooling(router: APIRouter, endpoint: PoolingEndpoint, config: ServeConfig) -> None:
    @router.post("/v1/embeddings", openapi_extra=body_of(EmbeddingRequest), responses=answers(Embeddings))
    async def embed(request: Request) -> Response:
        """Embeddings of texts."""
        asked = await read_request(request, EmbeddingRequest, config)
        return await whole_answer(request, endpoint.embed(asked, request.state.caller))

    @router.post("/v1/score", openapi_extra=body_of(ScoreRequest), responses=answers(Scores))
    @router.post("/score", include_in_schema=False)
    async def score(request: Request) -> Response:
        """How well the texts of pairs go together."""
        asked = await read_request(request, ScoreRequest, config)
        return await whole_answer(request, endpoint.score(asked, request.state.caller))

    @router.post("/v1/rerank", openapi_extra=body_of(RerankRequest), responses=answers(Ranking))
    @router.post("/v2/rerank", include_in_schema=False)
    @router.post("/rerank", include_in_schema=False)
    async def rerank(request: Request) -> Response:
        """Documents by how well they answer a query, the best first."""
        asked = await read_request(request, RerankRequest, config)
        return await whole_answer(request, endpoint.rerank(asked, request.state.caller))


def model_routes(service: Service, further: FurtherModels) -> APIRouter:
    """What is served here, of all models."""
    router = APIRouter()

    @router.get("/v1/models", responses=answers(ModelList))
    async def list_models() -> Response:
        """The models that are served here, the first one first."""
        return json_response(ModelList(data=[card(service.model), *(card(each.service.model) for each in further.listed())]))

    @router.get("/v1/models/{model:path}", responses=answers(ModelCard))
    async def retrieve_model(model: str) -> Response:
        """What is known of a model."""
        return json_response(card(one_of(model, service, further).model))

    return router


def _add_tokens(router: APIRouter, tokens: TokenTexts, config: ServeConfig) -> None:
    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest), responses=answers(Tokens))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation as the model would see it."""
        return await whole_answer(request, tokens.tokenize(await read_request(request, TokenizeRequest, config)))

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest), responses=answers(Text))
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        return await whole_answer(request, tokens.detokenize(await read_request(request, DetokenizeRequest, config)))


async def _generate(request: Request, endpoint: Endpoint[G], asked: G) -> Response:
    """Whoever says that it reads event streams is given events with ids, and comments while there is nothing new. Programs that
    only know OpenAI's streams may take every line for data; they do not say so."""
    caller, last_id, warnings = request.state.caller, request.headers.get(LAST_EVENT_ID), request.state.warnings
    if asked.stream:
        with_ids = "text/event-stream" in request.headers.get("accept", "").lower()
        events = endpoint.events(asked, caller, warnings, last_id, with_ids=with_ids)
        return EventStream(events, warnings, ping=COMMENT if with_ids else b"")
    if last_id is not None:
        raise RequestError.invalid(f"{LAST_EVENT_ID} goes with stream=true: leave it out, or stream", LAST_EVENT_ID)
    return await whole_answer(request, endpoint.whole(asked, caller, warnings))
