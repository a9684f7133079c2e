"""Scheduler and ranks as detached actors, kept by whoever owns them: they outlive it, and know that it lives.

Imports ray.
"""

import contextlib
import logging
import os
import threading
import time
from typing import Any

import ray

from cluster.fleet.ownership.claim import OwnerClaim
from cluster.fleet.ownership.lasting import Lasting
from scheduler.protocol.orphans import Estate
from scheduler.protocol.silence import Silence

logger = logging.getLogger(__name__)

KEEPS = 6
"""Of an owner, in the time after which its actors are orphans."""

LOOK_S = 1.0
DEAF_ROUNDS = 2.5
"""Of its word to each, without an answer from anybody, after which an owner takes itself for cut off."""

ACTORS = 0


class Owner(Lasting):
    """Whoever owns an estate: says so to each of its actors, in a thread, until `close`. Ends its process once another owns it.

    deaf: nobody answers who has done so before: it is cut off.
    """

    def __init__(self, estate: Estate) -> None:
        super().__init__(estate)
        self.deaf = False
        self._claim = OwnerClaim(estate)
        self._silence = Silence(time.monotonic(), LOOK_S)
        self._silence.heard(ACTORS, time.monotonic())
        self._asked: dict[Any, Any] = {}
        self._known: set[Any] = set()  # of those who are asked: they have answered
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manta-owner", daemon=True)
        self._thread.start()

    def keep(self, actor: Any) -> None:
        """From now on, until it dies."""
        with self._lock:
            self._asked[actor] = actor.keep.remote()

    def check(self) -> None:
        """Before whatever is done to the estate. Does not return if it is another's, which looks after it."""
        with contextlib.suppress(Exception):  # without Ray's GCS there is no other
            if self._claim.superseded:
                logger.error("another owner has come: this one ends its process")
                os._exit(1)

    def release(self, actor: Any) -> None:
        """It is not this one's any more."""
        with self._lock:
            self._asked.pop(actor, None)
            self._known.discard(actor)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        told_s, round_s = 0.0, self.estate.adoption_timeout_s / KEEPS
        while not self._closing.wait(min(LOOK_S, round_s)):
            now_s = time.monotonic()
            try:
                self.check()
                self.deaf = self._silence.look(now_s)[ACTORS] > DEAF_ROUNDS * round_s
                if now_s - told_s >= round_s:
                    told_s = now_s
                    self._tell()
            except Exception:  # whatever it is: without this thread all that is owned ends
                logger.exception("not all actors were told that they have an owner; trying on")

    def _tell(self) -> None:
        with self._lock:
            asked = {reference: actor for actor, reference in self._asked.items()}
            known = bool(self._known)
        if not known:  # they are only starting
            self._silence.heard(ACTORS, time.monotonic())
        if not asked:
            return
        answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=0)
        for reference in answered:  # who has not answered is stopped, or busy, and has been asked
            self._again(asked[reference], reference)

    def _again(self, actor: Any, reference: Any) -> None:
        """The next word, to an actor that has heard the last."""
        try:
            ray.get(reference)
            self._silence.heard(ACTORS, time.monotonic())
            with self._lock:
                if actor in self._asked:
                    self._known.add(actor)
        except ray.exceptions.ActorUnavailableError:
            logger.warning("an actor cannot be reached for now: %s", actor)
        except ray.exceptions.RayError:  # it has died
            self.release(actor)
            return
        with self._lock:
            if actor in self._asked:
                self._asked[actor] = actor.keep.remote()
