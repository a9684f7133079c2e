"""The HTTP endpoint: which path does what. Each replica makes its own; it runs under uvicorn and inside Ray Serve alike.

Imports fastapi; what the paths do is in `openai/`, `anthropic/` and `metrics`.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from deploy.config.serve import ServeConfig
from deploy.config.version import VERSION
from deploy.doors.access import ApiKeys
from deploy.doors.anthropic import errors as anthropic
from deploy.doors.anthropic.routes import RECORDS as ANTHROPIC_RECORDS
from deploy.doors.anthropic.routes import anthropic_routes
from deploy.doors.dialects.tools.grammars import Grammars
from deploy.doors.http.by_model import ByModel
from deploy.doors.http.entrance import (
    API_KEY_HEADER,
    REQUEST_ID_HEADER,
    Entrance,
    Gatekeeper,
    error_content,
    error_response,
    inside,
    names_of,
)
from deploy.doors.openai.adapters import RECORDS as ADAPTER_RECORDS
from deploy.doors.openai.document import add_schemas
from deploy.doors.openai.models import one_of
from deploy.doors.openai.responses.store.storing import OwnResponses, ResponseStore, bounds_of
from deploy.doors.openai.routes import RECORDS as OPENAI_RECORDS
from deploy.doors.openai.routes import model_routes, openai_routes
from deploy.doors.openai.streams.marks import LAST_EVENT_ID
from deploy.doors.warnings import HEADER as WARNING_HEADER
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.models.further import FurtherModel, FurtherModels
from deploy.frontend.service.service import Service
from deploy.observing import metrics

Handler = Callable[[Request, Any], Coroutine[Any, Any, Response]]

READY_RETRY_S = 1.0
ANTHROPIC_HEADERS = ("Anthropic-Version", "Anthropic-Beta", "Anthropic-Dangerous-Direct-Browser-Access")
"""Which pages that call `/v1/messages` send, and nothing here depends on."""

SHOWN_VERSION = VERSION or "0 (from a source folder)"


def create_app(
    service: Service, config: ServeConfig, keys: ApiKeys, *, pages: APIRouter | None = None,
    further: FurtherModels | None = None, names_responses: bool = True, store: ResponseStore | None = None,
) -> FastAPI:
    """The endpoint of services which somebody else runs. service: of the first model, which is meant where a request names
    none. keys: none leave it open. pages: to look at, beside the API. further: models beside the first. names_responses: False
    where whoever runs it puts the request's id on every response, as Ray Serve does. store: where responses are kept, of all
    models, if the endpoint is more than this process."""
    further = FurtherModels() if further is None else further
    store = OwnResponses(bounds_of(config)) if store is None else store
    by_model = Middleware(ByModel, further=further, doors=partial(_further_app, store))
    app = FastAPI(
        title="Manta", version=SHOWN_VERSION, docs_url=None, redoc_url=None,
        redirect_slashes=False,  # `Entrance` takes them off
        middleware=[*_middleware(config, keys, names_responses), by_model],
        exception_handlers=_handlers(_on_fault if names_responses else _on_unnamed_fault),
    )  # fmt: skip
    for router in _doors(service, config, store):
        app.include_router(router)
    app.include_router(model_routes(service, further))
    if pages is not None:
        app.include_router(pages)
    _add_operations(app, service, further)
    app.openapi = partial(_document, app, config.strict_fields)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI, strict: bool) -> dict[str, Any]:
    """Written when it is first asked for: most replicas never are, and it is most of what making the endpoint would take."""
    if (document := app.openapi_schema) is None:
        document = FastAPI.openapi(app)
        add_schemas(document, *OPENAI_RECORDS, *ADAPTER_RECORDS, *ANTHROPIC_RECORDS, strict=strict)
    return document


def _doors(service: Service, config: ServeConfig, store: ResponseStore) -> Iterator[APIRouter]:
    """What answers for one model: every POST whose body may name a model. Made once for each."""
    grammars = Grammars(service.model)
    yield openai_routes(service, config, grammars, store)
    yield anthropic_routes(service, config, grammars)


def _further_app(store: ResponseStore, model: FurtherModel) -> FastAPI:
    """Of a model beside the first, behind the same middleware."""
    app = FastAPI(openapi_url=None, redirect_slashes=False, exception_handlers=_handlers(_on_unnamed_fault))
    for router in _doors(model.service, model.config, store):
        app.include_router(router)
    return app


def _handlers(on_fault: Handler) -> dict[int | type[Exception], Handler]:
    return {
        RequestError: _on_request_error, RequestValidationError: _on_bad_parameter, HTTPException: _on_http_error,
        Exception: on_fault,
    }  # fmt: skip


def _middleware(config: ServeConfig, keys: ApiKeys, names_responses: bool) -> list[Middleware]:
    """Outermost first. A page of another origin may call only if it is named; its preflight carries no key."""
    cors = Middleware(
        CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["DELETE", "GET", "HEAD", "POST"],
        allow_headers=["Authorization", "Content-Type", LAST_EVENT_ID, REQUEST_ID_HEADER, API_KEY_HEADER, *ANTHROPIC_HEADERS],
        expose_headers=[REQUEST_ID_HEADER, anthropic.REQUEST_ID_HEADER, "Retry-After", WARNING_HEADER],
    )  # fmt: skip
    return [
        Middleware(Entrance, names_responses=names_responses),
        *([cors] if config.cors_origins else []),
        Middleware(Gatekeeper, keys=keys, config=config),
    ]


def _add_operations(app: FastAPI, service: Service, further: FurtherModels) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={404: {}, 503: {"description": "No group is up yet, or none can be reached."}})
    async def ready(request: Request, model: str | None = None) -> Response:
        """At least one group takes requests: of that model, or of any."""
        if model is not None:
            obstacles = [await one_of(model, service, further).obstacle()]
        else:
            obstacles = await asyncio.gather(*(each.obstacle() for each in [service, *(more.service for more in further)]))
        if None in obstacles:
            return JSONResponse({"status": "ready"})
        return error_response(RequestError(Fault.UNAVAILABLE, obstacles[0] or "", retry_after_s=READY_RETRY_S), request.scope)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """The whole cluster in Prometheus' text format, whichever replica is asked."""
        services = [service, *(more.service for more in further)]
        statuses = await asyncio.gather(*(each.cluster.status() for each in services))
        told = {each.model.name: status for each, status in zip(services, statuses, strict=True)}
        return Response(metrics.render(told), media_type=metrics.CONTENT_TYPE)

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        """Of Manta."""
        return {"version": SHOWN_VERSION}


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error, request.scope)


async def _on_bad_parameter(request: Request, error: Exception) -> Response:
    """A query or path parameter of the wrong type."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = str(first["loc"][-1])
    return error_response(RequestError.invalid(f"{where}: {first['msg']}", where), request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What the router says by itself (no such path, not with this method) in the same form as everything else."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; /openapi.json lists what there is"
    unknown = error.status_code == 404 and anthropic.is_for(inside(request.scope))
    body = error_content(RequestError(Fault.NOT_FOUND if unknown else Fault.INVALID, message), request.scope)
    return Response(body, error.status_code, error.headers, "application/json")


async def _on_fault(request: Request, fault: Exception) -> Response:
    response = await _on_unnamed_fault(request, fault)
    response.headers.update(names_of(request.scope))  # this handler stands outside of what names responses
    return response


async def _on_unnamed_fault(request: Request, _: Exception) -> Response:
    """The server's log has the traceback; the client gets the id to ask about."""
    name = request.state.request_id
    fault = RequestError(Fault.INTERNAL, f"a fault of the server's; its log has it under request {name}")
    return error_response(fault, request.scope)
