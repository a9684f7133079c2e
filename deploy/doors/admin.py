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


def admin_routes(cluster: Administration) -> APIRouter:
    router = APIRouter(prefix="/admin")

    @router.post("/groups/{group}/drain", status_code=202, responses={403: {}, 409: {}})
    async def drain(request: Request, group: int, replace: bool = False) -> Response:
        """Let a group run empty: it takes no more sequences. Then it ends, or, with `replace`, starts anew."""
        if not request.state.caller.operator:
            raise RequestError(
                Fault.FORBIDDEN,
                "this API key may not change the cluster: use one behind which the file of keys says `operator`",
                code="not_an_operator",
            )
        await cluster.drain(group, replace)
        return Response(status_code=202)

    return router
