"""Executes steps on one rank's device: inputs, model, sampler. The sampled tokens stay there for the next step.

Imports torch and the rooms' tensor side: `inputs`, `model`, `sampler`, `constraints`.
"""

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcache.pool import KVPool
from scheduler.messages import NO_TOKEN, Start
from workers.execution.inputs import build_step
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Pending, Tokens, row_of
from workers.model.decoder import Decoder
from workers.sampling.constraints import Allowed, Constraints
from workers.sampling.logprobs import PromptPart
from workers.sampling.sampler import Sampled, Sampler

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]


class ModelRunner:
    """The `Executor` that computes. pool: the pages that the model's attention is bound to. rows: of the resident batch."""

    def __init__(self, model: Decoder, sampler: Sampler, constraints: Constraints, rows: int, pool: KVPool) -> None:
        self.pool = pool
        self._model = model
        self._sampler = sampler
        self._constraints = constraints
        self._last_tokens = torch.zeros(rows, dtype=torch.int64, device=pool.device)

    def admit(self, start: Start) -> None:
        row, tokens = row_of(start), np.frombuffer(start.tokens, np.int32)
        self._last_tokens[row] = int(tokens[-1])
        self._sampler.admit(
            row,
            params=start.params,
            seed=start.seed,
            choice=start.choice,
            stop_ids=start.stop_ids,
            prompt=tokens[: start.prompt_tokens],
            output=tokens[start.prompt_tokens :],
        )
        self._constraints.admit(row, start.params.grammar, tokens[start.prompt_tokens :])

    def release(self, row: int) -> None:
        self._sampler.release(row)
        self._constraints.release(row)

    def close(self) -> None:
        self._constraints.close()

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.pool.copy(source, target, tokens)

    @torch.inference_mode()
    def execute(self, batch: ResidentBatch, step: Launched) -> Pending:
        """Launches the step. Every rank of the group must call it with the same step: the model talks to its peers."""
        samples = np.flatnonzero(step.samples)
        logits = self._model.forward(build_step(batch, step, self._last_tokens))
        measured = self._measure(batch, step, logits[len(samples) :])
        if not len(samples):
            return DeviceTokens(step, samples, None, measured, logits.is_cuda)
        rows = step.plan.rows[samples]
        allowed = self._constraints.allowed(rows)  # after the launch: the device computes while this waits
        sampled = self._sampler.sample(logits[: len(samples)], rows, step.first[samples] + step.plan.counts[samples], allowed)
        # NO_TOKEN ends the sequence once the host sees it; until then its row goes on with an id that can be embedded.
        self._last_tokens[torch.from_numpy(rows).to(self._last_tokens.device)] = sampled.tokens.clamp(min=0)
        tokens = DeviceTokens(step, samples, sampled, measured, logits.is_cuda)
        return tokens if allowed is None else ConstrainedTokens(tokens, samples, self._constraints, allowed)

    def _measure(self, batch: ResidentBatch, step: Launched, logits: Tensor) -> list[PromptPart]:
        """logits: of all measured positions, one part after another."""
        parts = []
        for part in step.measured:
            first = int(step.first[part.index]) + 1
            tokens = batch.tokens[step.plan.rows[part.index]][first : first + part.count]
            numbers = self._sampler.measure_prompt(logits[: part.count], tokens, part.most)
            parts.append(PromptPart(part.index, first, part.most, numbers))
            logits = logits[part.count :]
        return parts


class DeviceTokens:
    """A launched step's tokens; copied to the host without waiting, read when the host commits the step."""

    def __init__(
        self, step: Launched, samples: Ints, sampled: Sampled | None, measured: Sequence[PromptPart], on_gpu: bool
    ) -> None:
        self._size = len(step.plan.rows)
        self._samples = samples
        self._sampled = sampled
        self._measured = measured
        self._host = None if sampled is None else sampled.tokens.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if on_gpu:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> Tokens:
        ids = np.zeros(self._size, np.int64)
        if self._copied is not None:
            self._copied.synchronize()
        payloads = [(part.index, part.payload()) for part in self._measured]
        if self._host is not None and self._sampled is not None:
            ids[self._samples] = self._host.numpy()
            if (failed := int((ids[self._samples] == NO_TOKEN).sum())) > 0:
                logger.warning("the model's logits were not finite for %d of %d sequences", failed, len(self._samples))
            told = [(int(self._samples[at]), payload) for at, payload in self._sampled.payloads()]
            payloads += [(index, payload) for index, payload in told if ids[index] != NO_TOKEN]
        return Tokens(ids, payloads)


class ConstrainedTokens:
    """A launched step's tokens of which some follow a grammar: once they are here, work on what may come next begins."""

    def __init__(self, tokens: DeviceTokens, samples: Ints, constraints: Constraints, allowed: Allowed) -> None:
        self._tokens = tokens
        self._samples = samples
        self._constraints = constraints
        self._allowed = allowed

    def wait(self) -> Tokens:
        tokens = self._tokens.wait()
        self._constraints.advance(self._allowed, tokens.ids[self._samples])
        tokens.ids[self._samples[self._allowed.failed]] = NO_TOKEN
        return tokens
