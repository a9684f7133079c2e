"""`/v1/responses`: a conversation of items in, the items that follow out, and both kept for whoever goes on from them.

    ResponseRequest ──chat_request──▶ ChatRequest ──Chat.accept──▶ prompts ──Chat.deltas──▶ ResponseTelling ──▶ Response, events
                                                                                               └──put──▶ ResponseStore

What a model is asked, and how, is the chat door's matter. Knows nothing of HTTP.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from deploy.doors.access import Caller
from deploy.doors.openai.answers.logprobs import TokenNames
from deploy.doors.openai.generation.chat import Chat
from deploy.doors.openai.generation.endpoint import Accepted
from deploy.doors.openai.requests.reading import check_model, check_refused
from deploy.doors.openai.requests.schemas import ChatRequest
from deploy.doors.openai.requests.unknown import shortened
from deploy.doors.openai.responses.asking.asking import called_here, chat_request, items_of, said_here
from deploy.doors.openai.responses.asking.schemas import Item, ResponseRequest
from deploy.doors.openai.responses.listing import MOST_LISTED, Order, conversation, input_of, listed, page
from deploy.doors.openai.responses.store.storing import ResponseStore, StoredTurn
from deploy.doors.openai.responses.telling.events import Event, name_of
from deploy.doors.openai.responses.telling.records import Deleted, ItemList, Response
from deploy.doors.openai.responses.telling.telling import ResponseTelling
from deploy.doors.openai.streams.sse import event
from deploy.doors.warnings import Warnings
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service.service import Service

NOT_KEPT = "this response is not kept: nobody can go on from it by its id"


@dataclass(frozen=True, slots=True)
class Begun:
    """A request under way. items: what it adds to its conversation."""

    items: list[Item]
    accepted: Accepted[ChatRequest]
    telling: ResponseTelling


class Responses:
    """Responses of one service, which the chat door asks for. store: where they are kept."""

    def __init__(self, service: Service, chat: Chat, store: ResponseStore) -> None:
        self._service = service
        self._chat = chat
        self._store = store

    async def whole(self, request: ResponseRequest, caller: Caller, warnings: Warnings) -> Response:
        """warnings: are told what the client should know beside the answer. Errors: RequestError."""
        begun = await self.begin(request, caller, warnings)
        async with aclosing(self.told(begun, caller)) as told:
            async for _ in told:
                pass
        response = await self.kept(request, begun, caller)
        if request.store is not False and not response.store:
            warnings.add(NOT_KEPT)
        return response

    def stream(self, request: ResponseRequest, caller: Caller, warnings: Warnings) -> "ResponseStream":
        return ResponseStream(self, request, caller, warnings)

    async def begin(self, request: ResponseRequest, caller: Caller, warnings: Warnings) -> Begun:
        """Errors: RequestError."""
        check_model(request.model, self._service.model)
        check_refused(request)
        items, before = items_of(request), await self._before(request, caller)
        aside = Warnings()
        try:
            accepted = await self._chat.accept(chat_request(request, before, items), caller, aside)
        except RequestError as error:
            raise called_here(error) from None
        for said in aside:
            warnings.add(said_here(said))
        model = self._service.model
        opened = _opened(request, accepted, model.name)
        summarised = request.reasoning is not None and request.reasoning.summarised
        return Begun(items, accepted, ResponseTelling(opened, accepted, TokenNames(model.tokenizer), summarised=summarised))

    async def told(self, begun: Begun, caller: Caller) -> AsyncGenerator[list[Event], None]:
        """What is new, until the output has ended. Log-probabilities are held to the end, which the last events repeat. Errors:
        RequestError."""
        async with aclosing(self._chat.deltas(begun.accepted.prompts, caller, gathered=True)) as deltas:
            async for _, delta in deltas:
                yield begun.telling.push(delta)

    async def kept(self, request: ResponseRequest, begun: Begun, caller: Caller) -> Response:
        """The whole response, which is kept if it shall be, and can."""
        response = begun.telling.whole()
        if not response.store:
            return response
        turn = StoredTurn(input_of(begun.items), msgspec.json.encode(response.output))
        body = msgspec.json.encode(response)
        if await self._store.put(caller.account, response.id, request.previous_response_id, body, turn):
            return response
        return msgspec.structs.replace(response, store=False)

    async def retrieve(self, name: str, caller: Caller) -> bytes:
        """A response as it was told, in JSON. Errors: RequestError."""
        if (body := await self._store.body(caller.account, name)) is None:
            raise _not_here(name)
        return body

    async def delete(self, name: str, caller: Caller) -> Deleted:
        """Errors: RequestError."""
        if not await self._store.delete(caller.account, name):
            raise _not_here(name)
        return Deleted(id=name)

    async def input_items(self, name: str, caller: Caller, after: str | None, limit: int, order: Order) -> ItemList:
        """A page of what a response was made from. Errors: RequestError."""
        if not 1 <= limit <= MOST_LISTED:
            raise RequestError.invalid(f"limit={limit} is outside [1, {MOST_LISTED}]", "limit")
        if (turns := await self._store.turns(caller.account, name)) is None:
            raise _not_here(name)
        return page(listed(turns), after, limit, order)

    async def _before(self, request: ResponseRequest, caller: Caller) -> Sequence[Item]:
        """The conversation that the request goes on from. Errors: RequestError."""
        name = request.previous_response_id
        if name is None:
            return ()
        if (turns := await self._store.turns(caller.account, name)) is None:
            raise RequestError(
                Fault.INVALID,
                f"there is no response {shortened(name)!r} here, or none any more: send the whole conversation as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return conversation(turns)


class ResponseStream:
    """One response, told in events."""

    def __init__(self, door: Responses, request: ResponseRequest, caller: Caller, warnings: Warnings) -> None:
        self._door = door
        self._request = request
        self._caller = caller
        self._warnings = warnings
        self._begun: Begun | None = None

    async def events(self) -> AsyncGenerator[bytes, None]:
        """A piece of bytes for each delta. The first events come with the first delta, so that a request which is refused has
        the status of its error. Errors: RequestError, which after the first piece is for `failed` to tell."""
        begun = self._begun = await self._door.begin(self._request, self._caller, self._warnings)
        before = _encoded(begun.telling.begin())
        async with aclosing(self._door.told(begun, self._caller)) as told:
            async for events in told:
                if data := before + _encoded(events):
                    yield data
                before = b""
        response = await self._door.kept(self._request, begun, self._caller)
        yield _encoded([begun.telling.end(response)])

    def failed(self, error: RequestError) -> bytes:
        """The last events of a stream that fails."""
        assert self._begun is not None, "it has had its first events"
        return _encoded(self._begun.telling.fail(error))


def _encoded(events: Iterable[Event]) -> bytes:
    return b"".join(event(each, name=name_of(each)) for each in events)


def _opened(request: ResponseRequest, accepted: Accepted[ChatRequest], model: str) -> Response:
    """The response before anything is said."""
    params = accepted.prompts[0].params
    reasoning = request.reasoning
    return Response(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        model=model,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        prompt_cache_key=request.prompt_cache_key,
        reasoning={
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": (reasoning.summary or reasoning.generate_summary) if reasoning is not None else None,
        },
        safety_identifier=request.safety_identifier,
        store=request.store is not False,
        temperature=params.temperature if request.temperature is None else request.temperature,
        text=_text(request),
        tool_choice=request.tool_choice or "auto",
        tools=request.tools or [],
        top_logprobs=request.top_logprobs or 0,
        top_p=params.top_p if request.top_p is None else request.top_p,
        user=request.user,
    )


def _text(request: ResponseRequest) -> dict[str, Any]:
    asked = request.text.format if request.text is not None else None
    return {"format": asked or {"type": "text"}}


def _not_here(name: str) -> RequestError:
    return RequestError(
        Fault.NOT_FOUND, f"there is no response {shortened(name)!r} here, or none any more", code="response_not_found"
    )
