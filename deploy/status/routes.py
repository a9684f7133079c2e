"""The routes of the status page: `/`, and `/status.json` behind it. Imports fastapi; no ray.

The page and its assets hold nothing secret and are the same for everyone; `/status.json` is what an API key protects.
"""

import contextlib
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response

from deploy.frontend.models.further import FurtherModels
from deploy.frontend.service.service import Service
from deploy.status.page import ASSETS, page_file
from deploy.status.watch import Watches


def status_routes(service: Service, further: FurtherModels | None = None) -> APIRouter:
    """Routes of the page and its data. Their lifespan keeps the histories; without it, they only grow while someone looks.
    service: of the first model, which is shown where none is named. further: those beside it."""
    watches = Watches(service, FurtherModels() if further is None else further)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with watches.running():
            yield

    router = APIRouter(lifespan=lifespan, include_in_schema=False)

    @router.get("/")
    def page() -> Response:
        return page_file("page.html", "text/html")

    @router.get("/status.json")
    async def status(request: Request, history: bool = True, model: str | None = None) -> Response:
        """history=0 leaves the past samples out: a page that polls has them. model: by its name."""
        if (watch := watches.of(model)) is None:
            raise HTTPException(404, "there is no model of this name: /v1/models lists those that there are")
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
        return page_file(name, ASSETS[name])

    return router
