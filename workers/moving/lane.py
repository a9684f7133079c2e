"""Work that one thread does in order and another may end: the threads of a mover. Standard library only."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Job = Callable[[], None]


class TransferFailed(RuntimeError):
    """The blocks have not arrived; why, in words for the log."""


class LaneAbort:
    """Ends from one thread what another waits for, once and for good."""

    def __init__(self) -> None:
        self.reason = ""
        self._lock = threading.Lock()
        self._hooks: list[Job] = []

    def set(self, reason: str) -> None:
        """The first reason stays. Calls the hooks of those that wait."""
        with self._lock:
            self.reason = self.reason or reason
            hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()

    def check(self) -> None:
        """Errors: TransferFailed once `set` was called."""
        if self.reason:
            raise TransferFailed(self.reason)

    @contextmanager
    def waking(self, hook: Job) -> Iterator[None]:
        """While inside, `set` calls `hook`, from its own thread. Errors: TransferFailed if it has been called already."""
        with self._lock:
            self.check()
            self._hooks.append(hook)
        try:
            yield
        finally:
            with self._lock:
                if hook in self._hooks:
                    self._hooks.remove(hook)


class Lane:
    """Jobs in order, by a thread that lives while there are any: a pair of groups that is quiet costs no thread.

    A job must not raise, and must end soon once `abort` is set.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.abort = LaneAbort()
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._thread: threading.Thread | None = None  # the last one, which may have ended
        self._working = False

    def put(self, job: Job) -> None:
        """Never waits for a job."""
        with self._lock:
            self._jobs.append(job)
            if not self._working:
                self._working = True
                self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                self._thread.start()

    @property
    def idle(self) -> bool:
        """Nothing is to be done, as far as the one who puts jobs can know."""
        with self._lock:
            return not self._working

    def join(self, timeout_s: float) -> bool:
        """Waits until all jobs are done and the thread is gone; False if that was not in time."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
            return not thread.is_alive()
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._working = False
                    return
                job = self._jobs.popleft()
            job()
