"""One choice of one request, from submit to its one end. Mutated by the core alone.

Imports `kvcache`, `leaders` and `SamplingParams`.
"""

import math
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from kvcache.hashing import hash_blocks, hash_run, salt_seed
from kvcache.ids import GroupId
from kvcache.table import SequenceBlocks
from scheduler.protocol.leaders import LeaseId
from scheduler.protocol.messages import NO_MISSES, Adapter, Misses, Pooling
from scheduler.protocol.sampling import SamplingParams

Tokens = npt.NDArray[np.int32]

PRIORITY_SHIFT = 48
"""Arrivals that fit between two priorities."""


SUSPECT_DEATHS = 2

OUTPUT_WEIGHT = 2.0
"""What an output token counts against a computed prompt token where tenants are compared: as in the paper (see `fairness`)."""


@dataclass(slots=True, eq=False)
class Tenant:
    """On whose account sequences run. served: the counter of `fairness`, in prompt tokens. live: its sequences.

    Kept by the queue: stays: those without blocks. queue: those whose turn may come, by place. listed: it is in the heap of
    counters. head: its valid entry in the heap of heads; all others of it are void.
    """

    name: str = ""
    number: int = 0
    served: float = 0.0
    live: int = 0
    stays: int = 0
    queue: list[tuple[int, int, "Sequence"]] = field(default_factory=list)
    listed: bool = False
    head: "Head | None" = None


Head = tuple[int, float, int, int, Tenant]
"""Priority, counter and place of a tenant's first sequence; a number that breaks ties; the tenant."""


class State(Enum):
    """WAITING → RUNNING → ENDED; a preemption or a lost group leads back to WAITING.

    DEFERRED: the prefix that it shares is being computed by a running sequence; back to WAITING when that is published.
    FETCHING: between WAITING and RUNNING; its blocks are reserved, and a part of its prefix is on its way to them.
    """

    WAITING = "waiting"
    DEFERRED = "deferred"
    FETCHING = "fetching"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """Identity and settings never change (but an open max_tokens, when pools get smaller); the rest follows the state.

    number: counts arrivals. place: in the order of service, by priority (lower first), then by arrival; a restart keeps it.
    arrived_s, started_s: by the shell's clock; the first start counts, once its adapter is resident there.
    blocks_at_most: blocks that the whole life can need, prompt and max_tokens - 1 (the last token's KV is never written).
    blocks_at_once: those of them that it holds at the same time; fewer only where the model sees a window (`Window.most`).
    buffer: prompt and output; the first `committed` are written back, the newest ones of who runs are in the group's ring.
    hashes: chained hashes of the full blocks of `committed`, as far as they are known.
    pooling: what is wanted of its prompt instead of an output; max_tokens is 0 then. adapter: as in `Request`.
    cached_tokens: what its first start found in the cache; None before that. misses: what it did not find there.
    lease: None unless RUNNING. blocks: None unless RUNNING or FETCHING; narrow: likewise, where there are narrow layers.
    open_key: under which `Prefixes` finds it.
    tenant: whose it is; charged: tokens that its counter has had of it, 0 before the first start.
    deadline_s: by the same clock as arrived_s.
    brought: False once a window that was to be brought to it has not arrived: it starts without, then.
    kept: its client may come back for its tokens (`Recall`).
    deaths: the groups that have died while it ran there, each with its life, since it had last come further; proven: the length
    at which it has; bereaved_s: when the last one died; wary: it waits until it is known which groups live (`Suspects`).

    Of the present wait, kept by `waiting`: entered_s, when it began; ticket: under which it is queued, 0: it is not; aged: it
    has waited so long that it goes before others; passed_s: when it was the first and found no room, for the first time;
    needs: blocks that it cannot do without, as of the last try; tried: the `rooms` of then.
    """

    number: int
    place: int
    arrived_s: float
    front_end: int
    stream: int
    choice: int
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    salt: str
    prompt_tokens: int
    max_tokens: int
    blocks_at_most: int
    blocks_at_once: int
    hashes: list[int]
    buffer: Tokens
    committed: int
    pooling: Pooling | None = None
    adapter: Adapter | None = None
    state: State = State.WAITING
    cached_tokens: int | None = None
    misses: Misses = NO_MISSES
    started_s: float = 0.0
    preemptions: int = 0
    lease: LeaseId | None = None
    row: int = -1
    blocks: SequenceBlocks | None = None
    narrow: SequenceBlocks | None = None
    open_key: int | None = None
    tenant: Tenant = field(default_factory=Tenant)
    charged: int = 0
    deadline_s: float = math.inf
    brought: bool = True
    kept: bool = False
    deaths: tuple[tuple[GroupId, int], ...] = ()
    proven: int = 0
    bereaved_s: float = -math.inf
    wary: bool = False
    entered_s: float = 0.0
    ticket: int = 0
    aged: bool = False
    passed_s: float | None = None
    needs: int = 0
    tried: int = -1

    def __lt__(self, other: "Sequence") -> bool:
        """Who is served first: a total order that never changes, so that somebody always is the first."""
        return self.place < other.place

    @property
    def tables(self) -> tuple[SequenceBlocks, ...]:
        """All that it holds, once it has blocks: of each kind of layer."""
        assert self.blocks is not None
        return (self.blocks,) if self.narrow is None else (self.blocks, self.narrow)

    @property
    def priority(self) -> int:
        return self.place >> PRIORITY_SHIFT

    @property
    def suspect(self) -> bool:
        """It ran in each of several groups that died: it runs alone or not at all."""
        return len(self.deaths) >= SUSPECT_DEATHS

    @property
    def apart(self) -> bool:
        """It waits for something else than its turn."""
        return self.suspect or self.wary

    def append(self, tokens: Tokens) -> None:
        """Writes committed tokens back. Amortised O(1) a token."""
        end = self.committed + len(tokens)
        if end > len(self.buffer):
            grown = np.empty(2 * end, np.int32)
            grown[: self.committed] = self.buffer[: self.committed]
            self.buffer = grown
        self.buffer[self.committed : end] = tokens
        self.committed = end

    def charge(self, length: int) -> None:
        """Its tenant has been served its output up to `length` tokens of prompt and output; nothing before the first start.

        What a front end cuts off afterwards is not given back: counters only grow.
        """
        if 0 < self.charged < length:
            self.tenant.served += OUTPUT_WEIGHT * (length - self.charged)
            self.charged = length

    def hash_block(self, block: bytes) -> None:
        """Hashes the block after those that have been hashed: its tokens, int32."""
        self.hashes.append(hash_run(block, self.hashes[-1] if self.hashes else salt_seed(self.salt)))

    def hash_up_to(self, blocks: int, block_size: int) -> None:
        """Hashes full blocks up to `blocks`, more than are hashed: each once in the sequence's life."""
        known = len(self.hashes)
        new = self.buffer[known * block_size : blocks * block_size]
        self.hashes += hash_blocks(new, block_size, self.salt, parent=self.hashes[-1] if known else None)
