"""One rank's part in its group: the resident batch, what executes it, and the verbs plan, execute, commit.

The same object runs in the leader, in its peers and in simulations; only the executor differs.
Imports `batch`, `ledger` and `scheduler.protocol`; no torch, no ray.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from scheduler.protocol.leaders import ROW_MASK, Adapted, Command, Copy, Drop, LeaseId, Movement, Remap, Start, Trim
from scheduler.protocol.messages import FinishReason
from workers.loop.adapters import Residency
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.ledger import Ledger
from workers.loop.pulse import Kind, Pulse, kind_of

LOOK_S = 1e-4
"""Between two looks whether a step is done while commands are waited for: so much later its tokens may be told."""

TAKING = (Drop, Remap, Trim)
"""Commands that give nobody anything to compute."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What a step sampled. ids: [n] int64, any value where the step took no sample, NO_TOKEN where sampling failed.

    logprobs: (index, opaque payload) in the order in which the front end is to read them.
    """

    ids: npt.NDArray[np.int64]
    logprobs: Sequence[tuple[int, bytes]] = ()


class Pending(Protocol):
    """A step whose tokens may still be on the device."""

    def done(self) -> bool:
        """`wait` would not wait."""
        ...

    def wait(self) -> StepTokens: ...


class Executor(Protocol):
    """Computes steps: the model on this rank's device, or a model of its time."""

    def admit(self, start: Start) -> None:
        """A sequence enters the batch at the lease's row."""
        ...

    def release(self, row: int) -> None:
        """The sequence at `row` has left; a step with it may still be under way."""
        ...

    def copy(self, source: int, target: int, tokens: int, *, narrow: bool = False) -> None:
        """The first `tokens` slots of block `target` get what block `source` holds: after the steps launched so far, before
        every later one, without a wait on the host. narrow: they are of narrow layers."""
        ...

    def execute(self, batch: ResidentBatch, step: Launched) -> Pending:
        """Launches a step; must not wait for its result on the host."""
        ...

    def close(self) -> None:
        """No step follows: ends whatever threads it has, without waiting for them."""
        ...


class Opening(Protocol):
    """Grammars that are being compiled beside the steps."""

    on_opened: Callable[[], None]
    """Called from another thread when one is ready."""

    def opening(self) -> Sequence[int]:
        """Rows that would make a step wait."""
        ...


