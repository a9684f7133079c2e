"""A process that owns a fleet with an estate, on a Ray cluster that is there: for tests that end it without a warning.

    python -m tests.cluster.fleet.fleet_owner ADDRESS ADOPTION_TIMEOUT_S [OPTION=INTEGER ...]

It says "ready" once all groups are.
"""

import sys
import threading
from pathlib import Path
from typing import Any

import ray

from cluster.config import EngineConfig
from cluster.fleet.estate import version_of
from cluster.fleet.fleet import Fleet
from cluster.launch import plan
from scheduler.config.core import QueueBounds
from scheduler.protocol.orphans import Estate

NAMESPACE = "manta-test"
TINY = Path(__file__).parents[3] / "examples" / "tiny"


def config(**options: Any) -> EngineConfig:
    """No rank is taken for hung, however long others have the cores: what is started anew is what a test has ended."""
    told = {"groups": 2, "block_size": 16, "kv_memory": 32 << 20, "hung_after_s": 600.0} | options
    return EngineConfig(model=str(TINY), device="cpu", dtype="float32", **told)


def version(owned: EngineConfig) -> str:
    return version_of(owned, QueueBounds(), threads=1)


def main(address: str, timeout_s: str, *options: str) -> None:
    ray.init(address=address, log_to_driver=False)
    pairs = (option.split("=") for option in options)
    owned = config(**{name: int(value) for name, value in pairs})
    estate = Estate(NAMESPACE, version(owned), float(timeout_s))
    fleet = Fleet(owned, plan(owned, estate=estate), estate=estate)
    fleet.start(lambda words: print(words, flush=True))
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
