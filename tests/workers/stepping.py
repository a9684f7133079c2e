"""One rank, built as a worker builds it and stepped by hand: rows and blocks come from a scheduler of a few lines.

Imports the workers and the wire types. No engine, no threads: a turn is a turn, and what it did is known at once.
"""

import contextlib
import random
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cluster.config import EngineConfig
from cluster.resolve import resolve
from scheduler.protocol.leaders import ROW_BITS, ROW_MASK, Command, Copy, Drop, Grant, LeaseId, Remap, Start
from scheduler.protocol.messages import NO_TOKEN, Adapter, FinishReason, Payload, Pooled, Pooling, PromptLogprobs, TokenLogprobs
from scheduler.protocol.sampling import SamplingParams
from workers.loop.adapters import GatheredReads
from workers.loop.rank import Rank, StepResult
from workers.model.reading import read_model
from workers.parallel.communicator import JoinedGroup
from workers.parallel.in_process import Solo
from workers.process.build import build_rank

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 64, "max_model_len": 256,
    "kv_memory": 1 << 28, "threads": 1,
}  # fmt: skip
PATIENCE_S = 120.0
AHEAD = 3
"""Free slots below which a lease gets another block: a step is under way, and one follows."""


@dataclass(frozen=True)
class Work:
    """One prompt and how to go on from it."""

    prompt: list[int]
    params: SamplingParams
    seed: int = 0
    pooling: Pooling | None = None
    adapter: Adapter | None = None

    @property
    def most(self) -> int:
        if self.pooling is not None:
            return 0
        assert self.params.max_tokens is not None
        return self.params.max_tokens


@dataclass(eq=False)
class Lease:
    """What has become of a `Work`. blocks: granted, in block-table order."""

    work: Work
    id: LeaseId
    blocks: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: npt.NDArray[np.float32] | None = None
    finish: FinishReason | None = None

    @property
    def row(self) -> int:
        return self.id & ROW_MASK

    @property
    def computed(self) -> int:
        """Tokens whose KV has been written once it has reached its length: the last one is never fed back."""
        return len(self.work.prompt) + len(self.tokens) - 1


