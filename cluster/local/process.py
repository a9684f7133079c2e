"""The groups of a local engine in a process of their own, so that nobody else's Python holds up their steps.

    this process: front end, scheduler core  ──commands──▶  child: `groups.ThreadGroups`, one thread a rank
                                             ◀──reports──
One socket pair joins them. When either end has gone the other notices at once: the child ends itself, the parent says that
its groups are lost. A child of which a group hangs, by its beats, is killed: nobody waits for it for ever, and the device is
free. Imports `groups`, `scheduler.protocol.wire` and the scheduler's `vitals`; no Ray.
"""

import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from cluster.engine import EngineError
from cluster.local.groups import CLOSE_TIMEOUT_S, EPOCH, GroupHost, ThreadGroups
from kvcache.ids import GroupId
from kvcache.layout import PoolSizes
from scheduler.logs import configure, configured_format
from scheduler.protocol.leaders import Beat, Command, FromLeader
from scheduler.protocol.silence import LOOK_S
from scheduler.protocol.wire import FrameSocket
from scheduler.server.vitals import Vitals
from workers.config import ResolvedWorker, WorkerConfig
from workers.process.build import settle

logger = logging.getLogger(__name__)


class GroupUp(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """See `GroupHost.group_up`."""

    group: GroupId
    sizes: PoolSizes
    host: PoolSizes
    ports: tuple[str, ...]


class GroupSays(msgspec.Struct, frozen=True, array_like=True, tag=1):
    group: GroupId
    message: FromLeader


class GroupLost(msgspec.Struct, frozen=True, array_like=True, tag=2):
    group: GroupId
    reason: str


class Doing(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """What the start is doing at this moment, in words for the user."""

    what: str


class RanksReady(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """All ranks are ready; or, with an error (pickled), none is."""

    error: bytes = b""


FromChild = GroupUp | GroupSays | GroupLost | Doing | RanksReady


class GroupCommands(msgspec.Struct, frozen=True, array_like=True, tag=0):
    group: GroupId
    commands: tuple[Command, ...]


class Close(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """End all groups, then yourself."""


ToChild = GroupCommands | Close

CODE = "import sys; sys.path[:] = {path!r}; from cluster.local.process import main; main({descriptor})"


class ProcessGroups:
    """`ThreadGroups` behind a socket, in a child that ends with this process. hung_after_s: see `CoreConfig`."""

    def __init__(self, config: WorkerConfig, resolved: ResolvedWorker, hung_after_s: float) -> None:
        self._asked = pickle.dumps((config, resolved, configured_format()))
        self._model = config.model
        self._groups = [GroupId(number) for number in range(config.groups)]
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: FrameSocket | None = None
        self._host: GroupHost | None = None
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._vitals = Vitals(time.monotonic(), hung_after_s)
        self._reason = "the process of the local groups has ended"
        self._progress: Callable[[str], None] = lambda _: None

    def start(self, host: GroupHost, progress: Callable[[str], None]) -> None:
        self._host, self._progress = host, progress
        ours, theirs = socket.socketpair()
        with theirs:
            code = CODE.format(path=sys.path, descriptor=theirs.fileno())
            self._child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket = FrameSocket(ours)
        self._socket.send(self._asked)
        threading.Thread(target=self._read, name="manta-local-groups", daemon=True).start()
        threading.Thread(target=self._watch, name="manta-local-watch", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def command(self, group: GroupId, commands: Sequence[Command]) -> None:
        assert self._socket is not None, "commands before the start"
        with contextlib.suppress(OSError):  # the thread that reads says that the groups are lost
            self._socket.send(GroupCommands(group, tuple(commands)))

    def close(self) -> None:
        self._closing.set()
        if self._child is None or self._socket is None:
            return
        try:
            self._socket.send(Close())
            self._child.wait(CLOSE_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            self._child.kill()
        self._child.wait()
        self._socket.close()

    def _read(self) -> None:
        assert self._socket is not None
        assert self._host is not None
        message: FromChild
        try:
            for message in self._socket.messages(FromChild):  # type: ignore[arg-type]  # a union is not a type to mypy
                self._handle(self._host, message)
        except Exception as error:  # nobody else reads what the groups say
            logger.exception("what the local groups say cannot be taken in")
            self._reason = f"the process of the local groups was ended: {error}"
            if self._child is not None:
                self._child.kill()
        if not self._started.is_set():
            self._error = EngineError(f"{self._reason} while it was loading {self._model}; its messages stand above")
            self._started.set()
        elif not self._closing.is_set():
            self._closing.set()
            for group in self._groups:
                self._host.group_lost(group, self._reason)

    def _watch(self) -> None:
        """Kills the child if one of its groups hangs, which is then said by whoever reads: a command to a child that has been
        stopped may be waiting for room, with the engine's lock held, and nothing else would end that."""
        assert self._child is not None
        while not self._closing.wait(LOOK_S):
            for hung in self._vitals.look(time.monotonic()):
                logger.error("%s; the process of the local groups is ended", hung.reason)
                self._reason = f"the process of the local groups was ended: {hung.reason}"
                self._child.kill()
                return

    def _handle(self, host: GroupHost, message: FromChild) -> None:
        match message:
            case GroupSays(group, said):
                self._vitals.heard(group, EPOCH, time.monotonic(), said if isinstance(said, Beat) else None)
                host.hear(group, said)
            case GroupUp(group, sizes, host_sizes, ports):
                self._vitals.up(group, EPOCH, time.monotonic())
                host.group_up(group, sizes, host_sizes, ports)
            case GroupLost(group, reason):
                self._vitals.gone(group)
                host.group_lost(group, reason)
            case Doing(what):
                self._progress(what)
            case RanksReady(error):
                self._error = pickle.loads(error) if error else None
                self._started.set()


class _Parent:
    """In the child: the `GroupHost` at the other end of the socket."""

    def __init__(self, connection: FrameSocket) -> None:
        self._connection = connection

    def group_up(self, group: GroupId, sizes: PoolSizes, host: PoolSizes, ports: tuple[str, ...]) -> None:
        self._connection.send(GroupUp(group, sizes, host, ports))

    def hear(self, group: GroupId, message: FromLeader) -> None:
        self._connection.send(GroupSays(group, message))

    def group_lost(self, group: GroupId, reason: str) -> None:
        self._connection.send(GroupLost(group, reason))

    def progress(self, what: str) -> None:
        self._connection.send(Doing(what))


def main(descriptor: int) -> None:
    """The child: runs the groups until it is told to close, or its parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent says what to do
    connection = FrameSocket(socket.socket(fileno=descriptor))
    asked = connection.receive()
    if asked is None:
        return
    config, resolved, log_format = pickle.loads(msgspec.msgpack.decode(asked, type=bytes))
    configure(log_format)
    groups = ThreadGroups(config, resolved)
    parent = _Parent(connection)
    threading.Thread(target=_start, args=(groups, parent, connection), name="manta-local-start", daemon=True).start()
    message: ToChild
    for message in connection.messages(ToChild):  # type: ignore[arg-type]
        if isinstance(message, Close):
            groups.close()
            break
        groups.command(message.group, message.commands)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what is still under way on the device, or in a library's thread, has nobody to wait for it


def _start(groups: ThreadGroups, parent: _Parent, connection: FrameSocket) -> None:
    try:
        groups.start(parent, parent.progress)
    except BaseException as error:
        connection.send(RanksReady(_pickled(error)))
        return
    settle()
    connection.send(RanksReady())


def _pickled(error: BaseException) -> bytes:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        return pickle.dumps(EngineError(f"{type(error).__name__}: {error}"))
    return pickled
