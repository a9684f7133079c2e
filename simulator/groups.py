"""One simulated group in virtual time: the production resident batch, planned by the production code, without a model.

A step with a prefill chunk or a first token is one step. Decode steps between two events (a block fills, a grant is due, an
output ends, a command arrives) differ in nothing that the scheduler sees: one run, computed at once and sent as one report.
Imports `workers.loop.batch`, the messages and NumPy.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from scheduler.protocol.leaders import ROW_MASK, Command, Movement, Report, Start
from scheduler.protocol.messages import NO_TOKEN
from simulator.time_model import TimeModel
from workers.loop.batch import Launched, ResidentBatch

TOKEN_MASK = np.uint64(0x7FFFFFFF)
STRIDE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(slots=True)
class Run:
    """Steps with the same batch that are under way. ends_s: [steps] when each ends; a command may cut the run short."""

    step: Launched
    ends_s: npt.NDArray[np.float64]
    began_s: float

    @property
    def end_s(self) -> float:
        return float(self.ends_s[-1])


class SimulatedGroup:
    """One epoch of a group, as its leader sees it. grant_ahead: the core's, so that a run ends where a grant is due."""

    def __init__(self, epoch: int, batch: ResidentBatch, model: TimeModel, grant_ahead: int) -> None:
        self.epoch = epoch
        self.batch = batch
        self.run: Run | None = None
        self.prefilled = 0  # tokens that it had to compute of what it was told to start
        self.movements: list[Movement] = []  # that it has come to in its log; the engine takes them away
        self._model = model
        self._ahead = grant_ahead
        self._inbox: list[Command] = []
        self._reports = 0
        self._seeds = np.zeros(len(batch.lease), np.uint64)
        self._fresh = np.zeros(len(batch.lease), np.bool_)  # has sampled nothing yet: its first token has a time of its own

    def take(self, commands: Iterable[Command], now_s: float) -> None:
        """Commands arrive. A step under way goes on to its end; the steps that would have followed are off."""
        self._inbox += commands
        if self.run is not None:
            steps = int(self.run.ends_s.searchsorted(now_s)) + 1
            self.run.ends_s = self.run.ends_s[:steps]

    def begin(self, now_s: float) -> None:
        """Applies what has arrived and starts what is to be done; nothing if there is nothing."""
        for command in self._inbox:
            self.batch.apply(command)
            if isinstance(command, Start):
                self._start(command)
            elif isinstance(command, Movement):
                self.movements.append(command)
        self._inbox.clear()
        self.batch.vacated.clear()
        plan = self.batch.plan()
        if not len(plan.rows):
            return
        alone = plan.decodes < len(plan.rows) or self._fresh[plan.rows].any()
        steps = 1 if alone else self._steps(plan.rows)
        decoding = plan.rows[: plan.decodes]
        context = int(self.batch.known[decoding].sum())
        prefilled = int(plan.counts[plan.decodes :].sum())
        ends_s = now_s + self._model.durations_s(steps, plan.decodes, context, prefilled).cumsum()
        self.run = Run(self.batch.launch(plan), ends_s, now_s)

    def end(self) -> Report:
        """The run is over: its tokens."""
        assert self.run is not None
        run, self.run = self.run, None
        return self._commit(run)

    def interrupt(self, now_s: float) -> Report | None:
        """The group is lost at this moment. What its steps have done until now had been reported."""
        run, self.run = self.run, None
        if run is None or not (steps := int(run.ends_s.searchsorted(now_s, side="right"))):
            return None
        run.ends_s = run.ends_s[:steps]
        return self._commit(run)

    def _start(self, start: Start) -> None:
        row = start.lease & ROW_MASK
        self._seeds[row] = start.seed
        self._fresh[row] = True
        self.prefilled += len(start.tokens) // 4 - start.cached_tokens

    def _steps(self, rows: npt.NDArray[np.int64]) -> int:
        """How many decode steps these rows can do until one of them fills a block, wants a grant or ends."""
        batch, block = self.batch, self.batch.block_size
        known = batch.known[rows]
        filled = block - (known - 1) % block
        low = batch.granted[rows] - self._ahead + 1 - known
        last = np.minimum(filled, batch.limit[rows] - known)
        return max(1, int(np.where(low > 0, np.minimum(last, low), last).min()))

    def _commit(self, run: Run) -> Report:
        batch, step, steps = self.batch, run.step, len(run.ends_s)
        rows = step.plan.rows
        if steps > 1:  # the batch has launched the first of them
            batch.known[rows] += steps - 1
            batch.computed[rows] += steps - 1
        position = (step.first + step.plan.counts).astype(np.uint64) + np.arange(steps, dtype=np.uint64)[:, None]
        sampled = (((self._seeds[rows] + position * STRIDE) >> np.uint64(13)) & TOKEN_MASK).astype(np.int32)
        mixed = step.plan.decodes < len(rows)
        if mixed:
            sampled = np.where(step.samples, sampled, np.int32(NO_TOKEN))
        leases = step.leases
        self._fresh[rows[step.samples]] = False
        last = replace(step, first=step.first + (steps - 1)) if steps > 1 else step
        ended = batch.collect(last, sampled[-1].astype(np.int64))
        report = Report(
            epoch=self.epoch, number=self._reports, applied=batch.applied, steps=steps, leases=leases.tobytes(),
            computed=step.plan.counts.astype(np.int32).tobytes() if mixed else b"", tokens=sampled.tobytes(),
            finished=tuple((int(leases[at]), int(reason)) for at, reason in ended), elapsed_s=run.end_s - run.began_s,
        )  # fmt: skip
        self._reports += 1
        return report
