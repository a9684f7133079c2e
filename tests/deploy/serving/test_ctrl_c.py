"""Ctrl-C ends everything that was started, whatever of it has died or been stopped before; and says what becomes of requests.

Each on a Ray cluster of its own. How long it takes, and that nothing is left, is also counted by `python -m benchmarks.chaos`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.chaos.roles import holders
from benchmarks.shared.endpoint import Endpoint, end, serving
from deploy.config.load import EMBEDDED_MODEL
from tests.shared.processes import WORKER, all_named, named, signal_all

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATIENCE_S = 180.0
FLAGS = ("--replicas", "2", "--threads", "1", "--dtype", "float32", "--kv-memory", "32MiB", "--hung-after-s", "600")
STREAMS = 4
WAITING = "ending; waiting for"


class Stream(threading.Thread):
    """One without an end, read in a thread of its own. said: all that has come."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(daemon=True)
        self.said = ""
        self.begun = threading.Event()
        self._url = f"{endpoint.address}/v1/completions"
        self.start()

    def run(self) -> None:
        body = {"prompt": "x", "n": 16, "max_tokens": 1900, "ignore_eos": True, "stream": True}
        asked = httpx.stream("POST", self._url, json=body, timeout=PATIENCE_S, trust_env=False)
        with contextlib.suppress(httpx.HTTPError), asked as answer:
            for text in answer.iter_text():
                self.said += text
                self.begun.set()
        self.begun.set()


@contextlib.contextmanager
def streaming(log: Path) -> Iterator[tuple[Endpoint, list[Stream]]]:
    """An endpoint with streams under way that make no progress: its ranks are stopped."""
    with interruptible(), serving(EMBEDDED_MODEL, FLAGS, log) as endpoint:
        streams = [Stream(endpoint) for _ in range(STREAMS)]
        assert all(stream.begun.wait(PATIENCE_S) for stream in streams)
        signal_all(named(WORKER, endpoint.pid), signal.SIGSTOP)
        yield endpoint, streams


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What processes that are started meanwhile inherit: a background job of a shell ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(words: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while words not in (said := log.read_text()):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


def afflict(role: str, number: signal.Signals, root: int) -> None:
    victims = holders(role, root, lambda pids: pids[0])
    assert victims
    signal_all(victims, number)


@pytest.mark.parametrize(
    ("role", "number"),
    [(None, None), ("gcs", signal.SIGKILL), ("engine", signal.SIGKILL), ("scheduler", signal.SIGSTOP)],
    ids=["ranks stopped", "no GCS", "no engine", "scheduler stopped"],
)
def test_it_ends_everything(role: str | None, number: signal.Signals | None, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with streaming(log) as (endpoint, streams):
        if role is not None and number is not None:
            afflict(role, number, endpoint.pid)
        ended = endpoint.interrupt()
        said = log.read_text()
        assert not ended.left, said
        assert endpoint.returncode == 130, said
        assert WAITING in said or role == "engine"  # its requests may have ended with it
        assert "Traceback" not in said
        for stream in streams:
            stream.join(PATIENCE_S)
            assert not stream.is_alive()
            if role is None:
                assert '"error"' in stream.said


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with streaming(log) as (endpoint, _):
        os.kill(endpoint.pid, signal.SIGINT)
        wait_for(WAITING, log)
        ended = endpoint.interrupt()
        assert not ended.left, log.read_text()
        assert endpoint.returncode == 130, log.read_text()
        assert "Traceback" not in log.read_text()


GENERATE = [
    "-m", "manta", "generate", "def f(x):", "--temperature", "0", "--groups", "2", "--max-tokens", "1900", "--ignore-eos",
    "--threads", "1",
]  # fmt: skip
SCRIPT = f"""
from deploy import LLM, SamplingParams
with LLM({str(EMBEDDED_MODEL)!r}, groups=2, threads=1) as llm:
    for _ in llm.iterate(["x"] * 64, SamplingParams(max_tokens=1900, ignore_eos=True)):
        print("begun", flush=True)
"""


@pytest.mark.parametrize("command", [GENERATE, ["-c", SCRIPT]], ids=["manta generate", "a script"])
def test_other_commands_end_without_a_gcs_and_with_a_stopped_rank(command: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output, interruptible():
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, start_new_session=True)
    try:
        ranks = all_named(WORKER, 2, process.pid)
        wait_for("begun" if SCRIPT in command else "x -> x", log)  # what it says of that, greedily
        signal_all(ranks[:1], signal.SIGSTOP)
        afflict("gcs", signal.SIGKILL, process.pid)
    finally:
        ended = end(process, signal.SIGINT)
    assert not ended.left, log.read_text()
    assert process.returncode in (130, -signal.SIGINT), log.read_text()
