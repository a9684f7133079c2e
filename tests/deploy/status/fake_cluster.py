"""A cluster that only exists as its status: pools that fill, share, cache and evict, in virtual time, from a seed.

For tests of what people look at, and for looking at it: `python -m tests.deploy.status.serving`.
"""

import math
import random
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import msgspec

from cluster.config import EngineConfig
from cluster.engine import Engine, EngineError, OnDeltas, OnFailure
from deploy.observing.tally import TPOT, TTFT
from scheduler.server.stats import ClusterStatus, EngineStats, GroupStart, GroupStats, PoolMap
from scheduler.server.tallies import Tallies
from scheduler.state.counters import Counters
from tests.deploy.frontend.fake_engine import FakeEngine

BLOCK = 256
STEP_S = 0.03
PREFIXES, PREFIX_BLOCKS = 12, 24


@dataclass
class Sequence:
    blocks: list[int]
    tokens_left: int


@dataclass
class FakePool:
    """One group: blocks by reference count, the cached ones in LRU order, the rest as `GroupStats` has it."""

    size: int
    chance: random.Random
    holders: list[int] = field(default_factory=list)
    free: deque[int] = field(default_factory=deque)
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)
    prefixes: dict[int, list[int]] = field(default_factory=dict)
    running: list[Sequence] = field(default_factory=list)
    evictions: int = 0
    steps: int = 0
    step_tokens: int = 0
    draining: bool = False
    up: bool = True

    def __post_init__(self) -> None:
        self.holders = [0] * self.size
        self.free = deque(range(self.size))

    def take(self) -> int | None:
        if self.free:
            block = self.free.popleft()
        elif self.cached:
            block = self.cached.popitem(last=False)[0]
            self.evictions += 1
            self.prefixes = {name: blocks for name, blocks in self.prefixes.items() if block not in blocks}
        else:
            return None
        self.holders[block] = 1
        return block

    def pin(self, block: int) -> None:
        self.cached.pop(block, None)
        self.holders[block] += 1

    def release(self, block: int) -> None:
        self.holders[block] -= 1
        if not self.holders[block]:
            self.cached[block] = None

    def states(self) -> bytes:
        states = bytearray(min(count, 2) for count in self.holders)
        for block in self.cached:
            states[block] = 3
        return bytes(states)


