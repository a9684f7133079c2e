"""What every HTTP request passes before anything else: its id, one spelling of its path, its key, and bounds on its body.

    Entrance ─▶ (CORS) ─▶ Gatekeeper ─▶ the router          Pure ASGI, no state between requests.

Handlers find who asks in `request.state.caller`. Imports starlette, who may come in, and the door's errors.
"""

import asyncio
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.config.serve import ServeConfig
from deploy.doors.access import REQUEST_ID, ApiKeys, Caller
from deploy.doors.anthropic import errors as anthropic
from deploy.doors.connections import too_slow
from deploy.doors.openai.errors import error_body, error_headers
from deploy.frontend.errors import Fault, RequestError

REQUEST_ID_HEADER = "x-request-id"
API_KEY_HEADER = "x-api-key"
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_FOLDERS = ("/status/",)
"""What needs no key: whether the server is up, and the status page without its figures."""

_SLASHES = re.compile("/{2,}")


class Entrance:
    """Gives each request the id that its client chose, if it is a sane one, or a new one; the response names it.

    Takes `/health/` and `//health` for `/health`, where others would redirect, which clients follow with another method,
    another scheme, or not at all; and answers HEAD with the head of what GET answers, as load balancers and health checks ask.
    names_responses: False leaves the response to whoever names it as well.
    """

    def __init__(self, app: ASGIApp, names_responses: bool = True) -> None:
        self._app = app
        self._names_responses = names_responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        name = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        head_only = scope["method"] == "HEAD"
        told = {**scope, "path": plain(scope["path"], scope.get("root_path", ""))}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(names_of(told, self._names_responses))
            elif message["type"] == "http.response.body" and head_only:
                message = {**message, "body": b""}
            await send(message)

        await self._app(told | {"method": "GET"} if head_only else told, receive, answer)


class Gatekeeper:
    """Refuses requests without a key, before anything reads their body; bodies that are too large, by their declared length at
    once, otherwise as soon as they have grown too large; and bodies that have not arrived whole in time after their headers."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, config: ServeConfig) -> None:
        self._app = app
        self._keys = keys
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["caller"] = self._admitted(scope)
        except RequestError as error:
            await error_response(error, scope)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _admitted(self, scope: Scope) -> Caller:
        """Errors: RequestError."""
        headers = Headers(scope=scope)
        account = "" if _is_open(scope) else self._keys.check(headers.get("authorization"), headers.get(API_KEY_HEADER))
        declared = headers.get("content-length", "")
        if declared.isdecimal():
            self._check_size(int(declared))
        best_priority = self._keys.best_priority(account, self._config.best_priority)
        traceparent, operator = headers.get("traceparent"), self._keys.may_operate(account)
        return Caller(scope["state"]["request_id"], traceparent, account, best_priority, operator=operator)

    def _bounded(self, receive: Receive) -> Receive:
        """What it returns raises RequestError for a body that is too large, too late, or left by its client."""
        timeout_s = self._config.receive_timeout_s
        due_s, size, whole = asyncio.get_running_loop().time() + timeout_s, 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:  # what follows is the disconnect, however late
                return await receive()
            try:
                async with asyncio.timeout_at(due_s):
                    message = await receive()
            except TimeoutError:
                raise too_slow("body", timeout_s) from None
            if message["type"] == "http.disconnect":
                raise RequestError(Fault.CANCELLED, "the client went away before its body had arrived")
            size += len(message.get("body", b""))
            self._check_size(size)
            whole = not message.get("more_body", False)
            return message

        return bounded

    def _check_size(self, size_bytes: int) -> None:
        """Errors: RequestError TOO_LARGE."""
        limit = self._config.max_request_bytes
        if size_bytes > limit:
            said = f"the body is larger than {limit} bytes: send less, or let the server take more (max_request_bytes)"
            raise RequestError(Fault.TOO_LARGE, said)


def plain(path: str, root: str = "") -> str:
    """The path with single slashes, none at its end. root: of the application, which is left as it is."""
    inside = path.removeprefix(root)
    return root + (_SLASHES.sub("/", inside).removesuffix("/") or "/") if inside.startswith("/") else path


def error_response(error: RequestError, scope: Scope) -> Response:
    """With what a client needs to do better next time."""
    headers = error_headers(error)
    if error.fault is Fault.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    if error.fault in (Fault.TOO_LARGE, Fault.TOO_SLOW):
        headers["connection"] = "close"  # the rest of the body is not read
    return Response(error_content(error, scope), error.fault.status, headers, "application/json")


def error_content(error: RequestError, scope: Scope) -> bytes:
    """JSON, in the form that clients of this path know."""
    if anthropic.is_for(inside(scope)):
        return anthropic.error_body(error, scope["state"]["request_id"])
    return error_body(error)


def names_of(scope: Scope, by_us: bool = True) -> dict[str, str]:
    """Headers with the request's id. by_us: False where somebody else sets the usual one."""
    name = scope["state"]["request_id"]
    usual = {REQUEST_ID_HEADER: name} if by_us else {}
    return usual | ({anthropic.REQUEST_ID_HEADER: name} if anthropic.is_for(inside(scope)) else {})


def inside(scope: Scope) -> str:
    """The path without the application's own part."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_open(scope: Scope) -> bool:
    path = inside(scope)
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
