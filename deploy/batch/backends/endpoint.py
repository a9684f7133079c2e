"""A running deployment, or any server with OpenAI's API, reached by HTTP. Imports httpx, once there is one to reach."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from deploy.batch.backends.backend import LineAnswer
from deploy.batch.lines import BatchRequest
from deploy.config.load import ConfigError
from deploy.doors.openai.errors import error_body
from deploy.doors.warnings import HEADER, said
from deploy.frontend.errors import Fault, RequestError

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_S = 30.0
TRY_AGAIN = {429: Fault.OVERLOADED, 502: Fault.UNAVAILABLE, 503: Fault.UNAVAILABLE}
REFUSED_KEY = (401, 403)


class EndpointBackend:
    """Bodies go there as they are. client: knows the address and the key."""

    def __init__(self, client: "httpx.AsyncClient") -> None:
        self._client = client

    async def answer(self, request: BatchRequest) -> LineAnswer:
        from httpx import TransportError

        headers = {"content-type": "application/json", "x-request-id": request.id}
        try:
            response = await self._client.post(request.url, content=request.body, headers=headers)
        except TransportError as error:
            said = str(error) or type(error).__name__
            raise RequestError(Fault.UNAVAILABLE, f"{self._client.base_url} cannot be reached: {said}") from error
        if response.status_code in REFUSED_KEY:
            raise ConfigError(f"{self._client.base_url} refuses the API key ({_message(response)}): give one by --api-key-file")
        if response.status_code in TRY_AGAIN:
            fault = TRY_AGAIN[response.status_code]
            raise RequestError(fault, _message(response), retry_after_s=_retry_after_s(response))
        return _answer(response)


@asynccontextmanager
async def open_endpoint(url: str, api_key: str | None, concurrency: int) -> AsyncIterator[EndpointBackend]:
    """Errors: ConfigError."""
    import httpx

    from deploy.config.client import open_client

    async with open_client(
        httpx.AsyncClient,
        url,
        api_key,
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
    ) as client:
        yield EndpointBackend(client)


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Detail(msgspec.Struct):
    message: str


class _Failure(msgspec.Struct):
    error: _Detail


def _answer(response: "httpx.Response") -> LineAnswer:
    """What is not JSON comes from something in between, and is told as an error."""
    try:
        usage = msgspec.json.decode(response.content, type=_Body).usage
    except ValueError:
        error = RequestError(Fault.INTERNAL, f"the answer is not a JSON object: {response.text[:200]!r}")
        return LineAnswer(response.status_code, error_body(error))
    tokens = usage.completion_tokens if usage else 0
    return LineAnswer(response.status_code, response.content, tokens, said(response.headers.get(HEADER, "")))


def _message(response: "httpx.Response") -> str:
    try:
        return msgspec.json.decode(response.content, type=_Failure).error.message
    except ValueError:
        return f"status {response.status_code}"


def _retry_after_s(response: "httpx.Response") -> float:
    """Dates, which the header may hold too, count as nothing said."""
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
