"""`manta serve --local` as a user starts it: ready when it says so, and what stands in its way is told before it loads."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deploy.config.serve import ServeConfig
from deploy.serving.server import HttpServer

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "inherited"), [(signal.SIGTERM, signal.default_int_handler), (signal.SIGINT, signal.SIG_IGN)]
)
def test_when_it_says_that_it_is_ready_it_answers(tmp_path: Path, number: signal.Signals, inherited: Any) -> None:
    """And a signal ends it with its exit code, even one that was ignored as a shell does for what runs in its background."""
    log = tmp_path / "log"
    with sigint(inherited), served(log, "--port", "0") as process:
        url = ready_at(log, process)
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 128 + number
    require_told(log)


@pytest.mark.slow
def test_what_uvicorn_logs_is_written_as_everything_else() -> None:
    """With --log-format json as well; it had a format of its own."""
    assert HttpServer(FastAPI(), ServeConfig(), lambda: None).config.log_config is None


@pytest.mark.few(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_its_queue_is_bounded_it_says_for_whom_it_waits_and_a_second_signal_ends_them(
    tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    asked = {"prompt": "def f(", "n": 16, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    options = "--port", "0", "--max-num-seqs", "1", "--max-queued-requests", "1"
    with sigint(signal.default_int_handler), served(log, *options) as process:
        url = ready_at(log, process)
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=PATIENCE_S, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)  # one of its choices runs, the others wait
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": "def g("}, timeout=PATIENCE_S, trust_env=False)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            process.send_signal(number)
            wait_for("waiting for 1 request(s) under way", log, process)
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == 128 + number
            with contextlib.suppress(httpx.HTTPError):  # cut off
                assert not [line for line in lines if '"finish_reason":"length"' in line]
    require_told(log)


@pytest.mark.slow
def test_who_has_not_ended_after_a_while_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    asked = {"prompt": "def f(", "n": 16, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with sigint(signal.default_int_handler), served(log, "--port", "0") as process:
        url = ready_at(log, process)
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=PATIENCE_S, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            said = [line for line in lines if line]
        assert process.wait(PATIENCE_S) == 130
    assert "the endpoint is ending" in said[-2]
    assert said[-1] == "data: [DONE]"


def require_told(log: Path) -> None:
    """What the start has chosen, and no fault."""
    said = log.read_text()
    assert "Traceback" not in said
    for line in ("workers.process.build: model: ", "workers.attention.select: attention: ", "workers.process.build: KV pool: "):
        assert line in said


@contextlib.contextmanager
def sigint(handler: Any) -> Iterator[None]:
    """What processes that are started meanwhile inherit."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ready_at(log: Path, process: "subprocess.Popen[bytes]") -> str:
    return wait_for("is ready at ", log, process).split()[0]


def wait_for(words: str, log: Path, process: "subprocess.Popen[bytes]") -> str:
    """What it says after these words."""
    deadline = time.monotonic() + PATIENCE_S
    while words not in (said := log.read_text()):
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    return said.partition(words)[2]
