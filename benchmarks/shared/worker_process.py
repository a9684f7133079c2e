"""The parent's side of `engine_worker.py`: starts an engine in its own process and asks it for measurements.

May import the standard library and the benchmarks' own modules; never imports an engine.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.shared.workloads import Batch

LOAD_TIMEOUT_S = 900.0  # a peer may compile
BATCH_TIMEOUT_S = 1800.0
CLOSE_TIMEOUT_S = 30.0


class WorkerError(RuntimeError):
    """An engine could not be loaded, failed on a batch, or did less than it was asked for."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything that decides how one engine runs. `threads` are the CPU threads of the whole engine."""

    engine: str
    python: Path
    dtype: str
    tensor_parallel_size: int
    threads: int
    kv_gib: int
    block_size: int | None = None
    max_num_batched_tokens: int | None = None
    ray: bool = False

    def command(self, model: Path) -> list[str]:
        """The worker's command line."""
        options: dict[str, object] = {
            "engine": self.engine,
            "model": model,
            "dtype": self.dtype,
            "tensor-parallel-size": self.tensor_parallel_size,
            "threads": self.threads,
            "kv-gib": self.kv_gib,
            "block-size": self.block_size,
            "max-num-batched-tokens": self.max_num_batched_tokens,
        }
        pairs = [f"--{name}={value}" for name, value in options.items() if value is not None]
        worker = Path(__file__).with_name("engine_worker.py")
        return [str(self.python), str(worker), *pairs, *(["--ray"] if self.ray else [])]

    def environment(self) -> dict[str, str]:
        """What must be set before the process starts: offline, and the threads of vLLM on CPU."""
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.engine != "vllm":
            return {**offline, "OMP_NUM_THREADS": str(max(1, self.threads // self.tensor_parallel_size))}
        cpus = sorted(os.sched_getaffinity(0))[: self.threads]
        share = max(1, len(cpus) // self.tensor_parallel_size)
        ranks = [cpus[rank * share : (rank + 1) * share] for rank in range(self.tensor_parallel_size)]
        openmp = self.python.parent.parent / "lib" / "libiomp5.so"  # about 10% faster
        return {
            **offline,
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, rank)) for rank in ranks),
            **({"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}),
        }


@dataclass(frozen=True, slots=True)
class Measurement:
    """Wall-clock seconds of one batch, and how many prompt tokens came out of the prefix cache."""

    seconds: float
    cached_tokens: int


def _spawn(spec: EngineSpec, model: Path, log: Path) -> subprocess.Popen[str]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stderr:
        try:
            return subprocess.Popen(
                spec.command(model),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **spec.environment()},
                start_new_session=True,
            )
        except OSError as error:
            raise WorkerError(f"{spec.python} does not run: {error}") from error


class Worker:
    """One engine in a process group of its own, which ends with the `with` block.

    The engine's own output goes to `log`. Raises WorkerError, with the end of that log, when it fails.
    """

    def __init__(self, spec: EngineSpec, model: Path, log: Path) -> None:
        self._log = log
        self._process = _spawn(spec, model, log)
        try:
            loaded = self._answer(LOAD_TIMEOUT_S)
        except BaseException:
            self._end()
            raise
        self.version = str(loaded["version"])
        self.load_s = float(loaded["load_s"])

    def run(self, batch: Batch) -> Measurement:
        """Generate the batch and return its measurement; every prompt must get all of its output tokens."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(batch)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._failure("the engine's process has ended")) from error
        answer = self._answer(BATCH_TIMEOUT_S)
        if answer["output_tokens"] != batch.output_tokens:
            raise WorkerError(f"{answer['output_tokens']} output tokens instead of {batch.output_tokens}")
        return Measurement(float(answer["seconds"]), int(answer["cached_tokens"]))

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(timeout_s, self._signal, (signal.SIGKILL,))
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(self._failure(f"no answer (the limit is {timeout_s:.0f} s)"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(self._failure(answer["error"]))
        return answer

    def _failure(self, reason: str) -> str:
        tail = self._log.read_text(errors="replace").splitlines()[-12:]
        return "\n  ".join([f"{reason}; the end of {self._log}:", *tail])

    def _end(self) -> None:
        """Ask the engine to close by ending its input, then make sure of its whole process group."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@contextlib.contextmanager
def started(
    specs: dict[str, EngineSpec], model: Path, warm_up: list[Batch], logs: Path, optional: frozenset[str]
) -> Iterator[dict[str, Worker]]:
    """Load and warm up the engines one after another; an optional one that fails is left out with a note."""
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, spec in specs.items():
            try:
                worker = _warm(spec, model, warm_up, logs / f"{model.name}.{name}.log")
            except WorkerError as error:
                if name not in optional:
                    raise
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                continue
            workers[name] = stack.enter_context(worker)
            print(f"{name} {worker.version}: loaded in {worker.load_s:.1f} s", file=sys.stderr, flush=True)
        if not workers:
            raise WorkerError("no engine is left to measure")
        yield workers


def _warm(spec: EngineSpec, model: Path, warm_up: list[Batch], log: Path) -> Worker:
    with contextlib.ExitStack() as undo:
        worker = undo.enter_context(Worker(spec, model, log))
        for batch in warm_up:
            worker.run(batch)
        undo.pop_all()
        return worker
