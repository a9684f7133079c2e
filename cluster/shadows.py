"""Folders of the user's that would hide Manta's packages from Ray's processes, and what Ray is told then.

Ray's processes look for packages beside the driver's script and in its working folder before anywhere else, and what they are
sent names Manta's own as `scheduler.server.actor` and so on. So where such a folder has a `scheduler` of its own, each process
of the job claims the names first (`manta.names`). That costs the start of processes some time, so it is done only there.
Imports ray.
"""

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import ray

from cluster.engine import EngineError
from scheduler.logs import ROOMS

CLAIM = "manta.names.claim"
ROOT = Path(__file__).resolve().parents[1]


def job_environment() -> dict[str, Any] | None:
    """For `ray.init(runtime_env=...)`."""
    return {"worker_process_setup_hook": CLAIM} if shadow() is not None else None


def refuse_unclaimed() -> None:
    """For a Ray that somebody else has connected to. Errors: EngineError if its processes would not find Manta's packages."""
    place = shadow()
    if place is not None and ray.get_runtime_context().runtime_env.get("worker_process_setup_hook") != CLAIM:
        raise EngineError(
            f"Ray's processes would take {place} for Manta's package of that name: connect to Ray by "
            f"ray.init(runtime_env={{'worker_process_setup_hook': '{CLAIM}'}}), leave ray.init to Manta, or rename {place}"
        )


def shadow() -> Path | None:
    """The first package or folder that stands before one of Manta's, if any does."""
    script = os.path.dirname(os.path.realpath(sys.argv[0]))
    for room in ROOMS:
        found = PathFinder.find_spec(room, [os.getcwd(), script, *sys.path])
        if found is None:  # an editable install, which no path leads to
            continue
        place = next(iter(found.submodule_search_locations or ()), found.origin or room)
        if Path(place).resolve() != ROOT / room:
            return Path(place)
    return None
