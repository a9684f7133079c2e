"""Who may come in, with how much, and on which terms: API keys, request ids, the size of a body. Pure ASGI, no state between
requests.

Imports starlette, the terms of prompts and the door's errors.
"""

import hashlib
import hmac
import math
import re
import uuid
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.config.serve import ServeConfig
from deploy.doors.openai.errors import error_body, error_headers
from deploy.frontend.errors import Fault, RequestError
from deploy.text.prompts import MOST_URGENT, Terms

REQUEST_ID_HEADER = "x-request-id"
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_FOLDERS = ("/status/",)
"""What needs no key: whether the server is up, and the status page without its figures."""

ACCOUNT_DIGITS = 16

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class ApiKeys:
    """Keys that open the endpoint; without any, it is open. Only their digests are kept.

    priorities: of some keys, the most urgent priority that each may ask for.
    """

    def __init__(self, keys: Iterable[str] = (), priorities: Mapping[str, int] = MappingProxyType({})) -> None:
        self._digests = tuple(_digest(key) for key in keys)
        self._priorities = {account(key): priority for key, priority in priorities.items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def open(self, key: str) -> bool:
        """Whether the key is one of them. Takes the same time whichever it is, and however much of it is right."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0

    def check(self, authorization: str | None) -> str:
        """authorization: the header's value. Returns the key's account, "" where there are no keys.

        Errors: RequestError UNAUTHENTICATED.
        """
        if not self:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not self.open(key.strip()):
            said = "this API key is not known here" if key else "no API key was given"
            raise RequestError(
                Fault.UNAUTHENTICATED, f"{said}: send one as `Authorization: Bearer KEY`", code="invalid_api_key"
            )
        return account(key.strip())

    def best_priority(self, account: str, default: int) -> int:
        """The most urgent priority (the lowest number) that the key of this account may ask for."""
        return self._priorities.get(account, default)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. request_id: the door's. traceparent: of W3C's trace context, if there is one. account: of the API key.
    best_priority: the most urgent one that it may ask for. patience_s: the time that it gives the call as a whole."""

    request_id: str
    traceparent: str | None = None
    account: str = ""
    best_priority: int = MOST_URGENT
    patience_s: float = math.inf

    def terms(
        self, config: ServeConfig, salt: str, priority: int, timeout_s: float | None = None, user: str | None = None
    ) -> Terms:
        """salt, priority, timeout_s: as the request asks for them; it may ask for an earlier deadline than the server's.
        user: on whose account it is where there are no keys. KV is found by the same tenant with the same salt alone, whatever
        salts others choose, unless the server shares it: the length in front makes two different pairs two different salts.
        Errors: RequestError for a priority that goes before others' just by asking."""
        if priority < self.best_priority:
            raise RequestError.invalid(
                f"priority={priority} goes before what may be asked for here, which is {self.best_priority} or more: send "
                "that, or let the server allow it (best_priority for all, `priority=` behind the key in the file of keys)",
                "priority",
            )
        tenant = self.account or account(user or "")
        own = f"{len(tenant)}:{tenant}{salt}" if tenant or salt else ""
        deadline_s = min(config.request_timeout_s, self.patience_s, timeout_s or math.inf)
        return Terms(salt if config.share_prefix_cache else own, tenant, priority, deadline_s)


def account(name: str) -> str:
    """What the scheduler calls whoever has this key, or this name: it tells them apart and says no more."""
    return _digest(name).hex()[:ACCOUNT_DIGITS] if name else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class RequestIds:
    """Gives each request the id that its client chose, if it is a sane one, or a new one; the response names it.

    Handlers find it with `request_id_of`. names_responses: False leaves the response to whoever names it as well.
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

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = name
            await send(message)

        await self._app(scope, receive, send_named if self._names_responses else send)


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """The id of the request under way."""
    return str(scope["state"]["request_id"])


def account_of(scope: MutableMapping[str, Any]) -> str:
    """That of the key with which the request under way came; "" where there are no keys."""
    return str(scope["state"].get("account", ""))


class KeyCheck:
    """Refuses requests without a key, before anything reads their body. Handlers find the key's account with `account_of`."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope):
            try:
                key_account = self._keys.check(Headers(scope=scope).get("authorization"))
                scope.setdefault("state", {})["account"] = key_account
            except RequestError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


class BodyLimit:
    """Refuses bodies that are too large: by their declared length at once, otherwise as soon as they have grown too large."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> RequestError:
        said = f"the body is larger than {self._max_bytes} bytes: send less, or let the server take more (max_request_bytes)"
        return RequestError(Fault.TOO_LARGE, said)


def error_response(error: RequestError) -> Response:
    """OpenAI's form, with what a client needs to do better next time."""
    headers = error_headers(error)
    if error.fault is Fault.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    if error.fault in (Fault.TOO_LARGE, Fault.TOO_SLOW):
        headers["connection"] = "close"  # the rest of the body is not read
    return Response(error_body(error), error.fault.status, headers, "application/json")
