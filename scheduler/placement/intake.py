"""Requests come in: one becomes a sequence for each of its choices, or is refused. What was begun under another scheduler goes
on as if it had been preempted.

Imports `state` and `limits`.
"""

import math
import zlib

import msgspec
import numpy as np

from kvcache.hashing import hash_blocks
from scheduler.placement.limits import RequestRefused, allowance, queue_room, rest_room
from scheduler.protocol.messages import FinishReason, Had, Request, Resumption
from scheduler.state.cluster import ClusterState
from scheduler.state.resident import ProtocolError
from scheduler.state.sequence import PRIORITY_SHIFT, Sequence, Tokens


def take_in(state: ClusterState, front_end: int, request: Request) -> list[Sequence]:
    """The request's sequences, which are known from now on, and neither wait nor run yet.

    Errors: RequestRefused if it can never fit or the queue is full, ProtocolError if a stream of it is in use; nothing has
    changed then. What is resumed has been admitted once: no queue is too full for it.
    """
    config, params, resumed = state.config, request.params, request.resumption
    prompt = np.frombuffer(request.tokens, np.int32)
    asked = params.max_tokens if request.pooling is None else 0
    longest = state.longest
    if asked is not None or (longest is not None and len(prompt) > longest * config.block_size):
        longest = state.longest_later  # an output without a limit would wait for more than it needs
    model_len = state.resolved.max_model_len
    max_tokens, blocks = allowance(len(prompt), asked, model_len, config.block_size, longest, state.lost)
    at_once = blocks if state.window is None else min(blocks, state.window.most)
    if resumed is None:
        if state.largest is not None and at_once > state.largest:
            rest_room(state.bounds, state.rests_s(at_once), request.deadline_s, state.lost)
        try:
            if state.waiting.count:
                queue_room(state.bounds, state.waiting, request, len(prompt), state.now_s)
        except RequestRefused:
            state.counters.refused += 1
            raise
    _check_streams(state, front_end, request)
    hashes = _hashes(request, prompt, config.block_size)
    arrived_s = state.now_s - (0.0 if resumed is None else max(0.0, resumed.age_s))
    deadline_s = math.inf if request.deadline_s is None else arrived_s + request.deadline_s
    seed = state.random.getrandbits(63) if params.seed is None else params.seed
    sequences: list[Sequence] = []
    for stream, choice in zip(streams_of(request), choices_of(request), strict=True):
        if sequences and params.prompt_logprobs is not None:  # the first choice measures the prompt for all
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        number = next(state.numbers)
        sequence = Sequence(
            number=number, place=(request.priority << PRIORITY_SHIFT) + number, arrived_s=arrived_s,
            front_end=front_end, stream=stream, choice=choice, params=params, seed=seed,
            stop_ids=request.stop_ids, salt=request.salt, prompt_tokens=len(prompt), max_tokens=max_tokens,
            blocks_at_most=blocks, blocks_at_once=at_once, hashes=hashes.copy() if sequences else hashes, buffer=prompt,
            committed=len(prompt),
            tenant=state.waiting.fair.open(request.tenant), deadline_s=deadline_s, pooling=request.pooling,
            adapter=request.adapter,
        )  # fmt: skip
        state.sequences[front_end, stream] = sequence
        sequences.append(sequence)
    if resumed is not None:
        _go_on(sequences[0], resumed)
    known = [_recall(state, sequence, request.had[sequence.choice]) for sequence in sequences] if request.had else [False]
    if resumed is None and not all(known):
        state.counters.requests += 1
        state.counters.prompt_tokens += len(prompt)
    state.counters.resumed += sum(known) if resumed is None else 1
    return sequences


def streams_of(request: Request) -> range:
    """Its stream numbers, one for each sequence."""
    return range(request.stream, request.stream + len(choices_of(request)))


def choices_of(request: Request) -> range:
    """The numbers of its choices, in the order of its streams."""
    resumed = request.resumption
    return range(request.params.n) if resumed is None else range(resumed.choice, resumed.choice + 1)


def end_of(sequence: Sequence) -> FinishReason | None:
    """Why there is nothing left to compute of a sequence that was resumed: its end was lost, or told before, or pools have got
    smaller. What is made of a prompt is made again."""
    if sequence.pooling is not None:
        return None
    output = sequence.committed - sequence.prompt_tokens
    if output and output >= sequence.params.min_tokens and int(sequence.buffer[sequence.committed - 1]) in sequence.stop_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if output >= sequence.max_tokens else None


def _check_streams(state: ClusterState, front_end: int, request: Request) -> None:
    """Errors: ProtocolError."""
    resumed = request.resumption
    if resumed is not None and (not 0 <= resumed.choice < request.params.n or len(resumed.output) % 4):
        raise ProtocolError(f"front end {front_end} cannot resume choice {resumed.choice} with {len(resumed.output)} bytes")
    if request.had and len(request.had) != request.params.n:
        raise ProtocolError(f"front end {front_end} has {len(request.had)} choices of a request for {request.params.n}")
    for stream in streams_of(request):
        if (front_end, stream) in state.sequences:
            raise ProtocolError(f"front end {front_end} submitted stream {stream}, which has not ended")


def _go_on(sequence: Sequence, resumed: Resumption) -> None:
    """As it stood where it was lost. Once it had started its tenant has paid for what there is of it."""
    if resumed.output:
        sequence.append(np.frombuffer(resumed.output, np.int32))
    sequence.preemptions = resumed.restarts
    if resumed.cached_tokens is not None:
        sequence.cached_tokens, sequence.started_s = resumed.cached_tokens, sequence.arrived_s + resumed.queued_s
        sequence.misses = resumed.misses
        sequence.charged = sequence.committed


def _recall(state: ClusterState, sequence: Sequence, had: Had) -> bool:
    """Goes on behind what its client has, if that is still known; its tenant has paid for it. From now on it is this one that
    may be asked for again."""
    fresh = sequence.committed == sequence.prompt_tokens
    state.recall.follow(sequence)
    for past in state.recall.find(sequence) if fresh and had.tokens else ():
        if (group := state.group_of(past)) is not None and past.lease is not None:
            group.write_back(past)
        end = past.prompt_tokens + had.tokens
        output = past.buffer[past.prompt_tokens : end].tobytes()
        if past.cached_tokens is not None and past.committed >= end and zlib.crc32(output) == had.check:
            _go_on(sequence, Resumption(sequence.choice, output, 0.0, 1, past.cached_tokens, 0.0, past.misses))
            state.outbox.started(sequence, output)
            return True
    return False


def _hashes(request: Request, prompt: Tokens, block_size: int) -> list[int]:
    """Of the prompt's full blocks: the front end's, if it brought them."""
    if len(request.hashes) != 8 * (len(prompt) // block_size):
        return hash_blocks(prompt, block_size, request.salt)
    hashes: list[int] = np.frombuffer(request.hashes, np.uint64).tolist()
    return hashes
