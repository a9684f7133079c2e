"""The step loop of one rank without scheduler, sockets and front end: what the others are measured against.

Drives `Rank` with starts whose blocks are granted whole. Imports Manta's workers, NumPy and torch.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.works import Work
from cluster.config import EngineConfig
from cluster.resolve import resolve
from scheduler.protocol.leaders import ROW_BITS, ROW_MASK, LeaseId, Start
from scheduler.protocol.sampling import SamplingParams
from workers.execution.gpu.runner import GpuRunner
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Executor, Pending, StepTokens
from workers.parallel.communicator import Communicator
from workers.parallel.in_process import Solo
from workers.process.build import build_rank


@dataclass(slots=True)
class Timeline:
    """Where the host's time went, in seconds, over `steps` steps. Everything else is planning and bookkeeping."""

    steps: int = 0
    launch_s: float = 0.0
    wait_s: float = 0.0
    total_s: float = 0.0

    def table(self) -> dict[str, float]:
        """Microseconds a step."""
        each = 1e6 / max(1, self.steps)
        rest = self.total_s - self.launch_s - self.wait_s
        return {
            "step_us": self.total_s * each,
            "host_plan_and_commit_us": rest * each,
            "host_launch_us": self.launch_s * each,
            "host_wait_us": self.wait_s * each,
        }


class Timed:
    """An executor with a clock around what it launches and what is waited for."""

    def __init__(self, executor: Executor) -> None:
        self.timeline = Timeline()
        self.executor = executor
        self.admit, self.release, self.copy, self.close = executor.admit, executor.release, executor.copy, executor.close

    def execute(self, batch: ResidentBatch, step: Launched) -> Pending:
        begun = time.perf_counter()
        pending = self.executor.execute(batch, step)
        self.timeline.launch_s += time.perf_counter() - begun
        self.timeline.steps += 1
        return _TimedPending(pending, self.timeline)


@dataclass(frozen=True, slots=True)
class _TimedPending:
    pending: Pending
    timeline: Timeline

    def done(self) -> bool:
        return self.pending.done()

    def wait(self) -> StepTokens:
        begun = time.perf_counter()
        tokens = self.pending.wait()
        self.timeline.wait_s += time.perf_counter() - begun
        return tokens


class BareLoop:
    """One rank, built as a worker builds it, and stepped by hand. comm: of its group; None: it is alone. options: of
    `EngineConfig`."""

    def __init__(self, checkpoint: Path, comm: Communicator | None = None, device: str = "cuda", /, **options: object) -> None:
        config = EngineConfig(model=str(checkpoint), local=True, device=device, **options)  # type: ignore[arg-type]
        self._config = config
        begun = time.perf_counter()
        self._built = build_rank(config, resolve(config, device), comm or Solo())
        self.start_s = time.perf_counter() - begun
        self.rank = self._built.rank
        self._timed = self.rank.executor = Timed(self.rank.executor)
        self._serial = 1

    def run(self, work: Work) -> tuple[float, Timeline]:
        """Seconds for the work, and where they went."""
        rank = self.rank
        commands = self.starts(work)
        timeline = self._timed.timeline = Timeline()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        rank.turn(commands)
        while not rank.idle:
            rank.turn([])
        timeline.total_s = time.perf_counter() - begun
        return timeline.total_s, timeline

    def beside(self, work: Work, prompts: Work) -> list[float]:
        """Seconds of each step of `work`'s decodes while `prompts` come, each as soon as the one before has been computed."""
        rank, streams = self.rank, len(work.prompts)
        commands = self.starts(Work(work.prompts + prompts.prompts, work.lengths + prompts.lengths))
        waiting = list(reversed(commands[streams:]))
        rank.turn(commands[:streams])
        for _ in range(8):  # until all decode
            rank.turn([])
        torch.cuda.synchronize()
        took: list[float] = []
        prefilling = False
        while waiting or prefilling:
            begun = time.perf_counter()
            result = rank.turn([] if prefilling else [waiting.pop()])
            prefilling = result is None or not any(lease & ROW_MASK >= streams for lease, _ in result.finished)
            took.append(time.perf_counter() - begun)
        while not rank.idle:
            rank.turn([])
        return took

    def decoding(self, work: Work) -> GpuRunner:
        """Runs it until all of its prompts decode: what executes the steps, in the midst of them."""
        rank, rows = self.rank, len(work.prompts)
        rank.turn(self.starts(work))
        runner = self._timed.executor
        assert isinstance(runner, GpuRunner), "on a GPU"
        while bool(runner._state.order[:rows].eq(runner._state.padding).any()):
            rank.turn([])
        return runner

    def starts(self, work: Work) -> list[Start]:
        """Row i runs prompt i. Errors: ValueError if the pool has too few blocks."""
        starts, block = [], 0
        for row, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
            blocks = -(-(len(prompt) + length) // self._config.block_size)
            each = self._built.sizes.narrow // len(work.prompts)  # of narrow layers, used in turn: what they see is there
            narrow = [row * each + index % each for index in range(blocks)] if each else []
            starts.append(self._start(row, prompt, length, work.temperature, range(block, block + blocks), narrow))
            block += blocks
        if block > self._built.sizes.blocks:
            raise ValueError(f"the work needs {block} blocks and the pool has {self._built.sizes.blocks}")
        return starts

    def _start(
        self, row: int, prompt: list[int], length: int, temperature: float, blocks: range, narrow: list[int]
    ) -> Start:  # fmt: skip
        self._serial += 1
        return Start(
            lease=LeaseId(self._serial << ROW_BITS | row),
            tokens=np.array(prompt, np.int32).tobytes(),
            prompt_tokens=len(prompt),
            cached_tokens=0,
            blocks=np.array(blocks, np.int32).tobytes(),
            params=SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True),
            seed=row,
            choice=0,
            stop_ids=(),
            max_tokens=length,
            narrow=np.array(narrow, np.int32).tobytes(),
        )

    def close(self) -> None:
        self.rank.close()