class Stepped:
    """A `Rank` with whoever grants it rows and blocks. depth: steps under way while the next is planned.

    options: of `EngineConfig`, over `OPTIONS`. Blocks are granted in an order that is drawn once, one by one as needed.
    comm: of a rank among several, each of which is stepped alike.
    """

    def __init__(
        self, checkpoint: Path, *, device: str, depth: int = 1, comm: JoinedGroup | None = None, **options: Any
    ) -> None:
        self.config = config = EngineConfig(model=str(checkpoint), local=True, device=device, **OPTIONS | options)
        self.resolved = resolve(config, device)
        self.built = build_rank(config, self.resolved, comm or Solo())
        self.rank = Rank(self.built.rank.batch, self.built.rank.executor, depth)
        self.rank.adapters = self.built.rank.adapters
        self._reads, self._read = GatheredReads(1), threading.Event()
        self._reads.wake = self._read.set
        if self.rank.adapters is not None:
            self.rank.adapters.on_read = self._reads.add
        self.pool = self.built.pool
        self.block = self.config.block_size
        self.turns = 0
        self._ends = read_model(checkpoint).eos_ids
        order = list(range(self.built.sizes.blocks))
        random.Random(1).shuffle(order)
        self.free_blocks = deque(order)
        self.free_rows = deque(range(self.config.max_num_seqs))
        self.leases: dict[LeaseId, Lease] = {}
        self._holders: Counter[int] = Counter()  # of each block
        self._commands: list[Command] = []
        self._serial = 0

    def beside(self, blocks: Sequence[int]) -> list[int]:
        """Of narrow layers those that go with these, where there are any: the same from the end of their pool on."""
        sizes = self.built.sizes
        if self.built.narrow is None:
            return []
        assert sizes.narrow == sizes.blocks, "each has one"
        return [sizes.narrow - 1 - block for block in blocks]

    # ---- what a scheduler says

    def start(self, work: Work, *, output: Sequence[int] = (), cached: int = 0, own: Sequence[int] | None = None) -> Lease:
        """Puts it into the batch with the next turn. output: emitted before a restart. own: another lease's, or taken from
        `free_blocks` by the caller, in which the KV of `cached` tokens stands already."""
        tokens = [*work.prompt, *output]
        blocks = list(own) if own is not None else []
        blocks += [self.free_blocks.popleft() for _ in range(self._blocks_for(len(tokens)) - len(blocks))]
        self._holders.update(blocks)
        self._serial += 1
        lease = Lease(work, LeaseId(self._serial << ROW_BITS | self.free_rows.popleft()), blocks, list(output))
        self.leases[lease.id] = lease
        params = work.params
        self._commands.append(
            Start(
                lease=lease.id,
                tokens=np.array(tokens, np.int32).tobytes(),
                prompt_tokens=len(work.prompt),
                cached_tokens=cached,
                blocks=np.array(blocks, np.int32).tobytes(),
                params=params,
                seed=work.seed,
                choice=0,
                stop_ids=(*params.stop_token_ids, *(() if params.ignore_eos else self._ends)),
                max_tokens=work.most,
                pooling=work.pooling,
                adapter=work.adapter,
                narrow=np.array(self.beside(blocks), np.int32).tobytes(),
            )
        )
        return lease

    def say(self, *commands: Command) -> None:
        """With the next turn."""
        self._commands += commands

    def drop(self, lease: Lease) -> None:
        """With the next turn; its row and its blocks may be granted again in the same one."""
        self._commands.append(Drop(lease.id))
        self._give_back(lease)

    def remap(self, lease: Lease, index: int) -> int:
        """With the next turn a twin of a block takes its place. Returns the former block, which is free again at once."""
        twin, former = self.free_blocks.popleft(), lease.blocks[index]
        self._commands += [Copy(former, twin, self.block), Remap(lease.id, index, twin)]
        for source, target in zip(self.beside([former]), self.beside([twin]), strict=True):
            self._commands += [Copy(source, target, self.block, narrow=True), Remap(lease.id, index, target, narrow=True)]
        lease.blocks[index] = twin
        self._holders[twin] += 1
        self._release(former)
        return former

    def drop_all(self) -> None:
        """Whatever a test has left behind."""
        for lease in list(self.leases.values()):
            self.drop(lease)
        self.run()

    # ---- steps

    def turn(self) -> StepResult | None:
        self._grant()
        commands, self._commands = [*self._commands, *self._reads.take()], []
        result = self.rank.turn(commands)
        self.turns += 1
        if result is not None:
            self._take(result)
        return result

    def run(self) -> None:
        """Until there is nothing left to do."""
        while self._commands or self.leases or not self.rank.idle:
            self._read.clear()
            self.turn()
            if self.leases and self.rank.idle and self.rank.batch.unready:
                assert self._read.wait(PATIENCE_S), "an adapter is never read"
            else:
                assert self._commands or not (self.leases and self.rank.idle), "somebody has no block and gets none"

    def generate(self, works: Iterable[Work]) -> list[Lease]:
        """All of them, as many at once as there are rows."""
        left, leases = deque(works), []
        while left:
            while left and self.free_rows:
                leases.append(self.start(left.popleft()))
            self.turn()
        self.run()
        return leases

    def prefill(self, leases: Iterable[Lease]) -> None:
        """Until each has its first token."""
        while not all(lease.tokens for lease in leases):
            self.turn()

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, decodes are launched one by one, as with `cuda_graphs=False`."""
        runner: Any = self.rank.executor
        kept = runner._whole, runner._unsampled, runner._prefills, runner._adapted
        runner._whole = runner._unsampled = runner._prefills = runner._adapted = None
        try:
            yield
        finally:
            runner._whole, runner._unsampled, runner._prefills, runner._adapted = kept

    def close(self) -> None:
        self.rank.close()

    # ---- inside

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def _grant(self) -> None:
        batch = self.rank.batch
        for lease in self.leases.values():
            known = int(batch.known[lease.row]) if batch.holds(lease.id) else len(lease.work.prompt) + len(lease.tokens)
            wanted = min(known + AHEAD, len(lease.work.prompt) + lease.work.most)
            missing = self._blocks_for(wanted) - len(lease.blocks)
            if missing > 0:
                blocks = [self.free_blocks.popleft() for _ in range(missing)]
                self._holders.update(blocks)
                lease.blocks += blocks
                self._commands.append(Grant(lease.id, tuple(blocks), tuple(self.beside(blocks))))

    def _take(self, result: StepResult) -> None:
        step = result.step
        for index, payload in result.tokens.logprobs:
            self._note(int(step.leases[index]), msgspec.msgpack.decode(payload, type=Payload))
        for index in np.flatnonzero(result.live & step.samples).tolist():
            token = int(result.tokens.ids[index])
            if token != NO_TOKEN:
                self.leases[LeaseId(int(step.leases[index]))].tokens.append(token)
        for index, reason in result.finished:
            lease = self.leases[LeaseId(int(step.leases[index]))]
            lease.finish = reason
            self._give_back(lease)

    def _note(self, name: int, payload: Payload) -> None:
        lease = self.leases.get(LeaseId(name))
        if lease is None:
            return
        if isinstance(payload, PromptLogprobs):
            assert payload.first == 1 + len(lease.prompt_logprobs), "parts come in order, without a gap"
            lease.prompt_logprobs += payload.tokens
        elif isinstance(payload, Pooled):
            assert lease.pooled is None, "a prompt is pooled once"
            lease.pooled = np.frombuffer(payload.values, np.float32)
        else:
            lease.logprobs.append(payload)

    def _give_back(self, lease: Lease) -> None:
        """Whoever comes next gets them."""
        del self.leases[lease.id]
        self.free_rows.appendleft(lease.row)
        for block in reversed(lease.blocks):
            self._release(block)

    def _release(self, block: int) -> None:
        self._holders[block] -= 1
        if not self._holders[block]:
            self.free_blocks.appendleft(block)
