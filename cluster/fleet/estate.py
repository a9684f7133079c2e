"""What an estate is called: the namespace of an application's detached actors, and the version that they serve."""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import kvcache
import scheduler
import workers
from cluster.config import EngineConfig
from scheduler.config.core import CoreConfig, QueueBounds
from scheduler.protocol.orphans import Estate
from workers.config import WorkerConfig
from workers.model.sources.naming import folder_of, kind_of

VERSION_DIGITS = 12


def estate_of(application: str, version: str, config: EngineConfig) -> Estate:
    """What a Serve application has of that version."""
    return Estate(namespace_of(application), version, config.adoption_timeout_s)


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
