"""A cluster in a test: the production core, simulated groups, and front ends that check every token as it comes in.

Commands travel down and reports travel up only when the test says so, in order, through the wire encoding. The
simulated blocks hold digests of what was written to them, so a stale block, a wrong hit or a lost write shows as a wrong
token.
"""

import zlib
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import structs

from kvcache.ids import GroupId, host_of, is_narrow, narrow_of
from scheduler.config.core import CoreConfig, QueueBounds, Resolved
from scheduler.core import SchedulerCore
from scheduler.placement.limits import RequestRefused
from scheduler.protocol.inventory import beside_of, blocks_of
from scheduler.protocol.leaders import (
    Command,
    Commands,
    Cut,
    Inventory,
    Load,
    Moved,
    Offload,
    Receive,
    Report,
    Send,
    Start,
    Trim,
)
from scheduler.protocol.messages import (
    NO_MISSES,
    Deltas,
    Finished,
    FinishReason,
    Had,
    Payload,
    Pooled,
    Pooling,
    Request,
    Resumption,
    Started,
)
from scheduler.protocol.sampling import SamplingParams
from scheduler.protocol.silence import BEAT_S
from scheduler.state.sequence import Sequence
from scheduler.state.window import Window
from tests.shared.simulated import UNWRITTEN, SimulatedExecutor, continuation, digests, pooled
from workers.loop.batch import ResidentBatch
from workers.loop.leader import abandon
from workers.loop.ledger import Ledger, inventory
from workers.loop.rank import Rank
from workers.loop.reports import Reporter

VOCABULARY = 2
NARROW_BLOCKS = 5
LOST = "its workers have gone"


@dataclass
class Stream:
    """One choice as its front end sees it. request: as it was submitted, at submitted_s. expected: the undisturbed output, as
    long as it may get without a stop. started: what was said of its first start."""

    front_end: int
    number: int
    prompt: list[int]
    request: Request
    submitted_s: float
    expected: list[int]
    window: int | None = None
    narrow: int | None = None
    tokens: list[int] = field(default_factory=list)
    started: Started | None = None
    restarts: int = 0
    finished: Finished | None = None
    stop_after: int | None = None
    aborted: bool = False
    pooled: bytes | None = None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.request.stop_ids

    def start(self, started: Started) -> None:
        assert self.started is None, f"stream {self.number} started for the first time twice"
        self.started = started
        if started.output:
            assert not self.tokens, f"stream {self.number} goes on from what it has already"
            had = self.request.had[self.number - self.request.stream]
            assert len(started.output) == 4 * had.tokens, f"stream {self.number} goes on from another place"
            self.receive(np.frombuffer(started.output, np.int32).tolist())

    def receive(self, tokens: list[int]) -> None:
        assert self.finished is None, f"stream {self.number} got tokens after its end"
        assert self.started is not None, f"stream {self.number} got tokens before it was said to start"
        self.tokens += tokens
        assert self.tokens == self.expected[: len(self.tokens)], f"stream {self.number} is not the undisturbed output"

    def take_pooled(self, values: bytes) -> None:
        assert self.finished is None, f"stream {self.number} was pooled after its end"
        assert self.request.pooling is not None, f"stream {self.number} was pooled unasked"
        expected = pooled(self.prompt, self.request.pooling, self.window, self.narrow)
        assert values == expected, f"stream {self.number} was pooled from other states"
        self.pooled = values

    def end(self, finished: Finished) -> None:
        """The end must be the one that the output calls for."""
        assert self.finished is None, f"stream {self.number} ended twice"
        self.finished = finished
        if finished.reason is FinishReason.LENGTH:
            limit = self.params.max_tokens
            assert limit is None or len(self.tokens) == limit
            assert self.request.pooling is None
        elif finished.reason is FinishReason.STOP and self.stop_after is None and self.request.pooling is not None:
            assert (self.pooled is not None, self.tokens) == (True, [])
        elif finished.reason is FinishReason.STOP and self.stop_after is None:
            assert self.tokens[-1] in self.stop_ids
            assert len(self.tokens) >= self.params.min_tokens
        elif finished.reason is FinishReason.ABORTED:
            assert self.aborted
        assert finished.tokens == (len(self.tokens) if self.stop_after is None else self.stop_after)
        early = range(max(0, self.params.min_tokens - 1), len(self.tokens) - 1)
        assert not any(self.tokens[at] in self.stop_ids for at in early), f"stream {self.number} ran past a stop id"


