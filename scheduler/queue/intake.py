"""Requests come in: one becomes a sequence for each of its choices, or is refused.

Imports `state`, `limits` and `sequence`.
"""

import math

import msgspec
import numpy as np

from kvcache.hashing import hash_blocks
from scheduler.protocol.messages import Request
from scheduler.queue.limits import RequestRefused, blocks_for, output_limit, queue_room
from scheduler.running.resident import ProtocolError
from scheduler.sequence import PRIORITY_SHIFT, Sequence, Tokens
from scheduler.state import ClusterState


def take_in(state: ClusterState, front_end: int, request: Request) -> list[Sequence]:
    """The request's sequences, which are known from now on, and neither wait nor run yet.

    Errors: RequestRefused if it can never fit or the queue is full, ProtocolError if a stream of it is in use; nothing has
    changed then.
    """
    config, params = state.config, request.params
    prompt = np.frombuffer(request.tokens, np.int32)
    max_tokens = output_limit(
        len(prompt), params.max_tokens, state.resolved.max_model_len, config.block_size, state.largest, state.lost,
        state.back_at_s - state.now_s,
    )  # fmt: skip
    try:
        queue_room(state.bounds, state.waiting, request, len(prompt), state.now_s)
    except RequestRefused:
        state.counters.refused += 1
        raise
    for choice in range(params.n):
        if (front_end, request.stream + choice) in state.sequences:
            raise ProtocolError(f"front end {front_end} submitted stream {request.stream}, which has not ended")
    hashes = _hashes(request, prompt, config.block_size)
    blocks = blocks_for(len(prompt) + max_tokens - 1, config.block_size)
    deadline_s = math.inf if request.deadline_s is None else state.now_s + request.deadline_s
    seed = state.random.getrandbits(63) if params.seed is None else params.seed
    sequences = []
    for choice in range(params.n):
        if choice == 1 and params.prompt_logprobs is not None:  # the first choice measures the prompt for all
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        number = next(state.numbers)
        sequence = Sequence(
            number=number, place=(request.priority << PRIORITY_SHIFT) + number, arrived_s=state.now_s,
            front_end=front_end, stream=request.stream + choice, choice=choice, params=params, seed=seed,
            stop_ids=request.stop_ids, salt=request.salt, prompt_tokens=len(prompt), max_tokens=max_tokens,
            blocks_at_most=blocks, hashes=hashes if choice == 0 else hashes.copy(), buffer=prompt, committed=len(prompt),
            tenant=state.waiting.fair.open(request.tenant), deadline_s=deadline_s,
        )  # fmt: skip
        state.sequences[front_end, sequence.stream] = sequence
        sequences.append(sequence)
    state.counters.requests += 1
    state.counters.prompt_tokens += len(prompt)
    return sequences


def _hashes(request: Request, prompt: Tokens, block_size: int) -> list[int]:
    """Of the prompt's full blocks: the front end's, if it brought them."""
    if len(request.hashes) != 8 * (len(prompt) // block_size):
        return hash_blocks(prompt, block_size, request.salt)
    hashes: list[int] = np.frombuffer(request.hashes, np.uint64).tolist()
    return hashes
