"""`manta serve --local` as a user starts it: ready when it says so, and what stands in its way is told before it loads."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

PATIENCE_S = 300.0


@contextlib.contextmanager
def served(log: Path, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "manta", "serve", "--local", "--kv-memory", "32MiB", "--dtype", "float32", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_taken_port_is_named_before_the_model_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with served(log, "--port", str(port), "--model", "/no/such/model") as process:
            assert process.wait(PATIENCE_S) == 2
    assert f"manta: error: port {port} on 127.0.0.1, for HTTP, cannot be had" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_when_it_says_that_it_is_ready_it_answers(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    with served(log, "--port", "0") as process:
        url = ready_at(log, process)
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 128 + number
    assert "Traceback" not in log.read_text()


def ready_at(log: Path, process: "subprocess.Popen[bytes]") -> str:
    deadline = time.monotonic() + PATIENCE_S
    while "is ready at " not in (said := log.read_text()):
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    return said.partition("is ready at ")[2].split()[0]
