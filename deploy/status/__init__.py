"""Something to look at: the status page at `/`, and `/status.json` behind it. Imports fastapi; no ray.

The page and its assets hold nothing secret and are the same for everyone; `/status.json` is what an API key protects.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response

from deploy.frontend.service import Service
from deploy.status.history import History
from deploy.status.watch import StatusWatch

FOLDER = Path(__file__).parent
ASSETS = {
    "app.js": "text/javascript",
    "charts.js": "text/javascript",
    "map.js": "text/javascript",
    "panel.js": "text/javascript",
    "words.js": "text/javascript",
    "style.css": "text/css",
}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def status_routes(service: Service) -> APIRouter:
    """Routes of the page and its data. Their lifespan keeps the history; without it, it only grows while someone looks."""
    watch = StatusWatch(service, History())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sampling = asyncio.create_task(watch.run())
        try:
            yield
        finally:
            sampling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sampling

    router = APIRouter(lifespan=lifespan, include_in_schema=False)

    @router.get("/")
    def page() -> Response:
        return _file("page.html", "text/html")

    @router.get("/status.json")
    async def status(request: Request, history: bool = True) -> Response:
        """history=0 leaves the past samples out: a page that polls has them."""
        compressed = "gzip" in request.headers.get("Accept-Encoding", "")
        body = (await watch.latest()).body(history=history, compressed=compressed)
        headers = {"Cache-Control": "no-store", "Vary": "Accept-Encoding"}
        if compressed:
            headers["Content-Encoding"] = "gzip"
        return Response(body, media_type="application/json", headers=headers)

    @router.get("/status/{name}")
    def asset(name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(404, f"the status page has no {name}")
        return _file(name, ASSETS[name])

    return router


def _file(name: str, kind: str) -> Response:
    return Response((FOLDER / name).read_bytes(), media_type=kind, headers=PAGE_HEADERS)
