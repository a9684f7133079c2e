"""What crosses the border between the leaders of groups and the scheduler. Frozen wire types, msgpack arrays; no behaviour.

Buffers are as in `messages`. Imports that and `SamplingParams`.

    scheduler ──Start, Grant, Copy, Send, Receive, ..., Alive──▶ leader of a group
    scheduler ◀──────Report, Moved, Beat, Refused, Adapts─────── leader of a group
"""

from typing import NewType

import msgspec

from scheduler.protocol.messages import Adapter, Alive, Pooling
from scheduler.protocol.sampling import SamplingParams

LeaseId = NewType("LeaseId", int)
"""One start of one sequence in one group: `serial << ROW_BITS | row`. The serial is never reused, so a restarted sequence
cannot be mistaken for its former self; the row is its place in the group's resident batch, reused once the lease ended."""

ROW_BITS = 16
ROW_MASK = (1 << ROW_BITS) - 1

# ---- scheduler -> leader: one ordered log for each (group, epoch) ---------------------------------------------------------


class Start(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """Puts a sequence into the resident batch.

    tokens: int32 buffer, prompt and whatever was emitted before a restart. prompt_tokens: how many of them are prompt, so that
    penalties and min/max tokens count the rest as output. cached_tokens: the KV of this many leading tokens stands already in
    `blocks` (less than the number of tokens: the last token is always computed). blocks: int32 buffer of block ids in
    block-table order, from block `first` on: those before it are seen by no layer. stop_ids: ids that end the output.
    max_tokens: output tokens in all, those before a restart included.
    narrow: int32 buffer, where there are narrow layers: the blocks of theirs, from block `narrow_first` on.
    salt: the request's, so that its leader can say what stands in the blocks (`Inventory`). pooling: as in `Request`; it ends
    once its prompt is computed, and samples nothing. adapter: as in `Request`; its rows wait where it is not resident yet.
    """

    lease: LeaseId
    tokens: bytes
    prompt_tokens: int
    cached_tokens: int
    blocks: bytes
    params: SamplingParams
    seed: int
    choice: int
    stop_ids: tuple[int, ...]
    max_tokens: int
    salt: str = ""
    pooling: Pooling | None = None
    first: int = 0
    adapter: Adapter | None = None
    narrow: bytes = b""
    narrow_first: int = 0


class Grant(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Extends one lease by whole blocks.

    blocks: block ids in the receiving group's pool, in block-table order. narrow: of narrow layers, in theirs.
    Invariant: each block is held by `lease` until the core commits its end; a grant for an ended lease is a no-op.
    """

    lease: LeaseId
    blocks: tuple[int, ...]
    narrow: tuple[int, ...] = ()


class Remap(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """The block at `index` of the lease's block table has a published twin with the same content: use `block` from now on.

    The former block is free for others once this command has been applied; later commands of the log may grant it. narrow: it
    is one of narrow layers, here and in the commands below.
    """

    lease: LeaseId
    index: int
    block: int
    narrow: bool = False


class Drop(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """The lease has ended (preempted, aborted, or stopped by the front end). Forget it; its blocks may be granted again."""

    lease: LeaseId


class End(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """The log of this epoch is closed: leave the step loop tidily. reason: for the worker's log."""

    reason: str


class Copy(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """The first `tokens` slots of block `target` get the KV of those of block `source`: copy on write.

    On the stream of the steps, in the order of the log: after every step launched before it and before every later one, so
    `source` may be granted again at once. It comes before the `Start` of the lease whose block `target` is.
    """

    source: int
    target: int
    tokens: int
    narrow: bool = False


class Send(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """Whole blocks go to the same ranks of another group; each rank sends its shard, off the stream of the steps.

    transfer: the same number as in the other group's `Receive`; never reused. blocks: int32 buffer of ids, in the order in
    which they are received. group, epoch: who receives. Each side answers with one `Moved`; until the scheduler has it, the
    blocks are held there: nobody overwrites them.
    """

    transfer: int
    blocks: bytes
    group: int
    epoch: int
    narrow: bool = False


class Receive(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """The other end of `Send`. blocks: int32 buffer, to be overwritten once the steps launched before this command are done.

    group, epoch: who sends. ports: "host:port" of each of its ranks, where this group's rank of the same number fetches.
    """

    transfer: int
    blocks: bytes
    group: int
    epoch: int
    ports: tuple[str, ...]
    narrow: bool = False


class Offload(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False):
    """Blocks are copied to each rank's host memory, off the stream of the steps. blocks, host_blocks: ids, int32 buffers."""

    transfer: int
    blocks: bytes
    host_blocks: bytes
    narrow: bool = False


class Load(msgspec.Struct, frozen=True, array_like=True, tag=9, gc=False):
    """Slots of each rank's host memory are copied to blocks, once the steps launched before this command are done."""

    transfer: int
    host_blocks: bytes
    blocks: bytes
    narrow: bool = False


class Cut(msgspec.Struct, frozen=True, array_like=True, tag=10, gc=False):
    """That epoch of another group is gone: transfers with it that are under way fail now, each with its `Moved`."""

    group: int
    epoch: int


class Adapted(msgspec.Struct, frozen=True, array_like=True, tag=11, gc=False):
    """Said by a leader to all ranks of its group, itself included, and no part of the log: that reading of an adapter is over
    on every one of them. load: its number (`workers.loop.adapters`). failure: why one of them could not; "" where all could."""

    load: int
    failure: str = ""


Movement = Send | Receive | Offload | Load | Cut
"""What runs beside the steps."""

class Trim(msgspec.Struct, frozen=True, array_like=True, tag=12, gc=False):
    """The blocks of the lease's block table before `first` are seen by none of its layers any more, and are full. They may be
    granted to others once this command has been applied; their places in the table are not read again."""

    lease: LeaseId
    first: int
    narrow: bool = False


Command = Start | Grant | Remap | Drop | End | Copy | Adapted | Movement | Trim


class Commands(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """A run of the log. first: the number of the first command; numbers count from 0 in each epoch, without a gap."""

    first: int
    commands: tuple[Command, ...]


ToLeader = Commands | Alive

# ---- leader -> scheduler ---------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """A group's leader opens its stream. blocks: blocks in the pool. max_num_seqs: sequences that it can hold at once.

    host_blocks: that each rank keeps in host memory for its group; 0: no host tier. ports: "host:port" of each rank, where
    others fetch blocks; empty: it takes no part in transfers. Only groups with equally many ranks exchange blocks.
    inventories: so many of them follow, before anything else: its pool is not empty, since it has served another scheduler.
    life: the epoch in which its ranks were started; None: this one. narrow_blocks, host_narrow_blocks: of narrow layers.
    """

    group: int
    epoch: int
    blocks: int
    max_num_seqs: int
    host_blocks: int = 0
    ports: tuple[str, ...] = ()
    inventories: int = 0
    life: int | None = None
    narrow_blocks: int = 0
    host_narrow_blocks: int = 0


class Inventory(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """A part of what stands in a group's pool, or in its host memory (`scheduler.protocol.inventory`): a block before those
    that follow it, the most recently used first, over all parts.

    blocks: int32 [n]. before: int32 [n], the block before each; -1 - i: it is the first of prompts of `salts[i]`. counts: int32
    [n] tokens of each, `tokens` theirs one after another, int32. narrow: of the blocks of narrow layers, after all others;
    `before` is the full block of the group's pool beside which each stands, whose tokens are theirs.
    """

    blocks: bytes
    before: bytes
    counts: bytes
    tokens: bytes
    salts: tuple[str, ...] = ()
    host: bool = False
    narrow: bool = False


class ExpertLoad(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Of a model with experts: layers: those that have any. tokens: int64 [layers, experts], how many each expert has had since
    the group came up."""

    layers: tuple[int, ...]
    tokens: bytes

    @property
    def whole(self) -> bool:
        """As many numbers of each layer."""
        return bool(self.layers and self.tokens) and not len(self.tokens) % (8 * len(self.layers))


class Report(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """What `steps` consecutive steps with the same leases did. The only way by which tokens and KV become true.

    number: counts reports of this epoch from 0, without a gap. applied: commands applied so far.
    leases: int64 [n]. computed: int32 [n], tokens whose KV was written; empty means one a step for each lease.
    tokens: int32 [steps, n], sampled ids, NO_TOKEN where none. finished: leases that the leader ended, with the reason.
    logprobs: (lease, opaque payload) for the leases that asked for them, passed on to the front end unread.
    elapsed_s: duration of the steps. expert_load: told every few seconds, as it stood some steps ago.
    """

    epoch: int
    number: int
    applied: int
    steps: int
    leases: bytes
    computed: bytes
    tokens: bytes
    finished: tuple[tuple[int, int], ...] = ()
    logprobs: tuple[tuple[int, bytes], ...] = ()
    elapsed_s: float = 0.0
    expert_load: ExpertLoad | None = None


class Moved(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """A `Send`, `Receive`, `Offload` or `Load` is over on every rank of the group. Sent when it is, between reports.

    ok: all blocks have arrived; otherwise what stands in them is arbitrary, and `message` says why. elapsed_s: from the first
    byte to the last on the slowest rank. bytes: of all ranks.
    """

    epoch: int
    transfer: int
    ok: bool
    elapsed_s: float = 0.0
    bytes: int = 0
    message: str = ""


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """The rank lives: said every `silence.BEAT_S` by a thread beside the step loop, by peers to their leader, by it to the
    scheduler.

    busy_s: how long the leader's loop has been in its present step; 0 between steps. patience_s: what such a step may take
    (`workers.loop.pulse`). silent_rank: the peer that has said nothing for longest, for `silent_s`.
    """

    epoch: int
    busy_s: float = 0.0
    patience_s: float = 0.0
    silent_rank: int = 0
    silent_s: float = 0.0


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """These leases cannot be served, since their adapter could not be read. They hold what they hold until they are dropped."""

    epoch: int
    leases: tuple[int, ...]
    message: str


class Adapts(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """These leases have had to wait for their adapter, for the first time: it is resident now, and they go on."""

    epoch: int
    leases: tuple[int, ...]


FromLeader = Report | Moved | Beat | Refused | Adapts
