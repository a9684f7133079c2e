"""Memory that a full server of one pool wastes: contiguous preallocation against blocks, simulated step by step.

The queue is never empty, the order is first come, first served. A request that is admitted holds its prompt at once and one
token more after each step. Pure Python; imports the prefixes and the streams.
"""

import bisect
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from benchmarks.study.models.prefixes import block_keys
from benchmarks.study.models.streams import StudyRequest, Workload

GRANT_AHEAD = 4
"""Slots that Manta grants before they are needed: `Resolved.grant_ahead`."""


def power_of_two(tokens: int) -> int:
    return 1 << max(0, tokens - 1).bit_length()


def blocks_for(tokens: int, block: int) -> int:
    return -(-tokens // block)


class Memory(Protocol):
    """Where sequences are kept. `admit` and `grow` say no where there is no room; `free` ends a sequence."""

    def admit(self, number: int, request: StudyRequest) -> bool: ...

    def grow(self, number: int, tokens: int) -> bool:
        """The sequence will hold `tokens` tokens."""
        ...

    def next_growth(self, number: int, tokens: int) -> int | None:
        """The length, above `tokens`, at which it must `grow`; None: never."""
        ...

    def free(self, number: int) -> None: ...

    @property
    def allocated(self) -> int:
        """Tokens' worth of memory that sequences hold."""
        ...


class Contiguous:
    """One run of memory for each sequence, reserved for its whole life at admission, first fit.

    reserve: "max" for the model's maximum, "power of two" above the final length, "exact" for the final length itself, which
    no server knows: what is lost then is lost between the runs. (The vLLM paper has the three as Orca's Max, Pow2, Oracle.)
    """

    def __init__(self, total: int, reserve: str, longest: int) -> None:
        self._free: list[tuple[int, int]] = [(0, total)]  # (begin, size), by begin
        self._runs: dict[int, tuple[int, int]] = {}
        self._reserve = reserve
        self._longest = power_of_two(longest)
        self._allocated = 0

    @property
    def allocated(self) -> int:
        return self._allocated

    def size(self, request: StudyRequest) -> int:
        if self._reserve == "max":
            return self._longest
        return request.computed_tokens if self._reserve == "exact" else power_of_two(request.computed_tokens)

    def admit(self, number: int, request: StudyRequest) -> bool:
        size = self.size(request)
        for at, (begin, room) in enumerate(self._free):
            if room >= size:
                self._free[at : at + 1] = [(begin + size, room - size)] if room > size else []
                self._runs[number] = (begin, size)
                self._allocated += size
                return True
        return False

    def grow(self, number: int, tokens: int) -> bool:
        return tokens <= self._runs[number][1]

    def next_growth(self, number: int, tokens: int) -> int | None:  # noqa: ARG002
        return None

    def free(self, number: int) -> None:
        begin, size = self._runs.pop(number)
        self._allocated -= size
        at = bisect.bisect(self._free, (begin, 0))
        if at < len(self._free) and self._free[at][0] == begin + size:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == begin:
            before, room = self._free.pop(at - 1)
            begin, size, at = before, room + size, at - 1
        self._free.insert(at, (begin, size))


class Paged:
    """Blocks on demand, `GRANT_AHEAD` slots before they are needed; with `unit`, full blocks of equal prefixes are held once.

    unit: tokens that a name of the workload stands for. Content that nobody holds is not kept: what is counted is sharing
    among those who run, not caching.
    """

    def __init__(self, total: int, block: int, unit: int | None = None) -> None:
        self._blocks = total // block
        self._block = block
        self._unit = unit
        self._held = 0
        self._last: dict[int, int] = {}
        self._limits: dict[int, int] = {}
        self._shared: dict[int, list[int]] = {}
        self._holders: Counter[int] = Counter()

    @property
    def allocated(self) -> int:
        return self._held * self._block

    def admit(self, number: int, request: StudyRequest) -> bool:
        tokens, block = request.asked.prompt_tokens, self._block
        keys = [] if self._unit is None else block_keys(request.asked.names, self._unit, tokens, block)
        limit = blocks_for(request.computed_tokens, block)
        wanted = min(blocks_for(tokens + GRANT_AHEAD, block), limit)
        new = wanted - sum(key in self._holders for key in keys)
        if self._held + new > self._blocks:
            return False
        self._holders.update(keys)
        self._held += new
        self._last[number], self._limits[number], self._shared[number] = wanted, limit, keys
        return True

    def grow(self, number: int, tokens: int) -> bool:
        more = min(blocks_for(tokens + GRANT_AHEAD, self._block), self._limits[number]) - self._last[number]
        if self._held + more > self._blocks:
            return False
        self._held += more
        self._last[number] += more
        return True

    def next_growth(self, number: int, tokens: int) -> int | None:  # noqa: ARG002
        last = self._last[number]
        return None if last == self._limits[number] else last * self._block - GRANT_AHEAD + 1

    def free(self, number: int) -> None:
        keys = self._shared.pop(number)
        self._held -= self._last.pop(number) - len(keys)
        del self._limits[number]
        self._holders.subtract(keys)
        for key in keys:
            if not self._holders[key]:
                del self._holders[key]
                self._held -= 1


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Averages over steps, while requests were waiting. running: sequences. held: tokens of KV, each sequence's own.

    allocated: tokens' worth of memory that sequences hold. total: of the pool.
    """

    running: float
    held: float
    allocated: float
    total: int
    preemptions: int
    steps: int


class FullServer:
    """One pool and a queue that is never empty, until the workload ends: what is measured ends with the queue."""

    def __init__(self, memory: Memory, workload: Workload, rows: int) -> None:
        self._memory = memory
        self._queue: Iterator[StudyRequest] = iter(workload.requests)
        self._waiting: list[tuple[int, StudyRequest, int]] = []  # (number, request, tokens that it had)
        self._numbers = itertools.count()
        self._rows = rows
        self._running: dict[int, tuple[StudyRequest, int]] = {}  # number -> request, tokens less steps at its start
        self._events: list[tuple[int, int]] = []  # (step, number)
        self._now = 0
        self._preemptions = 0

    def run(self, total: int) -> Occupancy:
        sums, base = [0.0, 0.0, 0.0], 0
        while self._admit_all():
            until = self._events[0][0]
            steps = until - self._now
            running = len(self._running)
            base = sum(tokens for _, tokens in self._running.values())
            held = steps * (base + running * self._now) + running * steps * (steps - 1) / 2
            for at, amount in enumerate((running * steps, held, self._memory.allocated * steps)):
                sums[at] += amount
            self._now = until
            self._handle()
        steps = max(1, self._now)
        return Occupancy(sums[0] / steps, sums[1] / steps, sums[2] / steps, total, self._preemptions, self._now)

    def _admit_all(self) -> bool:
        """False once the queue has run out: from then on the server is not full."""
        while len(self._running) < self._rows:
            if not self._waiting:
                request = next(self._queue, None)
                if request is None:
                    return False
                self._waiting.append((next(self._numbers), request, request.asked.prompt_tokens))
            number, request, tokens = self._waiting[-1]
            if not self._memory.admit(number, request):
                break
            if not self._memory.grow(number, tokens):  # one that was preempted comes back with what it had
                self._memory.free(number)
                break
            self._waiting.pop()
            self._running[number] = (request, tokens - self._now)
            self._schedule(number)
        return bool(self._running)

    def _schedule(self, number: int) -> None:
        request, base = self._running[number]
        tokens = base + self._now
        at = request.computed_tokens + 1
        grows = self._memory.next_growth(number, tokens)
        heapq.heappush(self._events, (self._now + max(1, min(at, grows or at) - tokens), number))

    def _handle(self) -> None:
        """Whoever ends or needs a block at this step; the oldest first."""
        while self._events and self._events[0][0] == self._now:
            _, number = heapq.heappop(self._events)
            if number not in self._running:
                continue
            request, base = self._running[number]
            tokens = base + self._now
            if tokens > request.computed_tokens:
                self._memory.free(number)
                del self._running[number]
                continue
            while not self._memory.grow(number, tokens):
                youngest = max(self._running)
                self._preempt(youngest)
                if youngest == number:
                    break
            if number in self._running:
                self._schedule(number)

    def _preempt(self, number: int) -> None:
        request, base = self._running.pop(number)
        self._memory.free(number)
        self._waiting.append((number, request, base + self._now))
        self._waiting.sort(key=lambda each: -each[0])
        self._preemptions += 1


def paged_steps(first: int, last: int, block: int) -> int:
    """Tokens' worth of blocks summed over the steps at which a sequence has first, first + 1, ..., last tokens."""

    def up_to(tokens: int) -> int:
        full, rest = divmod(tokens, block)
        return block * (block * full * (full + 1) // 2 + rest * (full + 1))

    return up_to(last) - up_to(first - 1)
