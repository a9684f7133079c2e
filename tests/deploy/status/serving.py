"""The status page of a fake cluster on a port of its own, in a thread.

To look at it: `python -m tests.deploy.status.serving [groups] [blocks] [load]`.
"""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType

import uvicorn
from fastapi import FastAPI, Request, Response

from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.frontend.clusters import Cluster
from deploy.frontend.models.further import FurtherModel, FurtherModels
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from deploy.status.routes import status_routes
from deploy.text.prompts import read_model_limits
from tests.deploy.status.fake_cluster import FakeCluster


def make_app(cluster: Cluster, api_key: str | None = None, further: Mapping[str, Cluster] = MappingProxyType({})) -> FastAPI:
    """Services whose streams are kept open while the app runs. api_key: what `/status.json` then asks for. further: clusters of
    models beside the first."""
    limits = read_model_limits(EMBEDDED_MODEL, None, 1)
    clusters = {"example": cluster, **further}
    service, *others = (
        Service(ServedModel(name, EMBEDDED_MODEL, 0, limits, None), each) for name, each in clusters.items()
    )  # fmt: skip
    models = FurtherModels()
    for each in others:
        models.put(FurtherModel(each, ServeConfig()))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = [asyncio.create_task(each.run()) for each in (service, *others)]
        yield
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    app = FastAPI(lifespan=lifespan)
    app.include_router(status_routes(service, models))

    @app.middleware("http")
    async def authenticate(request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = api_key is not None and request.headers.get("Authorization") != f"Bearer {api_key}"
        return Response(status_code=401) if refused and request.url.path == "/status.json" else await follow(request)

    return app


class Server(uvicorn.Server):
    """Runs in a thread; a second start on the same port is what a restarted endpoint is."""

    def __init__(self, app: FastAPI, port: int = 0) -> None:
        super().__init__(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))

    @property
    def port(self) -> int:
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[Server]:
    """Errors: RuntimeError if it does not start."""
    server = Server(app, port)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError(f"no server on port {port}")
            thread.join(timeout=0.01)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def main() -> None:
    numbers = [float(word) for word in sys.argv[1:]] + [8, 8000, 60][len(sys.argv) - 1 :]
    cluster = FakeCluster(int(numbers[0]), int(numbers[1]), numbers[2], live=True)
    with serving(make_app(cluster), 8123) as server:
        print(server.url)
        threading.Event().wait()


if __name__ == "__main__":
    main()
