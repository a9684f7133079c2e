"""What of a fleet outlives its owner: scheduler and ranks as detached actors, found by their names, kept by whoever owns them.

    actors             VERSION/scheduler/LIFE, VERSION/group/GROUP/EPOCH/RANK    in the estate's namespace
    placement groups   NAMESPACE/VERSION/group/GROUP/EPOCH

A *version* is a digest of what the actor was told: nobody takes over what is not as its own configuration says. Imports ray.
"""

import contextlib
import hashlib
import logging
import threading
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, PlacementGroupID, placement_group_table, remove_placement_group

from scheduler.config import CoreConfig, QueueBounds
from scheduler.protocol.orphans import Estate
from workers.config import GroupsConfig, ResolvedWorker, WorkerConfig

logger = logging.getLogger(__name__)

KEEPS = 6
"""Of an owner, in the time after which its actors are orphans."""

VERSION_DIGITS = 12


def namespace_of(application: str) -> str:
    """Of a Serve application's detached actors."""
    return f"manta-{application}"


def worker_version(config: WorkerConfig, resolved: ResolvedWorker) -> str:
    """Of ranks: the same weights, cut and computed in the same way. How many groups there are does not matter."""
    counts = {f.name for f in fields(GroupsConfig)} & {"groups", "max_groups"}
    told = {f.name: getattr(config, f.name) for f in fields(WorkerConfig) if f.name not in counts}
    return _digest(told, config.exchanges_blocks, resolved, _files(Path(config.model)))


def scheduler_version(config: CoreConfig, resolved: ResolvedWorker, bounds: QueueBounds | None, log_format: str) -> str:
    told = [getattr(config, f.name) for f in fields(CoreConfig)]
    queue = [getattr(bounds, f.name) for f in fields(QueueBounds)] if bounds is not None else None
    return _digest(told, queue, resolved.max_model_len, resolved.grant_ahead, log_format)


def _files(model: Path) -> list[tuple[str, int, int]]:
    """What a checkpoint is made of: another one may stand at the same place tomorrow."""
    found = [*model.glob("*.json"), *model.glob("*.safetensors")]
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)


def _digest(*told: Any) -> str:
    return hashlib.sha256(repr(told).encode()).hexdigest()[:VERSION_DIGITS]


# ---- what is there


@dataclass(slots=True)
class Remains:
    """Of one epoch of a group. ranks: by number, of those whose processes live."""

    version: str
    group: int
    epoch: int
    ranks: dict[int, str] = field(default_factory=dict)
    placement: PlacementGroup | None = None


@dataclass(slots=True)
class Found:
    """schedulers: (life, version, name), the latest last. groups: by number and epoch."""

    schedulers: list[tuple[int, str, str]] = field(default_factory=list)
    groups: dict[tuple[int, int], Remains] = field(default_factory=dict)


def find(namespace: str) -> Found:
    """What stands in an estate, whoever owns it."""
    found = Found()

    def remains(version: str, group: str, epoch: str) -> Remains:
        key = int(group), int(epoch)
        return found.groups.setdefault(key, Remains(version, *key))

    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] != namespace:
            continue
        name = str(actor["name"])
        match name.split("/"):
            case [version, "scheduler", life]:
                found.schedulers.append((int(life), version, name))
            case [version, "group", group, epoch, rank]:
                remains(version, group, epoch).ranks[int(rank)] = name
    for number, placement in placement_group_table().items():
        if placement["state"] == "REMOVED":
            continue
        match str(placement["name"]).split("/"):
            case [owner, version, "group", group, epoch] if owner == namespace:
                remains(version, group, epoch).placement = PlacementGroup(PlacementGroupID(bytes.fromhex(number)))
    found.schedulers.sort()
    return found


def latest_scheduler(namespace: str) -> Any | None:
    """The actor, whether or not it listens yet; None if there is none."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [str(actor["name"]).split("/") for actor in actors if actor["namespace"] == namespace]
    lives = {int(name[2]): "/".join(name) for name in names if len(name) == 3 and name[1] == "scheduler"}
    with contextlib.suppress(ValueError):  # it has died meanwhile
        return actor_of(namespace, lives[max(lives)]) if lives else None
    return None


def actor_of(namespace: str, name: str) -> Any:
    """Errors: ValueError if it has died meanwhile."""
    return ray.get_actor(name, namespace=namespace)


def end_group(namespace: str, remains: Remains) -> None:
    """Its processes, also those that do not react."""
    if remains.placement is not None:
        remove_placement_group(remains.placement)
    for name in remains.ranks.values():
        _kill(namespace, name)


def end_all(namespace: str) -> None:
    """Nothing is left of an estate afterwards. For whoever knows that nobody owns it any more."""
    found = find(namespace)
    for _, _, name in found.schedulers:
        _kill(namespace, name)
    for remains in found.groups.values():
        end_group(namespace, remains)


def _kill(namespace: str, name: str) -> None:
    with contextlib.suppress(ValueError):  # it has ended by itself
        ray.kill(actor_of(namespace, name), no_restart=True)


# ---- what is owned


class Owner:
    """Whoever owns an estate: says so to each of its actors, in a thread, until `close`. version: of ranks that it starts."""

    def __init__(self, estate: Estate, version: str) -> None:
        self.estate, self.version = estate, version
        self._asked: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manta-owner", daemon=True)
        self._thread.start()

    def scheduler_options(self, version: str, life: int) -> dict[str, Any]:
        return self._detached(f"{version}/scheduler/{life}")

    def rank_options(self, group: int, epoch: int, rank: int) -> dict[str, Any]:
        return self._detached(f"{self.version}/group/{group}/{epoch}/{rank}")

    def placement_options(self, group: int, epoch: int) -> dict[str, Any]:
        return {"name": f"{self.estate.namespace}/{self.version}/group/{group}/{epoch}", "lifetime": "detached"}

    def _detached(self, name: str) -> dict[str, Any]:
        return {"name": name, "namespace": self.estate.namespace, "lifetime": "detached"}

    def keep(self, actor: Any) -> None:
        """From now on, until it dies."""
        with self._lock:
            self._asked[actor] = actor.keep.remote()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self.estate.adoption_timeout_s / KEEPS):
            with self._lock:
                asked = {reference: actor for actor, reference in self._asked.items()}
            if not asked:
                continue
            answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=0)
            for reference in answered:  # who has not answered is stopped, or busy, and has been asked
                self._again(asked[reference], reference)

    def _again(self, actor: Any, reference: Any) -> None:
        try:
            ray.get(reference)
        except ray.exceptions.ActorUnavailableError:
            logger.warning("an actor cannot be reached for now: %s", actor)
        except ray.exceptions.RayError:
            with self._lock:
                del self._asked[actor]
            return
        with self._lock:
            self._asked[actor] = actor.keep.remote()
