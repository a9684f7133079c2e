"""What an operator asks of a running endpoint, under `/admin`: with a key that is an operator's. Imports fastapi.

It is done beside the requests, and answered at once; `/status.json` shows how far it is.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response

from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.models.further import ModelState


class Administration(Protocol):
    """Whoever owns the clusters of an endpoint, as an operator reaches it. model: by its name; None: the first one. Errors of
    all: RequestError NOT_FOUND for a model that is not there, UNAVAILABLE if nobody can be asked."""

    async def drain(self, group: int, replace: bool, model: str | None) -> None:
        """Lets a group run empty, then ends it, or starts it anew. Errors: RequestError CONFLICT that says why it cannot."""
        ...

    async def roll(self, checkpoint: str, model: str | None, revision: str | None) -> None:
        """Serves another checkpoint in place of this one, under the same name and beside the requests. checkpoint, revision: as
        the settings `model` and `revision`. Errors: RequestError for one that cannot be served."""
        ...

    async def add(self, model: str, settings: Mapping[str, Any]) -> None:
        """Serves one more model, beside the requests of the others. settings: by the keys of an entry of `models:`. Errors:
        RequestError for one that cannot be served, CONFLICT if there is one of this name."""
        ...

    async def remove(self, model: str) -> None:
        """It takes no newcomers from now on, and ends when its requests have, or before it has come up. Errors: RequestError
        CONFLICT for the first."""
        ...

    async def models(self) -> list[ModelState]:
        """Of those beside the first, served yet or not."""
        ...

    async def model(self, model: str) -> ModelState:
        """Of one beside the first."""
        ...


def admin_routes(endpoint: Administration) -> APIRouter:
    router = APIRouter(prefix="/admin")

    @router.post("/groups/{group}/drain", status_code=202, responses={403: {}, 404: {}, 409: {}})
    async def drain(request: Request, group: int, replace: bool = False, model: str | None = None) -> Response:
        """Let a group run empty: it takes no more sequences. Then it ends, or, with `replace`, starts anew."""
        require_operator(request)
        await endpoint.drain(group, replace, model)
        return Response(status_code=202)

    @router.post("/roll", status_code=202, responses={400: {}, 403: {}, 404: {}})
    async def roll(
        request: Request, checkpoint: str, model: str | None = None, revision: str | None = None
    ) -> Response:  # fmt: skip
        """Serve another checkpoint in place of this one, under the same name."""
        require_operator(request)
        await endpoint.roll(checkpoint, model, revision)
        return Response(status_code=202)

    @router.put("/models/{model:path}", status_code=202, responses={400: {}, 403: {}, 409: {}})
    async def add(request: Request, model: str, settings: dict[str, Any]) -> Response:
        """Serve one more model, which takes requests when its groups are up."""
        require_operator(request)
        await endpoint.add(model, settings)
        return Response(status_code=202)

    @router.delete("/models/{model:path}", status_code=202, responses={403: {}, 404: {}, 409: {}})
    async def remove(request: Request, model: str) -> Response:
        """Let a model go: it takes no more requests, and ends when those under way have."""
        require_operator(request)
        await endpoint.remove(model)
        return Response(status_code=202)

    @router.get("/models", responses={403: {}})
    async def models(request: Request) -> dict[str, list[ModelState]]:
        """How the models beside the first are: also those that come up, or do not."""
        require_operator(request)
        return {"data": await endpoint.models()}

    @router.get("/models/{model:path}", responses={403: {}, 404: {}})
    async def model(request: Request, model: str) -> ModelState:
        """How a model beside the first is."""
        require_operator(request)
        return await endpoint.model(model)

    return router


def require_operator(request: Request) -> None:
    """Errors: RequestError FORBIDDEN."""
    if not request.state.caller.operator:
        raise RequestError(
            Fault.FORBIDDEN,
            "this API key may not change the cluster: use one behind which the file of keys says `operator`",
            code="not_an_operator",
        )
