"""Requests come in: one becomes a sequence for each of its choices, or is refused.

Imports `state`, `limits`, `sequence` and `admission`.
"""

import math
import random

import msgspec
import numpy as np

from kvcache.hashing import hash_blocks
from scheduler.placement.admission import Admission
from scheduler.protocol.messages import Failure, Request
from scheduler.queue.limits import RequestRefused, blocks_for, output_limit, queue_room
from scheduler.running.resident import ProtocolError
from scheduler.sequence import PRIORITY_SHIFT, Sequence, Tokens
from scheduler.state import ClusterState


class Intake:
    """Works on the shared state; its own are the numbers of sequences, and the seeds of requests that bring none."""

    def __init__(self, state: ClusterState, admission: Admission) -> None:
        self._state = state
        self._config = state.config
        self._admission = admission
        self._random = random.Random(state.config.seed)
        self._numbers = 0

    def take(self, front_end: int, request: Request) -> None:
        """The request's sequences wait, or run already if nobody waited.

        Errors: RequestRefused if it can never fit or the queue is full, ProtocolError if a stream of it is in use; nothing has
        changed then.
        """
        state, config = self._state, self._config
        prompt, params = np.frombuffer(request.tokens, np.int32), request.params
        largest = state.largest_pool()
        max_tokens = output_limit(
            len(prompt), params.max_tokens, state.resolved.max_model_len, config.block_size, largest, state.lost
        )
        if not state.groups and state.bounds is not None:
            raise RequestRefused("no group of workers is ready yet: try again soon", Failure.UNAVAILABLE, retry_after_s=1.0)
        self._require_room(request, len(prompt))
        for choice in range(params.n):
            if (front_end, request.stream + choice) in state.sequences:
                raise ProtocolError(f"front end {front_end} submitted stream {request.stream}, which has not ended")
        hashes = self._hashes(request, prompt)
        blocks = blocks_for(len(prompt) + max_tokens - 1, config.block_size)
        deadline_s = math.inf if request.deadline_s is None else state.now_s + request.deadline_s
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        for choice in range(params.n):
            if choice == 1 and params.prompt_logprobs is not None:  # the first choice measures the prompt for all
                params = msgspec.structs.replace(params, prompt_logprobs=None)
            sequence = Sequence(
                number=self._numbers, place=(request.priority << PRIORITY_SHIFT) + self._numbers, arrived_s=state.now_s,
                front_end=front_end, stream=request.stream + choice, choice=choice, params=params, seed=seed,
                stop_ids=request.stop_ids, salt=request.salt, prompt_tokens=len(prompt), max_tokens=max_tokens,
                blocks_at_most=blocks, hashes=hashes if choice == 0 else hashes.copy(), buffer=prompt, committed=len(prompt),
                tenant=state.waiting.fair.open(request.tenant), deadline_s=deadline_s,
            )  # fmt: skip
            self._numbers += 1
            state.sequences[front_end, sequence.stream] = sequence
            if params.n > 1 or not self._admission.start_at_once(sequence):
                state.waiting.enter(sequence, state.now_s)
            if request.deadline_s is not None:
                state.deadlines.add(sequence)
        state.counters.requests += 1
        state.counters.prompt_tokens += len(prompt)

    def _hashes(self, request: Request, prompt: Tokens) -> list[int]:
        """Of the prompt's full blocks: the front end's, if it brought them."""
        block_size = self._config.block_size
        if len(request.hashes) != 8 * (len(prompt) // block_size):
            return hash_blocks(prompt, block_size, request.salt)
        hashes: list[int] = np.frombuffer(request.hashes, np.uint64).tolist()
        return hashes

    def _require_room(self, request: Request, tokens: int) -> None:
        """Errors: RequestRefused if it may not wait, or would wait longer than it can."""
        try:
            queue_room(self._state.bounds, self._state.waiting, request, tokens, self._state.now_s)
        except RequestRefused:
            self._state.counters.refused += 1
            raise
