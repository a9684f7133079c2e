"""From committed steps to reports: consecutive decode steps of the same leases travel together.

Imports NumPy, `rank` and `scheduler.protocol`.
"""

import math
import time
from collections.abc import Callable

import numpy as np

from scheduler.protocol.leaders import ExpertLoad, Report
from scheduler.protocol.messages import NO_TOKEN
from workers.loop.rank import StepResult


class Reporter:
    """Numbers the reports of one epoch. steps: at most so many decode steps travel in one; 1 sends each at once.

    hold_s: no step is kept back for longer, as far as later steps come. expert_load: asked at each report, for what it has to
    tell of a model's experts.
    """

    def __init__(
        self, epoch: int, steps: int = 1, clock: Callable[[], float] = time.monotonic, hold_s: float = math.inf,
        expert_load: Callable[[], ExpertLoad | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._epoch = epoch
        self._steps = steps
        self._hold_s = hold_s
        self._clock = clock
        self._expert_load = expert_load
        self._number = 0
        self._applied = 0
        self._leases = b""
        self._rows: list[bytes] = []
        self._logprobs: list[tuple[int, bytes]] = []
        self._since = clock()
        self._ready: list[Report] = []

    @property
    def epoch(self) -> int:
        return self._epoch

    def wake(self) -> None:
        """The group has slept, with nothing to report: its next step is measured from here."""
        self._since = self._clock()

    def add(self, result: StepResult, applied: int) -> None:
        """Takes a committed step in. applied: commands applied so far."""
        self._applied = applied
        step, live = result.step, result.live
        tokens = np.where(step.samples, result.tokens.ids, NO_TOKEN).astype(np.int32)[live]
        counts = step.plan.counts[live]
        leases = step.leases[live]
        key = leases.tobytes()
        plain = bool((counts == 1).all() and (tokens != NO_TOKEN).all())
        if self._rows and (key != self._leases or not plain):
            self._close()
        if not self._rows and not len(leases):
            return  # nobody of this step is left
        self._leases = key
        self._rows.append(tokens.tobytes())
        self._logprobs += [(int(step.leases[at]), payload) for at, payload in result.tokens.logprobs if live[at]]
        if not plain or result.finished or len(self._rows) == self._steps or self._is_due():
            finished = tuple((int(step.leases[at]), int(reason)) for at, reason in result.finished)
            self._close(b"" if plain else counts.astype(np.int32).tobytes(), finished)

    def take(self, *, flush: bool) -> list[Report]:
        """The reports that are ready. flush: also what is still gathering, since no step follows soon."""
        if flush and self._rows:
            self._close()
        ready, self._ready = self._ready, []
        return ready

    def _is_due(self) -> bool:
        return self._hold_s < math.inf and self._clock() - self._since >= self._hold_s

    def _close(self, computed: bytes = b"", finished: tuple[tuple[int, int], ...] = ()) -> None:
        now = self._clock()
        self._ready.append(
            Report(
                epoch=self._epoch,
                number=self._number,
                applied=self._applied,
                steps=len(self._rows),
                leases=self._leases,
                computed=computed,
                tokens=b"".join(self._rows),
                finished=finished,
                logprobs=tuple(self._logprobs),
                elapsed_s=now - self._since,
                expert_load=self._expert_load(),
            )
        )
        self._number += 1
        self._since = now
        self._rows = []
        self._logprobs = []
