"""Everything that crosses a process border around the scheduler. Frozen wire types, msgpack arrays; no behaviour.

Token ids travel as little-endian int32 buffers, lease and stream numbers as int64 buffers, so that either side reads
them as one NumPy array without a loop. Imports `kvcache` ids and `SamplingParams` only.

    front end ──Submit, Abort, Stop──▶ scheduler ──Start, Grant, Copy, Send, Receive, ...──▶ leader of a group
    front end ◀────────Deltas───────── scheduler ◀───────────Report, Moved, Beat─────────── leader of a group
"""

import math
from enum import IntEnum
from typing import NewType

import msgspec

from scheduler.protocol.sampling import SamplingParams

LeaseId = NewType("LeaseId", int)
"""One start of one sequence in one group: `serial << ROW_BITS | row`. The serial is never reused, so a restarted sequence
cannot be mistaken for its former self; the row is its place in the group's resident batch, reused once the lease ended."""

ROW_BITS = 16
ROW_MASK = (1 << ROW_BITS) - 1
NO_TOKEN = -1
"""In a report's token matrix: this lease sampled nothing in this step (a prefill chunk, or it had finished)."""


class Failure(IntEnum):
    """Whose fault a FAILED end is, so that each door can say it in its own words."""

    FAULT = 0  # Manta's: a lost group that was not replaced, a bug
    IMPOSSIBLE = 1  # the request can never be served as it is
    OVERLOADED = 2  # not now: the queue is full; try again after `retry_after_s`
    UNAVAILABLE = 3  # no group is up or expected
    TIMED_OUT = 4  # its deadline has passed


class FinishReason(IntEnum):
    """Why a sequence ended. Each ends exactly once."""

    STOP = 0  # a stop id, or a stop string found by the front end
    LENGTH = 1  # max_tokens, or no room left in the model or in any pool
    ABORTED = 2  # the client went away
    FAILED = 3  # Manta's fault; `message` says what happened


# ---- scheduler -> leader: one ordered log for each (group, epoch) ---------------------------------------------------------


