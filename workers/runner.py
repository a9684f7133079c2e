"""Executes steps on one rank's device: inputs, model, sampler. The sampled tokens stay there for the next step.

Imports torch and the rooms' tensor side: `inputs`, `model`, `sampler`.
"""

import numpy as np
import torch
from torch import Tensor

from scheduler.messages import Start
from workers.batch import Launched, ResidentBatch
from workers.inputs import build_step
from workers.model import Decoder
from workers.rank import Tokens, row_of
from workers.sampler import Sampled, Sampler


class ModelRunner:
    """The `Executor` that computes. rows: size of the resident batch."""

    def __init__(self, model: Decoder, sampler: Sampler, rows: int, device: torch.device) -> None:
        self._model = model
        self._sampler = sampler
        self._last_tokens = torch.zeros(rows, dtype=torch.int64, device=device)

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

    def release(self, row: int) -> None:
        self._sampler.release(row)

    @torch.inference_mode()
    def execute(self, batch: ResidentBatch, step: Launched) -> "DeviceTokens":
        """Launches the step. Every rank of the group must call it with the same step: the model talks to its peers."""
        samples = np.flatnonzero(step.samples)
        logits = self._model.forward(build_step(batch, step, self._last_tokens))
        if not len(samples):
            return DeviceTokens(step, samples, None)
        rows = step.plan.rows[samples]
        sampled = self._sampler.sample(logits, rows, step.first[samples] + step.plan.counts[samples])
        self._last_tokens[torch.from_numpy(rows).to(self._last_tokens.device)] = sampled.tokens
        return DeviceTokens(step, samples, sampled)


class DeviceTokens:
    """A launched step's tokens; copied to the host without waiting, read when the host commits the step."""

    def __init__(self, step: Launched, samples: "np.typing.NDArray[np.int64]", sampled: Sampled | None) -> None:
        self._size = len(step.plan.rows)
        self._samples = samples
        self._sampled = sampled
        self._host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        if sampled is not None:
            on_gpu = sampled.tokens.is_cuda
            self._host = sampled.tokens.to("cpu", non_blocking=on_gpu)
            if on_gpu:
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record()

    def wait(self) -> Tokens:
        ids = np.zeros(self._size, np.int64)
        if self._host is None or self._sampled is None:
            return Tokens(ids, {})
        if self._copied is not None:
            self._copied.synchronize()
        ids[self._samples] = self._host.numpy()
        return Tokens(ids, {int(self._samples[at]): payload for at, payload in self._sampled.payloads().items()})
