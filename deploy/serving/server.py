"""The HTTP server of an endpoint in this one process: uvicorn, which tells for whom it waits at its end. Imports uvicorn."""

import asyncio
import logging
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from deploy.config.serve import ServeConfig
from deploy.doors.connections import bounded_protocol

CUT_OFF_S = 5
"""After the first signal; whoever still has a request then does not read what he is told of its end."""


class HttpServer(uvicorn.Server):
    """The first signal lets requests under way end, for a while, the second ends them. received: the first; uvicorn would send
    it again, into the midst of what its caller has to tidy up."""

    def __init__(self, app: FastAPI, limits: ServeConfig, tell: Callable[[], None]) -> None:
        """tell: called with the first signal, on the event loop."""
        super().__init__(
            uvicorn.Config(
                app, host=limits.host, port=limits.port, http=bounded_protocol(limits), ws="none", log_level="warning",
                log_config=None, access_log=False, timeout_graceful_shutdown=CUT_OFF_S,
            )
        )  # fmt: skip
        self.received: int | None = None
        self._tell = tell

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.should_exit:
            self.force_exit = True
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off now is no fault
        else:
            self.received, self.should_exit = sig, True
            asyncio.get_running_loop().call_soon_threadsafe(self._tell)
