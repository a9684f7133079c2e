"""Which model a request over HTTP is for: decided once, before the router, so that a door speaks for one model alone.

    Gatekeeper ─▶ ByModel ─┬─▶ the first model's doors, and what belongs to no model
                           └─▶ a further model's own doors, if the body names it

A name that nobody has goes to the first model's door, which refuses it in its own form. Pure ASGI; imports starlette.
"""

from collections.abc import Callable
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.doors.http.entrance import error_response
from deploy.frontend.errors import RequestError
from deploy.frontend.models.further import FurtherModel, FurtherModels


class _Named(msgspec.Struct):
    """What every body may have."""

    model: Any = None


_DECODER = msgspec.json.Decoder(_Named)


class ByModel:
    """doors: makes the application that answers for a further model; asked once for each."""

    def __init__(self, app: ASGIApp, further: FurtherModels, doors: Callable[[FurtherModel], ASGIApp]) -> None:
        self._app = app
        self._further = further
        self._doors = doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._further.models or scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        try:
            messages = await _whole(receive)
        except RequestError as error:  # too large, or too slow: no door has been asked
            await error_response(error, scope)(scope, receive, send)
            return
        model = self._further.get(_name(messages))
        app = self._app if model is None else model.once(self._doors)
        await app(scope, _again(messages, receive), send)


def _is_json(scope: Scope) -> bool:
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def _whole(receive: Receive) -> list[Message]:
    """All of a body, or what came of it before its client went away. Errors: RequestError."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    return messages


def _name(messages: list[Message]) -> str | None:
    """None where it cannot be read: the door says what is wrong with the body."""
    return named_in(b"".join(message.get("body", b"") for message in messages))


def named_in(body: bytes) -> str | None:
    """The model that a body names; None where it names none, or cannot be read."""
    try:
        named = _DECODER.decode(body).model
    except (ValueError, RecursionError):  # msgspec.DecodeError, UnicodeDecodeError
        return None
    return named if isinstance(named, str) else None


def _again(messages: list[Message], receive: Receive) -> Receive:
    """What was received, once more, then what follows."""
    left = iter(messages)

    async def again() -> Message:
        return next(left, None) or await receive()

    return again
