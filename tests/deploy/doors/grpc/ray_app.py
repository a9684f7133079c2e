"""A Ray Serve instance with gRPC, in a process of its own: `python -m tests.deploy.doors.grpc.ray_app GRPC_PORT HTTP_PORT`.

The ingress has a whole engine in each of its two replicas, so that no other part of a deployment is needed. For each line of
input it prints what the replicas have under way: a JSON list of [requests, held blocks].
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

from cluster.config import EngineConfig
from deploy.config.load import EMBEDDED_MODEL
from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys
from deploy.doors.grpc.ingress import GrpcIngress
from deploy.doors.grpc.server import SERVICER_FUNCTIONS, GrpcDoor
from deploy.frontend.clusters import LocalCluster
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service.model import ServedModel
from deploy.frontend.service.service import Service
from tests.shared.ray_heads import own_ray

APP, DEPLOYMENT, KEY = "manta", "Door", "secret"
FULL = "full"
"""A request of this salt is refused as if the queue were full."""


class BusyService(Service):
    """Has no room for some."""

    def generate(self, prompts: Any, **more: Any) -> AsyncGenerator[Any, None]:
        if prompts[0].terms.salt.endswith(FULL):
            raise RequestError(Fault.OVERLOADED, "the queue is full", code="queue_full", retry_after_s=4.0)
        return super().generate(prompts, **more)


class Door(GrpcIngress):
    """An ingress as an application has it, but for its cluster."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Ray awaits it
        engine = EngineConfig(model=str(EMBEDDED_MODEL), local=True, kv_memory=32 << 20, threads=1)
        self._service = BusyService(ServedModel.read("tiny", EMBEDDED_MODEL, None), LocalCluster(engine))
        self._running = asyncio.create_task(self._service.run())
        self.door = GrpcDoor(self._service, ServeConfig(), ApiKeys([KEY]), self._abort_everywhere)

    async def ready(self) -> bool:
        return await self._service.ready()

    async def status(self) -> tuple[int, int]:
        engine = (await self._service.cluster.status()).engine
        return self._service.under_way, sum(group.held_blocks for group in engine.groups) if engine else 0

    async def abort(self, request_id: str, account: str) -> int:
        return self._service.abort(request_id, account)

    async def _abort_everywhere(self, request_id: str, account: str) -> int:
        replicas = serve.get_deployment_handle(DEPLOYMENT, APP)
        return sum(await replicas.broadcast("abort", request_id, account).results_async())


def main(grpc_port: int, http_port: int) -> None:
    with own_ray(8):
        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=http_port),
            grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=list(SERVICER_FUNCTIONS)),
        )
        deployment = serve.deployment(Door, name=DEPLOYMENT, num_replicas=2, graceful_shutdown_timeout_s=1)
        handle = serve.run(deployment.bind(), name=APP)
        while not all(handle.broadcast("ready").results(timeout_s=30)):
            time.sleep(0.1)
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps(handle.broadcast("status").results(timeout_s=30)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
