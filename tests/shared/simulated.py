"""A group without a model: the executor whose tokens depend on every token before them, read back from simulated blocks.

What it makes of a prompt that is pooled are digests too: the last one's bytes, or those of the sum of all.
Each slot of a block holds a digest of the sequence up to it, computed from the digest in the slot before. So a stale block, a
wrong block table, a hit on what was never computed or a lost write changes the tokens, as it would with a real model. Where it
has a window, each digest is made of all digests in that, and of none before it. Where it has narrow layers beside others, there
are blocks and digests of both kinds, and a token depends on both.
Pure NumPy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import xor

import msgspec
import numpy as np
import numpy.typing as npt

from scheduler.protocol.leaders import Start
from scheduler.protocol.messages import Pooled, Pooling
from workers.loop.batch import Launched, PooledPart, ResidentBatch
from workers.loop.rank import StepTokens, row_of

_MASK = (1 << 64) - 1
UNWRITTEN = np.uint64(0xDEAD_BEEF_DEAD_BEEF)


def digest(before: int, token: int) -> int:
    """Extends the digest of a sequence by one token; 0 is the empty sequence. After splitmix64's finaliser."""
    mixed = (before * 0x9E3779B97F4A7C15 + token + 1) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return mixed ^ (mixed >> 27)


def digests(tokens: Iterable[int], seen: list[int], window: int | None = None) -> list[int]:
    """Of each token, of those that follow others. seen: the digests of these, as many as the first token sees. window: tokens
    that one sees, itself included; None: the one before it stands for all."""
    reach = 1 if window is None else window - 1
    states = list(seen)
    for token in tokens:
        before = states[max(0, len(states) - reach) :]
        states.append(digest(before[-1] if before else 0, token + sum(before[:-1])))
    return states[len(seen) :]


def next_token(state: int, vocabulary: int) -> int:
    """What the simulated model says after the sequence with this digest."""
    return (state >> 17) % vocabulary


def continuation(
    prompt: list[int], tokens: int, vocabulary: int, window: int | None = None, narrow: int | None = None
) -> list[int]:  # fmt: skip
    """The undisturbed output: what any schedule must produce, stop ids apart. narrow: tokens that narrow layers see, if any."""
    kinds = [(each, digests(prompt, [], each)) for each in _windows(window, narrow)]
    output: list[int] = []
    for _ in range(tokens):
        output.append(next_token(reduce(xor, (states[-1] if states else 0 for _, states in kinds)), vocabulary))
        for each, states in kinds:
            states += digests(output[-1:], states[-(each or 1) :], each)
    return output


def pooled(prompt: list[int], pooling: Pooling, window: int | None = None, narrow: int | None = None) -> bytes:
    """What is made of an undisturbed prompt."""
    kinds = [digests(prompt, [], each) for each in _windows(window, narrow)]
    states = [reduce(xor, each) for each in zip(*kinds, strict=True)]
    return _values(sum(states) if pooling == "mean" else states[-1] if states else 0)


def _windows(window: int | None, narrow: int | None) -> list[int | None]:
    """What each kind of layer sees."""
    return [window] if narrow is None else [window, narrow]


def _values(state: int) -> bytes:
    return (state & _MASK).to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class Ready:
    """A step whose tokens are known at once."""

    tokens: StepTokens

    def done(self) -> bool:
        return True

    def wait(self) -> StepTokens:
        return self.tokens


class SimulatedExecutor:
    """The `Executor` of a group of `blocks` blocks. vocabulary: token ids are below it. window: tokens that one sees.
    narrow: the same of narrow layers, if there are any, which have `narrow_blocks`."""

    def __init__(
        self, blocks: int, block_size: int, max_num_seqs: int, vocabulary: int, window: int | None = None,
        narrow: int | None = None, narrow_blocks: int = 0,
    ) -> None:  # fmt: skip
        sizes = [blocks] if narrow is None else [blocks, narrow_blocks]
        self.caches: list[npt.NDArray[np.uint64]] = [np.full((size, block_size), UNWRITTEN) for size in sizes]
        self._vocabulary = vocabulary
        self._windows = _windows(window, narrow)
        self._last = [0] * max_num_seqs
        self._sums: dict[int, int] = {}  # of rows whose mean is wanted

    def admit(self, start: Start) -> None:
        self._last[row_of(start)] = int(np.frombuffer(start.tokens, np.int32)[-1])

    def release(self, row: int) -> None:
        """Nothing else is kept of a row."""
        self._sums.pop(row, None)

    def copy(self, source: int, target: int, tokens: int, *, narrow: bool = False) -> None:
        cache = self.caches[narrow]
        cache[target, :tokens] = cache[source, :tokens]

    def close(self) -> None:
        """There are no threads."""

    def execute(self, batch: ResidentBatch, step: Launched) -> Ready:
        ids = np.zeros(len(step.plan.rows), np.int64)
        for index, row in enumerate(step.plan.rows.tolist()):
            first, count = int(step.first[index]), int(step.plan.counts[index])
            single = index < step.plan.decodes
            tokens = [self._last[row]] if single else batch.tokens[row][first : first + count].tolist()
            state = self._write(batch, row, first, tokens)
            if step.samples[index]:
                self._last[row] = ids[index] = next_token(state, self._vocabulary)
        return Ready(StepTokens(ids, [each for part in step.pooled for each in self._pool(batch, step, part)]))

    def _pool(self, batch: ResidentBatch, step: Launched, part: PooledPart) -> list[tuple[int, bytes]]:
        row, first = int(step.plan.rows[part.index]), int(step.first[part.index]) + part.start
        slots = np.divmod(np.arange(first, first + part.count), batch.block_size)
        kinds = [cache[ids[slots[0]], slots[1]] for cache, ids in self._kinds(batch, row)]
        states = reduce(np.bitwise_xor, kinds).tolist()
        state = states[-1]
        if part.pooling == "mean":
            state = self._sums[row] = self._sums.get(row, 0) + sum(states)
        return [(part.index, msgspec.msgpack.encode(Pooled(_values(state))))] if part.ends else []

    def _kinds(self, batch: ResidentBatch, row: int) -> list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]]:
        """Of each kind of layer the blocks, and the row's ids of them."""
        return [(cache, table.ids[row]) for cache, table in zip(self.caches, batch.kinds, strict=True)]

    def _write(self, batch: ResidentBatch, row: int, first: int, tokens: list[int]) -> int:
        """Writes the digests of `tokens` at positions first, first + 1, ...; returns the last one."""
        block_size, last = batch.block_size, 0
        for (cache, table), window in zip(self._kinds(batch, row), self._windows, strict=True):
            seen = np.arange(max(0, first - (1 if window is None else window - 1)), first)
            states = digests(tokens, cache[table[seen // block_size], seen % block_size].tolist(), window)
            for position, state in enumerate(states, first):
                cache[table[position // block_size], position % block_size] = state
            last ^= states[-1]
        return last
