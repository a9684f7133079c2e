"""The Ray shell of the store: an actor that keeps an application's responses, whichever front end asks. Imports no ray itself.

It is nobody's in particular: every front end says to it that it has an owner, and it ends when none has for a while.
"""

import logging
import os

from deploy.doors.openai.responses.store.storing import Bounds, KeptResponses, StoredTurn
from scheduler.logs import configure
from scheduler.protocol.orphans import OwnerWatch

logger = logging.getLogger(__name__)


class ResponsesActor:
    """Wrapped by `ray.remote` where it is placed (`shared`). Every method runs on the actor's one event loop."""

    def __init__(self, adoption_timeout_s: float, log_format: str) -> None:
        configure(log_format, role="responses")
        self._kept = KeptResponses()
        self._owner = OwnerWatch(adoption_timeout_s, self._orphaned)

    async def keep(self) -> None:
        """A front end lives."""
        self._owner.heard()

    async def process(self) -> int:
        """Its id."""
        return os.getpid()

    async def put(self, owner: str, name: str, previous: str | None, body: bytes, turn: StoredTurn, bounds: Bounds) -> bool:
        return self._kept.put(owner, name, previous, body, turn, bounds)

    async def body(self, owner: str, name: str) -> bytes | None:
        return self._kept.body(owner, name)

    async def turns(self, owner: str, name: str) -> list[StoredTurn] | None:
        return self._kept.turns(owner, name)

    async def delete(self, owner: str, name: str) -> bool:
        return self._kept.delete(owner, name)

    def _orphaned(self) -> None:
        """From the watch's thread."""
        logger.warning("no front end is left: %d responses are forgotten", self._kept.count)
        os._exit(0)
