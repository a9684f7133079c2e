"""A `Service` that runs within a test, in its process and its loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deploy.frontend.service.service import Service

PATIENCE_S = 60.0


@asynccontextmanager
async def connected(service: Service) -> AsyncIterator[Service]:
    """Once it has reached its cluster, and until the test has done with it."""
    running = asyncio.create_task(service.run())
    async with asyncio.timeout(PATIENCE_S):
        while not service.connected:
            await asyncio.sleep(0.01)
    try:
        yield service
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
