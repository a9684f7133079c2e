"""What is made of prompts' hidden states: the last one, the mean of all, or a classifier's scores; on its way to the host.

Imports torch, msgspec, the wire types and the batch.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import msgspec
import torch
from torch import Tensor

from scheduler.protocol.messages import Pooled
from workers.loop.batch import Launched
from workers.sampling.logprobs import to_host


@dataclass(frozen=True, slots=True)
class PooledPrompt:
    """One prompt's. index: of the sequence in the step. numbers: float32 of all prompts of the step, of which [start, stop) are
    this one's; an accelerator may still be writing them, so read only once it has been synchronised past the step."""

    index: int
    start: int
    stop: int
    numbers: Tensor

    def payload(self) -> bytes:
        """msgpack of `Pooled`."""
        return msgspec.msgpack.encode(Pooled(self.numbers[self.start : self.stop].numpy().tobytes()))


class Pooler:
    """One rank's. Every rank of a group has the whole of each hidden state, so none has to ask another.

    classifier: [labels, hidden], None where the checkpoint has none. The sums of means are float64, so that they do not depend
    on how a prompt was cut into chunks; one is kept for each row that has begun.
    """

    def __init__(self, classifier: Tensor | None) -> None:
        self._classifier = classifier
        self._sums: dict[int, Tensor] = {}

    def release(self, row: int) -> None:
        """The sequence at `row` has left, whether or not its prompt was whole."""
        self._sums.pop(row, None)

    def pool(self, step: Launched, hidden: Tensor) -> list[PooledPrompt]:
        """Of the prompts that end with a launched step. hidden: [positions, hidden], those of `step.pooled` one after another,
        behind the final norm. Waits for nothing."""
        indices, values = [], []
        for part in step.pooled:
            states, hidden = hidden[: part.count], hidden[part.count :]
            row = int(step.plan.rows[part.index])
            if part.pooling == "mean":
                value = self._add(row, states) / int(step.first[part.index] + step.plan.counts[part.index])
            elif part.pooling == "last":
                value = states[-1]
            else:
                value = self._scores(states[-1])
            if part.ends:
                indices.append(part.index)
                values.append(value.float())
        if not values:
            return []
        numbers, ends = to_host(torch.cat(values)), [*accumulate(map(len, values))]
        return [PooledPrompt(index, *span, numbers) for index, span in zip(indices, pairwise([0, *ends]), strict=True)]

    def _scores(self, state: Tensor) -> Tensor:
        """[hidden] -> [labels]. Where there is nothing to score with, not a number, which the front end refuses to tell."""
        if self._classifier is None:
            return state.new_full((1,), torch.nan)
        return self._classifier @ state.to(self._classifier.dtype)

    def _add(self, row: int, states: Tensor) -> Tensor:
        """The sum of a row's hidden states so far."""
        total = states.sum(0, dtype=torch.float64)
        if (before := self._sums.get(row)) is not None:
            total += before
        self._sums[row] = total
        return total
