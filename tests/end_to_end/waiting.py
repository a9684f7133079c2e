"""What must happen soon: blocks given back, threads ended. Generous, since nobody measures here."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from deploy import LLM

PATIENCE_S = 60.0


def wait_until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what()}"
        time.sleep(0.005)


def is_idle(llm: LLM) -> bool:
    """Nothing held, nothing running, nothing waiting; every block is accounted for."""
    stats = llm.stats()
    for group in stats.groups:
        assert group.free_blocks + group.held_blocks + group.cached_blocks == group.total_blocks
    return not stats.waiting and not any(group.held_blocks or group.running for group in stats.groups)


def wait_idle(llm: LLM) -> None:
    wait_until(lambda: is_idle(llm), lambda: f"all blocks come back: {llm.stats()}")


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Every thread that is started inside has ended soon after."""
    before = set(threading.enumerate())

    def left() -> set[threading.Thread]:
        return set(threading.enumerate()) - before

    yield
    wait_until(lambda: not left(), lambda: f"threads end: {left()}")
