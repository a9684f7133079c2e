"""Who plays which role, and what is done to him, with processes that do nothing else."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.chaos.faults import Fault, cut, inflict
from benchmarks.chaos.roles import ranks_of
from benchmarks.chaos.run import in_turns
from benchmarks.shared.processes import births, descendants, still_there
from tests.shared.processes import alive

SLEEP = "import time; time.sleep(3600)"
LISTEN = "import socket; held = [socket.create_server(('127.0.0.2', 0))]; print(held[0].getsockname()[1], flush=True); "
CONNECT = "import socket; held = [socket.create_connection(('127.0.0.2', {port}))]; "
ACCEPT = "held.append(held[0].accept()); "
Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(code: str) -> "subprocess.Popen[str]":
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_a_groups_ranks_are_told_apart_by_their_sockets(start: Start) -> None:
    scheduler = start(LISTEN + ACCEPT * 2 + SLEEP)
    port = said(scheduler)
    leaders, peers = [], []
    for _ in range(2):
        code = LISTEN + f"import socket; held.append(socket.create_connection(('127.0.0.2', {port}))); "
        leaders.append(start(code + "held.append(held[0].accept()); print('peer', flush=True); " + SLEEP))
        peers.append(start(CONNECT.format(port=said(leaders[-1])) + SLEEP))
        assert said(leaders[-1]) == "peer"
    pids = [process.pid for process in (*peers, *leaders)]
    assert ranks_of([scheduler.pid], pids) == {leader.pid: [peer.pid] for leader, peer in zip(leaders, peers, strict=True)}


def test_a_cut_ends_connections_on_both_sides_and_leaves_what_listens(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours:
        connects = f"held.append(socket.create_connection(('127.0.0.1', {ours.getsockname()[1]}))); "
        other = start(LISTEN + connects + "print(held[1].recv(1), flush=True); held[0].accept(); print('on', flush=True)")
        port = int(said(other))
        connection, _ = ours.accept()
        with connection:
            connection.settimeout(60.0)
            assert cut(other.pid) == 1
            assert connection.recv(1) == b""
            assert said(other) == "b''"
    socket.create_connection(("127.0.0.2", port), timeout=60.0).close()
    assert said(other) == "on"


def test_who_is_only_ever_woken_is_not_replaced() -> None:
    kinds = [Fault.parse(each).replaces for each in ("kill:haproxy", "stop:haproxy", "stop:scheduler", "pause:scheduler")]
    assert kinds == [True, False, True, False]


def test_what_is_paused_goes_on_and_what_is_stopped_does_not(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start("print('here', flush=True); " + SLEEP)
    said(process)
    monkeypatch.setattr("benchmarks.chaos.faults.PAUSES_S", (0.5, 0.6))
    pausing = threading.Thread(target=inflict, args=(Fault("pause", "peer"), [process.pid], random.Random(0)))
    pausing.start()
    seen = set()
    while pausing.is_alive():
        seen.add(state(process.pid))
        time.sleep(0.01)
    assert "T" in seen, "it was stopped meanwhile"
    while state(process.pid) == "T":
        time.sleep(0.01)
    inflict(Fault("stop", "peer"), [process.pid], random.Random(0))
    while state(process.pid) != "T":  # signals take their time
        time.sleep(0.01)
    inflict(Fault("kill", "peer"), [process.pid], random.Random(0))
    assert process.wait(60.0) == -signal.SIGKILL


def test_orphans_are_found_by_their_session() -> None:
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid, flush=True); input()"
    between = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}]); {SLEEP}"
    leader = subprocess.Popen(
        [sys.executable, "-c", between], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    orphan = int(said(leader))
    try:
        (middle,) = set(descendants(leader.pid)) - {orphan}
        os.kill(middle, signal.SIGKILL)
        while alive({middle}):
            time.sleep(0.01)
        assert set(descendants(leader.pid)) == {orphan}
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.communicate()


def test_faults_are_declared_by_kind_and_role() -> None:
    assert str(Fault.parse("kill:peer")) == "kill:peer"
    for wrong in ("kill", "kill:nobody", "shoot:peer", "disk:peer", "kill:node"):
        with pytest.raises(ValueError, match="choose from"):
            Fault.parse(wrong)


def test_faults_take_turns_and_what_ends_an_endpoint_comes_last() -> None:
    faults = [Fault.parse(each) for each in ("kill:gcs", "kill:peer", "stop:leader")]
    plan = in_turns(faults, 7, random.Random(0))
    assert sorted(plan.count(fault) for fault in faults) == [2, 2, 3]
    assert [fault.ends_all for fault in plan] == sorted(fault.ends_all for fault in plan)


def test_who_has_the_number_of_one_that_has_gone_is_another(start: Start) -> None:
    process = start(SLEEP)
    born = births([process.pid, os.getpid()])
    assert set(still_there(born)) == {process.pid, os.getpid()}
    assert still_there(born | {os.getpid(): "0"}) == [process.pid]
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie
    assert still_there(born) == [os.getpid()]
