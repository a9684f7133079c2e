"""A front end's way to the scheduler that is up: one stream after the other, for as long as there will be one.

What comes is received by one thread, the front end's; another opens the next stream meanwhile. Imports the engine's interface.
"""

import logging
import queue
import threading
import time

from cluster.engine import Connect, EngineError, EngineLost
from scheduler.protocol.messages import Deltas

logger = logging.getLogger(__name__)

RECONNECT_S = 0.2
"""Between two tries: whoever asks too early is told so at once."""

Inbox = queue.SimpleQueue[Deltas | str | None]
"""What one stream brings: deltas, then why it was lost; None once the connection is closed. Never full: the engine must not
wait for the front end's thread, which calls the engine. It is bounded by the tokens that live requests may still bring."""


class EngineConnection:
    """Connected from its birth. Errors: what `connect` raises."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._lock = threading.RLock()  # a garbage collection may call `close` in the midst of anything
        self._closed = False
        self._opened: queue.SimpleQueue[EngineLost | None] = queue.SimpleQueue()
        self._inbox: Inbox = queue.SimpleQueue()
        self.stream = connect(self._inbox.put, self._inbox.put)
        """The last one, which may be lost."""

    def receive(self) -> Deltas | str | None:
        """The next deltas; or why the stream is lost; None once the connection is closed."""
        return self._inbox.get()

    def renew(self) -> None:
        """Leaves the stream: what still comes of it is not received. Another is being opened from now on."""
        self.stream.leave()
        self._inbox = queue.SimpleQueue()
        threading.Thread(target=self._open, args=(self._inbox,), name="manta-frontend-connect", daemon=True).start()

    def renewed(self, timeout_s: float) -> bool:
        """Waits for the stream that is being opened. Errors: EngineLost if there will be none, or the connection is closed."""
        try:
            lost = self._opened.get(timeout=timeout_s)
        except queue.Empty:
            return False
        if lost is not None:
            raise lost
        return True

    def close(self) -> bool:
        """Ends the stream, and the cluster if it is one's own. False: it was closed before."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        try:
            self.stream.close()
        finally:
            self._inbox.put(None)
            self._opened.put(EngineLost("the engine was shut down"))
        return True

    def _open(self, inbox: Inbox) -> None:
        while not self._closed:
            try:
                stream = self._connect(inbox.put, inbox.put)
            except EngineLost as error:
                self._opened.put(error)
                return
            except (EngineError, OSError) as error:
                logger.info("no scheduler can be reached yet: %s", error)
            except Exception:
                logger.exception("no scheduler can be reached; trying on")
            else:
                self.stream = stream
                if self._closed:  # whoever closes says so first, then ends the stream that is there
                    stream.close()
                self._opened.put(None)
                return
            time.sleep(RECONNECT_S)
