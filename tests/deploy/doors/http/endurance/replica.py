"""A front end in a process of its own, which a test may kill: HTTP before it, the test's scheduler behind it.

    python -m tests.deploy.doors.http.endurance.replica PORT_OF_THE_SCHEDULER        says its own port
"""

import asyncio
import socket
import sys

import uvicorn

from cluster.engine import OnDeltas, OnFailure
from cluster.remote import SchedulerStream
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.http.app import create_app
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from scheduler.server.stats import ClusterStatus
from tests.deploy.frontend.mortal_cluster import HOST, MOST_TOKENS, TOKEN


class Reached:
    """A `Cluster` whose scheduler is at a port."""

    def __init__(self, port: int) -> None:
        self._port = port

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> SchedulerStream:
        return SchedulerStream(HOST, self._port, TOKEN, on_deltas, on_failure)

    async def status(self, maps: bool = False) -> ClusterStatus:  # noqa: ARG002
        return ClusterStatus(phase="ready")


async def serve(scheduler: int) -> None:
    """Until it is killed."""
    service = Service(ServedModel.read("tiny", EMBEDDED_MODEL, MOST_TOKENS), Reached(scheduler))
    running = asyncio.create_task(service.run())
    while not service.connected:
        await asyncio.sleep(0.01)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind((HOST, 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    app = create_app(service, ServeConfig(), ApiKeys())
    await uvicorn.Server(uvicorn.Config(app, log_level="warning")).serve(sockets=[listener])
    running.cancel()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
