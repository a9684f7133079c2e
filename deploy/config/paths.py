"""One spelling of every path, and HEAD wherever there is GET. Pure ASGI, no state between requests."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SLASHES = re.compile("/{2,}")


class Paths:
    """Takes `/health/` and `//health` for `/health`, where others would redirect, which clients follow with another method,
    another scheme, or not at all; and answers HEAD with the head of what GET answers, as load balancers and health checks ask.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = {**scope, "path": plain(scope["path"], scope.get("root_path", ""))}
        if scope["method"] != "HEAD":
            await self._app(told, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app(told | {"method": "GET"}, receive, send_head)


def plain(path: str, root: str = "") -> str:
    """The path with single slashes, none at its end. root: of the application, which is left as it is."""
    inside = path.removeprefix(root)
    return root + (_SLASHES.sub("/", inside).removesuffix("/") or "/") if inside.startswith("/") else path
