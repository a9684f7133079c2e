"""A group without a model: the executor whose tokens depend on every token before them, read back from simulated blocks.

Each slot of a block holds a digest of the sequence up to it, computed from the digest in the slot before. So a stale block, a
wrong block table, a hit on what was never computed or a lost write changes the tokens, as it would with a real model.
Pure NumPy. Used by tests and replay.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scheduler.protocol.leaders import Start
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import StepTokens, row_of

_MASK = (1 << 64) - 1
UNWRITTEN = np.uint64(0xDEAD_BEEF_DEAD_BEEF)


def digest(before: int, token: int) -> int:
    """Extends the digest of a sequence by one token; 0 is the empty sequence. After splitmix64's finaliser."""
    mixed = (before * 0x9E3779B97F4A7C15 + token + 1) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return mixed ^ (mixed >> 27)


def next_token(state: int, vocabulary: int) -> int:
    """What the simulated model says after the sequence with this digest."""
    return (state >> 17) % vocabulary


def continuation(prompt: list[int], tokens: int, vocabulary: int) -> list[int]:
    """The undisturbed output: what any schedule must produce, stop ids apart."""
    state = 0
    for token in prompt:
        state = digest(state, token)
    output = []
    for _ in range(tokens):
        output.append(next_token(state, vocabulary))
        state = digest(state, output[-1])
    return output


@dataclass(frozen=True, slots=True)
class Ready:
    """A step whose tokens are known at once."""

    tokens: StepTokens

    def wait(self) -> StepTokens:
        return self.tokens


class SimulatedExecutor:
    """The `Executor` of a group of `blocks` blocks. vocabulary: token ids are below it."""

    def __init__(self, blocks: int, block_size: int, max_num_seqs: int, vocabulary: int) -> None:
        self.cache: npt.NDArray[np.uint64] = np.full((blocks, block_size), UNWRITTEN)
        self._vocabulary = vocabulary
        self._last = [0] * max_num_seqs

    def admit(self, start: Start) -> None:
        self._last[row_of(start)] = int(np.frombuffer(start.tokens, np.int32)[-1])

    def release(self, row: int) -> None:
        """Nothing is kept of a row."""

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
        return Ready(StepTokens(ids))

    def _write(self, table: npt.NDArray[np.int32], first: int, tokens: list[int]) -> int:
        """Writes the digests of `tokens` at positions first, first + 1, ...; returns the last one."""
        block_size = self.cache.shape[1]
        state = int(self.cache[table[(first - 1) // block_size], (first - 1) % block_size]) if first else 0
        for position, token in enumerate(tokens, first):
            state = digest(state, token)
            self.cache[table[position // block_size], position % block_size] = state
        return state
