"""The end of what this process has started: within seconds, whatever of it has died or been stopped before.

Each step has a while in which it may end in an orderly way, in a thread, since Ray waits for minutes for what has gone. What a
Ray cluster of one's own still has then is ended by SIGKILL. A Ctrl-C meanwhile ends all waiting. Imports ray once it
has been asked to end it.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)

KILLED_S = 2.0
"""For the kernel to end what was killed."""

POLL_S = 0.05


class Ending:
    """One end, in steps. While it is entered, Ctrl-C and SIGTERM end whatever is waited for, and nothing else. hurried: one has
    come; from then on nothing is waited for. Times are seconds since it was entered first."""

    def __init__(self) -> None:
        self.hurried = False
        self._late = False
        self._began_s: float | None = None
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "Ending":
        self._began_s = self._began_s or time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._restore.callback(signal.signal, number, signal.signal(number, self._hurry))
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def give(self, until_s: float, step: Callable[[], object]) -> bool:
        """Whether the step has returned by then. If not it goes on in its thread, which ends with the process. What it raises
        is logged: nothing may keep the rest from being ended."""
        over = threading.Event()

        def run() -> None:
            try:
                step()
            except SystemExit:  # of Ray, which has been shut down meanwhile
                pass
            except BaseException as error:
                logger.warning("something could not be ended in an orderly way: %r", error)
            over.set()

        threading.Thread(target=run, name="manta-ending", daemon=True).start()
        assert self._began_s is not None, "not entered"
        deadline_s = self._began_s + until_s
        while not over.is_set():
            if self.hurried or time.monotonic() > deadline_s:
                self._late = True
                return False
            time.sleep(POLL_S)  # not on the event: what a signal's handler says is heard between two waits
        return True

    def end_ray(self, until_s: float) -> None:
        """Shuts down the Ray cluster that this process has started, unless a late step still asks something of it: whoever asks
        a Ray that was shut down ends the process, or starts another one. Nothing of it outlives this call."""
        import ray

        session = _session()
        if self._late or not self.give(until_s, ray.shutdown):
            logger.warning("Ray does not end by itself: its processes are killed")
            _part_from_ray()
        if session is not None:
            kill(session)

    def _hurry(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.hurried = True


def kill(session: Path) -> set[int]:
    """Ends by SIGKILL every process that writes into the folder of a Ray cluster's session, whoever has started it and whatever
    state it is in. Returns what has not gone soon. Finds nothing where there is no /proc."""
    deadline_s = time.monotonic() + KILLED_S
    while left := writers(session):
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline_s:  # a look takes long where there are many processes: all are killed once at least
            break
        time.sleep(POLL_S)
    return left


def writers(folder: Path) -> set[int]:
    """Processes, other than this one, that have a file below `folder` open: every process of a Ray session has its logs there,
    those that lost their parent too."""
    beginning, found = f"{folder}/", set()
    for entry in Path("/proc").glob("[0-9]*/fd"):
        pid = int(entry.parent.name)
        with contextlib.suppress(OSError):  # another account's, or one that has ended
            if pid != os.getpid() and any(os.readlink(each).startswith(beginning) for each in entry.iterdir()):
                found.add(pid)
    return found


def _part_from_ray() -> None:
    """At its exit the interpreter would ask what has gone, and wait for ever; and a late step would start another Ray."""
    import ray
    from ray._private import auto_init_hook

    worker = ray._private.worker
    auto_init_hook.enable_auto_connect = False
    atexit.unregister(worker.shutdown)
    if sys.excepthook is worker.custom_excepthook:
        sys.excepthook = worker.normal_excepthook


def _session() -> Path | None:
    """The folder of the Ray cluster that this process has started, if it has."""
    import ray

    node = ray._private.worker._global_node
    return Path(node.get_session_dir_path()) if node is not None and node.head else None