class Mover(Protocol):
    """Moves whole blocks beside the steps, and says by itself when it has."""

    def take(self, movement: Movement) -> None:
        """The next movement of the log; the steps of the commands before it have been launched. Must not wait."""
        ...

    def enter(self, epoch: int) -> None:
        """The group has another epoch from now on: what is under way fails. Errors: whatever keeps it from ending."""
        ...

    def close(self) -> None:
        """Fails what is under way and ends all threads."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """A committed step. live: [n] leases that had not ended when its tokens came in."""

    step: Launched
    tokens: StepTokens
    live: npt.NDArray[np.bool_]
    finished: list[tuple[int, FinishReason]]


class Rank:
    """Applies the log, plans, executes, commits. depth: steps that may be under way while the host plans the next.

    grammars: None where no row has any. adapters: set before the first turn, where rows may have LoRA adapters. mover: set
    before the first turn; without one, movements are passed over. ledger: set before the first turn, where somebody may ask
    what stands in the blocks. pulse: what the present turn is in, for others.
    Every rank of a group makes the same `turn` calls with the same commands, so all plan the same steps.
    """

    def __init__(
        self, batch: ResidentBatch, executor: Executor, depth: int = 0, grammars: Opening | None = None
    ) -> None:  # fmt: skip
        self.batch = batch
        self.grammars = grammars
        self.executor = executor
        self.mover: Mover | None = None
        self.ledger: Ledger | None = None
        self.adapters: Residency | None = None
        self._depth = depth
        self.pulse = Pulse()
        self._under_way: deque[tuple[Launched, Pending, Kind | None]] = deque()
        self._unopened: set[int] = set()  # rows with a grammar, until their first sample: it has to be compiled
        self._idle = True

    @property
    def idle(self) -> bool:
        """No step is under way and none can be planned: only a command can change that."""
        return self._idle

    def turn(self, commands: Iterable[Command], held: Sequence[int] = ()) -> StepResult | None:
        """Applies commands, then steps."""
        self.apply(commands)
        return self.step(held)

    def apply(self, commands: Iterable[Command]) -> None:
        for command in commands:
            if isinstance(command, Adapted):
                assert self.adapters is not None, "the leader tells what its own ranks have read"
                self.adapters.read(command)
                continue  # it is no part of the log
            if self.ledger is not None:
                self.ledger.take(command)
            self.batch.apply(command)
            self._release()
            if isinstance(command, Start):
                self._admit(command)
            elif isinstance(command, Copy):
                self.executor.copy(command.source, command.target, command.tokens, narrow=command.narrow)
            elif isinstance(command, Movement) and self.mover is not None:
                self.mover.take(command)

    def held(self) -> tuple[int, ...]:
        """Rows that are to take no sample in the next step: the leader's word, for all ranks, which compile side by side but
        not equally fast."""
        return tuple(self.grammars.opening()) if self.grammars is not None else ()

    def look_out(self, commands: Sequence[Command], look: Callable[[float], list[Command]]) -> Sequence[Command]:
        """commands: what has come. With what comes while all that there is to compute is under way: else the device would have
        nothing to do from the end of that until the next turn has launched what came meanwhile. Ends with what may give
        something to compute, or once the oldest step is done. look: given the seconds that it may wait. Errors: whatever it
        raises."""
        if self._under_way and not self.batch.has_work:
            self.pulse.begin([kind for *_, kind in self._under_way])
            while all(isinstance(command, TAKING) for command in commands) and not self._under_way[0][1].done():
                commands = [*commands, *look(LOOK_S)]
        return commands

    def step(self, held: Sequence[int] = ()) -> StepResult | None:
        """Launches one step if there is work, and commits the oldest if enough are under way. held: as the leader has it."""
        plan = self.batch.plan(held)
        step = self.batch.launch(plan) if len(plan.rows) else None
        kind = None if step is None else self._kind(step)
        kinds = [kind for *_, kind in self._under_way]
        if step is not None or kinds:
            self.pulse.begin(kinds if step is None else [*kinds, kind])
        if step is not None:
            self._under_way.append((step, self.executor.execute(self.batch, step), kind))
            self.batch.forget_edits()
        result = None
        if self._under_way and (len(self._under_way) > self._depth or step is None):
            oldest, pending, _ = self._under_way.popleft()
            result = self._commit(oldest, pending)
        self.pulse.end(committed=result is not None)
        self._idle = step is None and result is None  # what was committed may be what a row has waited for
        if self._idle and self.adapters is not None and not held:
            self._idle = not self.adapters.give_way()
        return result

    def vacate(self) -> list[Command]:
        """The commands that empty the batch."""
        return [Drop(LeaseId(lease)) for lease in self.batch.lease.tolist() if lease != -1]

    def close(self) -> None:
        """The loop has ended, for whatever reason."""
        try:
            if self.mover is not None:
                self.mover.close()
            if self.adapters is not None:
                self.adapters.close()
        finally:
            self.executor.close()

    def _admit(self, start: Start) -> None:
        self.executor.admit(start)
        if start.adapter is not None:
            assert self.adapters is not None, "front ends take none where ranks have no room for any"
            self.adapters.admit(row_of(start), start.adapter)
        if start.params.grammar is not None:
            self._unopened.add(row_of(start))

    def _kind(self, step: Launched) -> Kind | None:
        """Of a step that is about to be executed; None for one that may have to wait for a grammar to be compiled."""
        if self._unopened and not self._unopened.isdisjoint(sampled := step.plan.rows[step.samples].tolist()):
            self._unopened.difference_update(sampled)
            return None
        return kind_of(step)

    def _commit(self, step: Launched, pending: Pending) -> StepResult:
        tokens = pending.wait()
        live = self.batch.live(step)
        if self.ledger is not None:
            self.ledger.note(step, tokens.ids, live)
        finished = self.batch.collect(step, tokens.ids)
        if self.ledger is not None:
            for index, _ in finished:
                self.ledger.leave(int(step.plan.rows[index]))
        self._release()
        return StepResult(step, tokens, live, finished)

    def _release(self) -> None:
        while self.batch.vacated:
            row = self.batch.vacated.pop()
            self._unopened.discard(row)
            if self.adapters is not None:
                self.adapters.release(row)
            self.executor.release(row)


def row_of(start: Start) -> int:
    return start.lease & ROW_MASK
