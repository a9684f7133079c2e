"""Groups that come up before anybody owns them, while Serve and its replicas start: the engine's owner takes them over.

On a GPU a rank's imports, kernels and graphs take as long as all else of an endpoint's start. On CPUs nothing is begun: ranks
would take the cores that Serve comes up on. Imports ray.
"""

import logging
import threading
import time

from cluster.config import EngineConfig
from cluster.fleet.group import GroupHandle
from cluster.fleet.ownership.lasting import Lasting
from cluster.launch import plan
from scheduler.protocol.orphans import Estate

logger = logging.getLogger(__name__)


def begin_groups(config: EngineConfig, threads: int, log_format: str, estate: Estate) -> None:
    """On a Ray cluster on which nothing of the estate can be yet. Returns at once, and never raises: whoever takes over meets
    what is wrong himself, starts what is not there, and says so."""
    threading.Thread(target=_begin, args=(config, threads, log_format, estate), name="manta-early", daemon=True).start()


def _begin(config: EngineConfig, threads: int, log_format: str, estate: Estate) -> None:
    try:
        resolved, lasting = plan(config, threads), Lasting(estate)
    except Exception as error:
        logger.debug("no group can be started yet: %s", error)
        return
    if resolved.device != "cuda":
        return
    handles = [GroupHandle(number, 0, config, resolved, log_format, lasting) for number in range(config.groups)]
    deadline = time.monotonic() + config.start_timeout_s
    for handle in handles:
        threading.Thread(target=_begin_group, args=(handle, deadline), name=f"manta-early-{handle.group}", daemon=True).start()


def _begin_group(handle: GroupHandle, deadline: float) -> None:
    try:
        handle.begin(deadline)
    except Exception as error:
        logger.debug("group %d could not be started early: %s", handle.group, error)
        handle.kill()
