"""Processes that compile kernels into Triton's cache for this one, which finds them there. Imports triton.

    this process, a thread each  ──kernel──▶  worker: one of several processes, forked from one that imports once
                                 ◀──done, or why not──
One socket pair joins each pair. Python's lock is why: the compiler holds it for most of its time, so that threads together use
little more than two cores. Whatever cannot be told, or fails there, is for this process to compile.
"""

import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue

from triton import knobs

from workers.kernels.compiling.worker import Told

logger = logging.getLogger(__name__)

MOST = 8
"""Processes of a rank: some forty kernels are then five each, and what more would bring is less than what they take from the
start of others."""

FEW = 16
"""A cache with fewer entries holds no model's kernels: what Triton's own driver puts there are one or two."""

END_S = 5.0

PLACE = Path(__file__).resolve().parents[3]
CODE = """import pickle, sys; place, path, told = pickle.load(sys.stdin.buffer)
sys.path[:] = [place, *path]; import workers; sys.path[:] = path  # whatever else is called so there
from workers.kernels.compiling.worker import main; main(*told)"""
ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""No device, and no threads, which a fork would lose."""


class CompilePool:
    """As many processes as there are cores for one of `ranks` on this host, at most `MOST`; none where that were less than two.
    They start once, with this process's niceness and environment, when they are expected or a first kernel is missing, and end
    with `close`, or with this process. Any thread may call."""

    def __init__(self, ranks: int = 1) -> None:
        share = len(os.sched_getaffinity(0)) // ranks
        self.size = min(MOST, share) if share > 1 else 0
        self._idle = SimpleQueue[Connection]()
        self._lock = threading.Lock()
        self._first: subprocess.Popen[bytes] | None = None
        self._started = False

    def expect(self) -> None:
        """Starts them if the cache is as good as empty, so that their imports, of some three seconds, are done when the first
        kernel comes. Elsewhere nothing may be missing, and nobody starts to find that."""
        try:
            few = len(os.listdir(knobs.cache.dir)) < FEW
        except OSError:
            few = True
        if few:
            self._start()

    def compile(self, told: Told) -> None:
        """Returns when it is in the cache, or when it is clear that this process has to compile it: as it has the very first
        one where nobody expected any, while the processes come up, so that a single one takes no longer than it did."""
        if self._start():
            return
        try:
            message = told.dump()
            connection = self._idle.get_nowait()
        except Empty:
            return
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            logger.debug("%s is compiled here: %s", told.function, error)
            return
        try:
            connection.send_bytes(message)
            why = connection.recv_bytes().decode()
        except (EOFError, OSError):
            logger.warning("a process that compiles kernels has ended: what it would have done is done here")
            connection.close()
            return
        self._idle.put(connection)
        if why:
            logger.debug("%s is compiled here: %s", told.function, why)

    def close(self) -> None:
        """Nobody compiles any more."""
        with suppress(Empty):
            while True:
                self._idle.get_nowait().close()
        if self._first is not None:
            self._first.terminate()  # while it imports; later it waits for the others, which end with their sockets
            try:
                self._first.wait(END_S)
            except subprocess.TimeoutExpired:
                self._first.kill()
                self._first.wait()
            self._first = None

    def _start(self) -> bool:
        """Whether this call has started them."""
        with self._lock:
            if self._started or not self.size:
                return False
            self._started = True
            pairs = [socket.socketpair() for _ in range(self.size)]
            modules = [name for name in sys.modules if name.startswith(f"{__package__}.")]
            descriptors = [theirs.fileno() for _, theirs in pairs]
            try:
                self._first = subprocess.Popen(
                    [sys.executable, "-c", CODE], pass_fds=descriptors, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                    env=os.environ | ALONE | {"TRITON_CACHE_DIR": knobs.cache.dir},
                )  # fmt: skip
                assert self._first.stdin is not None
                with self._first.stdin as told:
                    pickle.dump((str(PLACE), sys.path, (descriptors, modules)), told)
            except OSError as error:
                logger.warning("no processes to compile kernels: %s", error)
                return False
            finally:
                for ours, theirs in pairs:
                    theirs.close()
                    self._idle.put(Connection(ours.detach()))
            return True
