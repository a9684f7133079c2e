"""Executes steps on a CPU: inputs, model, sampler. A step is done when its launch returns; a GPU has `execution.gpu.runner`.

Imports torch and the room's tensor side.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcache.pool import KVPool
from scheduler.protocol.leaders import Start
from workers.execution.cpu.inputs import build_step
from workers.execution.pending import DeviceTokens, Following, Here, measure_prompts
from workers.execution.pooling import PooledPrompt, Pooler
from workers.loop.batch import Launched, ResidentBatch
from workers.loop.rank import Pending, row_of
from workers.model.decoders.native import Decoder
from workers.sampling.constraints import Constraints
from workers.sampling.logprobs import PromptPart
from workers.sampling.sampler import Sampler
from workers.step import StepInput

Ints = npt.NDArray[np.int64]


class Model(Protocol):
    def forward(self, step: StepInput) -> Tensor:
        """This rank's logits of the tokens at `step.sample_at`, [samples, the rank's vocabulary]."""
        ...


class ModelRunner:
    """The `Executor` that computes. pool: the blocks that the model's attention is bound to; narrow: those of narrow layers
    beside others. max_num_seqs: rows of the resident batch."""

    def __init__(
        self, model: Model, sampler: Sampler, constraints: Constraints, max_num_seqs: int, pool: KVPool,
        narrow: KVPool | None = None,
    ) -> None:  # fmt: skip
        self.pool, self.narrow = pool, narrow
        self._model = model
        self._sampler = sampler
        self._constraints = constraints
        self._pools = model if isinstance(model, Decoder) else None
        classifier = self._pools.classifier if self._pools is not None else None
        self.expert_counts = self._pools.expert_counts if self._pools is not None else None
        self._pooler = Pooler(classifier.weight if classifier is not None else None)
        self._following = Following(constraints)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=pool.device)

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
        self._pooler.release(row)

    def close(self) -> None:
        self._constraints.close()

    def copy(self, source: int, target: int, tokens: int, *, narrow: bool = False) -> None:
        pool = self.narrow if narrow else self.pool
        assert pool is not None, "the model has no narrow layers"
        pool.copy(source, target, tokens)

    @torch.inference_mode()
    def execute(self, batch: ResidentBatch, step: Launched) -> Pending:
        """Launches the step. Every rank of the group must call it with the same step: the model talks to its peers."""
        samples = np.flatnonzero(step.samples)
        logits, pooled = self._forward(build_step(batch, step, self._last_tokens), step)
        measured = measure_prompts(self._sampler.measure_prompt, batch, step, logits[len(samples) :])
        prompts: list[PromptPart | PooledPrompt] = [*measured, *pooled]
        if not len(samples):
            return DeviceTokens(step, samples, None, None, prompts, Here())
        rows = step.plan.rows[samples]
        allowed = self._following.allowed(rows)
        sampled = self._sampler.sample(logits[: len(samples)], rows, step.first[samples] + step.plan.counts[samples], allowed)
        # NO_TOKEN ends the sequence once the host sees it; until then its row goes on with an id that can be embedded.
        self._last_tokens[torch.from_numpy(rows)] = sampled.tokens.clamp(min=0)
        tokens = DeviceTokens(step, samples, sampled.tokens, sampled.logprobs, prompts, Here())
        return self._following.pending(tokens, samples, allowed)

    def _forward(self, inputs: StepInput, step: Launched) -> tuple[Tensor, list[PooledPrompt]]:
        """Logits of what is sampled and measured, and what has been made of the prompts that are pooled."""
        if not step.pooled:
            return self._model.forward(inputs), []
        assert self._pools is not None, "a checkpoint of which nothing is pooled is refused at the door"
        hidden = self._pools.hidden(inputs)
        others = len(hidden) - step.pooled_tokens
        return self._pools.logits(hidden[:others]), self._pooler.pool(step, hidden[others:])
