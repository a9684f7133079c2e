"""What every question of the study is told, how it times things, and how it runs alone. Imports the standard library only."""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Result = dict[str, Any]
"""Plain data: what JSON can hold, with text for keys."""


@dataclass(frozen=True, slots=True)
class Options:
    """quick: small workloads, and nothing that needs a model or minutes. trace: any file that `manta replay` reads.

    limit: the first requests of the trace that question 5 replays; None for all. device: where question 1 and the kernels of
    question 5 run. threads: of torch on a CPU. rounds: turns that measured alternatives take. vllm_python: an interpreter that
    has vLLM, for question 4. model: a shape of `benchmarks.shared.checkpoints`, for the runs of the real engine. cache: where
    its random weights are kept.
    """

    quick: bool = False
    trace: Path | None = None
    device: str = "cpu"
    threads: int = 2
    rounds: int = 5
    seed: int = 0
    limit: int | None = None
    vllm_python: Path | None = None
    model: str = "0.1B"
    cache: Path = Path(tempfile.gettempdir()) / "manta-benchmarks"

    def command(self, question: int) -> str:
        """The line that repeats it. A trace is named without the folders above it."""
        words = ["manta study", f"--questions {question}"]
        if self.quick:
            words.append("--quick")
        if self.trace is not None:
            words.append(f"--trace {self.trace.name}")
        if self.limit is not None and question == 5:
            words.append(f"--limit {self.limit}")
        if self.device != "cpu":
            words.append(f"--device {self.device}")
        if self.threads != len(os.sched_getaffinity(0)) and question in (1, 5):
            words.append(f"--threads {self.threads}")
        if self.vllm_python is not None and question == 4:
            words.append("--vllm-python VLLM_VENV/bin/python")
        return " ".join(words)


def machine(options: Options) -> dict[str, str]:
    """What the figures depend on, without names of hosts. load: of the last 15 minutes; above the cores, they were shared."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    device = "CPU"
    if options.device == "cuda":
        import torch as library

        device = library.cuda.get_device_name()
    return {
        "device": device, "cores": str(len(os.sched_getaffinity(0))), "processor": _processor(), "torch": torch,
        "python": platform.python_version(), "load": f"{os.getloadavg()[2]:.1f}",
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def in_turns(
    work: dict[str, Callable[[], object]],
    rounds: int,
    *,
    repeat: int = 1,
    settle: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Name -> seconds of one call in each round. Every alternative runs in every round, after one that does not count.

    repeat: calls that are timed as one. settle: waits for what a call has only begun (a GPU). clock: CPU time of the process,
    all its threads, since others may use the machine too; for a GPU, `time.perf_counter`.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            settle()
            began_s = clock()
            for _ in range(repeat):
                call()
            settle()
            if number:
                times[name].append((clock() - began_s) / repeat)
    return times


def spread(values: list[float], scale: float = 1.0, digits: int = 3) -> dict[str, float]:
    """Median and range of some rounds, each times `scale`, with so many significant digits."""
    figures = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value * scale:.{digits}g}") for name, value in figures.items()}


def run_alone(run: Callable[[Options], Result], question: int, about: str | None) -> None:
    """The command line of one question: prints its result as the last line, in the form that `manta study --from` takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = Options(**vars(parser.parse_args()))
    print(json.dumps({"device": options.device, "questions": {str(question): run(options)}}))


def add_options(parser: argparse.ArgumentParser) -> None:
    defaults = Options()
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; nothing that needs a model")
    parser.add_argument("--trace", type=Path, help="Mooncake JSONL or another trace that manta replay reads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=defaults.device)
    parser.add_argument("--threads", type=int, default=defaults.threads, help="of torch on a CPU (%(default)s)")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="turns of each alternative (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--limit", type=int, help="requests of the trace that question 5 replays (all)")
    parser.add_argument("--vllm-python", type=Path, help="an interpreter that has vLLM")
    parser.add_argument("--model", default=defaults.model, help="shape of the real engine's model (%(default)s)")
    parser.add_argument("--cache", type=Path, default=defaults.cache, help="folder of random weights (%(default)s)")