class FakeCluster:
    """A `Cluster`. load: sequences that each group would like to run. Time passes in `advance`, or by the clock if `live`.

    down: `status` fails, as if nothing could be reached. `restart` begins a new epoch with empty pools.
    """

    def __init__(self, groups: int = 4, blocks: int = 2000, load: float = 40.0, live: bool = False, seed: int = 0) -> None:
        self.sizes = [blocks] * groups
        self.load = load
        self.epoch = 0
        self.down = False
        self.phase: str | None = None
        self.progress: tuple[str, ...] = ()
        self.starting: tuple[GroupStart, ...] = ()
        self.experts: dict[int, tuple[float, int]] = {}  # of each layer the imbalance, and the busiest
        self.status_calls = self.map_calls = 0
        self._on_failure: OnFailure = lambda _: None
        self._chance = random.Random(seed)
        self._clock = time.monotonic if live else None
        self._begin()

    def _begin(self) -> None:
        self.pools = [FakePool(size, self._chance) for size in self.sizes]
        self.counters = Counters()
        self.tallies = Tallies()
        self.uptime_s = self.busy_s = 0.0
        self.waiting = self.preempted = 0
        self._last_s = self._clock() if self._clock else 0.0

    def restart(self) -> None:
        """The scheduler goes and comes back: streams end, the epoch counts up, everything is counted anew."""
        self.epoch += 1
        self._begin()
        self._on_failure("the scheduler has gone")

    def connect(self, on_deltas: OnDeltas, on_failure: OnFailure) -> Engine:
        if self.down:
            raise EngineError("no scheduler")
        self._on_failure = on_failure
        return FakeEngine([5] * 8).start(EngineConfig(model="fake", local=True), on_deltas, on_failure, lambda _: None)

    async def status(self, maps: bool = False) -> ClusterStatus:
        self.status_calls += 1
        self.map_calls += maps
        if self.down:
            raise ConnectionError("the scheduler does not answer")
        if self._clock is not None:
            now_s = self._clock()
            self.advance(now_s - self._last_s)
            self._last_s = now_s
        up = [pool for pool in self.pools if pool.up]
        return ClusterStatus(
            phase=self.phase or ("ready" if up else "degraded"),
            model="/models/Qwen3-8B",
            block_size=BLOCK,
            epoch=self.epoch,
            progress=self.progress,
            starting=self.starting,
            engine=None if self.phase == "starting" else self._engine(),
            maps=tuple(PoolMap(n, pool.states()) for n, pool in enumerate(self.pools) if pool.up) if maps else (),
            tallies=self.tallies.snapshot(),
            uptime_s=self.uptime_s,
            busy_s=self.busy_s,
            front_ends=2,
            target_groups=len(self.pools),
        )

    def _engine(self) -> EngineStats:
        return EngineStats(
            groups=tuple(self._group(number, pool) for number, pool in enumerate(self.pools)),
            waiting=self.waiting,
            preempted=self.preempted,
            waiting_tokens=self.waiting * 900,
            oldest_wait_s=0.03 * self.waiting,
            **msgspec.structs.asdict(self.counters),
        )

    def _group(self, number: int, pool: FakePool) -> GroupStats:
        if not pool.up:
            return GroupStats(number, False, pool.size, 0, 0, 0, 0)
        free, cached = len(pool.free), len(pool.cached)
        return GroupStats(
            group=number,
            up=True,
            total_blocks=pool.size,
            free_blocks=free,
            held_blocks=pool.size - free - cached,
            cached_blocks=cached,
            running=len(pool.running),
            epoch=self.epoch,
            shared_blocks=sum(count > 1 for count in pool.holders),
            draining=pool.draining,
            backlog_tokens=self._chance.randrange(4) * 512,
            evictions=pool.evictions,
            steps=pool.steps,
            step_s=pool.steps * STEP_S,
            step_tokens=pool.step_tokens,
            expert_layers=tuple(self.experts),
            expert_imbalance=tuple(imbalance for imbalance, _ in self.experts.values()),
            expert_busiest=tuple(busiest for _, busiest in self.experts.values()),
        )

    # ---- time

    def advance(self, seconds: float) -> None:
        """Sequences start, grow and end, as many as so much time allows."""
        self.uptime_s += seconds
        steps = int(seconds / STEP_S)
        self.busy_s += seconds * min(0.8, 0.02 * len(self.pools))
        tide = 0.75 + 0.25 * math.sin(self.uptime_s / 17.0)
        self.waiting = self.preempted = 0
        for pool in self.pools:
            if pool.up:
                self._run(pool, steps, tide)

    def _run(self, pool: FakePool, steps: int, tide: float) -> None:
        for sequence in pool.running.copy():
            tokens = min(steps, sequence.tokens_left)
            sequence.tokens_left -= tokens
            self.counters.output_tokens += tokens
            pool.step_tokens += tokens
            if sequence.tokens_left <= 0:
                self._end(pool, sequence)
            elif self._chance.random() < tokens / BLOCK and (block := pool.take()) is not None:
                sequence.blocks.append(block)
        pool.steps += steps if pool.running else 0
        wanted = int(self.load * tide * self._chance.uniform(0.8, 1.2))
        while len(pool.running) < wanted and self._start(pool):
            pass
        short = max(0, wanted - len(pool.running))
        self.waiting += short
        self.preempted += short // 5

    def _start(self, pool: FakePool) -> bool:
        room = len(pool.free) + len(pool.cached)
        prefix, own = self._chance.randrange(PREFIXES), self._chance.randrange(2, 160)
        if own + PREFIX_BLOCKS > room or pool.draining:
            return False
        shared = pool.prefixes.get(prefix, [])
        for block in shared:
            pool.pin(block)
        taken = [pool.take() for _ in range(own)]
        blocks = shared + [block for block in taken if block is not None]
        pool.prefixes.setdefault(prefix, blocks[: min(PREFIX_BLOCKS, len(blocks))])
        pool.running.append(Sequence(blocks, self._chance.randrange(60, 900)))
        prompt, cached = len(blocks) * BLOCK, len(shared) * BLOCK
        pool.step_tokens += prompt - cached
        counters = self.counters
        counters.requests += 1
        counters.prompt_tokens += prompt
        counters.started_tokens += prompt
        counters.cached_tokens += cached
        missed = prompt - cached
        counters.miss_inside_block += min(missed, 90)
        counters.miss_routed += (missed - min(missed, 90)) // 9
        counters.miss_evicted += (missed - min(missed, 90)) // 4
        counters.miss_cold = (
            counters.started_tokens - counters.cached_tokens - counters.miss_inside_block - counters.miss_routed
            - counters.miss_evicted
        )  # fmt: skip
        return True

    def _end(self, pool: FakePool, sequence: Sequence) -> None:
        pool.running.remove(sequence)
        for block in reversed(sequence.blocks):
            pool.release(block)
        self.counters.finished += 1
        chance = self._chance.lognormvariate
        self.tallies.add([TTFT.observe(chance(-2.4, 0.7)), TPOT.observe(chance(-3.5, 0.25))])
