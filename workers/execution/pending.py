"""A launched step's tokens on their way to the host, and the grammars that wait for them.

Imports torch, NumPy and what `rank` calls a pending step.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from scheduler.protocol.messages import NO_TOKEN
from workers.execution.pooling import PooledPrompt
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import StepTokens
from workers.sampling.constraints import Allowed, Constraints
from workers.sampling.logprobs import Logprobs, PromptPart

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


MeasurePrompt = Callable[[Tensor, npt.NDArray[np.int32], int], Tensor]
"""(logits [positions, vocab], the tokens that follow them, top entries wanted of each) -> `PromptPart.numbers`."""


def measure_prompts(measure: MeasurePrompt, batch: ResidentBatch, step: Launched, logits: Tensor) -> list[PromptPart]:
    """The log-probabilities of prompts that a step brings. logits: of all measured positions, one part after another."""
    parts = []
    for part in step.measured:
        first = int(step.first[part.index]) + 1
        tokens = batch.tokens[step.plan.rows[part.index]][first : first + part.count]
        parts.append(PromptPart(part.index, first, part.most, measure(logits[: part.count], tokens, part.most)))
        logits = logits[part.count :]
    return parts


class Arrival(Protocol):
    """Whether what a device writes to the host is there, as `torch.cuda.Event` says it."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class Here:
    """The `Arrival` of what is there at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """There is nothing to wait for."""


class DeviceTokens:
    """A step's tokens, read when the host commits it.

    samples: [s] indices in the step of those who sampled. host: [s] their tokens in host memory, once they have arrived.
    prompts: what the step says of prompts.
    """

    def __init__(
        self,
        step: Launched,
        samples: Ints,
        host: Tensor | None,
        logprobs: Logprobs | None,
        prompts: Sequence[PromptPart | PooledPrompt],
        arrival: Arrival,
    ) -> None:
        self._size = len(step.plan.rows)
        self._samples = samples
        self._host = host
        self._logprobs = logprobs
        self._prompts = prompts
        self._arrival = arrival
        self._read: StepTokens | None = None

    def done(self) -> bool:
        return self._read is not None or self._arrival.query()

    def wait(self) -> StepTokens:
        """Once or more often; the same answer each time."""
        if self._read is None:
            self._arrival.synchronize()
            ids = np.zeros(self._size, np.int64)
            payloads = [(part.index, part.payload()) for part in self._prompts]
            if self._host is not None:
                ids[self._samples] = self._host.numpy()
                if (failed := int((ids[self._samples] == NO_TOKEN).sum())) > 0:
                    logger.warning("the model's logits were not finite for %d of %d sequences", failed, len(self._samples))
            if self._logprobs is not None:
                told = [(int(self._samples[at]), payload) for at, payload in self._logprobs.payloads()]
                payloads += [(index, payload) for index, payload in told if ids[index] != NO_TOKEN]
            self._read = StepTokens(ids, payloads)
        return self._read


class ConstrainedTokens:
    """A step's tokens of which some follow a grammar: once they are here, work on what may come next begins."""

    def __init__(self, tokens: DeviceTokens, samples: Ints, constraints: Constraints, allowed: Allowed) -> None:
        self._tokens = tokens
        self._samples = samples
        self._constraints = constraints
        self._allowed = allowed
        self._followed = False

    def done(self) -> bool:
        return self._tokens.done()

    def wait(self) -> StepTokens:
        """Once or more often: by the next constrained step, which needs to know, and when the host commits this one."""
        tokens = self._tokens.wait()
        if not self._followed:
            self._followed = True
            self._constraints.advance(self._allowed, tokens.ids[self._samples])
            tokens.ids[self._samples[self._allowed.failed]] = NO_TOKEN
        return tokens


class Following:
    """What the rows of a step may sample where some have a grammar, whose newest tokens may still be on the device.

    `allowed` waits for those, after the step's model has been launched: the device computes meanwhile, and no row sits out.
    """

    def __init__(self, constraints: Constraints) -> None:
        self._constraints = constraints
        self._unread: list[ConstrainedTokens] = []  # launched since the last constrained step, oldest first

    def allowed(self, rows: Ints) -> Allowed | None:
        """rows: [s] of the batch, of a step that has been launched up to its logits. None where none has a grammar."""
        if not self._constraints.any(rows):
            return None
        for tokens in self._unread:
            tokens.wait()
        self._unread.clear()
        return self._constraints.allowed(rows)

    def pending(self, tokens: DeviceTokens, samples: Ints, allowed: Allowed | None) -> DeviceTokens | ConstrainedTokens:
        """What `rank` waits for. allowed: as `allowed` said for the same step."""
        if allowed is None:
            return tokens
        constrained = ConstrainedTokens(tokens, samples, self._constraints, allowed)
        self._unread.append(constrained)
        return constrained
