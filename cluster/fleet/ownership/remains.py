"""What there is of an estate, whoever owns it: its actors and placement groups, found by their names.

    actors             VERSION/scheduler/LIFE, VERSION/group/GROUP/EPOCH/RANK    in the namespace of their application
    placement groups   NAMESPACE/VERSION/group/GROUP/EPOCH

Imports ray.
"""

import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, PlacementGroupID, placement_group_table, remove_placement_group

AGAIN_S = 0.25


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


def answer_of(method: Any, timeout_s: float) -> Any:
    """Of an actor, which is asked anew where only the connection to it was cut. Errors: Ray's."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(method.remote(), timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_S)


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
