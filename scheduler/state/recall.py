"""Outputs whose clients may come back: a stream that was cut goes on behind its last token instead of being computed again.

Tokens follow from the prompt, the parameters, the seed and the choice. So these find them, whoever asks: neither a client nor a
front end has to be known, and nobody is told what computing would not have told him. A sequence that has ended is known for
`KEPT_S`; one that still runs, since nobody has noticed yet that its client has gone, is found as well; and where several
clients have asked for the same, all of theirs. Whoever is not found is computed again.

Imports `sequence`.
"""

from collections import defaultdict, deque
from collections.abc import Iterator

import msgspec
import numpy as np
import xxhash

from scheduler.protocol.sampling import SamplingParams
from scheduler.state.sequence import Sequence

KEPT_S = 60.0
"""After its end: whoever comes back does so within seconds, once he has noticed."""

MOST_TOKENS = 1 << 22
"""Of all that have ended, prompts included: 16 MiB."""

Key = tuple[int, int, int, int]


class Recall:
    """The sequences that were asked for by clients that may come back."""

    def __init__(self) -> None:
        self._known = defaultdict[Key, list[Sequence]](list)
        self._ended: deque[tuple[float, Key, Sequence]] = deque()
        self._tokens = 0  # of those that have ended

    def follow(self, sequence: Sequence) -> None:
        """From now on it is the one to be found, until some time after its end."""
        sequence.kept = True
        self._known[_key(sequence)].append(sequence)

    def find(self, sequence: Sequence) -> Iterator[Sequence]:
        """Those before it whose tokens are the same as this one's, as far as they have come; the latest first."""
        known = self._known.get(_key(sequence), ())
        return (past for past in reversed(known) if past is not sequence and _same(past, sequence))

    def ended(self, sequence: Sequence, output: int, now_s: float) -> None:
        """One that was followed, with so many tokens of output that count."""
        sequence.committed = min(sequence.committed, sequence.prompt_tokens + output)
        self._ended.append((now_s, _key(sequence), sequence))
        self._tokens += len(sequence.buffer)
        while self._ended and (self._ended[0][0] < now_s - KEPT_S or self._tokens > MOST_TOKENS):
            self._forget(*self._ended.popleft()[1:])

    def _forget(self, key: Key, sequence: Sequence) -> None:
        self._tokens -= len(sequence.buffer)
        known = self._known[key]
        known[:] = [each for each in known if each is not sequence]
        if not known:
            del self._known[key]


def _key(sequence: Sequence) -> Key:
    prompt = sequence.buffer[: sequence.prompt_tokens]
    return sequence.seed, sequence.choice, len(prompt), xxhash.xxh3_64_intdigest(prompt.data)


def _same(one: Sequence, other: Sequence) -> bool:
    """All that decides what the tokens are, to the last of them."""
    length = one.prompt_tokens
    return (
        (one.salt, one.stop_ids, one.adapter) == (other.salt, other.stop_ids, other.adapter)
        and _deciding(one.params) == _deciding(other.params)
        and np.array_equal(one.buffer[:length], other.buffer[:length])
    )


def _deciding(params: SamplingParams) -> SamplingParams:
    """Without the seed, of which the sequence knows more."""
    return msgspec.structs.replace(params, seed=None)
