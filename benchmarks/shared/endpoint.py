"""The processes of a serving benchmark: `manta serve`, its peer `vllm serve`, and the clients of `load.py`. Each ends with its
`with` block.

May import the standard library and the benchmarks' own modules; never imports an engine.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.load import Outcome
from benchmarks.shared.ports import free_ports
from benchmarks.shared.processes import Process, command_line, descendants, held_by, signal_all, wait_gone
from benchmarks.shared.worker_process import LOAD_TIMEOUT_S, EngineSpec

GET_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0
IDLE_TIMEOUT_S = 60.0
LINGER_S = 5.0
"""What a command has started may outlive it by."""

BLOCKS = re.compile(r'^manta_kv_blocks\{[^}]*state="(\w+)"[^}]*\} (\S+)$', re.MULTILINE)
OWN_PORTS = tuple(
    f"RAY_SERVE_{name}_PORT" for name in ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC")
)
"""Fixed ones unless they are said: another endpoint may have them."""

ROOT = Path(__file__).resolve().parents[2]


class ServingError(RuntimeError):
    """The endpoint did not come up, or did not do what was asked of it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to be made. at_s: since the plan began. leave_after: events after which the client hangs up."""

    body: dict[str, Any]
    at_s: float = 0.0
    leave_after: int | None = None


def completion(prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """Exactly so many tokens, greedily."""
    return {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Ended:
    """seconds: until the command had ended, or was killed. left: what had to be killed, with its command line."""

    seconds: float
    left: dict[int, str]


class Endpoint:
    """One that is ready. pid: of the command; Manta on Ray and vLLM have other processes below it."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self._process = process
        self.pid = process.pid
        self.host, self.port = "127.0.0.1", port
        self.address = f"http://{self.host}:{port}"

    def get(self, path: str, timeout_s: float = GET_TIMEOUT_S) -> str:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=timeout_s) as answer:
            return str(answer.read().decode())

    def blocks(self) -> dict[str, int]:
        """Manta's KV blocks of all groups, by state: free, held, cached."""
        counts: dict[str, int] = {}
        for state, count in BLOCKS.findall(self.get("/metrics")):
            counts[state] = counts.get(state, 0) + int(float(count))
        return counts

    def idle_blocks(self) -> dict[str, int]:
        """Blocks by state once no request is left. Errors: ServingError if that does not come about."""
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        while (blocks := self.blocks())["held"]:
            if time.monotonic() > deadline_s:
                raise ServingError(f"blocks are still held {IDLE_TIMEOUT_S:g} s after the last request: {blocks}")
            time.sleep(0.1)
        return blocks

    @property
    def returncode(self) -> int | None:
        """None while the command runs."""
        return self._process.poll()

    def interrupt(self) -> Ended:
        """Ctrl-C."""
        return end(self._process, signal.SIGINT)

    def processes(self) -> dict[int, Process]:
        """The command and everything that it has started, directly or not, by id."""
        return held_by([self.pid, *descendants(self.pid)])


def serving(model: Path, options: Sequence[str], log: Path) -> contextlib.AbstractContextManager[Endpoint]:
    """Manta, ready on a free port. Errors: ServingError with the end of its log."""
    port, *own = free_ports(1 + len(OWN_PORTS))
    command = [sys.executable, "-m", "manta", "serve", "--model", str(model), "--port", str(port), *options]
    haproxy = {name: str(free) for name, free in zip(OWN_PORTS, own, strict=True)}
    return _running(command, haproxy, port, "/ready", log)


def serving_vllm(spec: EngineSpec, model: Path, log: Path) -> contextlib.AbstractContextManager[Endpoint]:
    """vLLM with its own defaults, compiled, ready on a free port. Errors: as above."""
    (port,) = free_ports(1)
    given: dict[str, object] = {
        "host": "127.0.0.1", "port": port, "dtype": spec.dtype, "max-model-len": 2048,
        "tensor-parallel-size": spec.tensor_parallel_size, "kv-cache-memory-bytes": spec.kv_gib << 30,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in given.items()]
    command = [str(spec.python.parent / "vllm"), "serve", str(model), *flags, "--disable-uvicorn-access-log"]
    return _running(command, spec.environment(), port, "/health", log)


@contextlib.contextmanager
def _running(command: Sequence[str], environment: Mapping[str, str], port: int, ready: str, log: Path) -> Iterator[Endpoint]:
    """ready: the path that answers 200 once it is."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, **environment}, start_new_session=True
        )
    endpoint = Endpoint(process, port)
    try:
        deadline_s = time.monotonic() + LOAD_TIMEOUT_S
        while not _answers(endpoint, ready):
            if process.poll() is not None or time.monotonic() > deadline_s:
                tail = log.read_text(errors="replace").splitlines()[-12:]
                raise ServingError("\n  ".join([f"the endpoint did not come up; the end of {log}:", *tail]))
            time.sleep(0.25)
        yield endpoint
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]", number: signal.Signals = signal.SIGTERM) -> Ended:
    """Ends a command that leads a session, by a signal, and kills what is left of all that it has started. Usually SIGTERM: a
    background job of a shell ignores SIGINT, which goes to the process group, as from a terminal."""
    below, began_s = set(descendants(process.pid)), time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
        if process.poll() is None:
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        process.wait(STOP_TIMEOUT_S)
    seconds = time.monotonic() - began_s
    left = {pid: command_line(pid) for pid in wait_gone(below | set(descendants(process.pid)) | {process.pid}, LINGER_S)}
    signal_all(left, signal.SIGKILL)
    process.wait()
    return Ended(seconds, left)


class Clients:
    """Requests to one endpoint after the other, from a process that shares no event loop with it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("load.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, endpoint: Endpoint, asks: Iterable[Ask], limit: int | None = None) -> list[Outcome]:
        """limit: requests under way at once; None: each goes out at its own time."""
        requests = [{"at_s": ask.at_s, "body": ask.body, "leave_after": ask.leave_after} for ask in asks]
        plan = {"host": endpoint.host, "port": endpoint.port, "path": "/v1/completions", "limit": limit, "requests": requests}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ServingError("the clients' process has ended: its error is above")
        return [Outcome(**outcome) for outcome in json.loads(line)]

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def completed(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    """All of them. Errors: ServingError if one has failed."""
    failed = [outcome for outcome in outcomes if not outcome.complete]
    if failed:
        raise ServingError(f"{len(failed)} of {len(outcomes)} requests failed, the first with {failed[0]}")
    return outcomes


def _answers(endpoint: Endpoint, path: str) -> bool:
    try:
        endpoint.get(path)
    except OSError:  # nobody listens yet, or it says 503
        return False
    return True
