"""Serve's own actors are woken when a signal has stopped them, by a small process beside each (`scheduler.protocol.sentinel`),
or ended where that does not help.

Nothing of Serve's or Ray's would notice for its controller, and only after half a minute for the others: whoever is dead is
replaced at once. Imports ray, Serve's names and the sentinel.
"""

import logging
import threading

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE, SERVE_PROXY_NAME

from scheduler.protocol.sentinel import watch_this_process

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""Between two looks for actors that Serve has started since."""

ASK_TIMEOUT_S = 10.0
PARTS = (SERVE_CONTROLLER_NAME, SERVE_PROXY_NAME)
"""What their names begin with, those of HAProxy's managers, too; replicas have others."""

_watched = False


class Attendant:
    """Begins at once, in a thread, and sees to it until it is closed."""

    def __init__(self) -> None:
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manta-attendant", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._look()
            except Exception as error:  # Ray is being restarted, or ends
                logger.debug("Serve's actors cannot be looked for: %s", error)
            self._closing.wait(LOOK_S)

    def _look(self) -> None:
        asked = {}
        for found in ray.util.list_named_actors(all_namespaces=True):
            if found["namespace"] == SERVE_NAMESPACE and found["name"].startswith(PARTS):
                actor = ray.get_actor(found["name"], SERVE_NAMESPACE)
                asked[actor.__ray_call__.remote(_attend)] = found["name"]
        answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=ASK_TIMEOUT_S) if asked else ([], [])
        for answer in answered:
            try:
                ray.get(answer)
            except Exception as error:
                logger.debug("%s is not attended to: %s", asked[answer], error)


def _attend(_: object) -> None:
    """Inside the actor. Once for each of its processes."""
    global _watched
    if not _watched:
        watch_this_process()
        _watched = True