class NoPeers:
    def send(self, commands: Listing[Command], held: Listing[int]) -> None:
        """To nobody."""


class SimulatedGroup:
    """One epoch of a group: its leader, and what is on its way to and from it."""

    def __init__(self, group: GroupId, epoch: int, rank: Rank, reporter: Reporter, host_blocks: int) -> None:
        self.group = group
        self.epoch = self.life = epoch
        self.rank = rank
        self.reporter = reporter
        self.issued = 0
        self.down: deque[Command] = deque()
        self.inbox: deque[Command] = deque()
        self.up: deque[Report | Moved] = deque()
        self.sends: dict[int, Send] = {}
        self.receives: dict[int, Receive] = {}
        self.copies: dict[int, Offload | Load] = {}
        self.hosts = [np.full((host_blocks, cache.shape[1]), UNWRITTEN) for cache in self.caches]

    def take(self, batch: Commands) -> None:
        """Puts newly issued commands on their way; their numbers have no gap."""
        assert batch.first == self.issued
        self.issued += len(batch.commands)
        self.down += msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Commands).commands

    def deliver(self, count: int | None = None) -> None:
        """The next commands arrive at the leader; None: all."""
        for _ in range(len(self.down) if count is None else min(count, len(self.down))):
            self.inbox.append(self.down.popleft())

    def turn(self) -> None:
        """One turn of the leader's loop, with the commands that have arrived. Checks that no step leaves its lease."""
        commands = list(self.inbox)
        self.inbox.clear()
        result = self.rank.turn(commands)
        for command in commands:
            self._take_movement(command)
        batch = self.rank.batch
        assert (batch.computed <= np.maximum(batch.granted, 0) + (batch.known >= batch.limit)).all()
        if result is not None:
            self.reporter.add(result, batch.applied)
        for report in self.reporter.take(flush=self.rank.idle):
            self.up.append(msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=Report))

    def abandon(self) -> None:
        """Its scheduler has gone: commands that have not arrived never will, and what is on its way stops half-way."""
        self.down.clear()
        self.inbox.clear()
        for receive in self.receives.values():
            self.caches[receive.narrow][np.frombuffer(receive.blocks, np.int32)] = UNWRITTEN
        for copy in self.copies.values():
            if isinstance(copy, Load):
                self.caches[copy.narrow][np.frombuffer(copy.blocks, np.int32)] = UNWRITTEN
            else:
                self.hosts[copy.narrow][np.frombuffer(copy.host_blocks, np.int32)] = UNWRITTEN
        abandon(self.rank, NoPeers())
        assert self.rank.ledger is not None
        self.rank.ledger.forget_transfers()

    @property
    def caches(self) -> list[npt.NDArray[np.uint64]]:
        """Of each kind of layer."""
        executor = self.rank.executor
        assert isinstance(executor, SimulatedExecutor)
        return executor.caches

    def answer(self, transfer: int, *, ok: bool) -> None:
        """This side of a transfer is over."""
        self.sends.pop(transfer, None)
        self.copies.pop(transfer, None)
        receive = self.receives.pop(transfer, None)
        if receive is not None and not ok:
            self.caches[receive.narrow][np.frombuffer(receive.blocks, np.int32)] = UNWRITTEN  # arbitrary
        moved = Moved(self.epoch, transfer, ok, 0.001, 1)
        if self.rank.ledger is not None:
            self.rank.ledger.moved(moved)
        self.up.append(msgspec.msgpack.decode(msgspec.msgpack.encode(moved), type=Moved))

    def copy(self, transfer: int) -> None:
        """Between the device and host memory, at this moment."""
        command = self.copies[transfer]
        blocks, host_blocks = np.frombuffer(command.blocks, np.int32), np.frombuffer(command.host_blocks, np.int32)
        host, cache = self.hosts[command.narrow], self.caches[command.narrow]
        if isinstance(command, Offload):
            host[host_blocks] = cache[blocks]
        else:
            cache[blocks] = host[host_blocks]

    def _take_movement(self, command: Command) -> None:
        if isinstance(command, Send):
            self.sends[command.transfer] = command
        elif isinstance(command, Receive):
            self.receives[command.transfer] = command
        elif isinstance(command, Offload | Load):
            self.copies[command.transfer] = command
        elif isinstance(command, Cut):
            gone = (command.group, command.epoch)
            under_way: list[Send | Receive] = [*self.sends.values(), *self.receives.values()]
            for movement in under_way:
                if (movement.group, movement.epoch) == gone:
                    self.answer(movement.transfer, ok=False)


