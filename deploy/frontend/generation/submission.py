"""What the scheduler was asked for one request, and what it has said of it: enough to ask another one for the rest.

Tokens depend on the prompt, the parameters, the seed, the choice and the tokens before them alone, so the rest is the same.
Imports prompts and the wire types; the tokens themselves are kept by `generation`.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from deploy.text.prompts import Prompt
from kvcache.hashing import hash_blocks
from scheduler.protocol.messages import (
    NO_MISSES,
    Adapter,
    Failure,
    Finished,
    FinishReason,
    Had,
    Misses,
    Request,
    Resumption,
    Started,
)

MOST_LOSSES = 5
"""Schedulers that a choice may lose in a row without a token in between: the request may be what ends them."""


@dataclass(slots=True)
class _Standing:
    """One choice, as far as schedulers have said. tokens: of output when it was last lost; losses: in a row, with no more."""

    started: Started | None = None
    restarts: int = 0
    losses: int = 0
    tokens: int = 0

    @property
    def figures(self) -> tuple[int | None, float, Misses]:
        """Its cached_tokens, queued_s and misses; None and nothing before its first start."""
        started = self.started
        return (None, 0.0, NO_MISSES) if started is None else (started.cached_tokens, started.queued_s, started.misses)


class Submission:
    """One request with all its choices. Times are monotonic seconds."""

    def __init__(
        self, stream: int, prompt: Prompt, eos_ids: Sequence[int], block_size: int, now_s: float, had: tuple[Had, ...] = ()
    ) -> None:
        """stream: of its first choice. eos_ids: the model's own; a grammar ends with them, so they stop such an output in any
        case. block_size: of the scheduler. had: as in `Request`."""
        params, terms = prompt.params, prompt.terms
        bare = params.ignore_eos and params.grammar is None
        stop_ids = params.stop_token_ids if bare else (*params.stop_token_ids, *eos_ids)
        salt = salt_of(terms.salt, prompt.adapter)
        self.request = Request(
            stream=stream,
            tokens=prompt.packed,
            hashes=_hashes(np.frombuffer(prompt.packed, "<i4"), block_size, salt),
            params=params,
            stop_ids=tuple(dict.fromkeys(stop_ids)),
            salt=salt,
            priority=terms.priority,
            tenant=terms.tenant,
            deadline_s=None if terms.deadline_s == math.inf else terms.deadline_s,
            pooling=prompt.pooling,
            adapter=prompt.adapter,
            had=had if params.prompt_logprobs is None else (),
        )
        """As it is submitted for the first time."""
        self.waits_since_s: float | None = None
        """Since when no scheduler has it; None: one has, or will at once."""
        self._block_size = block_size
        self._begun_s = now_s
        self._sent = True
        self.seed = params.seed
        """Once it is known: a request that brings none has one drawn: by the scheduler, or here if it is lost before."""
        self._standings = [_Standing() for _ in range(params.n)]

    def wait(self) -> None:
        """There is no scheduler that could have it yet."""
        self._sent, self.waits_since_s = False, self._begun_s

    def sent(self) -> None:
        """A scheduler has it, or had it just now."""
        self._sent, self.waits_since_s = True, None

    def start(self, started: Started) -> None:
        self.seed = started.seed
        self._standings[started.stream - self.request.stream].started = started

    def stopped(self, choice: int, tokens: int) -> Finished:
        """The end of a choice whose stop string was found after so many tokens, of which the scheduler may not have heard."""
        cached_tokens, queued_s, misses = self._standings[choice].figures
        return Finished(
            self.request.stream + choice, FinishReason.STOP, cached_tokens or 0, tokens,
            queued_s=queued_s, preemptions=self._standings[choice].restarts, misses=misses,
        )  # fmt: skip

    def lose(self, outputs: Mapping[int, Sequence[int]], reason: str, now_s: float) -> list[Finished]:
        """No scheduler has it any more. outputs: of the choices that need more, the tokens that they have. Returns the ends of
        those that have lost too many schedulers."""
        if self.waits_since_s is not None:
            return []  # none has had it since
        self.waits_since_s = now_s
        for choice, tokens in outputs.items():
            standing = self._standings[choice]
            standing.losses = 1 if len(tokens) > standing.tokens else standing.losses + 1
            standing.tokens = len(tokens)
            standing.restarts += 1
        message = f"{reason}, {MOST_LOSSES} times in a row without a token of the request in between, so it is not tried again"
        return [
            Finished(self.request.stream + choice, FinishReason.FAILED, 0, len(tokens), message, Failure.FAULT)
            for choice, tokens in outputs.items()
            if self._standings[choice].losses >= MOST_LOSSES
        ]

    def requests(
        self, outputs: Mapping[int, Sequence[int]], prompt_told: bool, block_size: int, now_s: float
    ) -> list[Request]:
        """To a scheduler that has nothing of it: as it was, if none has had it, or what is missing of each choice.

        outputs: as for `lose`. prompt_told: the prompt's log-probabilities are complete. block_size: that of the scheduler.
        """
        age_s, request = now_s - self._begun_s, self._hashed(block_size)
        if not self._sent:
            deadline_s = None if request.deadline_s is None else max(0.0, request.deadline_s - age_s)
            return [msgspec.structs.replace(request, deadline_s=deadline_s)]
        if self.seed is None:  # for each of them the scheduler would draw another
            self.seed = secrets.randbits(63)
        return [self._resumed(request, choice, tokens, prompt_told, age_s) for choice, tokens in outputs.items()]

    def _resumed(self, request: Request, choice: int, tokens: Sequence[int], prompt_told: bool, age_s: float) -> Request:
        standing, params = self._standings[choice], request.params
        measures = params.prompt_logprobs if choice == 0 and not prompt_told else None
        output = np.array(tokens, dtype="<i4").tobytes()
        return msgspec.structs.replace(
            request,
            stream=request.stream + choice,
            params=msgspec.structs.replace(params, seed=self.seed, prompt_logprobs=measures),
            resumption=Resumption(choice, output, age_s, standing.restarts, *standing.figures),
        )

    def _hashed(self, block_size: int) -> Request:
        if block_size != self._block_size:
            self._block_size, tokens = block_size, np.frombuffer(self.request.tokens, dtype="<i4")
            hashes = _hashes(tokens, block_size, self.request.salt)
            self.request = msgspec.structs.replace(self.request, hashes=hashes)
        return self.request


def _hashes(tokens: npt.NDArray[np.int32], block_size: int, salt: str) -> bytes:
    return np.array(hash_blocks(tokens, block_size, salt), dtype="<u8").tobytes()


MARK = "\0"


def salt_of(salt: str, adapter: Adapter | None) -> str:
    """What isolates a prompt's prefixes: of whoever asks, and of the weights that compute them.

    No two pairs have the same: an adapter's begins with one mark, and any other salt that begins with one gets another before
    it. An adapter of the same name with other weights has another version.
    """
    if adapter is not None:
        return f"{MARK}{adapter.version} {adapter.name}{MARK}{salt}"
    return f"{MARK}{salt}" if salt.startswith(MARK) else salt
