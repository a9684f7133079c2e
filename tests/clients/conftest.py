"""The endpoint as its users have it: `manta serve` in a process and an environment of its own, known by its address."""

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients.checkpoint import ROOT, make_checkpoint
from tests.clients.samples import MODEL, PATIENCE_S, THOUGHT, keep_quiet, thinking_bias

keep_quiet()  # before any client is imported: some read the environment then

MANTA = os.environ.get("MANTA", str(ROOT / ".venv" / "bin" / "manta"))
"""The command, of the environment that `make install` makes."""


@contextlib.contextmanager
def served(checkpoint: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of an endpoint that ends with the context. Errors: AssertionError with its log if it does not start."""
    command = [MANTA, "serve", "--local", "--port", "0", "--model", str(checkpoint), "--served-model-name", MODEL]
    command += ["--kv-memory", "32MiB", "--dtype", "float32", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline_s = time.monotonic() + PATIENCE_S
        while (found := re.search(r"ready at (http://\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / MODEL)


@pytest.fixture(scope="session")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Without `/v1`."""
    with served(checkpoint, tmp_path_factory.mktemp("endpoint") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def base_url(address: str) -> str:
    """As OpenAI's clients want it."""
    return f"{address}/v1"


@pytest.fixture(scope="session")
def bias(address: str) -> dict[str, float]:
    """Of a request that shall think `THOUGHT`: see `THINKING`."""
    text = f"{THOUGHT}</think>"
    return thinking_bias(httpx.post(f"{address}/tokenize", json={"prompt": text}, timeout=PATIENCE_S).json()["tokens"])


class FullEndpoint:
    """An endpoint whose queue is full until it has turned somebody away, who may then come again."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.base_url = f"{address}/v1"

    @contextlib.contextmanager
    def until_refused(self) -> Iterator[None]:
        """Errors: AssertionError if nobody was turned away meanwhile."""
        before, over = self._refused(), threading.Event()
        body = {"model": MODEL, "prompt": "a", "n": 16, "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{self.base_url}/completions", json=body, timeout=PATIENCE_S) as held:
            lines = held.iter_lines()
            next(lines)  # one of its choices runs, the others wait

            def let_go() -> None:
                while self._refused() == before and not over.wait(0.1):
                    pass
                held.close()

            watching = threading.Thread(target=let_go)
            watching.start()
            try:
                yield
            finally:
                over.set()
                watching.join()
        assert self._refused() > before

    def _refused(self) -> int:
        lines = httpx.get(f"{self.address}/metrics", timeout=PATIENCE_S).text.splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("manta_refused_requests_total"))


@pytest.fixture(scope="session")
def full(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FullEndpoint]:
    options = ("--max-num-seqs", "1", "--max-queued-requests", "1")
    with served(checkpoint, tmp_path_factory.mktemp("full") / "log", *options) as url:
        yield FullEndpoint(url)
