"""What of a fleet outlives its owner: scheduler and ranks as detached actors, found by their names, kept by whoever owns them.

    actors             VERSION/scheduler/LIFE, VERSION/group/GROUP/EPOCH/RANK    in the namespace of their application
    placement groups   NAMESPACE/VERSION/group/GROUP/EPOCH

Imports ray.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, PlacementGroupID, placement_group_table, remove_placement_group

import kvcache
import scheduler
import workers
from cluster.config import EngineConfig
from cluster.fleet.claim import OwnerClaim
from scheduler.config.core import CoreConfig, QueueBounds
from scheduler.protocol.orphans import Estate
from scheduler.protocol.silence import Silence
from workers.config import WorkerConfig
from workers.model.sources.naming import folder_of, kind_of

logger = logging.getLogger(__name__)

KEEPS = 6
"""Of an owner, in the time after which its actors are orphans."""

VERSION_DIGITS = 12


def namespace_of(application: str) -> str:
    """Of a Serve application's detached actors."""
    return f"manta-{application}"


def version_of(config: EngineConfig, bounds: QueueBounds, threads: int) -> str:
    """Of what scheduler and ranks are told, of the weights, and of their own code. How many groups there are, how long is
    waited for them, and which adapters are named, does not matter: who is told something else of that serves on."""
    records = (CoreConfig, WorkerConfig)
    names = {f.name for record in records for f in fields(record)} - {"groups", "max_groups", "lora", "max_loras"}
    told = [(name, getattr(config, name)) for name in sorted(names)]
    queue = [getattr(bounds, f.name) for f in fields(QueueBounds)]
    return _digest(told, config.exchanges_blocks, config.lora_slots, queue, threads, _files(config.model), _code())


def _files(model: str) -> list[tuple[str, int, int]]:
    """What a folder is made of: another checkpoint may stand there tomorrow. Of anything else the revision tells."""
    if kind_of(model) != "folder":
        return []
    folder = folder_of(model)
    found = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)


def _code() -> list[str]:
    """What an old scheduler or rank may not be able to say to a new one."""
    rooms = (Path(package.__path__[0]) for package in (kvcache, scheduler, workers))
    files = sorted(file for room in rooms for file in room.rglob("*.py"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _digest(*told: Any) -> str:
    return hashlib.sha256(repr(told).encode()).hexdigest()[:VERSION_DIGITS]


# ---- what is there


@dataclass(slots=True)
class Remains:
    """Of one epoch of a group. ranks: names of the actors that live, by number."""

    group: int
    epoch: int
    ranks: dict[int, str] = field(default_factory=dict)
    placement: PlacementGroup | None = None


@dataclass(slots=True)
class Found:
    """Of one version. schedulers: names by life. groups: by number and epoch."""

    schedulers: dict[int, str] = field(default_factory=dict)
    groups: dict[tuple[int, int], Remains] = field(default_factory=dict)

    def remains(self, group: str, epoch: str) -> Remains:
        key = int(group), int(epoch)
        return self.groups.setdefault(key, Remains(*key))


def find(namespace: str) -> dict[str, Found]:
    """What an application has, by version, whoever owns it."""
    found: defaultdict[str, Found] = defaultdict(Found)
    for name in _names(namespace):
        match name.split("/"):
            case [version, "scheduler", life]:
                found[version].schedulers[int(life)] = name
            case [version, "group", group, epoch, rank]:
                found[version].remains(group, epoch).ranks[int(rank)] = name
    for number, placement in placement_group_table().items():
        match str(placement["name"]).split("/"):
            case [owner, version, "group", group, epoch] if owner == namespace and placement["state"] != "REMOVED":
                found[version].remains(group, epoch).placement = PlacementGroup(PlacementGroupID(bytes.fromhex(number)))
    return dict(found)


def _names(namespace: str) -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [str(actor["name"]) for actor in actors if actor["namespace"] == namespace]


def latest_scheduler(namespace: str, version: str) -> Any | None:
    """The actor, whether or not it listens yet; None if there is none."""
    lives = [int(name.rpartition("/")[2]) for name in _names(namespace) if name.startswith(f"{version}/scheduler/")]
    with contextlib.suppress(ValueError):  # it has died meanwhile
        return actor_of(namespace, f"{version}/scheduler/{max(lives)}") if lives else None
    return None


def actor_of(namespace: str, name: str) -> Any:
    """Errors: ValueError if it has died meanwhile."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except AssertionError as error:  # Ray's own: it was the last one of its job, of which nothing is known any more
        raise ValueError(f"{name} has died, and all else of its job") from error


def end_group(namespace: str, remains: Remains) -> None:
    """Its processes, also those that do not react."""
    if remains.placement is not None:
        remove_placement_group(remains.placement)
    for name in remains.ranks.values():
        _kill(namespace, name)


def end(namespace: str, found: Found) -> None:
    """Nothing is left of it afterwards. For whoever knows that nobody owns it any more."""
    for name in found.schedulers.values():
        _kill(namespace, name)
    for remains in found.groups.values():
        end_group(namespace, remains)


def _kill(namespace: str, name: str) -> None:
    with contextlib.suppress(ValueError):  # it has ended by itself
        ray.kill(actor_of(namespace, name), no_restart=True)


# ---- what is owned


LOOK_S = 1.0
DEAF_ROUNDS = 2.5
"""Of its word to each, without an answer from anybody, after which an owner takes itself for cut off."""

ACTORS = 0


class Owner:
    """Whoever owns an estate: says so to each of its actors, in a thread, until `close`. Ends its process once another owns it.

    deaf: nobody answers who has done so before: it is cut off.
    """

    def __init__(self, estate: Estate) -> None:
        self.estate = estate
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

    def scheduler_options(self, life: int) -> dict[str, Any]:
        return self._detached(f"scheduler/{life}")

    def rank_options(self, group: int, epoch: int, rank: int) -> dict[str, Any]:
        return self._detached(f"group/{group}/{epoch}/{rank}")

    def placement_options(self, group: int, epoch: int) -> dict[str, Any]:
        return {"name": f"{self.estate.prefix}group/{group}/{epoch}", "lifetime": "detached"}

    def _detached(self, name: str) -> dict[str, Any]:
        return {"name": f"{self.estate.version}/{name}", "namespace": self.estate.namespace, "lifetime": "detached"}

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