class Start(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """Puts a sequence into the resident batch.

    tokens: int32 buffer, prompt and whatever was emitted before a restart. prompt_tokens: how many of them are prompt, so that
    penalties and min/max tokens count the rest as output. cached_tokens: the KV of this many leading tokens stands already in
    `blocks` (less than the number of tokens: the last token is always computed). blocks: int32 buffer of block ids in
    block-table order. stop_ids: ids that end the output. max_tokens: output tokens in all, those before a restart included.
    salt: the request's, so that its leader can say what stands in the blocks (`Inventory`).
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


class Grant(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Extends one lease by whole blocks.

    blocks: block ids in the receiving group's pool, in block-table order.
    Invariant: each block is held by `lease` until the core commits its end; a grant for an ended lease is a no-op.
    """

    lease: LeaseId
    blocks: tuple[int, ...]


class Remap(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """The block at `index` of the lease's block table has a published twin with the same content: use `block` from now on.

    The former block is free for others once this command has been applied; later commands of the log may grant it.
    """

    lease: LeaseId
    index: int
    block: int


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


class Receive(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """The other end of `Send`. blocks: int32 buffer, to be overwritten once the steps launched before this command are done.

    group, epoch: who sends. ports: "host:port" of each of its ranks, where this group's rank of the same number fetches.
    """

    transfer: int
    blocks: bytes
    group: int
    epoch: int
    ports: tuple[str, ...]


class Offload(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False):
    """Blocks are copied to each rank's host memory, off the stream of the steps. blocks, host_blocks: ids, int32 buffers."""

    transfer: int
    blocks: bytes
    host_blocks: bytes


class Load(msgspec.Struct, frozen=True, array_like=True, tag=9, gc=False):
    """Slots of each rank's host memory are copied to blocks, once the steps launched before this command are done."""

    transfer: int
    host_blocks: bytes
    blocks: bytes


class Cut(msgspec.Struct, frozen=True, array_like=True, tag=10, gc=False):
    """That epoch of another group is gone: transfers with it that are under way fail now, each with its `Moved`."""

    group: int
    epoch: int


Movement = Send | Receive | Offload | Load | Cut
"""What runs beside the steps."""

Command = Start | Grant | Remap | Drop | End | Copy | Movement


class Commands(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """A run of the log. first: the number of the first command; numbers count from 0 in each epoch, without a gap."""

    first: int
    commands: tuple[Command, ...]


class Alive(msgspec.Struct, frozen=True, array_like=True, tag=15, gc=False):
    """This process lives: said every `silence.BEAT_S` between front ends and the scheduler, both ways, and by the scheduler to
    leaders, which pass it on to their peers: whoever serves and is served is nobody's orphan (`orphans`)."""


ToLeader = Commands | Alive

# ---- leader -> scheduler ---------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """A group's leader opens its stream. blocks: blocks in the pool. max_num_seqs: sequences that it can hold at once.

    host_blocks: that each rank keeps in host memory for its group; 0: no host tier. ports: "host:port" of each rank, where
    others fetch blocks; empty: it takes no part in transfers. Only groups with equally many ranks exchange blocks.
    inventories: so many of them follow, before anything else: its pool is not empty, since it has served another scheduler.
    life: the epoch in which its ranks were started; None: this one.
    """

    group: int
    epoch: int
    blocks: int
    max_num_seqs: int
    host_blocks: int = 0
    ports: tuple[str, ...] = ()
    inventories: int = 0
    life: int | None = None


class Inventory(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """A part of what stands in a group's pool, or in its host memory (`scheduler.protocol.inventory`): a block before those
    that follow it, the most recently used first, over all parts.

    blocks: int32 [n]. before: int32 [n], the block before each; -1 - i: it is the first of prompts of `salts[i]`. counts: int32
    [n] tokens of each, `tokens` theirs one after another, int32.
    """

    blocks: bytes
    before: bytes
    counts: bytes
    tokens: bytes
    salts: tuple[str, ...] = ()
    host: bool = False


class Report(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """What `steps` consecutive steps with the same leases did. The only way by which tokens and KV become true.

    number: counts reports of this epoch from 0, without a gap. applied: commands applied so far.
    leases: int64 [n]. computed: int32 [n], tokens whose KV was written; empty means one a step for each lease.
    tokens: int32 [steps, n], sampled ids, NO_TOKEN where none. finished: leases that the leader ended, with the reason.
    logprobs: (lease, opaque payload) for the leases that asked for them, passed on to the front end unread.
    elapsed_s: duration of the steps.
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


FromLeader = Report | Moved | Beat

# ---- front end -> scheduler ------------------------------------------------------------------------------------------------


class Connect(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """A front end opens its stream; answered by `Welcome`."""


class Resumption(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a front end knows of a choice that it had submitted when it lost the scheduler: it goes on from there.

    choice: its number in its request. output: int32 buffer, every token of it that the front end was told. age_s: since it was
    submitted for the first time. restarts: how often it has been resumed, this time included. cached_tokens, queued_s: as
    `Started` said; None and 0: it had not started, as far as is known.
    """

    choice: int
    output: bytes
    age_s: float
    restarts: int = 1
    cached_tokens: int | None = None
    queued_s: float = 0.0


class Request(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One prompt. Its `params.n` choices use the stream numbers stream, stream + 1, ..., chosen by the front end.

    tokens: int32 buffer [prompt_tokens]. hashes: uint64 buffer [full blocks of the prompt], `kvcache.hashing.hash_blocks`.
    stop_ids: ids that end the output, the model's own included unless ignored. salt: isolates tenants in the prefix index.
    priority: lower goes first; equal ones by what their tenants were served, then by age. tenant: on whose account.
    deadline_s: seconds from now within which it must have ended; None: it has the time that it needs.
    resumption: the request is for this one choice alone, under `stream`; its seed, once known, stands in `params`, and
    `deadline_s` counts from when it was first submitted.
    """

    stream: int
    tokens: bytes
    hashes: bytes
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    salt: str = ""
    priority: int = 0
    tenant: str = ""
    deadline_s: float | None = None
    resumption: Resumption | None = None


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=11, gc=False):
    """All that a front end has to submit at this moment."""

    requests: tuple[Request, ...]


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=12, gc=False):
    """The clients of these streams went away."""

    streams: tuple[int, ...]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=13, gc=False):
    """The front end found a stop string: the output ends after `keep_tokens` tokens."""

    stream: int
    keep_tokens: int


class TalliedMetric(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A counter or a histogram, or an increment of one. labels: (name, value) pairs, sorted.

    buckets: how many observations fell into each of the metric's buckets, the one beyond the last bound included; empty for
    a counter. total: sum of the observations, or the counter's value.
    """

    name: str
    labels: tuple[tuple[str, str], ...]
    buckets: tuple[int, ...]
    total: float


class Tally(msgspec.Struct, frozen=True, array_like=True, tag=14, gc=False):
    """What a front end has observed since its last tally; the scheduler adds it up, so metrics outlive their front end."""

    metrics: tuple[TalliedMetric, ...]


FromFrontEnd = Submit | Abort | Stop | Tally | Alive
Opening = Hello | Connect

# ---- scheduler -> front end ------------------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """block_size in tokens: what `Request.hashes` must be computed with. hung_after_s: of silence, after which the
    scheduler is to be left."""

    block_size: int
    hung_after_s: float = math.inf


class Finished(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The one end of a stream. cached_tokens: prompt tokens that its first start found in the cache. tokens: output tokens.

    message, failure: why, if it FAILED. queued_s: from submit to the first start, by the scheduler's clock.
    preemptions: how often it had to begin again, as far as this scheduler knows; resumptions count.
    """

    stream: int
    reason: FinishReason
    cached_tokens: int
    tokens: int
    message: str = ""
    failure: Failure = Failure.FAULT
    retry_after_s: float = 0.0
    queued_s: float = 0.0
    preemptions: int = 0


class Started(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A stream's first start: what another scheduler must be told if this one is lost. seed: the request's, drawn if it brought
    none. cached_tokens, queued_s: as in `Finished`."""

    stream: int
    seed: int
    cached_tokens: int
    queued_s: float


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """What one scheduler event means for one front end, in commit order.

    streams: int64 [n]. tokens: int32 [steps, n], NO_TOKEN where none. finished come after the tokens.
    positions: int32 [n]; each stream had `positions[i] + advanced` tokens before these, its prompt included. Who has heard
    fewer has missed some, and must not go on. The buffer stays the same while the same streams decode: it costs nothing.
    started: streams that have started since the last deltas; each comes with or before its first token.
    """

    streams: bytes
    tokens: bytes
    finished: tuple[Finished, ...] = ()
    logprobs: tuple[tuple[int, bytes], ...] = ()
    positions: bytes = b""
    advanced: int = 0
    started: tuple[Started, ...] = ()


ToFrontEnd = Deltas | Alive
"""After the `Welcome`."""

# ---- leader -> front end, inside `logprobs` --------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """Log-probabilities of one sampled token.

    logprob: the sampled token's. top_ids, top_logprobs: as many as were asked for, most likely first, ties by lowest id.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Log-probabilities of the prompt's tokens from position `first` on (at least 1: nothing predicts the first token).

    They come with the chunks that computed them, in order; after a restart they may come again, with the same positions.
    """

    first: int
    tokens: tuple[TokenLogprobs, ...]


Payload = TokenLogprobs | PromptLogprobs
"""What the opaque payloads in `Report` and `Deltas` decode to."""
