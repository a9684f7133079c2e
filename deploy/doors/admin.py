"""What an operator asks of a running endpoint, under `/admin`: with a key that is an operator's. Imports fastapi.

It is done beside the requests, and answered at once; `/status.json` shows how far it is.
"""

from typing import Protocol

from fastapi import APIRouter, Request, Response

from deploy.frontend.errors import Fault, RequestError


class Administration(Protocol):
    """Whoever owns the cluster, as an operator reaches it."""

    async def drain(self, group: int, replace: bool) -> None:
        """Lets a group run empty, then ends it, or starts it anew. Errors: RequestError CONFLICT that says why it cannot,
        UNAVAILABLE if nobody can be asked."""
        ...

    async def roll(self, model: str) -> None:
        """Serves another checkpoint in place of this one, under the same name and beside the requests. model: its folder.
        Errors: RequestError for one that cannot be served."""
        ...


def admin_routes(cluster: Administration) -> APIRouter:
    router = APIRouter(prefix="/admin")

    @router.post("/groups/{group}/drain", status_code=202, responses={403: {}, 409: {}})
    async def drain(request: Request, group: int, replace: bool = False) -> Response:
        """Let a group run empty: it takes no more sequences. Then it ends, or, with `replace`, starts anew."""
        _check(request)
        await cluster.drain(group, replace)
        return Response(status_code=202)

    @router.post("/roll", status_code=202, responses={400: {}, 403: {}})
    async def roll(request: Request, model: str) -> Response:
        """Serve another checkpoint in place of this one, under the same name."""
        _check(request)
        await cluster.roll(model)
        return Response(status_code=202)

    return router


def _check(request: Request) -> None:
    """Errors: RequestError FORBIDDEN."""
    if not request.state.caller.operator:
        raise RequestError(
            Fault.FORBIDDEN,
            "this API key may not change the cluster: use one behind which the file of keys says `operator`",
            code="not_an_operator",
        )
