"""A group without a model: the executor whose tokens depend on every token before them, read back from simulated blocks.

What it makes of a prompt that is pooled are digests too: the last one's bytes, or those of the sum of all.
Each slot of a block holds a digest of the sequence up to it, computed from the digest in the slot before. So a stale block, a
wrong block table, a hit on what was never computed or a lost write changes the tokens, as it would with a real model. Where it
has a window, each digest is made of all digests in that, and of none before it.
Pure NumPy. Used by tests and replay.
"""

from collections.abc import Iterable
from dataclasses import dataclass

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


def continuation(prompt: list[int], tokens: int, vocabulary: int, window: int | None = None) -> list[int]:
    """The undisturbed output: what any schedule must produce, stop ids apart."""
    states = digests(prompt, [], window)
    output: list[int] = []
    for _ in range(tokens):
        output.append(next_token(states[-1] if states else 0, vocabulary))
        states += digests(output[-1:], states[-(window or 1) :], window)
    return output


def pooled(prompt: list[int], pooling: Pooling, window: int | None = None) -> bytes:
    """What is made of an undisturbed prompt."""
    states = digests(prompt, [], window)
    return _values(sum(states) if pooling == "mean" else states[-1] if states else 0)


def _values(state: int) -> bytes:
    return (state & _MASK).to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class Ready:
    """A step whose tokens are known at once."""

    tokens: StepTokens

    def wait(self) -> StepTokens:
        return self.tokens


class SimulatedExecutor:
    """The `Executor` of a group of `blocks` blocks. vocabulary: token ids are below it. window: tokens that one sees."""

    def __init__(
        self, blocks: int, block_size: int, max_num_seqs: int, vocabulary: int, window: int | None = None
    ) -> None:  # fmt: skip
        self.cache: npt.NDArray[np.uint64] = np.full((blocks, block_size), UNWRITTEN)
        self._vocabulary = vocabulary
        self._window = window
        self._last = [0] * max_num_seqs
        self._sums: dict[int, int] = {}  # of rows whose mean is wanted

    def admit(self, start: Start) -> None:
        self._last[row_of(start)] = int(np.frombuffer(start.tokens, np.int32)[-1])

    def release(self, row: int) -> None:
        """Nothing else is kept of a row."""
        self._sums.pop(row, None)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.cache[target, :tokens] = self.cache[source, :tokens]

    def close(self) -> None:
        """There are no threads."""

    def execute(self, batch: ResidentBatch, step: Launched) -> Ready:
        ids = np.zeros(len(step.plan.rows), np.int64)
        for index, row in enumerate(step.plan.rows.tolist()):
            first, count = int(step.first[index]), int(step.plan.counts[index])
            single = index < step.plan.decodes
            tokens = [self._last[row]] if single else batch.tokens[row][first : first + count].tolist()
            state = self._write(batch.block_table[row], first, tokens)
            if step.samples[index]:
                self._last[row] = ids[index] = next_token(state, self._vocabulary)
        return Ready(StepTokens(ids, [each for part in step.pooled for each in self._pool(batch, step, part)]))

    def _pool(self, batch: ResidentBatch, step: Launched, part: PooledPart) -> list[tuple[int, bytes]]:
        row, first = int(step.plan.rows[part.index]), int(step.first[part.index]) + part.start
        block, offset = np.divmod(np.arange(first, first + part.count), self.cache.shape[1])
        states = self.cache[batch.block_table[row, block], offset].tolist()
        state = states[-1]
        if part.pooling == "mean":
            state = self._sums[row] = self._sums.get(row, 0) + sum(states)
        return [(part.index, msgspec.msgpack.encode(Pooled(_values(state))))] if part.ends else []

    def _write(self, table: npt.NDArray[np.int32], first: int, tokens: list[int]) -> int:
        """Writes the digests of `tokens` at positions first, first + 1, ...; returns the last one."""
        block_size = self.cache.shape[1]
        seen = np.arange(max(0, first - (1 if self._window is None else self._window - 1)), first)
        states = digests(tokens, self.cache[table[seen // block_size], seen % block_size].tolist(), self._window)
        for position, state in enumerate(states, first):
            self.cache[table[position // block_size], position % block_size] = state
        return states[-1]
