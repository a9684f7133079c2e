"""What crosses the border between front ends and the scheduler, and what is said on both its sides. Frozen wire types, msgpack
arrays; no behaviour. What leaders say and are told: `leaders`.

Token ids travel as little-endian int32 buffers, lease and stream numbers as int64 buffers, so that either side reads
them as one NumPy array without a loop. Imports `SamplingParams` only.

    front end ──Submit, Abort, Stop, Alive──▶ scheduler
    front end ◀───────Deltas, Alive────────── scheduler
"""

import math
from enum import IntEnum
from typing import Literal

import msgspec
from msgspec.structs import astuple

from scheduler.protocol.sampling import SamplingParams

Pooling = Literal["last", "mean", "score"]
"""What is made of a prompt's hidden states, those after the final norm: the last token's; the mean of all; or the scores that
the checkpoint's classifier gives the last token's."""


class Adapter(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A LoRA adapter, as every process that has to do with it is told: nobody has to remember which there are.

    name: the model that clients ask for. version: a digest of its files: what it makes of a prompt is its own. folder: where
    each rank reads them.
    """

    name: str
    version: str
    folder: str


NO_TOKEN = -1
"""In a report's token matrix: this lease sampled nothing in this step (a prefill chunk, or it had finished)."""


class Failure(IntEnum):
    """Whose fault a FAILED end is, so that each door can say it in its own words."""

    FAULT = 0  # Manta's: a lost group that was not replaced, a bug
    IMPOSSIBLE = 1  # the request can never be served as it is
    OVERLOADED = 2  # not now: the queue is full; try again after `retry_after_s`
    UNAVAILABLE = 3  # no group is up or expected, nor tried again soon
    TIMED_OUT = 4  # its deadline has passed


def context_length(most: int, *, output: bool = True) -> str:
    """In the words of OpenAI and vLLM, by which clients that do not read codes (litellm) know what has happened."""
    return f"this model's maximum context length is {most} tokens{', output included' if output else ''}"


class FinishReason(IntEnum):
    """Why a sequence ended. Each ends exactly once."""

    STOP = 0  # a stop id, or a stop string found by the front end; of a prompt that is pooled, its end
    LENGTH = 1  # max_tokens, or no room left in the model or in any pool
    ABORTED = 2  # the client went away
    FAILED = 3  # Manta's fault; `message` says what happened


# ---- both ways --------------------------------------------------------------------------------------------------------------


class Alive(msgspec.Struct, frozen=True, array_like=True, tag=15, gc=False):
    """This process lives: said every `silence.BEAT_S` between front ends and the scheduler, both ways, and by the scheduler to
    leaders, which pass it on to their peers: whoever serves and is served is nobody's orphan (`orphans`)."""


# ---- what both ways tell of a sequence's first start ----------------------------------------------------------------------


class Misses(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Prompt tokens that a first start did not find in its group, by reason; with its cached_tokens they are the prompt.

    routed: another group has them. evicted: were published, and have been evicted since. cold: nobody has computed them, as far
    as is known. inside_block: beyond the last block that a hit can cover whole.
    """

    routed: int = 0
    evicted: int = 0
    cold: int = 0
    inside_block: int = 0

    def __add__(self, other: "Misses") -> "Misses":
        return Misses(*(here + there for here, there in zip(astuple(self), astuple(other), strict=True)))


NO_MISSES = Misses()

# ---- front end -> scheduler ------------------------------------------------------------------------------------------------


class Connect(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """A front end opens its stream; answered by `Welcome`."""


class Resumption(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a front end knows of a choice that it had submitted when it lost the scheduler: it goes on from there.

    choice: its number in its request. output: int32 buffer, every token of it that the front end was told. age_s: since it was
    submitted for the first time. restarts: how often it has been resumed, this time included. cached_tokens, queued_s,
    misses: as `Started` said; None and nothing: it had not started, as far as is known.
    """

    choice: int
    output: bytes
    age_s: float
    restarts: int = 1
    cached_tokens: int | None = None
    queued_s: float = 0.0
    misses: Misses = NO_MISSES


class Had(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a client has of a choice, from an earlier run of the same request: so many tokens, and their CRC-32 (int32)."""

    tokens: int = 0
    check: int = 0


class Request(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One prompt. Its `params.n` choices use the stream numbers stream, stream + 1, ..., chosen by the front end.

    tokens: int32 buffer [prompt_tokens]. hashes: uint64 buffer [full blocks of the prompt], `kvcache.hashing.hash_blocks`.
    stop_ids: ids that end the output, the model's own included unless ignored. salt: isolates tenants in the prefix index.
    priority: lower goes first; equal ones by what their tenants were served, then by age. tenant: on whose account.
    deadline_s: seconds from now within which it must have ended; None: it has the time that it needs.
    resumption: the request is for this one choice alone, under `stream`; its seed, once known, stands in `params`, and
    `deadline_s` counts from when it was first submitted. pooling: it wants no output, but this of its prompt (`Pooled`); it has
    one choice then, and nothing to sample. adapter: with whose weights beside the model's; the salt is its own as well.
    had: of each choice, where the client has come back or may do so: then its tokens are known for a while after its end. Not
    with `prompt_logprobs`, which come before any token.
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
    pooling: Pooling | None = None
    adapter: Adapter | None = None
    had: tuple[Had, ...] = ()


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

# ---- scheduler -> front end ------------------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """block_size in tokens: what `Request.hashes` must be computed with. hung_after_s: of silence, after which the
    scheduler is to be left."""

    block_size: int
    hung_after_s: float = math.inf


class Finished(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The one end of a stream. cached_tokens: prompt tokens that its first start found in the cache, and misses those that it
    did not. tokens: output tokens.

    message, failure: why, if it FAILED. queued_s: from submit to the first start, by the scheduler's clock; the wait for
    its adapter is a part of it. preemptions: how often it had to begin again, as far as this scheduler knows; resumptions
    count.
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
    misses: Misses = NO_MISSES


class Started(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A stream's first start: what another scheduler must be told if this one is lost. Said again if it has had to wait for its
    adapter. seed: the request's, drawn if it brought none. cached_tokens, queued_s, misses: as in `Finished`. output: int32
    buffer, what its client had of it and the scheduler still knew: it goes on behind these, without their log-probabilities."""

    stream: int
    seed: int
    cached_tokens: int
    queued_s: float
    misses: Misses = NO_MISSES
    output: bytes = b""


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


class Pooled(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """What was asked of a prompt as `Request.pooling`: it comes with the report that ends the sequence.

    values: float32 buffer, [hidden] of the model, or [labels] of its classifier.
    """

    values: bytes


Payload = TokenLogprobs | PromptLogprobs | Pooled
"""What the opaque payloads in `Report` and `Deltas` decode to."""
