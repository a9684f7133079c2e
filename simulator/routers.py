"""What others put in front of independent engines: each request is sent to one of them as it comes, and waits there.

A router sees what its kind can see: nothing, loads, its own memory of what it sent where, a mirror of the engines' indexes
that lags behind, or the indexes themselves. None can reserve. Imports the engines and Manta's own cost formula.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Listing
from typing import NamedTuple

from scheduler.policy import DECODE_WEIGHT, UNCACHED_WEIGHT
from simulator.engines import SimulatedEngine

Hashes = list[int]


Router = Callable[[Listing[SimulatedEngine], Hashes, int, float], int]
"""(engines, hashes, tokens, now_s): which engine takes a prompt of so many tokens whose full blocks have these hashes."""


class EngineLoad(NamedTuple):
    """prefill_tokens: queued or started, not yet computed. sequences: all that have not ended."""

    up: bool
    prefill_tokens: int
    sequences: int

    @classmethod
    def of(cls, engine: SimulatedEngine) -> "EngineLoad":
        core = engine.core
        backlog = sum(group.backlog for group in core.groups.values())
        return cls(bool(engine.groups), core.waiting.tokens + backlog, len(core.sequences))

    @property
    def work(self) -> float:
        """In prefill tokens, as Manta's own routing counts it."""
        return self.prefill_tokens + DECODE_WEIGHT * self.sequences


def cheapest(loads: Listing[EngineLoad], costs: Iterable[float | tuple[float, ...]]) -> int:
    """The engine of the least cost among those that are up; ties go to the first. All are down: the first."""
    candidates = [(cost, at) for at, (load, cost) in enumerate(zip(loads, costs, strict=True)) if load.up]
    return min(candidates)[1] if candidates else 0


def cost(load: EngineLoad, tokens: int, hit: int) -> float:
    """Manta's own formula, as far as a router can know its parts."""
    return UNCACHED_WEIGHT * (tokens - hit) + load.work


def depth(hashes: Hashes, held: Collection[int]) -> int:
    """How many blocks, from the first on, are held."""
    return next((at for at, hash_ in enumerate(hashes) if hash_ not in held), len(hashes))


class RoundRobin:
    """In turn."""

    def __init__(self) -> None:
        self._turn = -1

    def __call__(self, engines: Listing[SimulatedEngine], hashes: Hashes, tokens: int, now_s: float) -> int:  # noqa: ARG002
        for _ in engines:
            self._turn = (self._turn + 1) % len(engines)
            if engines[self._turn].groups:
                break
        return self._turn


def least_load(engines: Listing[SimulatedEngine], hashes: Hashes, tokens: int, now_s: float) -> int:  # noqa: ARG001
    """Least work that is queued or running, known exactly and at once; blind to prefixes."""
    loads = [EngineLoad.of(engine) for engine in engines]
    return cheapest(loads, [load.work for load in loads])


class ApproximateIndex:
    """Remembers what it sent where, as many blocks as a pool has, the least recent forgotten first; loads are exact."""

    def __init__(self, engines: int, blocks: int, block_size: int) -> None:
        self._sent: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(engines)]
        self._blocks = blocks
        self._block_size = block_size

    def __call__(self, engines: Listing[SimulatedEngine], hashes: Hashes, tokens: int, now_s: float) -> int:  # noqa: ARG002
        loads = [EngineLoad.of(engine) for engine in engines]
        hits = [depth(hashes, sent) * self._block_size for sent in self._sent]
        choice = cheapest(loads, [cost(load, tokens, hit) for load, hit in zip(loads, hits, strict=True)])
        sent = self._sent[choice]
        for hash_ in reversed(hashes):  # leaves are older than their parents, hence forgotten first
            sent[hash_] = None
            sent.move_to_end(hash_)
        while len(sent) > self._blocks:
            sent.popitem(last=False)
        return choice


class MirroredIndex:
    """The engines' indexes and loads, copied every `lag_s`; costs added up as Manta does. lag_s 0: never stale."""

    def __init__(self, block_size: int, lag_s: float) -> None:
        self._block_size = block_size
        self._lag_s = lag_s
        self._seen_s = float("-inf")
        self._loads: list[EngineLoad] = []
        self._held: list[Collection[int]] = []

    def __call__(self, engines: Listing[SimulatedEngine], hashes: Hashes, tokens: int, now_s: float) -> int:
        if now_s - self._seen_s >= self._lag_s:
            self._loads = [EngineLoad.of(engine) for engine in engines]
            self._held = [engine.core.table.index.by_hash.keys() for engine in engines]
            if self._lag_s:
                self._held = [frozenset(held) for held in self._held]
            self._seen_s = now_s
        loads = [load._replace(up=bool(engine.groups)) for load, engine in zip(self._loads, engines, strict=True)]
        hits = [depth(hashes, held) * self._block_size for held in self._held]
        return cheapest(loads, [cost(load, tokens, hit) for load, hit in zip(loads, hits, strict=True)])


def longest_prefix(engines: Listing[SimulatedEngine], hashes: Hashes, tokens: int, now_s: float) -> int:  # noqa: ARG001
    """The longest prefix by the engines' own indexes, then the least load."""
    loads = [EngineLoad.of(engine) for engine in engines]
    hits = [depth(hashes, engine.core.table.index.by_hash.keys()) for engine in engines]
    return cheapest(loads, [(-hit, load.work) for hit, load in zip(hits, loads, strict=True)])