class Cluster:
    """block_size and pools (blocks of each group) are small, so that everything happens soon.

    depth and steps are those of `Rank` and `Reporter`. hash_stride: 0, whole blocks only, unless a test is about parts of them.
    window: tokens that the simulated model sees; None: all. narrow: those that narrow layers beside others see; None: there are
    none. Their pools have as many blocks, or what a sequence needs. beats: groups say by `beat` that they live.
    """

    def __init__(
        self,
        pools: tuple[int, ...] = (8,),
        *,
        block_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 64,
        depth: int = 0,
        steps: int = 1,
        grant_ahead: int | None = None,
        hash_stride: int = 0,
        enable_prefix_caching: bool = True,
        wait_for_prefix: bool = True,
        max_model_len: int = 256,
        bounds: QueueBounds | None = None,
        fetch: bool = False,
        host_blocks: int = 0,
        queue_skip_s: float = 2.0,
        queue_age_s: float = 30.0,
        log_decisions: bool = False,
        window: int | None = None,
        narrow: int | None = None,
        beats: bool = False,
    ) -> None:
        ahead = 2 * (steps + depth) if grant_ahead is None else grant_ahead
        config = CoreConfig(
            block_size=block_size,
            hash_stride=hash_stride,
            enable_prefix_caching=enable_prefix_caching,
            wait_for_prefix=wait_for_prefix,
            seed=0,
            queue_skip_s=queue_skip_s,
            queue_age_s=queue_age_s,
            log_decisions=log_decisions,
        )
        prefill_ahead = (depth + 2) * max_num_batched_tokens
        self.window, self.narrow, self.beats = window, narrow, beats
        resolved = Resolved(max_model_len, ahead, window, prefill_ahead, narrow)
        needed = Window.of_narrow(resolved, block_size)
        self._narrow_blocks = 0 if needed is None else max(needed.most, NARROW_BLOCKS)
        self._new_core = partial(SchedulerCore, config, resolved, bounds)
        self.core = self._new_core()
        self.block_size, self.pools = block_size, pools
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.depth, self.steps, self.max_model_len = depth, steps, max_model_len
        self._ports = ("here:1",) if fetch else ()
        self._host_blocks = host_blocks
        self.groups: dict[GroupId, SimulatedGroup] = {}
        self.ghosts: list[SimulatedGroup] = []
        self.streams: dict[tuple[int, int], Stream] = {}
        self.epochs = [0] * len(pools)
        self._numbers = 0
        self.given_back = self.begun_in_the_midst = 0  # commands that say so
        for group in range(len(pools)):
            self.bring_up(group)

    # ---- groups

    def bring_up(self, group: int) -> None:
        """A new epoch of the group, with empty blocks. The one before, if it still runs, is a ghost from now on."""
        name, epoch, blocks = GroupId(group), self.epochs[group], self.pools[group]
        self.epochs[group] += 1
        if name in self.groups:
            self.ghosts.append(self.groups.pop(name))
        batch = ResidentBatch(
            self.max_num_seqs, self.block_size, self.max_num_batched_tokens, self.max_model_len, narrow=self.narrow is not None
        )
        executor = SimulatedExecutor(
            blocks, self.block_size, self.max_num_seqs, VOCABULARY, self.window, self.narrow, self._narrow_blocks
        )
        rank, reporter = Rank(batch, executor, self.depth), Reporter(epoch, self.steps)
        rank.ledger = Ledger(batch, blocks, self._host_blocks, self._narrow_blocks)
        self.groups[name] = SimulatedGroup(name, epoch, rank, reporter, self._host_blocks)
        self.core.group_up(
            name, epoch, blocks, self.max_num_seqs, host_blocks=self._host_blocks, ports=self._ports,
            narrow_blocks=self._narrow_blocks, host_narrow_blocks=self._host_blocks,
            beats=self.beats,
        )  # fmt: skip
        self.settle()

    def lose(self, group: int, *, returning: bool = False, back_s: float | None = None) -> None:
        if GroupId(group) in self.groups:
            self.ghosts.append(self.groups.pop(GroupId(group)))
        self.core.group_down(GroupId(group), LOST, returning=returning, back_s=back_s)
        self.settle()

    def lose_scheduler(self, staying: Iterable[int] = ()) -> int:
        """The scheduler dies with all that it knows, and with the streams under way; another comes up. `staying` groups come to
        it and say what stands in their pools, the others have gone as well. Returns the blocks that were told."""
        now_s, self.core = self.core.now_s, self._new_core()
        self.core.now_s = now_s
        self.streams = {key: stream for key, stream in self.streams.items() if stream.finished is not None}
        self.ghosts.clear()
        before, self.groups = self.groups, {}
        told = 0
        for group in staying:
            told += self._rejoin(before[GroupId(group)])
        return told

    def cut(self, group: int) -> None:
        """The connection to a group ends, and its ranks come back over another."""
        before = self.groups.pop(GroupId(group))
        self.core.group_down(before.group, LOST, returning=True)
        self.settle()
        self._rejoin(before)

    def _rejoin(self, before: SimulatedGroup) -> int:
        name, rank, epoch, blocks = before.group, before.rank, self.epochs[before.group], self.pools[before.group]
        self.epochs[name] += 1
        before.abandon()
        assert rank.ledger is not None
        sent = [msgspec.msgpack.encode(part) for part in inventory(rank.ledger, 40)]
        told = [msgspec.msgpack.decode(part, type=Inventory) for part in sent]
        self.groups[name] = group = SimulatedGroup(name, epoch, rank, Reporter(epoch, self.steps), self._host_blocks)
        group.hosts, group.life = before.hosts, before.life
        self.core.group_up(
            name, epoch, blocks, self.max_num_seqs, host_blocks=self._host_blocks, ports=self._ports,
            standing=blocks_of(told), host_standing=blocks_of(told, host=True), life=before.life,
            narrow_blocks=self._narrow_blocks, host_narrow_blocks=self._host_blocks, narrow_standing=beside_of(told),
            beats=self.beats,
        )  # fmt: skip
        self.settle()
        return sum(len(part.blocks) // 4 for part in told)

    def drain(self, group: int, *, returning: bool = False) -> bool:
        drained = self.core.drain(GroupId(group), returning=returning)
        self.settle()
        return drained

    def migrate(self, stream: Stream) -> bool:
        began = self.core.migrate(stream.front_end, stream.number)
        self.settle()
        return began

    def vacate(self, group: int) -> None:
        self.core.vacate(GroupId(group))
        self.settle()

    def haunt(self, ghost: SimulatedGroup) -> None:
        """A stopped worker goes on: it steps, and its reports arrive, under its old epoch."""
        ghost.deliver()
        ghost.turn()
        while ghost.up:
            self._hear_from(ghost.group, ghost.up.popleft())

    # ---- front ends

    def submit(
        self,
        prompt: list[int],
        *,
        front_end: int = 0,
        stop_ids: tuple[int, ...] = (),
        salt: str = "",
        n: int = 1,
        max_tokens: int | None = 8,
        min_tokens: int = 0,
        priority: int = 0,
        prompt_logprobs: int | None = None,
        tenant: str = "",
        deadline_s: float | None = None,
        pooling: Pooling | None = None,
        kept: bool = False,
        seed: int | None = None,
    ) -> list[Stream]:
        """kept: the client may come back. Errors: RequestRefused, ProtocolError; nothing has changed then, and the invariants
        are checked all the same."""
        params = SamplingParams(
            n=n, max_tokens=max_tokens, min_tokens=min_tokens, prompt_logprobs=prompt_logprobs, seed=seed
        )
        room = max_tokens or max(self.max_model_len, max(self.pools) * self.block_size + 1) - len(prompt)
        expected = continuation(prompt, max(0, room), VOCABULARY, self.window, self.narrow)
        tokens = np.array(prompt, np.int32).tobytes()
        had = (Had(),) * n if kept else ()
        request = Request(0, tokens, b"", params, stop_ids, salt, priority, tenant, deadline_s, pooling=pooling, had=had)
        return self._submit(front_end, request, prompt, expected)

    def come_back(self, streams: Listing[Stream], tokens: Listing[int], front_end: int = 0) -> list[Stream]:
        """The client of a request's streams asks for it again, wherever they are by now, with so many tokens of each.
        Errors: as `submit`."""
        one = next(stream for stream in streams if stream.started is not None)
        assert one.started is not None
        heard = [np.array(stream.tokens[:count], np.int32) for stream, count in zip(streams, tokens, strict=True)]
        had = tuple(Had(len(each), zlib.crc32(each.tobytes())) for each in heard)
        request = structs.replace(one.request, params=structs.replace(one.params, seed=one.started.seed), had=had)
        return self._submit(front_end, request, one.prompt, one.expected)

    def _submit(self, front_end: int, request: Request, prompt: list[int], expected: list[int]) -> list[Stream]:
        n = request.params.n
        first, self._numbers = self._numbers, self._numbers + n
        request = structs.replace(request, stream=first)
        try:
            self.core.submit(front_end, request)
        finally:
            self.core.check()
        now_s = self.core.now_s
        streams = [
            Stream(front_end, first + choice, prompt, request, now_s, expected, self.window, self.narrow) for choice in range(n)
        ]
        self.streams |= {(front_end, stream.number): stream for stream in streams}
        self.settle()
        return streams

    def abort(self, stream: Stream) -> None:
        stream.aborted = stream.aborted or stream.finished is None
        self.core.abort(stream.front_end, stream.number)
        self.settle()

    def end(self, stream: Stream, keep_tokens: int) -> None:
        if stream.finished is None:
            stream.stop_after = min(keep_tokens, len(stream.tokens))
        self.core.end(stream.front_end, stream.number, keep_tokens)
        self.settle()

    def front_end_down(self, front_end: int) -> None:
        self.core.front_end_down(front_end)
        for key in [key for key in self.streams if key[0] == front_end and self.streams[key].finished is None]:
            del self.streams[key]
        self.settle()

    def reconnect(self, front_end: int, unheard: int = 0) -> list[Stream]:
        """Its connection is cut: it goes on over another. unheard: tokens of each stream that were on their way to it; where
        nothing was heard, its start was not either. Returns those that are not taken in again: no group is large enough now."""
        lost = [stream for (owner, _), stream in self.streams.items() if owner == front_end and stream.finished is None]
        self.core.front_end_down(front_end)
        self.settle()
        refused = []
        for stream in lost:
            stream.tokens = stream.tokens[: max(0, len(stream.tokens) - unheard)]
            stream.restarts += 1
            if not stream.tokens and unheard:
                stream.started = None
            try:
                self.core.submit(front_end, self.resumption(stream))
            except RequestRefused:
                refused.append(stream)
                del self.streams[front_end, stream.number]
            finally:
                self.core.check()
            self.settle()
        return refused

    def resumption(self, stream: Stream) -> Request:
        """What its front end asks of a scheduler that knows nothing of it."""
        seed, cached, queued_s, misses = None, None, 0.0, NO_MISSES
        if (started := stream.started) is not None:
            seed, cached, queued_s, misses = started.seed, started.cached_tokens, started.queued_s, started.misses
        output, choice = np.array(stream.tokens, np.int32).tobytes(), stream.number - stream.request.stream
        age_s = self.core.now_s - stream.submitted_s
        return structs.replace(
            stream.request, stream=stream.number, params=structs.replace(stream.params, seed=seed),
            resumption=Resumption(choice, output, age_s, stream.restarts, cached, queued_s, misses),
        )  # fmt: skip

    # ---- events

    def wait(self, seconds: float) -> None:
        """Time passes; what is late is noticed with the next event."""
        self.core.now_s += seconds

    def beat(self, *groups: int) -> None:
        """These say that they are whole now; none named: all."""
        for group in groups or tuple(self.groups):
            self.core.lives(GroupId(group), self.groups[GroupId(group)].epoch, self.core.now_s)
            self.settle()

    def deliver(self, group: int = 0, count: int | None = None) -> None:
        self.groups[GroupId(group)].deliver(count)

    def turn(self, group: int = 0) -> None:
        self.groups[GroupId(group)].turn()

    def arrive(self, group: int = 0, count: int | None = None) -> None:
        """The next reports of the group arrive at the scheduler; None: all."""
        reports = self.groups[GroupId(group)].up
        for _ in range(len(reports) if count is None else min(count, len(reports))):
            self._hear_from(GroupId(group), reports.popleft())

    def _hear_from(self, group: GroupId, said: Report | Moved) -> None:
        if isinstance(said, Moved):
            self.core.moved(group, said)
        else:
            self.core.report(group, said)
        self.settle()

    def moves(self) -> list[int]:
        """Transfers that both sides have begun."""
        sent = {number for group in self.groups.values() for number in group.sends}
        both = [number for group in self.groups.values() for number in group.receives if number in sent]
        return sorted([*both, *(number for group in self.groups.values() for number in group.copies)])

    def move(self, transfer: int, *, ok: bool = True) -> None:
        """The blocks of a transfer cross, at this moment; or they do not. Both sides know of it and have not said so yet."""
        for group in self.groups.values():
            if transfer in group.copies:
                if ok:
                    group.copy(transfer)
                group.answer(transfer, ok=ok)
                return
        source = next(group for group in self.groups.values() if transfer in group.sends)
        target = next(group for group in self.groups.values() if transfer in group.receives)
        blocks = np.frombuffer(source.sends[transfer].blocks, np.int32)
        if ok:
            received = target.receives[transfer]
            target.caches[received.narrow][np.frombuffer(received.blocks, np.int32)] = source.caches[received.narrow][blocks]
        source.answer(transfer, ok=ok)
        target.answer(transfer, ok=ok)

    def step(self, *groups: int, times: int = 1) -> None:
        """Commands down, a turn, reports up, in each of the groups; none named: in all, and what can move moves."""
        for _ in range(times):
            for transfer in () if groups else self.moves():
                self.move(transfer)
            for group in groups or tuple(self.groups):
                self.deliver(group)
                self.turn(group)
                self.arrive(group)

    def settle(self) -> None:
        """What follows from every event: the invariants hold, the logs travel, the front ends are told."""
        self.core.check()
        self._check_blocks()
        for name, batch in self.core.take_logs():
            self.groups[name].take(batch)
            self.given_back += sum(isinstance(command, Trim) for command in batch.commands)
            starts = [command for command in batch.commands if isinstance(command, Start)]
            self.begun_in_the_midst += sum(start.first > 0 or start.narrow_first > 0 for start in starts)
        assert all(group.drain() is None for group in self.core.groups.values()), "a log was not handed out"
        for front_end, deltas in self.core.outbox.drain():
            self._hear(front_end, msgspec.msgpack.decode(msgspec.msgpack.encode(deltas), type=Deltas))

    def _check_blocks(self) -> None:
        """What the index names stands in the blocks of the groups that hold it: the digests of exactly those tokens."""
        index = self.core.table.index
        pools = {name: group.caches for name, group in self.groups.items()}
        pools |= {host_of(name): group.hosts for name, group in self.groups.items()}
        caches = {name: caches[0] for name, caches in pools.items()}
        caches |= {narrow_of(name): caches[1] for name, caches in pools.items() if self.narrow is not None}
        states: dict[bool, dict[int, list[int]]] = {False: {}, True: {}}
        for name, cache in caches.items():
            narrow = is_narrow(name)
            for node, block in index.blocks.get(name, {}).items():
                expected = self._expected(node, states[narrow], self.narrow if narrow else self.window)
                found = cache[block, : len(expected)].tolist()
                assert found == expected, f"pool {name}: node {node} does not stand in block {block}"

    def _expected(self, node: int, known: dict[int, list[int]], window: int | None) -> list[int]:
        """Digests of the tokens of a node. known: those of all tokens up to each node that has been asked for."""
        index, chain = self.core.table.index, list[int]()
        while node and node not in known:
            chain.append(node)
            node = index.parents[node]
        for below in reversed(chain):
            before = known.get(index.parents[below], [])
            known[below] = before + digests(np.frombuffer(index.contents[below], np.int32).tolist(), before, window)
        node = chain[0] if chain else node
        return known[node][len(known[node]) - len(index.contents[node]) // 4 :]

    def _hear(self, front_end: int, deltas: Deltas) -> None:
        for started in deltas.started:
            self.streams[front_end, started.stream].start(started)
        numbers = np.frombuffer(deltas.streams, np.int64).tolist()
        if numbers:
            columns = np.frombuffer(deltas.tokens, np.int32).reshape(-1, len(numbers)).T.tolist()
            positions = (np.frombuffer(deltas.positions, np.int32) + deltas.advanced).tolist()
            for number, position, column in zip(numbers, positions, columns, strict=True):
                stream = self.streams[front_end, number]
                assert position == len(stream.prompt) + len(stream.tokens), "nothing is missing before these tokens"
                sampled = [token for token in column if token >= 0]
                if sampled:
                    stream.receive(sampled)
        for number, payload in deltas.logprobs:
            said = msgspec.msgpack.decode(payload, type=Payload)
            if isinstance(said, Pooled):
                self.streams[front_end, number].take_pooled(said.values)
        for finished in deltas.finished:
            self.streams[front_end, finished.stream].end(finished)

    # ---- the end

    def run(self, limit: int = 2_000) -> None:
        """Steps until every sequence has ended, which must not take more than `limit` rounds; then nothing is held."""
        rounds = 0
        while self.core.sequences:
            self.step()
            if self.beats:
                self.wait(BEAT_S)
                self.beat()
            rounds += 1
            assert rounds < limit, f"no end in sight: {list(self.core.sequences.values())}"
        self.step(times=2 + self.depth)
        assert all(stream.finished is not None for stream in self.streams.values())
        assert not self.core.prefixes.waiters
        for name, group in self.core.groups.items():
            usage = self.core.table.pools[name]
            assert usage.held == 0
            assert self.narrow is None or self.core.table.pools[narrow_of(name)].held == 0
            assert usage.free + usage.cached == usage.total == self.pools[name]
            assert not group.running
            assert group.backlog == 0
            assert (self.groups[name].rank.batch.lease == -1).all()
        assert not self.core.transfers.under_way()

    # ---- what tests ask

    def sequence(self, stream: Stream) -> Sequence:
        """The live sequence behind a stream."""
        return self.core.sequences[stream.front_end, stream.number]

    def fits(self, tokens: int) -> bool:
        """Whether a sequence whose KV is so many tokens can be served by some group that is up, expected or rests."""
        core = self.core
        rests = [rest.blocks for rest in core.resting.values()]
        largest = max([*core.expected.values(), *rests, *(group.blocks for group in core.groups.values())], default=0)
        window = Window.of(core.resolved, self.block_size)
        blocks = -(-tokens // self.block_size)
        return tokens < self.max_model_len and (blocks if window is None else min(blocks, window.most)) <= largest

    def held(self, group: int = 0) -> int:
        return self.core.table.pools[GroupId(group)].held

    def cached_tokens(self, stream: Stream) -> int:
        assert stream.finished is not None
        return stream.finished.cached_tokens

    def reason(self, stream: Stream) -> FinishReason:
        assert stream.finished is not None
        return stream.finished.reason


def filled(*values: int, block_size: int = 4) -> list[int]:
    """A prompt of full blocks, each of one repeated token: few distinct ones, hence many hits."""
    return [value for value in values for _ in range(block_size)]
